"""Figures of training dynamics from the metrics.jsonl of any runs.

    python -m eval.plots runs/demo                                   # writes dynamics.png
    python -m eval.plots runs/simper runs/dpo --output rivals.svg    # one line per run
    python -m eval.plots runs/simper runs/dpo --heldout              # the held-out pairs instead of the training batches

The paper's view of training: mean log-prob per token of the chosen and of the rejected responses, the margin between them, and
how hard the loss pulls at each side (gradient weights, see train.py's pair_losses). Needs matplotlib: eval/requirements.txt.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from data import InputError

PANELS = {
    "mean log-prob, chosen": lambda line: line["logps/chosen"],
    "mean log-prob, rejected": lambda line: line["logps/rejected"],
    "margin of mean log-probs": lambda line: line["logps/chosen"] - line["logps/rejected"],
    "gradient weight, chosen": lambda line: line["gradient_weight/chosen"],
    "gradient weight, rejected": lambda line: line["gradient_weight/rejected"],
    "accuracy": lambda line: line["accuracy"],
}


def read_run(run: str, heldout: bool = False) -> list[dict]:
    """The lines of a run's metrics.jsonl (`run` is its folder or the file), of the training steps or of the evaluations, these
    without the prefix "eval/". Raises InputError if there are none."""
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the output_dir of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if ("epoch" in line) != heldout]
    if not lines:
        raise InputError(f"{path}: holds no metrics of {'evaluations' if heldout else 'training steps'}")
    return [{name.removeprefix("eval/"): value for name, value in line.items()} for line in lines]


def plot(curves: dict[str, list[list[dict]]], path: str, panels: dict = PANELS) -> None:
    """Draw {label: runs, each a list of metrics} over steps, one panel per entry of `panels`. Several runs
    under one label, such as seeds, are drawn as their mean and the range between the least and the largest.

    Raises InputError if matplotlib is not installed, or if the runs under a label have other steps.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install -r eval/requirements.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    colors = pyplot.get_cmap("tab10" if len(curves) <= 10 else "tab20").colors
    for axis, (name, metric) in zip(axes.flat, panels.items()):
        for color, (label, runs) in zip(itertools.cycle(colors), curves.items()):
            steps = [line["step"] for line in runs[0]]
            if any([line["step"] for line in run] != steps for run in runs):
                raise InputError(f"the runs of {label} have not the same steps")
            values = np.array([[metric(line) for line in run] for run in runs])
            axis.plot(steps, values.mean(axis=0), color=color, label=label, linewidth=1.5)
            if len(runs) > 1:
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(curves), 7), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a metrics.jsonl")
    parser.add_argument("--output", default="dynamics.png", help="file to write; its name decides the format (.png .svg .pdf)")
    parser.add_argument("--heldout", action="store_true", help="the evaluations instead of the training steps")
    args = parser.parse_args()
    try:
        plot({run: [read_run(run, args.heldout)] for run in args.runs}, args.output)
    except KeyError as missing:
        raise InputError(f"a run has no metric {missing}: it was logged by an older version") from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
