"""Held-out preference pairs under one or several models, through the packed forward of training.

    python -m eval.preference demo runs/demo/final --data demo/heldout.jsonl

Prints the models side by side and writes, for each, OUTPUT_DIR/MODEL/preference.json and, pair by pair,
preference_pairs.jsonl; with matplotlib also the paper's figure, the density of the inverse perplexity of chosen and rejected
responses under each model: OUTPUT_DIR/preference.png. One process, on a GPU if there is one.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import InputError, load_pairs, load_rows, load_tokenizer, pack_rows, split
from eval.generate import short_name
from eval.report import file_sha256, write_result
from loss import sum_logps
from model import load_model, resolve_model


@torch.no_grad()
def pair_logps(name: str, pairs, micro_batch_tokens: int) -> np.ndarray:
    """log p(response | prompt) of every pair of load_pairs under the model: (pairs, 2) float64, chosen and rejected. In
    bfloat16 on GPUs, in float32 on CPU. Needs a process group of one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs["lengths"])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(resolve_model(name), device, dtype, longest=longest)
    sums = np.empty((len(pairs), 2))
    tokens = [sum(lengths) for lengths in pairs["lengths"]]
    for (share,) in tqdm(split(tokens, 1, micro_batch_tokens), desc=short_name(name), unit="micro-batch", dynamic_ncols=True):
        batch = pack_rows(pairs, share).to(device)
        sums[share] = sum_logps(model(batch).double(), batch.lengths).cpu().numpy()
    return sums


def score(sums: np.ndarray, lengths: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Summed log-probs (pairs, 2) and lengths (pairs, 2) → scores, and the standard errors of some of them.

    accuracy: share of pairs whose chosen response has the higher mean log-prob; accuracy_sum: the higher summed log-prob.
    inverse_perplexity, logps (per token) and length: means over the pairs.
    """
    means = sums / lengths
    inverse = np.exp(means)
    values = {"accuracy": means[:, 0] > means[:, 1], "accuracy_sum": sums[:, 0] > sums[:, 1]}
    for side, name in enumerate(("chosen", "rejected")):
        values |= {f"inverse_perplexity/{name}": inverse[:, side], f"logps/{name}": means[:, side]}
        values |= {f"length/{name}": lengths[:, side]}
    values["inverse_perplexity/margin"] = inverse[:, 0] - inverse[:, 1]
    values["logps/margin"] = means[:, 0] - means[:, 1]
    errors = {name: float(np.std(value, ddof=1)) / math.sqrt(len(sums)) for name, value in values.items() if len(sums) > 1}
    return {name: float(np.mean(value)) for name, value in values.items()} | {"pairs": len(sums)}, errors


def density_figure(inverse: dict[str, np.ndarray], path: Path) -> None:
    """Histograms, as densities, of the inverse perplexities {model: (pairs, 2)}: chosen, rejected, and their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    views = {"chosen": lambda p: p[:, 0], "rejected": lambda p: p[:, 1], "margin": lambda p: p[:, 0] - p[:, 1]}
    for axis, (title, view) in zip(axes, views.items()):
        shown = {name: view(values) for name, values in inverse.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(shown.values())), bins="fd")
        for name, values in shown.items():
            axis.hist(values, bins=edges, density=True, histtype="step", linewidth=1.5, label=name)
        axis.set_title(f"inverse perplexity, {title}", fontsize=10)
        axis.set_ylabel("density")
        axis.grid(alpha=0.3)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids; 'demo' is the demo's base model")
    parser.add_argument("--data", default="demo/heldout.jsonl", help="sources of pairs, as for train.py's --eval_data")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--max_prompt_length", type=int, default=1800)
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--wandb", choices=["off", "online", "offline"], default="off")
    args = parser.parse_args()

    sources = [source.strip() for source in args.data.strip(" ,").split(",")]
    rows = {source: load_rows(source) for source in sources}
    hashes = {source: file_sha256(source) for source in sources if Path(source).is_file()}
    names = [short_name(name) for name in args.models]
    if len(set(names)) < len(names):
        raise InputError(f"two models have the same name: {', '.join(names)}; results are kept by name")
    # Every model's input is looked at before the first one is run.
    limits = (args.max_length, args.max_prompt_length)
    loaded = [load_pairs(args.data, load_tokenizer(resolve_model(model)), *limits) for model in args.models]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    columns, inverse = {}, {}
    for model, name, (pairs, report) in zip(args.models, names, loaded):
        print(f"{name}: {report}")
        sums, lengths = pair_logps(model, pairs, args.micro_batch_tokens), np.array(pairs["lengths"])[:, 1:]
        scores, errors = score(sums, lengths)
        places = list(zip(pairs["source"], pairs["row"]))
        categories = np.array([str(rows[source][row].get("category", "")) for source, row in places])
        for category in sorted({*categories} - {""}):
            here = categories == category
            scores[f"accuracy/{category}"] = score(sums[here], lengths[here])[0]["accuracy"]
        folder = Path(args.output_dir) / name
        settings = {
            "data": args.data,
            "max_length": args.max_length,
            "max_prompt_length": args.max_prompt_length,
            "pairs": report,
        }
        write_result(folder, "preference", model, scores, errors, settings, hashes, wandb_mode=args.wandb)
        with open(folder / "preference_pairs.jsonl", "w") as file:
            for (source, row), logps, length in zip(places, sums.tolist(), lengths.tolist()):
                print(json.dumps({"source": source, "row": row, "logps": logps, "lengths": length}), file=file)
        columns[name], inverse[name] = (scores, errors), np.exp(sums / lengths)
    dist.destroy_process_group()
    width = max(len(key) for values, _ in columns.values() for key in values) + 2
    print(f"{'':<{width}}" + "".join(f"{name[-26:]:>28}" for name in names))
    for key in dict.fromkeys(key for values, _ in columns.values() for key in values):
        cells = []
        for values, errors in columns.values():
            error = f" ± {errors[key]:.4f}" if key in errors else ""
            cells.append(f"{values[key]:.4f}{error}" if key in values else "–")
        print(f"{key:<{width}}" + "".join(f"{cell:>28}" for cell in cells))
    try:
        density_figure(inverse, Path(args.output_dir) / "preference.png")
        print(f"figure: {Path(args.output_dir) / 'preference.png'}")
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -r eval/requirements.txt)")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
