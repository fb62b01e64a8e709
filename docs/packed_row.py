"""Draw docs/packed_row.png: which tokens of two packed pairs see which, from MicroBatch itself.

python docs/packed_row.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data import pack
from eval.plots import new_figure

SIZES = [(4, 3, 2), (3, 2, 4)]  # tokens of prompt, chosen and rejected
COLORS = {"x": "#0072B2", "w": "#009E73", "l": "#D55E00"}  # as y_w and y_l in the paper


def visible(batch) -> np.ndarray:
    """(T, T) bool: whether the token of a row sees that of a column. Sequences of queries see keys
    so that the last query sees all of them."""
    seen = np.zeros((len(batch.input_ids),) * 2, dtype=bool)
    ends = zip(batch.query_starts[1:].tolist(), batch.key_starts[1:].tolist())
    query, key = 0, 0
    for query_end, key_end in ends:
        keys = batch.keys[key:key_end].tolist()
        for number in range(query, query_end):
            seen[number, keys[: len(keys) - (query_end - number) + 1]] = True
        query, key = query_end, key_end
    return seen


def main() -> None:
    batch = pack([[[0] * n for n in sizes] for sizes in SIZES])
    kinds = "".join("x" * p + "w" * c + "l" * r for p, c, r in SIZES)
    seen = visible(batch)
    with new_figure(Path(__file__).parent / "packed_row.png", [""], (3.3, 3.3)) as (axis,):
        for row, column in np.argwhere(seen):
            place = (column - 0.45, row - 0.45)
            axis.add_patch(square(place, COLORS[kinds[column]]))
        axis.set(xlim=(-0.6, len(kinds) - 0.4), ylim=(len(kinds) - 0.4, -0.6), aspect="equal")
        for set_ticks in (axis.set_xticks, axis.set_yticks):
            set_ticks(range(len(kinds)), kinds, fontsize=8)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_color(COLORS[label.get_text()])
        axis.tick_params(length=0)
        axis.grid(False)
        axis.set_xlabel("is seen", fontsize=8)
        axis.set_ylabel("a token (x: prompt, w: chosen, l: rejected)", fontsize=8)


def square(place: tuple[float, float], color: str):
    from matplotlib.patches import Rectangle

    return Rectangle(place, 0.9, 0.9, color=color, lw=0)


if __name__ == "__main__":
    main()
