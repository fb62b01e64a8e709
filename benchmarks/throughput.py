"""Measure train.py against the textbook step and against TRL, side by side.

    python benchmarks/throughput.py                                   # HH lengths, the demo's model, 8 pairs a step
    python benchmarks/throughput.py --data ultrafeedback --model random-32k random-256k --pairs 2
    python benchmarks/throughput.py --data my_pairs.jsonl --arms simper textbook --repeats 3
    python benchmarks/throughput.py --pairs 32 --arms simper simper,ranks=2 simper,activation_checkpointing=true

Every measurement is a process of its own: `python train.py` itself, and benchmarks/baselines.py for the others, on the same
pairs with the same weights and optimizer. They take turns, each repetition with another seed and so with other pairs. The
first step of a process counts only for the time to get there; losses, log-probs and gradient norms of all steps must agree.
Prints a Markdown table per workload; --log keeps every step.

arms: simper, textbook or trl, each with flags of train.py, and ranks, added after commas; the ratios are to the first arm.

data: hh or ultrafeedback (random words, with the lengths of Anthropic's HH and of UltraFeedback), or any --train_data.
model: demo, random-32k, random-128k, random-256k (8 random layers of width 512 under a vocabulary of that size), or a folder.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.plan import LENGTHS, flops, sample_lengths
from data import load_pairs, load_tokenizer, step_indices
from model import build_model, resolve_model

ROOT = Path(__file__).resolve().parent.parent
# Each is one token of the demo's tokenizer, too.
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one"
WORDS = (WORDS + " you were her all she there would their we him been has when who will more no if out so said what").split()
ARMS = {
    "simper": [str(ROOT / "train.py")],
    "textbook": [str(ROOT / "benchmarks" / "baselines.py"), "textbook"],
    "trl": [str(ROOT / "benchmarks" / "baselines.py"), "trl"],
}


def make_pairs(name: str, folder: Path, count: int) -> str:
    """Write `count` pairs of random words with the lengths of `name` and return the file."""
    rng = np.random.default_rng(0)
    path = folder / f"{name}-{count}.jsonl"
    with open(path, "w") as file:
        for row in sample_lengths(name, count):
            texts = (" ".join(rng.choice(WORDS, size=size)) for size in row)
            print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))), file=file)
    return str(path)


def make_model(name: str, folder: Path) -> str:
    """Write the random model `name`, with a tokenizer of WORDS, to a folder and return it; "demo" and folders stay."""
    if not name.startswith("random-"):
        return resolve_model(name)
    vocabulary = int(name.removeprefix("random-").removesuffix("k")) * 1000
    path = folder / name
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>").save_pretrained(path)
    return str(path)


def matmul_speed() -> float:
    """Floating-point operations per second of a float32 matrix product of size 2048³ on all cores: the best of ten."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def measure(arm: str, flags: dict, output: Path) -> dict:
    """Run one process (with ranks=N in the arm: torchrun and as many): {"start": seconds to the end of the first step,
    "steps": its lines of metrics.jsonl}."""
    name, *settings = arm.split(",")
    flags = flags | dict(setting.split("=") for setting in settings)
    launch, ranks = [sys.executable], int(flags.pop("ranks", 1))
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
    lines = output / "metrics.jsonl"
    began, start = time.perf_counter(), None
    with open(f"{output}.log", "w") as log:
        process = subprocess.Popen(
            [*launch, *ARMS[name], *(f"--{key}={value}" for key, value in flags.items()), f"--output_dir={output}"],
            stdout=log,
            stderr=log,
            env=environment,
        )
        while process.poll() is None:
            if start is None and lines.exists() and lines.stat().st_size:
                start = time.perf_counter() - began
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{arm} failed:\n{Path(f'{output}.log').read_text()[-3000:]}")
    return {"start": start, "steps": [json.loads(line) for line in lines.read_text().splitlines()]}


def check(results: dict[str, dict]) -> None:
    """Raise ValueError unless all arms computed what the first did: in each step the same loss, log-probs and gradient; in
    TRL, whose objective is another, the log-probs of the first two steps, before which no weight has moved."""
    (first, reference), *others = results.items()
    for arm, other in others:
        trl = "trl" in (arm.split(",")[0], first.split(",")[0])
        names = ("logps/chosen",) if trl else ("loss", "grad_norm", "logps/chosen", "logps/rejected")
        steps = list(zip(reference["steps"], other["steps"]))[: 2 if trl else None]
        for name, (mine, theirs) in itertools.product(names, steps):
            if not abs(mine[name] - theirs[name]) <= 1e-3 * max(abs(mine[name]), 0.01):
                raise ValueError(f"step {mine['step']}: {name} is {mine[name]} in {first} and {theirs[name]} in {arm}")


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["hh"])
    parser.add_argument("--model", nargs="+", default=["demo"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[8], help="pairs a step, all in one micro-batch per rank")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="NAME[,FLAG=VALUE ...]; NAME is simper, textbook or trl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each process; the first is not timed")
    parser.add_argument("--max_length", type=int, default=512, help="of prompt + response; the prompt's limit is half of it")
    parser.add_argument("--log", default="", help="file to which every measurement is added as a line of JSON")
    args = parser.parse_args()
    arms = args.arms
    for arm in arms:
        if not re.fullmatch(rf"({'|'.join(ARMS)})(,\w+=[^,=]+)*", arm):
            parser.error(f"arm {arm} is not one of {', '.join(ARMS)}, with FLAG=VALUE after commas")
    if importlib.util.find_spec("trl"):
        versions = f"TRL {importlib.metadata.version('trl')}"
    else:
        versions = "TRL is not installed (pip install -r benchmarks/requirements.txt) and left out"
        arms = [arm for arm in arms if arm.split(",")[0] != "trl"]
    if not arms or len(set(arms)) < len(arms):
        parser.error(f"nothing to compare, or the same arm twice: {versions}; {', '.join(args.arms)}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, float32; ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {versions}\n")
    with tempfile.TemporaryDirectory() as folder:
        for workload in itertools.product(args.data, args.model, args.pairs):
            run(*workload, arms, args, Path(folder))


def run(data: str, model: str, pairs: int, arms: list[str], args, folder: Path) -> None:
    """Measure one workload and print its table."""
    source = make_pairs(data, folder, max(400, 4 * pairs)) if data in LENGTHS else str(Path(data).resolve())
    name = make_model(model, folder)
    limits = {"max_length": args.max_length, "max_prompt_length": args.max_length // 2}
    # Unless an arm says otherwise, a rank has one micro-batch: what is compared is one forward and one backward.
    flags = {"model": name, "train_data": source, "batch_size": pairs, "max_steps": args.steps, "micro_batch_tokens": 10**6}
    flags |= {"wandb": "off", "eval_data": "", "save_every": 0, **limits}
    rows = load_pairs(source, load_tokenizer(name), *limits.values())[0]
    with torch.device("meta"):
        shape = build_model(AutoConfig.from_pretrained(name))
    padded = []  # operations of the textbook's batch over those of the distinct tokens, of each step
    figures = {arm: {"speed": [], "tokens": [], "share": [], "memory": [], "start": []} for arm in arms}
    for repeat in range(args.repeats):
        peak, results = matmul_speed(), {}
        for arm in arms[repeat % len(arms) :] + arms[: repeat % len(arms)]:
            results[arm] = measure(arm, flags | {"seed": repeat}, Path(tempfile.mkdtemp(dir=folder)) / "run")
            peak = max(peak, matmul_speed())
        results = {arm: results[arm] for arm in arms}  # whichever ran first, the first arm is what the others are held to
        check(results)
        for step in range(1, args.steps):
            segments = rows[step_indices(len(rows), pairs, repeat, step)]["lengths"]
            longest = max(p + max(c, r) for p, c, r in segments)
            padded.append(sum(flops(shape, [(0, longest, 0)] * 2 * pairs)) / sum(flops(shape, segments)))
        for arm, result in results.items():
            if args.log:
                with open(args.log, "a") as file:
                    setting = {"data": data, "model": model, "pairs": pairs, "seed": repeat, "arm": arm}
                    print(json.dumps(setting | {"matmul": peak, **result}), file=file)
            figures[arm]["start"].append(result["start"])
            figures[arm]["memory"].append(max(step["peak_memory_gb"] for step in result["steps"]))
            speeds, tokens, shares = [], [], []
            for step in result["steps"][1:]:
                segments = rows[step_indices(len(rows), pairs, repeat, step["step"] - 1)]["lengths"]
                speeds.append(step["pairs_per_second"])
                tokens.append(sum(map(sum, segments)) / pairs * speeds[-1])
                shares.append(sum(flops(shape, segments)) / pairs * speeds[-1] / peak)
            for key, values in (("speed", speeds), ("tokens", tokens), ("share", shares)):
                figures[arm][key].append(statistics.median(values))
    means = np.array(rows["lengths"]).mean(axis=0)
    print(f"**{data}, {model}, {pairs} pairs a step**: ")
    print(f"mean tokens {means[0]:.0f} + {means[1]:.0f} + {means[2]:.0f}; {args.repeats} repeats, median (min–max);")
    print(f"the padded batch has {spread(padded)} times the operations of the distinct tokens\n")
    ratios = f"speed of {arms[0]} | memory of {arms[0]}"
    print(f"| | pairs/s | distinct tokens/s | share of matmul | peak GB | s to first step | {ratios} |")
    print("|---|---|---|---|---|---|---|---|")
    for arm, values in figures.items():
        faster = [a / b for a, b in zip(figures[arms[0]]["speed"], values["speed"])]
        leaner = [a / b for a, b in zip(figures[arms[0]]["memory"], values["memory"])]
        cells = [spread(values["speed"]), spread(values["tokens"], 0), spread(values["share"]), spread(values["memory"])]
        cells += [spread(values["start"], 1), spread(faster) + " ×", spread(leaner) + " ×"]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
