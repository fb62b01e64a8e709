"""Figures of training dynamics from the metrics.jsonl of any runs.

    python -m eval.plots runs/demo                                  # writes dynamics.png
    python -m eval.plots runs/simper runs/dpo --output rivals.svg   # one line per run
    python -m eval.plots runs/simper runs/dpo --heldout             # held-out, not training pairs

The paper's view of training: mean log-prob per token of the chosen and of the rejected responses,
the margin between them, and how hard the loss pulls at each side (gradient weights, see
pair_metrics in train.py). Needs matplotlib (eval/requirements.txt).
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data import InputError
from eval.report import make_parser
from runtime import run_command

PANELS = {
    "mean log-prob, chosen": lambda line: line["logps/chosen"],
    "mean log-prob, rejected": lambda line: line["logps/rejected"],
    "margin of mean log-probs": lambda line: line["logps/chosen"] - line["logps/rejected"],
    "gradient weight, chosen": lambda line: line["gradient_weight/chosen"],
    "gradient weight, rejected": lambda line: line["gradient_weight/rejected"],
    "accuracy": lambda line: line["accuracy"],
}


def read_run(run: str, heldout: bool = False) -> list[dict]:
    """The lines of a run's metrics.jsonl (`run` is its folder or the file): those of the training
    steps, or those of the evaluations, without the prefix "eval/". Raises InputError if there are
    none."""
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the output_dir of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if ("epoch" in line) != heldout]
    if not lines:
        kind = "evaluations" if heldout else "training steps"
        raise InputError(f"{path}: holds no metrics of {kind}")
    return [{name.removeprefix("eval/"): value for name, value in line.items()} for line in lines]


@contextmanager
def new_figure(
    path: str | Path,
    titles: list[str],
    panel_size: tuple[float, float] = (4.2, 3.1),
    legend_columns: int = 7,
    projection: str | None = None,
) -> Iterator[list]:
    """One matplotlib axes for each title, at most three in a row, to draw on. When the block ends,
    the figure gets the legend of the first axes and is saved to `path`.

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
    figure = pyplot.figure(figsize=size, layout="constrained")
    for place, title in enumerate(titles, 1):
        axis = figure.add_subplot(rows, columns, place, projection=projection)
        axis.set_title(title, fontsize=10)
    yield figure.axes
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=legend_columns, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot(curves: dict[str, list[list[dict]]], path: str, panels: dict = PANELS) -> None:
    """Draw {label: runs, each a list of metrics} over steps, one panel per entry of `panels`.
    Several runs under one label, such as seeds, are drawn as their mean and the range between the
    smallest and the largest.

    Raises InputError if matplotlib is not installed, or if the runs under a label have different
    steps.
    """
    with new_figure(path, list(panels)) as axes:
        from matplotlib import colormaps

        colors = colormaps["tab10" if len(curves) <= 10 else "tab20"].colors
        for axis, metric in zip(axes, panels.values()):
            for color, (label, runs) in zip(itertools.cycle(colors), curves.items()):
                steps = [line["step"] for line in runs[0]]
                if any([line["step"] for line in run] != steps for run in runs):
                    raise InputError(f"the runs of {label} do not have the same steps")
                values = np.array([[metric(line) for line in run] for run in runs])
                axis.plot(steps, values.mean(axis=0), color=color, label=label, linewidth=1.5)
                if len(runs) > 1:
                    low, high = values.min(axis=0), values.max(axis=0)
                    axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output_dir of a run, or a metrics.jsonl"
    )
    parser.add_argument(
        "--output", default="dynamics.png", help="file to write, .png, .svg or .pdf"
    )
    parser.add_argument(
        "--heldout", action="store_true", help="the evaluations instead of the training steps"
    )
    args = parser.parse_args()
    try:
        plot({run: [read_run(run, args.heldout)] for run in args.runs}, args.output)
    except KeyError as error:
        raise InputError(
            f"a run has no metric {error}: it was logged by an older version"
        ) from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
