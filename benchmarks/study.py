"""Train the demo's model with every loss of loss.py on the same pairs, and write docs/study.md.

    python benchmarks/study.py                                          # the demo's pairs
    python benchmarks/study.py --data hh.jsonl.gz --jobs 2              # other pairs; two runs at a time
    python benchmarks/study.py --report                                 # only the tables and figures, from finished runs

Every run is `python train.py` with its own --loss, --learning_rate and --seed, and its answers to held-out prompts. Finished
runs are lines of docs/study.jsonl: a study that is started again goes on after them, and the tables are made of nothing else.
Only short pairs take part, so that a run takes minutes on a CPU. The figures need matplotlib (eval/requirements.txt).
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from data import InputError, load_pairs, load_rows, load_tokenizer, parse_row
from eval.generate import generate
from eval.plots import plot
from model import resolve_model
from train import LOSSES

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATES = (3e-5, 1e-4)  # that of recipes/demo.yaml and a larger one
START = ("simper", 1e-12)  # a run that does not move the model: what it logs are the metrics before training
ABLATIONS = ("simper", "simper_sum", "simper_log", "simper_reference")
LIMITS = {"prompt": 96, "response": 48, "heldout": 96}  # tokens of the pairs that take part; pairs that are held out
FLAGS = {"model": "demo", "batch_size": 8, "max_steps": 24, "max_length": 256, "max_prompt_length": 128}
FLAGS |= {"micro_batch_tokens": 1024, "eval_every": 0, "save_every": 0, "wandb": "off"}
PROMPTS, NEW_TOKENS = 32, 48  # held-out prompts that are answered, greedily
LOGGED = ("step", "accuracy", "grad_norm", "pairs_per_second", "peak_memory_gb", "loss")
LOGGED += tuple(f"{name}/{side}" for name in ("logps", "inverse_perplexity") for side in ("chosen", "rejected"))
LOGGED += ("gradient_weight/chosen", "gradient_weight/rejected")
BEGIN, END = "<!-- the tables: written by benchmarks/study.py -->", "<!-- end of the tables -->"


def select_pairs(data: str, folder: Path) -> tuple[str, str, str]:
    """Write the short pairs of `data` to two files, training and held out, no prompt in both → the files and what they hold."""
    tokenizer = load_tokenizer(resolve_model(FLAGS["model"]))
    pairs, _ = load_pairs(data, tokenizer, 4096, 2048)
    sources = {source: load_rows(source) for source in map(str.strip, data.split(","))}
    short = [p <= LIMITS["prompt"] and max(c, r) <= LIMITS["response"] for p, c, r in pairs["lengths"]]
    pairs = pairs.select(np.flatnonzero(short))
    if len(pairs) < LIMITS["heldout"] + FLAGS["batch_size"]:
        raise InputError(f"{data} has only {len(pairs)} pairs within {LIMITS}")
    heldout = range(len(pairs) - LIMITS["heldout"], len(pairs))
    prompts = {tuple(pairs[i]["prompt"]) for i in heldout}
    train = [i for i in range(heldout.start) if tuple(pairs[i]["prompt"]) not in prompts]
    files = []
    for name, indices in (("train", train), ("heldout", heldout)):
        files.append(str(folder / f"{name}.jsonl"))
        with open(files[-1], "w") as file:
            for pair in pairs.select(indices):
                row = sources[pair["source"]][pair["row"]]
                print(json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected") if row.get(key)}), file=file)
    means = np.array(pairs["lengths"]).mean(axis=0)
    return *files, f"{len(train)} pairs, {len(heldout)} held out, mean tokens {means[0]:.0f} + {means[1]:.0f} + {means[2]:.0f}"


def brief(line: dict) -> dict:
    """A line of metrics.jsonl with what the study uses, to five digits."""
    return {key: float(f"{line[key]:.5g}") for key in line if key.removeprefix("eval/") in LOGGED}


def run(loss: str, rate: float, seed: int, train_data: str, heldout: str, folder: Path, threads: int) -> dict:
    """Train, answer, and throw the model away. Returns what is kept of it; {"error": text} if training diverged."""
    output = folder / f"{loss}-{rate:g}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    flags = FLAGS | {"train_data": train_data, "eval_data": heldout, "loss": loss, "learning_rate": rate, "seed": seed}
    command = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(output)]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if not last.startswith("FloatingPointError"):  # not a result, but a run to be made again
            raise RuntimeError(f"{' '.join(command)}: {last}")
        return {"error": last}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(str(output / "final"))
    model = AutoModelForCausalLM.from_pretrained(output / "final").eval()
    prompts = [parse_row(row)[0] for row in load_rows(heldout).select(range(PROMPTS))]
    answers = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=PROMPTS)
    tokens = [len(tokenizer(text, add_special_tokens=False).input_ids) for text, _ in answers]
    shutil.rmtree(output / "final")
    return {
        "before": brief(next(line for line in lines if "eval/loss" in line)),
        "after": brief(lines[-1]),
        "steps": [brief(line) for line in lines if "epoch" in line],
        "answer_tokens": statistics.mean(tokens),
        "finished": statistics.mean(finished for _, finished in answers),
    }


# ---- The report -----------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


COLUMNS = {
    "accuracy": lambda r: (r["after"]["eval/accuracy"], 3),
    "inverse perplexity, chosen": lambda r: (r["after"]["eval/inverse_perplexity/chosen"], 4),
    "rejected": lambda r: (r["after"]["eval/inverse_perplexity/rejected"], 4),
    "margin": lambda r: (
        r["after"]["eval/inverse_perplexity/chosen"] - r["after"]["eval/inverse_perplexity/rejected"],
        4,
    ),
    "change of mean log-prob, chosen": lambda r: (r["after"]["eval/logps/chosen"] - r["before"]["eval/logps/chosen"], 3),
    "of rejected": lambda r: (r["after"]["eval/logps/rejected"] - r["before"]["eval/logps/rejected"], 3),
    "answer tokens": lambda r: (r["answer_tokens"], 1),
    "s/step": lambda r: (
        statistics.median(r["setting"]["flags"]["batch_size"] / line["pairs_per_second"] for line in r["steps"]),
        1,
    ),
    "peak GB": lambda r: (max(line["peak_memory_gb"] for line in r["steps"]), 1),
}


def table(rows: list[tuple[str, float, list[dict]]]) -> str:
    """Markdown: one row for each (loss, learning rate, its runs)."""
    lines = ["| loss | learning rate | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for loss, rate, runs in rows:
        cells = []
        for column in COLUMNS.values():
            values, digits = [column(r)[0] for r in runs], column(runs[0])[1]
            cells.append(spread(values, digits))
        name = "before training" if (loss, rate) == START else loss
        lines.append(f"| {name} | {'–' if rate == START[1] else f'{rate:g}'} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def grouped(results: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """{(loss, learning rate): its finished runs in the order of their seeds}"""
    groups = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        if "error" not in result:
            groups.setdefault((result["loss"], result["learning_rate"]), []).append(result)
    return groups


def chosen_rates(groups: dict) -> dict[str, float]:
    """The learning rate that each loss is compared at: the one with the highest mean accuracy on the held-out pairs, the larger
    margin deciding between equals."""
    best = {}
    for (loss, rate), runs in groups.items():
        if (loss, rate) != START:
            score = tuple(statistics.mean(COLUMNS[name](r)[0] for r in runs) for name in ("accuracy", "margin"))
            best[loss] = max(best.get(loss, (score, rate)), (score, rate))
    return {loss: rate for loss, (_, rate) in best.items()}


def tables(results: list[dict]) -> str:
    """The generated part of docs/study.md."""
    groups = grouped(results)
    rates = chosen_rates(groups)
    start = [(*START, groups[START])] if START in groups else []
    rivals = [(loss, rates[loss], groups[loss, rates[loss]]) for loss in LOSSES if loss in rates]
    ablations = [row for row in rivals if row[0] in ABLATIONS]
    every = [(loss, rate, groups[loss, rate]) for loss in LOSSES for rate in LEARNING_RATES if (loss, rate) in groups]
    failed = [f"{r['loss']} at {r['learning_rate']:g}, seed {r['seed']}: {r['error']}" for r in results if "error" in r]
    setting = results[0]["setting"]
    counts = ", ".join(
        f"{sum(r['learning_rate'] == rate and 'error' not in r for r in results)} at {rate:g}" for rate in LEARNING_RATES
    )
    steps = f"{setting['flags']['max_steps']} steps of {setting['flags']['batch_size']} pairs"
    return "\n\n".join(
        [
            f"{setting['pairs']}; {steps}; {setting['versions']}. Finished runs: {counts}; {len(LOSSES)} losses.",
            *([f"Failed: {'; '.join(failed)}."] if failed else []),
            "### Each loss at its learning rate",
            table(start + [row for row in rivals if row[0] == "simper" or row[0] not in ABLATIONS]),
            "### SimPER without its parts",
            table(ablations),
            "### Every run",
            table(every),
        ]
    )


def figures(results: list[dict], folder: Path) -> None:
    """study-rivals.png, study-ablations.png, study-weights.png: dynamics at each loss's learning rate. Log-probs are of the
    training batches, minus those of the starting model on the same batches, so that batches do not add their noise."""
    groups = grouped(results)
    start = {r["seed"]: r["steps"] for r in groups.get(START, [])}
    curves = {}
    for loss, rate in chosen_rates(groups).items():
        curves[loss] = []
        for result in groups[loss, rate]:
            if result["seed"] in start:
                pairs = zip(result["steps"], start[result["seed"]])
                change = [{f"logps/{s}": a[f"logps/{s}"] - b[f"logps/{s}"] for s in ("chosen", "rejected")} for a, b in pairs]
                curves[loss].append([line | new for line, new in zip(result["steps"], change)])
    panels = {
        "change of mean log-prob, chosen": lambda line: line["logps/chosen"],
        "change of mean log-prob, rejected": lambda line: line["logps/rejected"],
        "change of their margin": lambda line: line["logps/chosen"] - line["logps/rejected"],
    }
    rivals = {loss: runs for loss, runs in curves.items() if runs and (loss == "simper" or loss not in ABLATIONS)}
    plot(rivals, str(folder / "study-rivals.png"), panels)
    plot({loss: curves[loss] for loss in ABLATIONS if curves.get(loss)}, str(folder / "study-ablations.png"), panels)
    weights = {
        "log10 of gradient weight, chosen": lambda line: math.log10(max(line["gradient_weight/chosen"], 1e-6)),
        "log10 of gradient weight, rejected": lambda line: math.log10(max(line["gradient_weight/rejected"], 1e-6)),
    }
    pulls = {loss: curves[loss] for loss in ("simper", "simpo", "dpo") if curves.get(loss)}
    plot(pulls, str(folder / "study-weights.png"), weights)


def report(results: list[dict], page: Path) -> None:
    before, _, rest = (page.read_text() if page.exists() else f"{BEGIN}{END}\n").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.partition(END)[2]}")
    figures(results, page.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/train.jsonl,demo/heldout.jsonl", help="sources as for train.py's --train_data")
    parser.add_argument("--results", default=str(ROOT / "docs" / "study.jsonl"), help="finished runs, one a line")
    parser.add_argument("--page", default=str(ROOT / "docs" / "study.md"), help="page whose tables are written")
    parser.add_argument("--output_dir", default="runs/study", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--report", action="store_true", help="only write the tables and figures")
    args = parser.parse_args()
    path, folder = Path(args.results), Path(args.output_dir).resolve()
    results = read_results(path)
    if not args.report:
        folder.mkdir(parents=True, exist_ok=True)
        train_data, heldout, pairs = select_pairs(args.data, folder)
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        setting = {
            "data": ",".join(Path(source.strip()).name for source in args.data.split(",")),
            "pairs": pairs,
            "limits": LIMITS,
            "flags": FLAGS,
            "versions": versions,
        }
        if results and results[0]["setting"] != setting:
            raise InputError(f"{path} holds runs of another setting, {results[0]['setting']}: choose another --results")
        done = {(r["loss"], r["learning_rate"], r["seed"]) for r in results}
        # All losses at one rate, seed after seed: whatever is finished compares them.
        plan = [(*START, seed) for seed in range(args.seeds)]
        plan += [(loss, rate, seed) for rate, seed, loss in product(LEARNING_RATES, range(args.seeds), args.losses)]
        plan = [entry for entry in plan if entry not in done]
        torch.set_num_threads(threads)
        lock = threading.Lock()

        def work(entry: tuple[str, float, int]) -> None:
            result = dict(zip(("loss", "learning_rate", "seed"), entry))
            result |= {"setting": setting} | run(*entry, train_data, heldout, folder, threads)
            with lock, open(path, "a") as file:
                results.append(result)
                print(json.dumps(result), file=file)
                print(f"{len(results)} finished: {entry}", result.get("error", ""), flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, plan))
    if not results:
        raise InputError(f"{path} holds no finished run")
    report(results, Path(args.page))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
