"""Where a step's time goes on a GPU, and what each of this code's choices brings, without a GPU.

    python benchmarks/roofline.py                  # one GPU, 8 of Llama-3-8B's 32 layers
    python benchmarks/roofline.py --rows eight     # all layers, as rank 0 of eight; and on one

Bytes, operators, waits and peaks are counted by benchmarks/fake_gpu.py, each row in a process of
its own, which needs a CUDA build of torch. The share of a large matrix product's speed that a step
reaches is *predicted* from them, with the constants of benchmarks/plan.py; NCCL is not in it. Flags
that --help does not list are those of fake_gpu.py.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.plan import GPUS, LARGE, LINK_EFFICIENCY, PAPER, Counts, flops, seconds
from benchmarks.throughput import random_config
from eval.results import make_parser
from model import build_model
from runtime.command_line import run_command
from runtime.streaming import HOST_BYTES

FIXED, SELECTIVE = ["--micro_batch_tokens", "4096"], ["--activation_checkpointing", "selective"]
STREAMED = ["--stream_optimizer", "true", *SELECTIVE]
# (what, layers, flags): each row adds to the one before.
ONE = [
    ("FSDP, transformers' norms, 4,096 tokens", 8, [*FIXED, "--without", "masters", "norms"]),
    ("without FSDP", 8, [*FIXED, "--without", "norms"]),
    ("norms of one kernel", 8, FIXED),
    ("micro-batches by memory", 8, []),
    ("selective checkpointing", 8, SELECTIVE),
]
EIGHT = [
    (
        "8 GPUs, transformers' norms, 4,096 tokens",
        32,
        ["--ranks", "8", *FIXED, "--without", "norms"],
    ),
    ("norms of one kernel", 32, ["--ranks", "8", *FIXED]),
    ("gathered once a step, micro-batches by memory", 32, ["--ranks", "8"]),
    ("selective checkpointing", 32, ["--ranks", "8", *SELECTIVE]),
    ("one GPU, AdamW on the host, selective checkpointing", 32, STREAMED),
]
PARTS = ("FSDP", "sums and casts", "blocks", "head", "AdamW, norm")
CARDS = ("h100", "h200")


def share(found: dict, config, ranks: int, streamed: bool, card: str) -> float:
    """Needed operations a second, of a large product's. streamed: whether masters and moments
    travel to the GPU and back, at the same time, in each step."""
    gpu, moved = GPUS[card], 1e9 * sum(found["moved"].values())
    # Attention is counted as whole rectangles: half of it is computed.
    counts = Counts(0, 0, 0, moved, found["products"], found["attention"] / 2)
    idle = seconds(Counts(0, 0, 0, 0, 0, 0), 1, 1, 0, gpu)
    time = seconds(counts, 1, 1, 0, gpu) + (found["micro_batches"] - 1) * idle
    with torch.device("meta"):
        model = build_model(config)
    needed = sum(flops(model, found["sizes"])) / ranks
    if streamed:
        host = HOST_BYTES * sum(parameter.numel() for parameter in model.parameters())
        time += host / (LINK_EFFICIENCY * gpu.pcie)
    return needed / time / (LARGE * gpu.flops)


def count(layers: int, flags: list[str]) -> tuple[dict, object]:
    """(what fake_gpu.py counts of Llama-3-8B with so many layers, its config)."""
    config = random_config(f"llama-3-8b:{layers}")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        command = [sys.executable, str(Path(__file__).parent / "fake_gpu.py"), PAPER, "--json"]
        done = subprocess.run([*command, "--model", folder, *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1]), config


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", choices=["one", "eight"], default="one")
    parser.add_argument("--pairs", nargs="+", default=["32", "128"], help="in a step")
    args, flags = parser.parse_known_args()
    print("| pairs | | GB moved: " + " | ".join(PARTS), "all", end=" | ")
    print("operators | host waits | peak GB | predicted share, " + " | ".join(CARDS), "|")
    print("|---" * (len(PARTS) + 6 + len(CARDS)) + "|")
    for pairs in args.pairs:
        for what, layers, own in ONE if args.rows == "one" else EIGHT:
            ranks = [] if "--ranks" in own else ["--ranks", "1"]
            given = [*ranks, *own, "--batch_size", pairs, *flags]
            found, config = count(layers, given)
            moved = [found["moved"].get(part, 0) for part in PARTS]
            cells = [pairs, what, *(f"{size:,.0f}" for size in (*moved, sum(moved)))]
            cells += [f"{found['operators']:,}", str(found["waits"]), f"{found['peak']:.1f}"]
            number = int(given[given.index("--ranks") + 1])
            cells += [
                f"{share(found, config, number, own[:2] == STREAMED[:2], card):.2f}"
                for card in CARDS
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_command(main, shows=True)
