"""Measure train.py against the textbook step and against TRL, side by side.

    python benchmarks/throughput.py                 # HH lengths, the demo's model, 8 pairs a step
    python benchmarks/throughput.py --data ultrafeedback --model random-32k random-256k --pairs 2
    python benchmarks/throughput.py --data my_pairs.jsonl --arms simper textbook --repeats 3
    python benchmarks/throughput.py --pairs 32 --arms simper simper,ranks=2 simper,compile=true

Every measurement is a separate process: `python train.py` itself, or benchmarks/baselines.py, on
the same pairs with the same weights and optimizer. The processes run one after another, in an order
that rotates; each repetition has another seed and therefore other pairs. The first step of a
process counts only for the time until its end. Losses, log-probs and gradient norms of all steps
must agree. Prints a Markdown table for each workload; --log keeps every step, also of processes
that turn out to disagree.

arms: simper, textbook, trl or padded, followed, after commas, by flags of train.py, by ranks=N, or
(textbook and trl) by pairs_a_forward=N. The ratios are to the first arm.

data: hh or ultrafeedback (random words, with the lengths of Anthropic's HH or of UltraFeedback), or
anything that --train_data accepts.

model: demo, a folder, random-32k, random-128k or random-256k (8 random layers of width 512 with
a vocabulary of that size), or llama-3-8b:N (N random layers of its shape, and its vocabulary).

With a GPU, the processes run there, in bfloat16 (docs/notes/speed.md has a command). The model, and
a trained one until its process has been measured, are written to the folder for temporary files: 32
GB together for llama-3-8b:32.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.baselines import DEVICE, seconds_since
from benchmarks.plan import LENGTHS, flops, sample_lengths
from data import load_data, step_indices
from eval.results import at_least, make_parser
from model import build_model
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.weights import load_tokenizer, resolve_model

ROOT = Path(__file__).resolve().parent.parent
# Each of these is one token of the demo's tokenizer, too.
WORDS = """the of and to in is that for it as was with be by on not he his but at are this have from
or had an they which one you were her all she there would their we him been has when who will more
no if out so said what""".split()
BASELINES = str(ROOT / "benchmarks" / "baselines.py")
ARMS = {"simper": [str(ROOT / "train.py")]}
ARMS |= {name: [BASELINES, name] for name in ("textbook", "trl", "padded")}
# The figures of a process, and with how many digits they are printed.
FIGURES = {"pairs/s": 2, "distinct tokens/s": 0, "share of matmul": 2, "peak GB": 2}
FIGURES |= {"s to first step": 1}


def make_pairs(name: str, folder: Path, count: int) -> str:
    """Write `count` pairs of random words with lengths from LENGTHS[name] and return the file."""
    rng = np.random.default_rng(0)
    path = folder / f"{name}-{count}.jsonl"
    with open(path, "w") as file:
        for lengths in sample_lengths(name, count):
            texts = (" ".join(rng.choice(WORDS, size=length)) for length in lengths)
            print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))), file=file)
    return str(path)


def random_config(name: str) -> LlamaConfig:
    """The config of the random model `name`, one of those in this file's head."""
    found = re.fullmatch(r"llama-3-8b:(?P<layers>\d+)|random-(?P<thousands>\d+)k", name)
    if not found:
        raise InputError(f"{name} is neither llama-3-8b:N nor random-Nk")
    if layers := found["layers"]:
        return LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=int(layers),
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            dtype="bfloat16",
        )
    return LlamaConfig(
        vocab_size=int(found["thousands"]) * 1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def make_model(name: str, folder: Path) -> str:
    """Write the random model `name`, with a tokenizer of WORDS, and return its folder; for "demo"
    or a folder, return the folder."""
    if not name.startswith(("random-", "llama-3-8b:")):
        return resolve_model(name)
    config, path = random_config(name), folder / name
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    model.save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(path)
    return str(path)


def matmul_speed() -> float:
    """Floating-point operations per second of a matrix product, the best of ten: of size 2048³ in
    float32 on all cores, or of 8192³ in bfloat16 on a GPU."""
    size, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, dtype=dtype, device=DEVICE)
    seconds_since(0.0)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / seconds_since(began))
    return best


def split_arm(arm: str) -> tuple[str, int, dict[str, str]]:
    """(name, ranks, flags) of an arm."""
    name, *settings = arm.split(",")
    flags = dict(setting.split("=") for setting in settings)
    return name, int(flags.pop("ranks", 1)), flags


def measure(arm: str, flags: dict, output: Path) -> dict:
    """Run one process, or with ranks=N in the arm torchrun with N processes: {"start": seconds to
    the end of the first step, "steps": the lines of its metrics.jsonl}."""
    name, ranks, own_flags = split_arm(arm)
    flags = flags | own_flags | {"output_dir": output}
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    command += [*ARMS[name], *(f"--{flag}={value}" for flag, value in flags.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
    if DEVICE.type == "cuda" and ranks == 1:  # with more GPUs than one, Trainer would take them all
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment |= {"CUDA_VISIBLE_DEVICES": visible.split(",")[0]}
    torch.cuda.empty_cache()  # what this process has used is for those that are measured
    metrics, log = output / "metrics.jsonl", Path(f"{output}.log")
    began, start = time.perf_counter(), None
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while process.poll() is None:
            if start is None and metrics.exists() and metrics.stat().st_size:
                start = time.perf_counter() - began
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{arm} failed:\n{log.read_text()[-3000:]}")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    shutil.rmtree(output)  # the trained model, too
    return {"start": start, "steps": steps}


def check_agreement(results: dict[str, dict]) -> None:
    """Raise ValueError unless all arms computed the same as the first: the loss, log-probs and
    gradient norm of each step, to a thousandth (the norm in bfloat16 to a hundredth; the loss, a
    difference near 0, to a thousandth or 1e-5, which on random weights is no check). Of TRL, whose
    objective is a different one unless both have the loss alphapo, only the log-probs of the first
    two steps are compared, before which no weight has changed."""
    (first, expected), *compared = results.items()
    for arm, result in compared:
        names, steps = ("loss", "grad_norm", "logps/chosen", "logps/rejected"), None
        if "trl" in (arm.split(",")[0], first.split(",")[0]):
            same = all("loss=alphapo" in flags.split(",") for flags in (first, arm))
            names = ("loss", "grad_norm", "logps/chosen") if same else ("logps/chosen",)
            steps = None if same else 2
        lines = list(zip(expected["steps"], result["steps"]))[:steps]
        for name, (a, b) in itertools.product(names, lines):
            tolerance = 0.01 if (name, DEVICE.type) == ("grad_norm", "cuda") else 1e-3
            if not abs(a[name] - b[name]) <= max(tolerance * abs(a[name]), 1e-5 * (name == "loss")):
                figures = f"{a[name]} in {first} and {b[name]} in {arm}"
                raise ValueError(f"step {a['step']}: {name} is {figures}")


def summarize(result: dict, step_lengths: list, model, matmul: float) -> dict[str, float]:
    """FIGURES of one process, medians over its timed steps.

    result: of measure; step_lengths: for each timed step, the (prompt, chosen, rejected) tokens of
    its pairs; model: a PackedModel, with or without data; matmul: of matmul_speed.
    """
    speeds = [step["pairs_per_second"] for step in result["steps"][1:]]
    tokens_per_second, operations_per_second = [], []
    for speed, lengths in zip(speeds, step_lengths):
        tokens_per_second.append(speed * sum(map(sum, lengths)) / len(lengths))
        operations_per_second.append(speed * sum(flops(model, lengths)) / len(lengths))
    return {
        "pairs/s": statistics.median(speeds),
        "distinct tokens/s": statistics.median(tokens_per_second),
        "share of matmul": statistics.median(operations_per_second) / matmul,
        "peak GB": max(step["peak_memory_gb"] for step in result["steps"]),
        "s to first step": result["start"],
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Median (least–largest)."""
    median, least, largest = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}–{largest:.{digits}f})"


def run(data: str, model: str, batch_size: int, arms: list[str], args, folder: Path) -> None:
    """Measure one workload and print its table."""
    source = str(Path(data).resolve())
    if data in LENGTHS:
        source = make_pairs(data, folder, max(400, 4 * batch_size))
    source_model = make_model(model, folder)
    limits = {"max_length": args.max_length, "max_prompt_length": args.max_length // 2}
    limits |= {"truncation": "paper"}
    flags = {"model": source_model, "train_data": source, "eval_data": "", **limits}
    # Unless an arm has another value, a rank has one micro-batch: one forward and one backward pass
    # are compared.
    flags |= {"batch_size": batch_size, "max_steps": args.steps, "micro_batch_tokens": 10**6}
    flags |= {"wandb": "off", "save_every": 0}
    pairs = load_data(source, load_tokenizer(source_model), **limits).lengths  # (pairs, 3)
    with torch.device("meta"):
        empty_model = build_model(AutoConfig.from_pretrained(source_model, trust_remote_code=False))
    figures = {arm: [] for arm in arms}  # of each repetition
    padded = []  # operations of the textbook's batch divided by those of the distinct tokens
    for seed in range(args.repeats):
        matmul, results, turn = matmul_speed(), {}, seed % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            output = Path(tempfile.mkdtemp(dir=folder)) / "run"
            results[arm] = measure(arm, flags | {"seed": seed}, output)
            matmul = max(matmul, matmul_speed())
            if args.log:
                line = {"data": data, "model": model, "pairs": batch_size, "seed": seed, "arm": arm}
                with open(args.log, "a") as file:
                    print(json.dumps(line | {"matmul": matmul, **results[arm]}), file=file)
        check_agreement({arm: results[arm] for arm in arms})  # in the given order
        batches = [step_indices(len(pairs), batch_size, seed, step) for step in range(args.steps)]
        step_lengths = [pairs[indices].tolist() for indices in batches[1:]]
        for lengths in step_lengths:
            longest = max(p + max(c, r) for p, c, r in lengths)
            operations = flops(empty_model, [(0, longest, 0)] * 2 * batch_size)
            padded.append(sum(operations) / sum(flops(empty_model, lengths)))
        for arm in arms:
            speed = matmul * (split_arm(arm)[1] if DEVICE.type == "cuda" else 1)
            figures[arm].append(summarize(results[arm], step_lengths, empty_model, speed))
    prompt, chosen, rejected = pairs.mean(axis=0)
    print(
        f"**{data}, {model}, {batch_size} pairs a step**: \n"
        f"mean tokens {prompt:.0f} + {chosen:.0f} + {rejected:.0f}; {args.repeats} repeats, "
        "median (min–max);\n"
        f"the padded batch has {spread(padded)} times the operations of the distinct tokens\n"
    )
    basis = figures[arms[0]]
    ratios = [f"speed of {arms[0]}", f"memory of {arms[0]}"]
    print(f"| | {' | '.join([*FIGURES, *ratios])} |")
    print("|---" * (1 + len(FIGURES) + len(ratios)) + "|")
    for arm in arms:
        cells = [spread([f[name] for f in figures[arm]], FIGURES[name]) for name in FIGURES]
        for name in ("pairs/s", "peak GB"):
            cells.append(spread([a[name] / b[name] for a, b in zip(basis, figures[arm])]) + " ×")
        print(f"| {arm} | {' | '.join(cells)} |")
    print(flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["hh"])
    parser.add_argument("--model", nargs="+", default=["demo"])
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=at_least(1),
        default=[8],
        help="pairs in a step; unless an arm says otherwise, in one micro-batch per rank",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["simper", "textbook", "trl"],
        help="NAME[,FLAG=VALUE ...]; NAME is simper, textbook, trl or padded",
    )
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument(
        "--steps", type=at_least(2), default=3, help="steps of each process; the first is not timed"
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=512,
        help="as for train.py; max_prompt_length is half of it",
    )
    parser.add_argument(
        "--log", default="", help="file to which every measurement is added as a line of JSON"
    )
    args = parser.parse_args()
    for arm in args.arms:
        if not re.fullmatch(rf"({'|'.join(ARMS)})(,\w+=[^,=]+)*", arm):
            parser.error(f"arm {arm} is not one of {', '.join(ARMS)}, with FLAG=VALUE after commas")
    arms = args.arms
    if importlib.util.find_spec("trl"):
        versions = f"TRL {importlib.metadata.version('trl')}"
    else:
        versions = "TRL is not installed (pip install -r benchmarks/requirements.txt) and left out"
        arms = [arm for arm in arms if arm.split(",")[0] != "trl"]
    if not arms or len(set(arms)) < len(arms):
        compared = ", ".join(args.arms)
        parser.error(f"nothing to compare, or the same arm twice: {versions}; {compared}")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
    machine += f"{torch.get_num_threads()} threads, float32"
    if DEVICE.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}, bfloat16"
    print(
        f"{machine}; \n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, {versions}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        for data, model, batch_size in itertools.product(args.data, args.model, args.pairs):
            run(data, model, batch_size, arms, args, Path(folder))


if __name__ == "__main__":
    run_command(main)
