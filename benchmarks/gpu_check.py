"""What only a GPU can show, checked in a few minutes, shortest first; one line each.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --model FOLDER --train_data my_pairs.jsonl [flags of train.py]

On all GPUs of the machine. Each line says what was compared, the figure, and what it may be at
most; the exit code is the number of checks that failed. `--device cpu` runs the same on the CPU.
Two of the short trainings are on one GPU, which a model of 16 bytes a parameter must fit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import model as model_module
from data import pack
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
    """Of masters.add_product, the sum of a product of `dtype` and a float32 tensor, relative to
    float64."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in ((512, 4096), (4096, 256))
    )
    total = torch.ones(512, 256, device=device)
    exact = total.double() + a.double() @ b.double()
    masters.add_product(total, a, b)
    return ((total - exact).norm() / exact.norm()).item()


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
    command = [*launch, str(ROOT / "train.py"), "--model", args.model, "--max_steps", "4"]
    command += ["--wandb", "off", "--train_data", args.train_data, "--eval_data", args.train_data]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="demo", help="folder or hub id")
    parser.add_argument("--train_data", default="demo/train.jsonl")
    args, flags = parser.parse_known_args()
    args.flags = flags  # of train.py
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use is here")
    args.model = resolve_model(args.model)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    gpus, runs, failures = torch.cuda.device_count() if args.device == "cuda" else 2, {}, 0
    if args.device == "cuda":
        print(f"{gpus} × {torch.cuda.get_device_name()}, torch {torch.__version__}")
        works = model_module.varlen_works(dtype, 128)
        print(f"attention in one kernel call a layer: {'yes' if works else 'no, pair by pair'}")
        print(f"products of bfloat16 in float32: {'yes' if masters.gives_float32() else 'no'}")

    def train_once(name: str, ranks: int, *flags: str) -> list[dict]:
        if name not in runs:
            runs[name] = run_training(args, ranks, *flags)
        return runs[name]

    def against_float32() -> float:
        exact = train_once("float32", 1, "--dtype", "float32")
        return difference(train_once("one", 1), exact, "logps/chosen")

    def against_one_gpu() -> float:
        return difference(train_once("all", gpus), train_once("one", 1), "logps/chosen")

    def check(what: str, limit: float, measure: Callable[[], float]) -> None:
        nonlocal failures
        began = time.perf_counter()
        try:
            figure = measure()
            verdict = "ok    " if figure <= limit else "FAILED"
            text = f"{figure:.2g} (at most {limit:g})"
        except Exception as error:
            verdict, text = "FAILED", f"{type(error).__name__}: {error}"
        failures += verdict == "FAILED"
        print(f"{verdict} {what}: {text}, {time.perf_counter() - began:.0f} s", flush=True)

    attention = "attention and its gradients, relative error"
    check(
        f"{attention}, 32 heads of 128",
        0.02,
        lambda: attention_error(args.device, dtype, 32, 8, 128),
    )
    check(
        f"{attention}, 9 heads of 64", 0.02, lambda: attention_error(args.device, dtype, 9, 3, 64)
    )
    check("log-probs of the chunked head, nats", 0.02, lambda: head_error(args.device, dtype))
    check(
        "a product added to its float32 sum, relative", 1e-5, lambda: sum_error(args.device, dtype)
    )
    check("a fused norm and its gradients, relative", 0.01, lambda: norm_error(args.device, dtype))
    check("training against float32, mean log-prob, relative", 0.02, against_float32)
    if gpus > 1:
        check(f"{gpus} GPUs against one, mean log-prob, relative", 0.01, against_one_gpu)
    if "one" in runs:
        last = runs["one"][-2]
        print(
            f"{last['pairs_per_second']:.1f} pairs/s, {last['tokens_per_second']:.0f} tokens/s, "
            f"{last['peak_memory_gb']:.1f} GB on one"
        )
    sys.exit(failures)


if __name__ == "__main__":
    run_command(main)
