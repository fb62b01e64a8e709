"""Train the demo's model with every loss of loss.py on the same pairs, and write docs/study.md.

    python benchmarks/study.py                                   # the demo's pairs
    python benchmarks/study.py --data hh.jsonl.gz --jobs 2       # other pairs; two runs at a time
    python benchmarks/study.py --report                          # only the tables and figures

Every run is `python train.py` with its own --loss, --learning_rate and --seed, followed by answers
to held-out prompts. Finished runs are lines of docs/study.jsonl, and the tables and figures are
made from these lines alone. A study that is started again continues after them. Only short pairs
are used, so that a run takes minutes on a CPU. The figures need matplotlib (eval/requirements.txt).
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

from data import COLUMNS, InputError, load_pairs, load_rows, load_tokenizer, parse_row
from demo.smollm2 import resolve_model
from eval.generate import generate
from eval.plots import plot
from loss import LOSSES
from runtime import run_command

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATES = (3e-5, 1e-4)  # that of recipes/demo.yaml and a larger one
# A run that does not change the model: what it logs are the metrics before training.
START = ("simper", 1e-12)
ABLATIONS = ("simper", "simper_sum", "simper_log", "simper_reference")
# The most tokens that a prompt or a response may have, and the number of held-out pairs.
LIMITS = {"prompt": 96, "response": 48, "heldout": 96}
FLAGS = {"model": "demo", "batch_size": 8, "max_steps": 24, "max_length": 256}
FLAGS |= {"max_prompt_length": 128, "micro_batch_tokens": 1024}
FLAGS |= {"eval_every": 0, "save_every": 0, "wandb": "off"}
PROMPTS, NEW_TOKENS = 32, 48  # held-out prompts that are answered, greedily
SIDES = ("chosen", "rejected")
LOGGED = {"step", "accuracy", "grad_norm", "pairs_per_second", "peak_memory_gb", "loss"}
LOGGED |= {f"{name}/{side}" for name in ("logps", "inverse_perplexity") for side in SIDES}
LOGGED |= {f"gradient_weight/{side}" for side in SIDES}
BEGIN, END = "<!-- the tables: written by benchmarks/study.py -->", "<!-- end of the tables -->"


def select_pairs(data: str, folder: Path) -> tuple[str, str, str]:
    """Write the short pairs of `data` to two files that have no prompt in common: (training file,
    held-out file, description of both)."""
    tokenizer = load_tokenizer(resolve_model(FLAGS["model"]))
    pairs, _ = load_pairs(data, tokenizer, max_length=4096, max_prompt_length=2048)
    short = [
        p <= LIMITS["prompt"] and max(c, r) <= LIMITS["response"] for p, c, r in pairs["lengths"]
    ]
    pairs = pairs.select(np.flatnonzero(short))
    if len(pairs) < LIMITS["heldout"] + FLAGS["batch_size"]:
        raise InputError(f"{data} has only {len(pairs)} pairs within {LIMITS}")
    heldout = range(len(pairs) - LIMITS["heldout"], len(pairs))
    prompts = {tuple(pairs[i]["prompt"]) for i in heldout}
    train = [i for i in range(heldout.start) if tuple(pairs[i]["prompt"]) not in prompts]
    train_file, heldout_file = folder / "train.jsonl", folder / "heldout.jsonl"
    rows = {source: load_rows(source) for source in map(str.strip, data.split(","))}
    for path, indices in ((train_file, train), (heldout_file, heldout)):
        with open(path, "w") as file:
            for pair in pairs.select(indices):
                row = rows[pair["source"]][pair["row"]]
                row = {column: row[column] for column in COLUMNS if row.get(column)}
                print(json.dumps(row), file=file)
    prompt, chosen, rejected = np.array(pairs["lengths"]).mean(axis=0)
    description = (
        f"{len(train)} pairs, {len(heldout)} held out, "
        f"mean tokens {prompt:.0f} + {chosen:.0f} + {rejected:.0f}"
    )
    return str(train_file), str(heldout_file), description


def shorten(line: dict) -> dict:
    """What the study uses of a line of metrics.jsonl, to five digits."""
    return {key: float(f"{line[key]:.5g}") for key in line if key.removeprefix("eval/") in LOGGED}


def run(flags: dict, output: Path, threads: int) -> dict:
    """Train with `flags`, answer held-out prompts, and delete the model. Returns what the study
    keeps of the run; {"error": text} if training diverged."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py")]
    command += [f"--{name}={value}" for name, value in (flags | {"output_dir": output}).items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if not last.startswith("FloatingPointError"):  # no result: the run must be repeated
            raise RuntimeError(f"{' '.join(command)}: {last}")
        return {"error": last}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(str(output / "final"))
    model = AutoModelForCausalLM.from_pretrained(output / "final").eval()
    prompts = [parse_row(row)[0] for row in load_rows(flags["eval_data"]).select(range(PROMPTS))]
    answers = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=PROMPTS)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text, _ in answers]
    shutil.rmtree(output / "final")
    return {
        "before": shorten(next(line for line in lines if "eval/loss" in line)),
        "after": shorten(lines[-1]),
        "steps": [shorten(line) for line in lines if "epoch" in line],
        "answer_tokens": statistics.mean(lengths),
        "finished": statistics.mean(finished for _, finished in answers),
    }


# ---- The report ----------------------------------------------------------------------------------


def inverse_perplexity(result: dict, side: str) -> float:
    return result["after"][f"eval/inverse_perplexity/{side}"]


def margin(result: dict) -> float:
    return inverse_perplexity(result, "chosen") - inverse_perplexity(result, "rejected")


def logp_change(result: dict, side: str) -> float:
    return result["after"][f"eval/logps/{side}"] - result["before"][f"eval/logps/{side}"]


def seconds_per_step(result: dict) -> float:
    batch_size = result["setting"]["flags"]["batch_size"]
    return statistics.median(batch_size / line["pairs_per_second"] for line in result["steps"])


# Column of the tables: its value for a finished run, and the digits after the point.
TABLE_COLUMNS = {
    "accuracy": (lambda r: r["after"]["eval/accuracy"], 3),
    "inverse perplexity, chosen": (lambda r: inverse_perplexity(r, "chosen"), 4),
    "rejected": (lambda r: inverse_perplexity(r, "rejected"), 4),
    "margin": (margin, 4),
    "change of mean log-prob, chosen": (lambda r: logp_change(r, "chosen"), 3),
    "of rejected": (lambda r: logp_change(r, "rejected"), 3),
    "answer tokens": (lambda r: r["answer_tokens"], 1),
    "s/step": (seconds_per_step, 1),
    "peak GB": (lambda r: max(line["peak_memory_gb"] for line in r["steps"]), 1),
}


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(rows: list[tuple[str, float, list[dict]]]) -> str:
    """Markdown: one row for each (loss, learning rate, its runs)."""
    lines = [
        f"| {' | '.join(['loss', 'learning rate', 'seeds', *TABLE_COLUMNS])} |",
        "|---" * (3 + len(TABLE_COLUMNS)) + "|",
    ]
    for loss, rate, runs in rows:
        start = (loss, rate) == START
        cells = ["before training", "–"] if start else [loss, f"{rate:g}"]
        cells.append(str(len(runs)))
        cells += [
            spread([value(run) for run in runs], digits) for value, digits in TABLE_COLUMNS.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def group_runs(results: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """{(loss, learning rate): its finished runs in the order of their seeds}"""
    groups = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        if "error" not in result:
            groups.setdefault((result["loss"], result["learning_rate"]), []).append(result)
    return groups


def best_rates(groups: dict) -> dict[str, float]:
    """The learning rate that each loss is compared at: the one with the highest mean accuracy on
    the held-out pairs and, of equal ones, with the largest margin."""
    best = {}
    for (loss, rate), runs in groups.items():
        if (loss, rate) != START:
            accuracy = statistics.mean(run["after"]["eval/accuracy"] for run in runs)
            score = accuracy, statistics.mean(map(margin, runs)), rate
            best[loss] = max(best.get(loss, score), score)
    return {loss: rate for loss, (_, _, rate) in best.items()}


def tables(results: list[dict]) -> str:
    """The generated part of docs/study.md."""
    groups = group_runs(results)
    rates = best_rates(groups)
    start = [(*START, groups[START])] if START in groups else []
    compared = [(loss, rates[loss], groups[loss, rates[loss]]) for loss in LOSSES if loss in rates]
    every_run = [(*key, groups[key]) for key in product(LOSSES, LEARNING_RATES) if key in groups]
    setting = results[0]["setting"]
    flags = setting["flags"]
    finished = [result["learning_rate"] for result in results if "error" not in result]
    counts = ", ".join(f"{finished.count(rate)} at {rate:g}" for rate in LEARNING_RATES)
    failed = [
        f"{r['loss']} at {r['learning_rate']:g}, seed {r['seed']}: {r['error']}"
        for r in results
        if "error" in r
    ]
    parts = [
        f"{setting['pairs']}; {flags['max_steps']} steps of {flags['batch_size']} pairs; "
        f"{setting['versions']}. Finished runs: {counts}; {len(LOSSES)} losses.",
        f"Failed: {'; '.join(failed)}." if failed else "",
        "### Each loss at its learning rate",
        table(start + [row for row in compared if is_rival(row[0])]),
        "### SimPER without its parts",
        table([row for row in compared if row[0] in ABLATIONS]),
        "### Every run",
        table(every_run),
    ]
    return "\n\n".join(filter(None, parts))


def is_rival(loss: str) -> bool:
    """Whether a loss is in the comparison of SimPER with other losses."""
    return loss == "simper" or loss not in ABLATIONS


def figures(results: list[dict], folder: Path) -> None:
    """study-rivals.png, study-ablations.png, study-weights.png: training dynamics of each loss at
    its learning rate. Log-probs are those of the training batches, minus those of the starting
    model on the same batches, so that differences between batches add no noise."""
    groups = group_runs(results)
    start_steps = {result["seed"]: result["steps"] for result in groups.get(START, [])}
    curves = {}
    for loss, rate in best_rates(groups).items():
        runs = [run for run in groups[loss, rate] if run["seed"] in start_steps]
        if runs:
            curves[loss] = [subtract(run["steps"], start_steps[run["seed"]]) for run in runs]
    changes = {
        "change of mean log-prob, chosen": lambda line: line["logps/chosen"],
        "change of mean log-prob, rejected": lambda line: line["logps/rejected"],
        "change of their margin": lambda line: line["logps/chosen"] - line["logps/rejected"],
    }
    weights = {
        "log10 of gradient weight, chosen": lambda line: log_weight(line, "chosen"),
        "log10 of gradient weight, rejected": lambda line: log_weight(line, "rejected"),
    }
    for name, losses, panels in (
        ("rivals", filter(is_rival, curves), changes),
        ("ablations", ABLATIONS, changes),
        ("weights", ("simper", "simpo", "dpo"), weights),
    ):
        selected = {loss: curves[loss] for loss in losses if loss in curves}
        plot(selected, str(folder / f"study-{name}.png"), panels)


def subtract(steps: list[dict], start_steps: list[dict]) -> list[dict]:
    """The lines of `steps`, with those of `start_steps` subtracted from their log-probs."""
    return [
        line | {f"logps/{side}": line[f"logps/{side}"] - start[f"logps/{side}"] for side in SIDES}
        for line, start in zip(steps, start_steps)
    ]


def log_weight(line: dict, side: str) -> float:
    return math.log10(max(line[f"gradient_weight/{side}"], 1e-6))


def report(results: list[dict], page: Path) -> None:
    """Write the tables into the page, in place of earlier ones, and the figures beside it."""
    before, _, rest = (page.read_text() if page.exists() else f"{BEGIN}{END}\n").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.partition(END)[2]}")
    figures(results, page.parent)


# ---- The command ---------------------------------------------------------------------------------


def run_all(args, results: list[dict]) -> None:
    """Make the runs of the study that are not in `results`; add each to `results` and to the file
    args.results when it is finished."""
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train_file, heldout_file, description = select_pairs(args.data, folder)
    setting = {
        "data": ",".join(Path(source.strip()).name for source in args.data.split(",")),
        "pairs": description,
        "limits": LIMITS,
        "flags": FLAGS,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    if results and results[0]["setting"] != setting:
        raise InputError(
            f"{args.results} holds runs of another setting, {results[0]['setting']}: "
            "choose another --results"
        )
    # All losses at one rate, seed after seed: whatever is finished compares them.
    seeds = range(args.seeds)
    plan = [(*START, seed) for seed in seeds]
    for rate, seed, loss in product(LEARNING_RATES, seeds, args.losses):
        plan.append((loss, rate, seed))
    done = {(r["loss"], r["learning_rate"], r["seed"]) for r in results}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    torch.set_num_threads(threads)
    lock = threading.Lock()

    def work(entry: tuple[str, float, int]) -> None:
        loss, rate, seed = entry
        key = {"loss": loss, "learning_rate": rate, "seed": seed}
        flags = FLAGS | {"train_data": train_file, "eval_data": heldout_file} | key
        result = key | {"setting": setting}
        result |= run(flags, folder / f"{loss}-{rate:g}-{seed}", threads)
        with lock, open(args.results, "a") as file:
            results.append(result)
            print(json.dumps(result), file=file)
            print(f"{len(results)} finished: {entry}", result.get("error", ""), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, [entry for entry in plan if entry not in done]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="demo/train.jsonl,demo/heldout.jsonl",
        help="sources as for train.py's --train_data",
    )
    parser.add_argument(
        "--results", default=str(ROOT / "docs" / "study.jsonl"), help="finished runs, one a line"
    )
    parser.add_argument(
        "--page", default=str(ROOT / "docs" / "study.md"), help="page whose tables are written"
    )
    parser.add_argument("--output_dir", default="runs/study", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--report", action="store_true", help="only write the tables and figures")
    args = parser.parse_args()
    results = read_results(Path(args.results))
    if not args.report:
        run_all(args, results)
    if not results:
        raise InputError(f"{args.results} holds no finished run")
    report(results, Path(args.page))


if __name__ == "__main__":
    run_command(main)
