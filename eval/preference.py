"""Held-out preference pairs under one or several models, through the packed forward of training.

    python -m eval.preference demo runs/demo/final --data demo/heldout.jsonl
    python -m eval.preference runs/dpo/final --reference demo --data demo/heldout.jsonl

Prints the models side by side. With --reference, also by the implicit reward of DPO and its kin:
the log-prob of a response minus that under the model that training started from. Rows with a column
`category` or, as RewardBench's, `subset` also give an accuracy for each.

Writes, for each model, OUTPUT_DIR/MODEL/preference.json and, pair by pair, preference_pairs.jsonl;
with matplotlib also a figure, the distributions of the inverse perplexity of chosen and rejected
responses under each model: OUTPUT_DIR/preference.png and .pdf. Runs as one process, on a GPU if
there is one.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import DataSet, load_data
from eval.generate import short_name
from eval.plots import line_styles, new_figure
from eval.results import (
    by_item,
    file_sha256,
    make_parser,
    print_scores,
    say_repeated,
    write_result,
)
from model import load_model
from runtime.checks import choose_forward
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.processes import choose_dtype
from runtime.reference import response_logps
from runtime.rows import load_rows, split_share, split_sources
from runtime.weights import load_tokenizer, resolve_model


def load_pairs(source: str, model: str, template_args: str = "", **options) -> DataSet:
    """The pairs of the sources, tokenized for the model. options: of load_data. Raises InputError
    if the rows do not have two responses each."""
    tokenizer = load_tokenizer(resolve_model(model), "", template_args)
    data = load_data(source, tokenizer, **options)
    if data.responses != 2:
        raise InputError(f"{source}: {data.responses} responses to a prompt; pairs have two")
    return data


def own_dtype() -> tuple[torch.device, torch.dtype]:
    """Where and in which dtype models are computed: bfloat16 on a GPU, float32 on CPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, choose_dtype("auto", device)


def pair_logps(name: str, data: DataSet, micro_batch_tokens: int) -> np.ndarray:
    """log p(response | prompt) of every pair under the model: (pairs, 2) float64, chosen and
    rejected. In bfloat16 on GPUs, in float32 on CPU. Needs a process group of one."""
    model = load_model(resolve_model(name), *own_dtype())
    choose_forward(model, data, None)
    micro_batches = data.spread(range(len(data.rows)), 1, micro_batch_tokens)
    return response_logps(model, data, micro_batches).cpu().numpy()


def score(
    sums: np.ndarray, lengths: np.ndarray, reference: np.ndarray | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Summed log-probs (pairs, 2) and lengths (pairs, 2) → scores, and the standard errors of some
    of them. reference: the summed log-probs under a reference model.

    accuracy: share of pairs whose chosen response has the higher mean log-prob; accuracy_sum: the
    higher summed log-prob; accuracy_implicit: the higher implicit reward (DPO, equation 5, where β
    and the prompt's term do not matter), whose margin over β is given in nats. inverse_perplexity,
    logps (per token) and length: means over the pairs.
    """
    values = pair_values(sums, lengths, reference)
    scores = {name: float(np.mean(value)) for name, value in values.items()}
    errors = {}
    if len(sums) > 1:
        root = math.sqrt(len(sums))
        errors = {name: float(np.std(value, ddof=1)) / root for name, value in values.items()}
    return scores | {"pairs": len(sums)}, errors


def pair_values(
    sums: np.ndarray, lengths: np.ndarray, reference: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The values whose means `score` gives: {name: (pairs,)}."""
    means = sums / lengths
    inverse = np.exp(means)
    values = {"accuracy": means[:, 0] > means[:, 1], "accuracy_sum": sums[:, 0] > sums[:, 1]}
    if reference is not None and not np.array_equal(sums, reference):  # not the reference itself
        rewards = sums - reference
        values["accuracy_implicit"] = rewards[:, 0] > rewards[:, 1]
        values["implicit_reward/margin"] = rewards[:, 0] - rewards[:, 1]
    for side, name in enumerate(("chosen", "rejected")):
        values[f"inverse_perplexity/{name}"] = inverse[:, side]
        values[f"logps/{name}"] = means[:, side]
        values[f"length/{name}"] = lengths[:, side]
    values["inverse_perplexity/margin"] = inverse[:, 0] - inverse[:, 1]
    values["logps/margin"] = means[:, 0] - means[:, 1]
    return values


def distribution_figure(inverse: dict[str, np.ndarray], path: Path) -> None:
    """The distributions of the inverse perplexities {model: (pairs, 2)}: chosen, rejected, and
    their difference; a row for each model, with the density, the middle half as a bar and the
    median as a point. Raises InputError if matplotlib is not installed."""
    views = {
        "chosen": lambda p: p[:, 0],
        "rejected": lambda p: p[:, 1],
        "chosen − rejected": lambda p: p[:, 0] - p[:, 1],
    }
    colors = [style["color"] for style in line_styles(inverse).values()]
    with new_figure(path, list(views), (2.4, 0.9 + 0.4 * len(inverse))) as axes:
        for axis, view in zip(axes, views.values()):
            for place, (color, pairs) in enumerate(zip(colors, inverse.values())):
                values = view(pairs)
                if np.ptp(values) > 0:  # a density needs two values
                    parts = axis.violinplot(
                        values, [place], orientation="horizontal", widths=0.9, showextrema=False
                    )
                    parts["bodies"][0].set(facecolor=color, alpha=0.35, linewidth=0)
                low, middle, high = np.percentile(values, (25, 50, 75))
                axis.plot([low, high], [place, place], color=color, linewidth=2.5)
                axis.plot(middle, place, "o", color=color, markersize=4, markeredgecolor="white")
            axis.set(xlabel="inverse perplexity", ylim=(len(inverse) - 0.4, -0.6))
            axis.set_yticks(range(len(inverse)), inverse if axis is axes[0] else [])
        axes[2].axvline(0, color="black", linewidth=0.7)
        highest = max(axis.get_xlim()[1] for axis in axes[:2])
        for axis in axes[:2]:
            axis.set_xlim(0, highest)


def main() -> None:
    parser = make_parser(__doc__, "--columns", "--template_args", "--output_dir", "--wandb")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folders or hub ids; 'demo' is the demo's base model",
    )
    parser.add_argument(
        "--data",
        default="demo/heldout.jsonl",
        help="sources of pairs, as for train.py's --eval_data",
    )
    parser.add_argument("--reference", default="", metavar="MODEL", help="for implicit rewards")
    parser.add_argument("--max_length", type=int, default=2048, help="as for train.py")
    parser.add_argument("--max_prompt_length", type=int, default=1800, help="as for train.py")
    parser.add_argument("--truncation", default="fit", help="as for train.py")
    parser.add_argument("--micro_batch_tokens", type=int, default=8192, help="as for train.py")
    args = parser.parse_args()

    sources = [split_share(source)[0] for source in split_sources(args.data)]
    rows = {source: load_rows(source) for source in sources}
    # Of other sources than files, what names their content in the cache.
    hashes = {
        source: file_sha256(source) if Path(source).is_file() else rows[source]._fingerprint
        for source in sources
    }
    names = [short_name(model) for model in args.models]
    if len(set(names)) < len(names):
        raise InputError(
            f"two models have the same name: {', '.join(names)}; results are kept by name"
        )
    how = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
    how |= {"truncation": args.truncation, "columns": args.columns}
    how |= {"template_args": args.template_args}
    # The pairs of all models are tokenized before the first model runs, so that errors come early.
    inputs = [load_pairs(args.data, model, **how) for model in args.models]
    if args.reference:
        reference_pairs = load_pairs(args.data, args.reference, **how)
        for model, pairs in zip(args.models, inputs):
            if pairs.fingerprint != reference_pairs.fingerprint:
                raise InputError(f"{model} and the reference {args.reference} read other tokens")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    settings = {"data": args.data, **how, "reference": args.reference}
    settings["dtype"] = str(own_dtype()[1]).removeprefix("torch.")
    columns, inverse, items, seen, reference = {}, {}, [], [], None
    if args.reference:
        reference = pair_logps(args.reference, reference_pairs, args.micro_batch_tokens)
    for model, name, pairs in zip(args.models, names, inputs):
        print(f"{name}: {pairs.report}")
        sums = pair_logps(model, pairs, args.micro_batch_tokens)
        lengths = pairs.lengths[:, 1:]
        scores, errors = score(sums, lengths, reference)
        places = list(zip(pairs.rows["source"], pairs.rows["row"]))
        of_rows = [rows[source][row] for source, row in places]
        categories = [str(row.get("category") or row.get("subset") or "") for row in of_rows]
        for category in sorted({*categories} - {""}):
            of_category = np.array(categories) == category
            own = None if reference is None else reference[of_category]
            found = score(sums[of_category], lengths[of_category], own)
            for values, more in zip((scores, errors), found):
                for kind in {"accuracy", "accuracy_implicit"} & more.keys():
                    values[f"{kind}/{category}"] = more[kind]
        folder, of_pairs = Path(args.output_dir) / name, pair_values(sums, lengths, reference)
        implicit = {key: of_pairs.pop(key) for key in [*of_pairs] if "implicit" in key}
        write_result(
            folder,
            "preference",
            model,
            scores,
            errors=errors,
            settings=settings | {"pairs": pairs.report, "tokens_sha256": pairs.fingerprint},
            inputs=hashes,
            wandb_mode=args.wandb,
            items=by_item(of_pairs, [*hashes.values(), args.columns, *places])
            | by_item(implicit, [*hashes.values(), args.columns, args.reference, *places]),
        )
        with open(folder / "preference_pairs.jsonl", "w") as file:
            for (source, row), logps, length in zip(places, sums.tolist(), lengths.tolist()):
                line = {"source": source, "row": row, "logps": logps, "lengths": length}
                print(json.dumps(line), file=file)
        columns[name], inverse[name] = (scores, errors), np.exp(sums / lengths)
        values = of_pairs | implicit
        if pairs.fingerprint != inputs[0].fingerprint:
            print(f"{name} reads other tokens than {names[0]}: only accuracies are compared")
            values = {key: value for key, value in values.items() if "accuracy" in key}
        items.append(values)
        seen.append(places)
    dist.destroy_process_group()
    say_repeated([prompt for prompt, *_ in inputs[0].rows["hashes"]])
    same = all(places == seen[0] for places in seen)  # a tokenizer may have led to drop some
    print_scores([(name, *values) for name, values in columns.items()], items if same else None)
    figure = Path(args.output_dir) / "preference.png"
    try:
        distribution_figure(inverse, figure)
        print(f"figure: {figure}")
    except InputError as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    run_command(main)
