"""Figures of training dynamics from the metrics.jsonl of any runs.

    python -m eval.plots runs/demo                                  # writes dynamics.png
    python -m eval.plots runs/simper runs/dpo --output rivals.svg   # one line per run
    python -m eval.plots runs/simper runs/dpo --heldout             # held-out, not training pairs
    python -m eval.plots runs/dpo --label SimPER='runs/simper-*'    # several seeds, one line

The paper's view of training: mean log-prob per token of the chosen and of the rejected responses,
the margin between them, and how hard the loss pulls at each side (gradient weights, see
pair_metrics in train.py). The metrics of training batches are noisy: a line is their moving average
over --smooth lines, and they themselves are pale behind it. Several runs of one label are their
mean and, as a band, the range between the smallest and the largest. Held-out points of a single run
have 95 % intervals over the pairs. A .png is written with a .pdf beside it. Needs matplotlib
(eval/requirements.txt).
"""

import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from eval.results import at_least, make_parser, matching
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.intervals import t_quantile
from runtime.log import read_lines

# A loss has one color everywhere: those of Okabe and Ito (2008), which the color-blind can tell
# apart; what is no loss, or none of these, gets one of matplotlib's.
COLORS = {
    "simper": "#D55E00",
    "dpo": "#0072B2",
    "simpo": "#009E73",
    "kto": "#CC79A7",
    "sft": "#000000",
    "ipo": "#56B4E9",
    "orpo": "#E69F00",
}
OTHER_COLORS = ("#882255", "#44AA99", "#999933", "#332288", "#8C564B", "#666666")
PALE = "#BBBBBB"
# Readable where a figure is as wide as a column of text, 3.3 inches, or three panels as a page.
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text that can be searched
}
DIRECT, BESIDE = 8, 24  # labels, and their characters, that find room beside a panel, not below
METRICS = {
    "mean log-prob (nats), chosen": "logps/chosen",
    "mean log-prob (nats), rejected": "logps/rejected",
    "margin of mean log-probs (nats)": "logps/margin",
    "gradient weight, chosen": "gradient_weight/chosen",
    "gradient weight, rejected": "gradient_weight/rejected",
    "accuracy": "accuracy",
}
PANELS = {title: operator.itemgetter(name) for title, name in METRICS.items()}


def read_run(run: str, heldout: bool = False) -> list[dict]:
    """The lines of a run's metrics.jsonl (`run` is its folder or the file): those of the training
    steps, or those of the evaluations, without the prefix "eval/". Raises InputError if there are
    none."""
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the output_dir of a run")
    lines = [line for line in read_lines(path) if ("epoch" in line) != heldout]
    if not lines:
        kind = "evaluations" if heldout else "training steps"
        raise InputError(f"{path}: holds no metrics of {kind}")
    return [{name.removeprefix("eval/"): value for name, value in line.items()} for line in lines]


@contextmanager
def new_figure(
    path: str | Path, titles: list[str], panel_size: tuple[float, float] = (2.4, 2.2)
) -> Iterator[list]:
    """One matplotlib axes for each title, at most three in a row, to draw on. When the block ends,
    the figure gets a legend of all labels and is saved to `path`, a .png also as a .pdf.

    panel_size: width and height of each panel in inches. Raises InputError if matplotlib is not
    installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "matplotlib is not installed (pip install -r eval/requirements.txt)"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    size = (panel_size[0] * columns, panel_size[1] * rows)
    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=size, layout="constrained")
        for place, title in enumerate(titles, 1):
            figure.add_subplot(rows, columns, place).set_title(title)
        yield figure.axes
        handles = {}
        for axis in figure.axes:
            of_axis, labels = axis.get_legend_handles_labels()
            handles |= dict(zip(labels, of_axis))
        longest = max(map(len, handles), default=0)
        per_row = max(1, int(size[0] * 15 / (longest + 8)))  # fifteen characters an inch
        where = {"loc": "outside lower center", "ncols": per_row}
        if handles:
            figure.set_size_inches(size[0], size[1] + 0.17 * -(-len(handles) // per_row))
            figure.legend(handles.values(), handles.keys(), **where)
        figure.savefig(path)
        if Path(path).suffix == ".png":
            figure.savefig(Path(path).with_suffix(".pdf"))
        pyplot.close(figure)


def line_styles(labels: Iterable[str], pale: Iterable[str] = ()) -> dict[str, dict]:
    """{label: matplotlib's style of its line}: the color of the loss that its name begins with,
    dashed for the second label with that color; SimPER's wide, and above the others; those of
    `pale` thin and gray, below."""
    styles, seen, others = {}, {}, itertools.cycle(OTHER_COLORS)
    for label in labels:
        loss = re.split(r"[\s-]", Path(label).name.lower())[0]
        color = COLORS.get(loss) or next(others)
        dashes = ("-", "--", ":", "-.")[seen.setdefault(color, 0) % 4]
        seen[color] += 1
        styles[label] = {"color": color, "linestyle": dashes, "linewidth": 1.2, "zorder": 2.2}
        if loss == "simper":
            styles[label] |= {"linewidth": 2.2, "zorder": 2.4}
        if label in pale:
            styles[label] = {"color": PALE, "linewidth": 0.8, "zorder": 2.1}
    return styles


def label_lines(axis, ends: dict[str, tuple[float, str]]) -> None:
    """Write {label: (y, color)} beside the right edge of an axes, each as near to its y as the
    others allow. To be called when all is drawn and the axes have their limits."""
    axis.figure.canvas.draw()  # gives the axes their height
    height, gap = axis.bbox.height, axis.figure.dpi * 9.5 / 72  # pixels; a line of text
    wanted = sorted((axis.transData.transform((1, y))[1], label) for label, (y, _) in ends.items())
    places = []
    for pixel, _ in wanted:
        bottom = axis.bbox.y0 if not places else places[-1] + gap
        places.append(max(pixel, bottom))
    top = axis.bbox.y1
    for index in reversed(range(len(places))):
        places[index] = min(places[index], top)
        top = places[index] - gap
    for place, (_, label) in zip(places, wanted):
        y = (place - axis.bbox.y0) / height
        where = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axis.annotate(label, (1.03, y), color=ends[label][1], fontsize=7, **where)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and of those up to window // 2 before and after it, fewer at the ends.

    >>> moving_average(np.array([1.0, 4.0, 1.0, 1.0]), 3)
    array([2.5, 2. , 2. , 1. ])
    """
    half, sums = window // 2, np.concatenate([[0.0], np.cumsum(values)])
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    starts = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def half_interval(line: dict, name: str) -> float:
    """Half of the 95 % interval of a metric in a line of an evaluation; NaN where none is known."""
    error = line.get(f"standard_error/{name}")
    return t_quantile(line["pairs"] - 1) * error if error else math.nan


def plot(
    curves: dict[str, list[list[dict]]],
    path: str,
    panels: dict = PANELS,
    window: int = 1,
    x: str = "step",
    pale: Iterable[str] = (),
) -> None:
    """Draw {label: runs, each a list of metrics} over `x`, a key of the metrics, the learning rate
    on a scale of logarithms; one panel per entry of `panels`.

    Several runs under one label, such as seeds, are drawn as their mean and the range between the
    smallest and the largest. window: of the moving average of the mean, behind which the mean
    itself is pale. Panels whose titles are the same up to a comma have the same scale. The labels
    stand beside the last panel of each row, or below where they are many or long; those of `pale`,
    drawn thin and gray, nowhere.

    Raises InputError if matplotlib is not installed, or if the runs under a label have different
    values of x.
    """
    styles = line_styles(curves, pale)
    named = [label for label in curves if label not in pale]
    beside = len(named) <= DIRECT and max(map(len, named), default=0) <= BESIDE
    with new_figure(path, list(panels)) as axes:
        ends = {}
        for axis, (title, metric) in zip(axes, panels.items()):
            ends[axis] = {}
            for label, runs in curves.items():
                style, color = styles[label], styles[label]["color"]
                xs = [line[x] for line in runs[0]]
                if any([line[x] for line in run] != xs for run in runs):
                    raise InputError(f"the runs of {label} do not have the same values of {x}")
                values = np.array([[metric(line) for line in run] for run in runs])
                mean = values.mean(axis=0)
                smooth = moving_average(mean, window)
                key = {"label": label} if label in named and not beside else {}
                axis.plot(xs, smooth, **style, **key)
                if label in named:
                    ends[axis][label] = (smooth[-1], color)
                    if window > 1:
                        axis.plot(xs, mean, color=color, alpha=0.25, linewidth=0.6, zorder=1)
                    if len(runs) == 1 and title in METRICS and "pairs" in runs[0][0]:
                        bars = [half_interval(line, METRICS[title]) for line in runs[0]]
                        bar = {"elinewidth": 0.8, "capsize": 1.5, "alpha": 0.6}
                        axis.errorbar(xs, mean, bars, fmt="none", color=color, **bar)
                    if len(runs) > 1:
                        low, high = values.min(axis=0), values.max(axis=0)
                        axis.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)
            axis.set_xlabel(x.replace("_", " "))
            if x == "step":
                axis.xaxis.get_major_locator().set_params(integer=True)
            if x == "learning_rate":
                axis.set_xscale("log")
                rates = sorted({line[x] for runs in curves.values() for line in runs[0]})
                axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
                axis.minorticks_off()
        for axis, title in zip(axes, panels):
            same = [a for a, t in zip(axes, panels) if t.split(",")[0] == title.split(",")[0]]
            low, high = zip(*(a.get_ylim() for a in same))
            axis.set_ylim(min(low), max(high))
        if beside:
            for number, axis in enumerate(axes, 1):
                if number % 3 == 0 or number == len(axes):
                    label_lines(axis, ends[axis])


def main() -> None:
    parser = make_parser(__doc__, "--label")
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="output_dir of a run, or a metrics.jsonl"
    )
    parser.add_argument(
        "--output", default="dynamics.png", help="file to write, .png, .svg or .pdf"
    )
    parser.add_argument(
        "--heldout", action="store_true", help="the evaluations instead of the training steps"
    )
    parser.add_argument(
        "--smooth", type=at_least(1), help="lines of metrics; by default a tenth. 1: not at all"
    )
    args = parser.parse_args()
    if Path(args.output).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output {args.output}: its name must end with .png, .svg or .pdf")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    groups, labels = {run: [run] for run in args.runs}, matching(args.label)
    if both := groups.keys() & labels.keys():
        raise InputError(f"--label {min(both)}: a run has that name, too")
    groups |= labels
    curves = {n: [read_run(run, args.heldout) for run in g] for n, g in groups.items()}
    if not curves:
        raise InputError("give the folders of runs, or --label NAME=PATTERN")
    window = 1 if args.heldout else max(len(runs[0]) for runs in curves.values()) // 10
    lines = [line for runs in curves.values() for run in runs for line in run]
    # Of rows with one response, there are no metrics of the rejected.
    lacking = [name for name in METRICS.values() if any(name not in line for line in lines)]
    panels = {title: f for title, f in PANELS.items() if METRICS[title] not in lacking}
    if lacking:
        print(f"not in all runs, and left out: {', '.join(lacking)}")
    if not panels:
        raise InputError("the runs have none of the figure's metrics")
    plot(curves, args.output, panels, window=args.smooth or window or 1)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
