"""Train the demo's model with every loss of loss.py at several learning rates, and write the tables
and figures of docs/study.md.

    python benchmarks/study.py --jobs 2     # every run that docs/study.jsonl does not hold yet
    python benchmarks/study.py --report     # only the tables and figures

A run is the demo, 20 steps of it, with its own --loss, --loss_args, --learning_rate and --seed.
Then the model answers new prompts, one sample each at temperature 1. Of every answer the study
keeps its reward, its divergence from the starting model, its length, and whether the model ended
it. A study that is started again continues after its finished runs; the tables and figures are made
of docs/study.jsonl alone, and need matplotlib (eval/requirements.txt).
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from demo.smollm2 import demo_model
from eval.generate import generate_tokens, load_prompts, prompt_ids, stop_tokens
from eval.plots import COLORS, label_lines, line_styles, new_figure, plot
from eval.results import at_least, make_parser, read_records
from eval.score import load_scorer, score_answers
from loss import LOSSES
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.log import read_lines, write_whole
from runtime.weights import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
# What is compared: every loss with the hyperparameters of its paper or its authors' code, which are
# the defaults in loss.py, and for DPO and SimPO others from their papers.
STUDIED = [loss for loss in LOSSES if loss != "alphapo"]  # alphapo was added after the study
ARMS = {loss: {"loss": loss} for loss in STUDIED}
VARIANTS = ("dpo beta=0.01", "dpo beta=1", "simpo beta=2.5,gamma=0.25", "simpo beta=10,gamma=3")
ARMS |= {arm: dict(zip(("loss", "loss_args"), arm.split())) for arm in VARIANTS}
# A run that does not change the model: its metrics and answers are those of the start.
START, START_RATE = "start", 1e-12
ABLATIONS = ("simper", "simper_sum", "simper_log", "simper_reference")
# Where more lines could not be told apart.
SHOWN = ("simper", "simper_log", "simper_reference", "dpo", "kto", "simpo", "slic_hf", "sft")
# Those of the README's figure, by their names: in color in the others, too, where the rest is gray.
FIVE = {"simper": "SimPER", "dpo": "DPO", "simpo": "SimPO", "kto": "KTO", "sft": "SFT"}
DYNAMICS_RATE = 3e-5
LEARNING_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
SEEDS = 3  # of the order of the pairs and of the sampled answers
EQUAL_KL = 5  # nats per answer, at which losses are compared
OTHER_KL = (2.5, 10)  # to see what that choice does
UNRESOLVED = 0.02  # the error of a reward that is read between two learning rates
PROMPTS, NEW_TOKENS, BATCH = 300, 48, 150
RECIPE = ROOT / "recipes" / "demo.yaml"
FLAGS = {"max_steps": 20, "eval_every": 0, "save_every": 0, "wandb": "off"}
SCORER = f"{ROOT / 'demo' / 'sentiment.py'}:score"
NEW_PROMPTS = ROOT / "demo" / "new_prompts.jsonl"
PACKAGES = ("torch", "transformers", "vaderSentiment")
SIDES = ("chosen", "rejected")
LOGGED = re.compile(r"(eval/)?(step|accuracy|(logps|gradient_weight)/(chosen|rejected))")
JUDGING = threading.Lock()  # one model at a time: torch has one stream of random numbers
CHANGES = tuple(f"Δ {side}" for side in SIDES)
FORMATS = {"words": ".1f", "finished": ".2f", "distinct": ".2f"} | dict.fromkeys(CHANGES, "+.2f")
BEGIN, END = "<!-- the tables: written by benchmarks/study.py -->", "<!-- end of the tables -->"


# ---- A run ---------------------------------------------------------------------------------------


def make_run(arm: str, rate: float, seed: int, output: Path, threads: int) -> dict:
    """Train, answer the new prompts, and delete the model. Returns what the study keeps of the run,
    its numbers to five digits; {"error": text} if training diverged."""
    shutil.rmtree(output, ignore_errors=True)
    flags = FLAGS | ARMS.get(arm, {}) | {"learning_rate": rate, "seed": seed, "output_dir": output}
    command = [sys.executable, "train.py", str(RECIPE)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        diverged = re.search(r"step \d+: gradient norm .*", done.stderr)
        if not diverged:  # no result: the run must be repeated
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")
        return {"error": diverged[0]}
    lines = read_lines(output / "metrics.jsonl")
    lines = [{k: v for k, v in line.items() if LOGGED.fullmatch(k)} for line in lines]
    evaluations = [line for line in lines if "eval/accuracy" in line]
    steps = [line for line in lines if "accuracy" in line]
    if len(steps) != FLAGS["max_steps"]:  # of two processes that wrote to one folder
        raise RuntimeError(f"{output}: {len(steps)} lines of {FLAGS['max_steps']} steps")
    kept = {"before": evaluations[0], "after": evaluations[-1], "steps": steps}
    with JUDGING:
        kept |= judge(str(output / "final"), seed)
    shutil.rmtree(output / "final")
    return json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.5g}"))


def judge(folder: str, seed: int) -> dict:
    """Sampled answers of a model to the new prompts: what the study keeps of each, in lists."""
    tokenizer, model = load_tokenizer(folder), load(folder)
    prompts = load_prompts(str(NEW_PROMPTS), PROMPTS)
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "batch_size": BATCH, "seed": seed}
    answers = generate_tokens(model, tokenizer, prompts, **sampling)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    words = [text.split() for text in texts]
    pairs = [pair for answer in words for pair in zip(answer, answer[1:])]
    stop_ids = stop_tokens(model.generation_config, tokenizer)
    finished = [ids[-1] in stop_ids for ids in answers]
    asked = prompt_ids(tokenizer, prompts, context=2**31)
    third = slice(seed % 3, None, 3)  # for a mean as exact as is needed; with three seeds, of all
    kl = divergences(model, load(demo_model()), asked[third], answers[third])
    return {
        "reward": score_answers(load_scorer(SCORER), prompts, list(zip(texts, finished))),
        "kl": kl,
        "words": [len(answer) for answer in words],
        "finished": finished,
        "distinct": len({*pairs}) / max(len(pairs), 1),  # share of distinct pairs of words
        "examples": texts[:3],
    }


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def divergences(model, start, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """The KL divergence of `model` from `start` along each answer (token ids), in nats: that of the
    next token's distributions, summed over the answer's positions. Its mean over answers that were
    sampled from `model` estimates KL(model ‖ start) of whole answers, by the chain rule."""
    totals = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer[:-1]])
        logps, start_logps = (  # of the answer's positions alone: the vocabulary is wide
            m(ids, logits_to_keep=len(answer)).logits[0].log_softmax(-1) for m in (model, start)
        )
        totals.append((logps.exp() * (logps - start_logps)).sum(dtype=torch.float64).item())
    return totals


# ---- The report ----------------------------------------------------------------------------------


@functools.cache
def bootstrap_weights(seeds: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """What each seed and each prompt weighs in 10,000 bootstrap samples of both: (10000, seeds) and
    (10000, prompts), each row with the sum 1. Always the same."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(n, np.full(n, 1 / n), 10_000) / n for n in (seeds, prompts))


def interval(values: np.ndarray, percent: float = 95) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, prompts): the ends of its bootstrap interval."""
    seeds, prompts = bootstrap_weights(*values.shape)
    means = (seeds @ values * prompts).sum(axis=1)
    return (values.mean(), *np.percentile(means, (50 - percent / 2, 50 + percent / 2)))


def group_runs(results: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """{(arm, learning rate): what the report shows of its finished runs}: "reward", an array with a
    value for each prompt; the means of the others; "Δ chosen" and "Δ rejected", the changes of the
    held-out mean log-probs, in nats per token; "steps", the metrics of each, with these changes of
    its batch, since the same batch before training."""
    groups = {}
    at_start = {run["seed"]: run["steps"] for run in results if run["arm"] == START}
    for run in sorted((r for r in results if "error" not in r), key=lambda run: run["seed"]):
        shown = {key: run[key] for key in ("seed", "learning_rate")}
        shown |= {key: np.mean(run[key]) for key in ("kl", "words", "finished", "distinct")}
        shown |= {"reward": np.array(run["reward"]), "steps": [dict(line) for line in run["steps"]]}
        for change, side in zip(CHANGES, SIDES):
            before, after = (run[when][f"eval/logps/{side}"] for when in ("before", "after"))
            shown[change] = after - before
            for line, first in zip(shown["steps"], at_start[run["seed"]]):
                line[change] = line[f"logps/{side}"] - first[f"logps/{side}"]
        groups.setdefault((run["arm"], run["learning_rate"]), []).append(shown)
    return groups


def at_kl(groups: dict, arm: str, nats: float) -> dict[int, dict]:
    """{seed: what its run would show at `nats`}, of the seeds with which two neighbouring learning
    rates of the arm lie on both sides: on the line between these two. That line is over log KL, but
    for the changes of log-probs over KL, over which they are straighter."""
    points = {}
    of_arm = [run for rate in LEARNING_RATES for run in groups.get((arm, rate), [])]
    for seed in range(SEEDS):
        runs = [run for run in of_arm if run["seed"] == seed]  # by learning rate
        for low, high in zip(runs, runs[1:]):
            if low["kl"] <= nats < high["kl"]:
                linear = (nats - low["kl"]) / (high["kl"] - low["kl"])
                logs = math.log(nats / low["kl"]) / math.log(high["kl"] / low["kl"])
                points[seed] = {
                    key: low[key] + (linear if key in CHANGES else logs) * (high[key] - low[key])
                    for key in ("reward", *FORMATS)
                }
    return points


def mean(runs: Iterable[dict], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def minus_simper(groups: dict, arm: str, nats: float) -> np.ndarray:
    """An arm's rewards minus SimPER's at `nats`, (seeds, prompts), of the seeds that both have."""
    of_arm, simper = at_kl(groups, arm, nats), at_kl(groups, "simper", nats)
    both = sorted(of_arm.keys() & simper.keys()) if arm != "simper" else []
    return np.array([of_arm[seed]["reward"] - simper[seed]["reward"] for seed in both])


def show(values: np.ndarray, sign: str = "") -> str:
    """The mean of values (seeds, prompts) and, if all seeds are there, its 95 % interval. With the
    sign "+", for a difference: bold if the interval for so many comparisons excludes 0, and in how
    many of the seeds it is positive."""
    if not len(values):
        return "–"
    text = format(values.mean(), f"{sign}.3f")
    if len(values) == SEEDS:  # fewer are too few for an interval
        _, low, high = interval(values, 100 - 5 / max(1, len(ARMS) - 1))
        text = f"**{text}**" if sign and (low > 0 or high < 0) else text
        text += " [{1:{0}.3f}, {2:{0}.3f}]".format(sign, *interval(values)[1:])
    return text + (f", {(values.mean(axis=1) > 0).sum()} of {len(values)}" if sign else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(setting: dict, results: list[dict]) -> str:
    """The generated part of docs/study.md."""
    groups = group_runs(results)
    arms = [arm for arm in ARMS if any((arm, rate) in groups for rate in LEARNING_RATES)]
    compared = {"before training": {run["seed"]: run for run in groups[START, START_RATE]}}
    compared |= {arm: at_kl(groups, arm, EQUAL_KL) for arm in arms}
    rows = []
    for arm, runs in compared.items():
        reward = np.array([run["reward"] for run in runs.values()])
        row = [arm, show(reward), show(minus_simper(groups, arm, EQUAL_KL), "+")]
        for key, form in FORMATS.items():
            row.append(format(mean(runs.values(), key), form) if runs else "–")
        rows.append(row)
    minus = "minus SimPER's [95 %], seeds above"
    first = table([f"at {EQUAL_KL:g} nats", "reward [95 %]", minus, *FORMATS], rows)
    rows = []
    for arm in arms:
        row = [arm, *(show(minus_simper(groups, arm, nats), "+") for nats in OTHER_KL)]
        for runs in (groups.get((arm, rate), []) for rate in LEARNING_RATES):
            shown = [mean(runs, key) for key in ("reward", "kl", "words")] if runs else []
            row.append("{:.3f} ({:.1f}, {:.0f})".format(*shown) if runs else "")
            row[-1] += f", {len(runs)}" if 0 < len(runs) < SEEDS else ""
        rows.append(row)
    header = ["elsewhere", *(f"at {nats:g} nats" for nats in OTHER_KL)]
    second = table(header + [f"{rate:g}" for rate in LEARNING_RATES], rows)
    failed = [f"{r['arm']} at {r['learning_rate']:g}" for r in results if "error" in r]
    counts = f"{len(results)} of {len(planned_runs())} runs; {setting['versions']}."
    counts += f" Diverged: {'; '.join(failed)}." if failed else ""
    folded = "<details><summary>At other KLs, and at each learning rate</summary>"
    return "\n\n".join([counts, first, folded, second, "</details>"])


def figures(results: list[dict], folder: Path) -> None:
    """study-differences.png, at EQUAL_KL; study-frontier.png, and of it study-five.png, the
    README's; study-rates.png; study-dynamics.png. An arm is shown where it has all its seeds."""
    groups = group_runs(results)
    minus = {a: v for a in ARMS if len(v := minus_simper(groups, a, EQUAL_KL)) == SEEDS}
    title = f"reward at {EQUAL_KL:g} nats, minus SimPER's"
    with new_figure(folder / "study-differences.png", [title], (4.6, 3.4)) as (axis,):
        axis.axvspan(-UNRESOLVED, UNRESOLVED, color="0.9", label="too small to resolve")
        axis.axvline(0, color=COLORS["simper"], lw=1.2)
        for arm in sorted(minus, key=lambda arm: minus[arm].mean()):
            middle, low, high = interval(minus[arm])
            bar = {"xerr": [[middle - low], [high - middle]], "fmt": "ko", "label": "mean, 95 %"}
            axis.errorbar(middle, arm, ms=4, **bar)
            seeds = minus[arm].mean(axis=1)
            axis.plot(seeds, [arm] * SEEDS, "|", color="0.5", label="each seed", zorder=1)
    rivals = [loss for loss in STUDIED if loss not in ABLATIONS]
    panels = {
        "losses": [*FIVE, *(loss for loss in rivals if loss not in FIVE)],
        "SimPER without its parts": ABLATIONS,
        "other hyperparameters": ["simper", "dpo", "simpo", *VARIANTS],
    }
    start = mean(groups[START, START_RATE], "reward")
    with new_figure(folder / "study-frontier.png", list(panels), (2.7, 2.6)) as axes:
        for axis, (title, arms) in zip(axes, panels.items()):
            pale = [arm for arm in arms if title == "losses" and arm not in FIVE]
            frontier(axis, groups, arms, pale, start, "KL from the start, nats per answer")
    with new_figure(folder / "study-five.png", [""], (3.3, 2.5)) as (axis,):
        of_five = "change of the model (KL, nats per answer)"
        frontier(axis, groups, FIVE, [], start, of_five, dots=False)
        axis.set_ylabel("reward of new answers (−1 to 1)")
        axis.annotate("before training", (0.8, start), color="0.4", fontsize=7, va="bottom")
    by_rate, by_step = {}, {}
    for arm in SHOWN:
        name = display_name(arm)
        if runs := with_all_seeds(groups, arm):
            by_rate[name] = list(zip(*runs))
        if len(runs := groups.get((arm, DYNAMICS_RATE), [])) == SEEDS:
            by_step[f"{name} ({mean(runs, 'kl'):.0f} nats)"] = [run["steps"] for run in runs]
    pale = [label for label in (*by_rate, *by_step) if label.split()[0] not in FIVE.values()]
    shown = {
        "mean reward (−1 to 1)": lambda run: run["reward"].mean(),
        "share of finished answers": lambda run: run["finished"],
        "rejected's share of gradient weight": late_share,
    }
    plot(by_rate, str(folder / "study-rates.png"), shown, x="learning_rate", pale=pale)
    chosen, rejected = CHANGES
    shown = {
        f"{chosen}, nats per token": lambda line: line[chosen],
        f"{rejected}, nats per token": lambda line: line[rejected],
        "Δ of their margin, nats per token": lambda line: line[chosen] - line[rejected],
    }
    plot(by_step, str(folder / "study-dynamics.png"), shown, pale=pale)


def display_name(arm: str) -> str:
    """As in a figure: "dpo beta=1" → "DPO β=1"."""
    loss, _, values = arm.partition(" ")
    values = values.replace("beta", "β").replace("gamma", "γ").replace(",", ", ")
    return f"{FIVE.get(loss, loss)} {values}".strip()


def frontier(
    axis, groups: dict, arms: Iterable[str], pale: list[str], start: float, xlabel: str, dots=True
) -> None:
    """Mean reward over mean KL at each learning rate, a line for each arm, its name at the right
    edge unless it is pale; with dots, a small one for each run, otherwise a bar from the lowest
    seed's reward to the highest. start: the reward before training, a dotted line."""
    styles, ends = line_styles([display_name(arm) for arm in arms], pale), {}
    for name, arm in zip(styles, arms):
        if not (runs := with_all_seeds(groups, arm)):
            continue
        line = [[mean(of_rate, key) for of_rate in runs] for key in ("kl", "reward")]
        axis.plot(*line, **styles[name])
        if arm in pale:
            continue
        ends[name] = (line[1][-1], styles[name]["color"])
        points = line
        if dots:  # seeds differ in both
            points = [[mean([run], key) for run in sum(runs, [])] for key in ("kl", "reward")]
        else:
            seeds = [[mean([run], "reward") for run in of_rate] for of_rate in runs]
            ends_of_bars = [*map(min, seeds)], [*map(max, seeds)]
            bar = {"lw": 0.8, "color": styles[name]["color"], "zorder": 2.3}
            axis.vlines(line[0], *ends_of_bars, **bar)
        axis.plot(*points, "o", ms=2 if dots else 3, color=styles[name]["color"], zorder=2.3)
    axis.axhline(start, color="0.4", ls=":", lw=0.8)
    axis.set(xscale="log", xlabel=xlabel, ylabel="mean reward (−1 to 1)", ylim=(None, 1))
    axis.set_xticks(ticks := (0.3, 1, 3, 10, 30), ticks)
    axis.minorticks_off()
    label_lines(axis, ends)


def with_all_seeds(groups: dict, arm: str) -> list[list[dict]]:
    """The runs of an arm at each learning rate at which it has all its seeds."""
    of_rates = (groups.get((arm, rate), []) for rate in LEARNING_RATES)
    return [runs for runs in of_rates if len(runs) == SEEDS]


def late_share(run: dict) -> float:
    """The rejected responses' share of the gradient weight in the last half of a run's steps."""
    late = run["steps"][len(run["steps"]) // 2 :]
    chosen, rejected = (mean(late, f"gradient_weight/{side}") for side in SIDES)
    return rejected / (chosen + rejected)


# ---- The command ---------------------------------------------------------------------------------


def planned_runs() -> list[tuple[str, float, int]]:
    """(arm, learning rate, seed) of every run, in their order."""
    plan = [(START, START_RATE, seed) for seed in range(SEEDS)]
    return plan + [
        (arm, rate, seed) for seed in range(SEEDS) for rate in LEARNING_RATES for arm in ARMS
    ]


def run_all(results: list[dict], path: Path, output: Path, jobs: int) -> None:
    """Make the runs that are not in `results`, and add each to it and to the file at its end."""
    plan = planned_runs()
    done = {(r["arm"], r["learning_rate"], r["seed"]) for r in results}
    threads, lock = max(1, (os.cpu_count() or 1) // jobs), threading.Lock()

    def work(entry: tuple[str, float, int]) -> None:
        arm, rate, seed = entry
        name = f"{arm}-{rate:g}-{seed}".replace(" ", "-")
        result = {"arm": arm, "learning_rate": rate, "seed": seed}
        result |= make_run(arm, rate, seed, output / name, threads)
        with lock, open(path, "a") as file:
            results.append(result)
            print(json.dumps(result), file=file)
            print(f"{len(results)} of {len(plan)}: {name}", result.get("error", ""), flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [entry for entry in plan if entry not in done]))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "study.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "study.md")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, help="runs at a time, which share the cores"
    )
    parser.add_argument("--report", action="store_true", help="only write the tables and figures")
    args = parser.parse_args()
    setting, *results = read_records(args.results) or [{}]
    if not args.report:
        now = this_setting()
        if setting and setting != now:
            raise InputError(f"{args.results} holds runs of another setting, {setting}, not {now}")
        if not setting:
            write_whole(args.results, json.dumps(setting := now) + "\n")
        run_all(results, args.results, args.output_dir.resolve(), args.jobs)
    at_start = {result["seed"] for result in results if result["arm"] == START}
    if not at_start or {result["seed"] for result in results} - at_start:
        raise InputError(f"{args.results} does not hold the runs of the start")
    before, _, rest = args.page.read_text().partition(BEGIN)
    written = f"{BEGIN}\n\n{tables(setting, results)}\n\n{END}"
    args.page.write_text(before + written + rest.partition(END)[2])
    figures(results, args.page.parent)


def this_setting() -> dict:
    """What all runs of a study have in common."""
    files = [ROOT / "demo" / f"{name}.jsonl" for name in ("train", "heldout", "new_prompts")]
    return {
        "recipe": yaml.safe_load(RECIPE.read_text()),
        "files_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "flags": FLAGS,
        "arms": ARMS,
        "defaults": {
            name: str(inspect.signature(loss)) for name, loss in LOSSES.items() if name in STUDIED
        },
        "answers": {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "batch": BATCH},
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


if __name__ == "__main__":
    run_command(main)
