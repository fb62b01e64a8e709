"""What only a GPU can show, in about nine minutes, shortest first; one line each.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --model FOLDER --train_data my_pairs.jsonl [flags of train.py]

First what is computed, on all GPUs of the machine: each line says what was compared, the figure,
and what it may be at most; the exit code is the number of checks that failed. Two of the short
trainings are on one GPU, which a model of 16 bytes a parameter must fit. Then, on one GPU, the
speed of train.train itself with a random model of Llama-3-8B's shape, of 8 of its layers or as many
as --layers says: with each of this code's choices and without, by turns, as a share of a large
matrix product's speed; the textbook's step and, if it is installed, TRL's; all 32 layers with AdamW
on the host. What there is no time for is left out by name. `--device cpu` runs the same on the CPU;
--log FILE adds a line of JSON for each line.
"""

import contextlib
import gc
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import model as model_module
import train
from benchmarks import fake_gpu
from benchmarks.baselines import seconds_since
from benchmarks.plan import PAPER, flops
from benchmarks.throughput import matmul_speed, random_config
from data import pack
from eval.results import make_parser
from runtime import checks, masters, norms
from runtime.command_line import run_command
from runtime.log import read_lines
from runtime.weights import resolve_model

ROOT = Path(__file__).resolve().parent.parent


def attention_error(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> float:
    """checks.attention_error of three pairs, without a window and with two."""
    sizes = ((300, 200, 170), (5, 130, 1), (129, 1, 300))
    batch = pack([[[1] * p, [2] * c, [3] * r] for p, c, r in sizes]).to(device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, n, len(batch.input_ids), width) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes]
    windows = (None, 64, 5)
    return max(checks.attention_error(*inputs, None, w, batch).item() for w in windows)


def head_error(device: str, dtype: torch.dtype) -> float:
    """Of TokenLogps' log-probs against float64, with the inputs of `dtype`, in nats."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in ((600, 256), (50_000, 256))
    )
    targets = torch.arange(600, device=device)
    logps = model_module.TokenLogps.apply(hidden, weight / 16, None, targets)
    exact = (hidden.double() @ (weight / 16).double().T).log_softmax(dim=1)
    return (logps - exact[targets, targets]).abs().max().item()


def sum_error(device: str, dtype: torch.dtype) -> float:
    """The relative error of masters.add_product, which adds a product of `dtype` to a float32
    tensor, against float64."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in ((512, 4096), (4096, 256))
    )
    total = torch.ones(512, 256, device=device)
    exact = total.double() + a.double() @ b.double()
    masters.add_product(total, a, b)
    return ((total - exact).norm() / exact.norm()).item()


def sum_speed(device: str, dtype: torch.dtype) -> float:
    """Seconds of masters.add_product, relative to a product that is added afterwards."""
    a, b = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((4096, 8192), (8192, 4096))
    )
    total, seconds = torch.zeros(4096, 4096, device=device), {}
    for name, add in {
        "at once": lambda: masters.add_product(total, a, b),
        "afterwards": lambda: total.add_(a @ b),
    }.items():
        times = []
        for _ in range(10):
            began = time.perf_counter()
            add()
            times.append(seconds_since(began))
        seconds[name] = min(times)
    return seconds["at once"] / seconds["afterwards"]


def norm_error(device: str, dtype: torch.dtype) -> float:
    """Of a fused norm and its gradients, of `dtype`, relative to the same in float32; 0 if
    transformers' own is kept."""
    model = torch.nn.Sequential(LlamaRMSNorm(4096, 1e-5).to(device, dtype))
    norms.fuse_norms(model, torch.device(device), dtype)
    if "forward" not in vars(model[0]):
        return 0.0
    generator, results = torch.Generator(device).manual_seed(0), []
    x, direction = (torch.randn(999, 4096, generator=generator, device=device) for _ in range(2))
    for kind in (dtype, torch.float32):
        weight = torch.linspace(0.5, 2, 4096, device=device, dtype=kind).requires_grad_()
        inputs = x.to(dtype).to(kind).requires_grad_()
        out = torch.nn.functional.rms_norm(inputs, weight.shape, weight, 1e-5)
        results.append((out, *torch.autograd.grad(out, (inputs, weight), direction.to(kind))))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))


def run_training(args, ranks: int, *flags: str) -> list[dict]:
    """metrics.jsonl of a short run of train.py on `ranks` GPUs."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launch, str(ROOT / "train.py"), "recipes/demo.yaml", "--model", args.model]
    command += ["--max_steps", "4", "--wandb", "off"]
    command += ["--train_data", args.train_data, "--eval_data", args.train_data]
    with tempfile.TemporaryDirectory() as output:
        command += ["--output_dir", f"{output}/run", *args.flags, *flags]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
        environment = os.environ | hidden
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "rror" in line]
            raise RuntimeError(lines[0] if lines else f"exit code {done.returncode}")
        return read_lines(Path(output) / "run" / "metrics.jsonl")


def difference(some: list[dict], others: list[dict], name: str) -> float:
    """The largest relative difference of a metric between two runs."""
    pairs = [(a[name], b[name]) for a, b in zip(some, others, strict=True) if name in a]
    return max(abs(a - b) / abs(b) for a, b in pairs)


# ---- Speed ---------------------------------------------------------------------------------------

FIXED = ["--micro_batch_tokens", "4096"]
SELECTIVE = ["--activation_checkpointing", "selective"]
# What a run is without, and its flags.
CHOICES = {
    "FSDP, transformers' norms, 4,096 tokens": ("masters norms", FIXED),
    "without FSDP": ("norms", FIXED),
    "norms of one kernel": ("", FIXED),
    "norms of one kernel, pageable copies": ("pinning", FIXED),
    "micro-batches by memory": ("", []),
    "selective checkpointing": ("", SELECTIVE),
    "AdamW on the host": ("", ["--stream_optimizer", "true", *SELECTIVE]),
}
WITHOUT = {
    "masters": (model_module, "masters_fit", lambda *args: False),
    "norms": (model_module, "fuse_norms", lambda *args: None),
    "pinning": (torch.Tensor, "pin_memory", lambda tensor: tensor),
}


@torch.no_grad()
def draw_weights(model, folder: str, values: dict) -> None:
    """read_weights, of random values, drawn on the GPU if there is one."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()  # buffers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for parameter in model.parameters():
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        mine.copy_(torch.randn(mine.shape, device=device) * 0.02)


def speed(layers: int, pairs: int, choice: str, steps: int, dtype: str) -> dict[str, float]:
    """Of `steps` steps of train.train, but for the first two: the median of seconds and the highest
    peak. layers: see random_config; the pairs have UltraFeedback's lengths."""
    without, flags = CHOICES[choice]
    shape = random_config(f"llama-3-8b:{layers}" if layers else "random-32k")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shape.save_pretrained(folder)
        flags = [PAPER, "--model", folder, "--output_dir", f"{folder}/run", *flags]
        flags += ["--batch_size", str(pairs), "--max_steps", str(steps), "--dtype", dtype]
        flags += ["--wandb", "off"]
        flags += ["--eval_data", "", "--save_every", "0", "--train_data", "random"]
        config = train.parse_args(flags)
        sizes = fake_gpu.sample_pairs(config, "ultrafeedback")
        random = fake_gpu.random_pairs(sizes)
        replaced = fake_gpu.without_files(config, random, lambda *args: None)
        replaced[model_module] |= {"read_weights": draw_weights}
        replaced[train] |= {"model_card": lambda *args: "", "export": lambda *args: None}
        for module, functions in replaced.items():
            for name, function in functions.items():
                stack.enter_context(patch.object(module, name, function))
        for name in without.split():
            stack.enter_context(patch.object(*WITHOUT[name]))
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(stream(io.StringIO()))
        train.train(config)
        lines = read_lines(Path(folder) / "run" / "metrics.jsonl")
        head = (Path(folder) / "run" / "config.yaml").read_text()
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("meta"):
        needed = sum(flops(model_module.build_model(shape), sizes))
    seconds = statistics.median(pairs / line["pairs_per_second"] for line in lines[2:])
    found = {"seconds": seconds, "pairs_per_second": pairs / seconds, "needed": needed}
    found["peak_gb"] = max(line["peak_memory_gb"] for line in lines)
    tokens = re.search(r"micro_batch_tokens in use: (\d+)", head)
    return found | {"tokens": int(tokens[1]) if tokens else config.micro_batch_tokens}


def speeds(args, dtype: str, show: Callable) -> None:
    """Print a line for each choice, as long as there is time."""
    began = time.perf_counter()
    matmul = matmul_speed()
    print(f"a large matrix product: {matmul / 1e12:.3g} TFLOP/s")
    smaller = [choice for choice in CHOICES if choice != "AdamW on the host"]
    plans = [(args.layers, pairs, choice) for pairs in args.pairs for choice in smaller]
    plans = plans[: len(smaller)] * 2 + plans[len(smaller) :]  # the first number twice, by turns
    if args.layers:
        plans.insert(2 * len(smaller), (4 * args.layers, args.pairs[0], "AdamW on the host"))
    longest = 0.0
    for layers, pairs, choice in plans:
        name = f"{layers} layers, {pairs} pairs, {choice}"
        if time.perf_counter() - began + 1.2 * longest > args.seconds:
            print(f"left out: {name}")
            continue
        start = time.perf_counter()
        try:
            found = speed(layers, pairs, choice, args.steps, dtype)
        except Exception as error:
            if dist.is_initialized():
                dist.destroy_process_group()
            show(name, f"{type(error).__name__}: {error}"[:300], {"error": str(error)})
            continue
        share = found["needed"] / found["seconds"] / matmul
        text = f"{found['seconds']:.3f} s a step, {share:.3f} of the product, "
        text += f"{found['peak_gb']:.1f} GB, {found['tokens']} tokens a micro-batch"
        show(name, text, found | {"share": share, "matmul": matmul})
        longest = max(longest, time.perf_counter() - start)


def baselines(args, show: Callable) -> None:
    """The textbook's step and TRL's beside train.py's, by throughput.py."""
    arms = ["simper,micro_batch_tokens=0", "textbook,pairs_a_forward=2"]
    arms += ["trl,pairs_a_forward=2"] if importlib.util.find_spec("trl") else []
    model, pairs = f"llama-3-8b:{args.layers}" if args.layers else "random-32k", str(args.pairs[0])
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--model", model]
    command += ["--data", "ultrafeedback", "--max_length", "2048", "--pairs", pairs]
    command += ["--repeats", "1", "--steps", str(args.steps), "--arms", *arms]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    show("beside the textbook", "\n".join(rows) or done.stderr[-300:], {"table": rows})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="demo", help="folder or hub id")
    parser.add_argument("--train_data", default="demo/train.jsonl")
    parser.add_argument("--layers", type=int, default=8, help="0: a small model")
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 128], help="in a step")
    parser.add_argument("--steps", type=int, default=5, help="of a run; the first two do not count")
    parser.add_argument(
        "--seconds", type=float, default=220, help="for the choices' speeds; 0: no speeds"
    )
    parser.add_argument("--log", help="file to which lines of JSON are added")
    args, flags = parser.parse_known_args()
    args.flags, started = flags, time.perf_counter()  # flags of train.py
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use is here")
    args.model = resolve_model(args.model)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    gpus, runs, failures = torch.cuda.device_count() if args.device == "cuda" else 2, {}, 0
    if args.device == "cuda":
        print(f"{gpus} × {torch.cuda.get_device_name()}, torch {torch.__version__}")
        works = model_module.varlen_works(dtype, 128, 128)
        print(f"attention in one kernel call a layer: {'yes' if works else 'no, pair by pair'}")
        print(f"products of bfloat16 in float32: {'yes' if masters.gives_float32() else 'no'}")

    def show(name: str, text: str, values: dict) -> None:
        print(f"{name}: {text}", flush=True)
        if args.log:
            with open(args.log, "a") as file:
                print(json.dumps({"name": name} | values), file=file)

    def train_once(name: str, ranks: int, *flags: str) -> list[dict]:
        if name not in runs:
            runs[name] = run_training(args, ranks, *flags)
        return runs[name]

    def against_float32() -> float:
        exact = train_once("float32", 1, "--dtype", "float32")
        return difference(train_once("one", 1), exact, "logps/chosen")

    def against_one_gpu() -> float:
        return difference(train_once("all", gpus), train_once("one", 1), "logps/chosen")

    def check(what: str, limit: float, measure: Callable[..., float], *inputs) -> None:
        nonlocal failures
        began = time.perf_counter()
        try:
            figure = measure(*inputs)
            verdict = "ok    " if figure <= limit else "FAILED"
            text = f"{figure:.2g} (at most {limit:g})"
        except Exception as error:
            verdict, text = "FAILED", f"{type(error).__name__}: {error}"
        failures += verdict == "FAILED"
        values = {"verdict": verdict.strip(), "figure": text}
        show(f"{verdict} {what}", f"{text}, {time.perf_counter() - began:.0f} s", values)

    attention, where = "attention and its gradients, relative error", (args.device, dtype)
    check(f"{attention}, 32 heads of 128", 0.02, attention_error, *where, 32, 8, 128)
    check(f"{attention}, 9 heads of 64", 0.02, attention_error, *where, 9, 3, 64)
    check("log-probs of the chunked head, nats", 0.02, head_error, *where)
    check("a product added to its float32 sum, relative", 1e-5, sum_error, *where)
    check("its time, to that of a product added afterwards", 1.2, sum_speed, *where)
    check("a fused norm and its gradients, relative", 0.01, norm_error, *where)
    check("training against float32, mean log-prob, relative", 0.02, against_float32)
    if gpus > 1:
        check(f"{gpus} GPUs against one, mean log-prob, relative", 0.01, against_one_gpu)
    if "one" in runs:
        last = runs["one"][-2]
        print(
            f"{last['pairs_per_second']:.1f} pairs/s, {last['tokens_per_second']:.0f} tokens/s, "
            f"{last['peak_memory_gb']:.1f} GB on one"
        )
    if not args.seconds:
        sys.exit(failures)
    speeds(args, "auto" if args.device == "cuda" else "bfloat16", show)
    if time.perf_counter() - started < args.seconds + 180:
        baselines(args, show)
    else:
        print("left out: beside the textbook")
    sys.exit(failures)


if __name__ == "__main__":
    run_command(main)
