"""Predict a recipe's memory and time on GPUs before paying for them.

    python benchmarks/plan.py recipes/llama-3-8b-instruct.yaml --gpus 8 --gpu a100
    python benchmarks/plan.py recipes/llama-3-8b-instruct.yaml --gpus 64 --replicas 8 --activation_checkpointing true

Flags that are not listed by --help are train.py's. Needs the model's config only, no weights and no GPU.

What is counted exactly: the parameters on each rank (the model is sharded over as many simulated ranks), the floating-point
operations, the bytes that the forward keeps for the backward (transformers' code runs on tensors without data), and the
collectives and their bytes. What is assumed: the GPUs' datasheets, EFFICIENCY, LINK_EFFICIENCY and HOP below; that FSDP's
transfers hide behind computation where they are shorter; and pairs with the lengths of LENGTHS. No prediction has been held
against a GPU yet.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from data import InputError, MicroBatch, pack, split, truncate
from model import LOGITS_BYTES, PackedModel, blocks, build_model, resolve_model, shard
from train import Config, parse_args

# Means of the tokens of prompt, chosen and rejected, and the standard deviations of their logarithms (log-normal). The means of
# hh are those of Anthropic's harmless-base under SmolLM2's tokenizer; the others are round numbers.
LENGTHS = {"hh": ((125, 40, 50), (0.8, 0.9, 0.9)), "ultrafeedback": ((150, 300, 250), (1.0, 0.7, 0.7))}


@dataclass
class GPU:
    """Dense bfloat16 operations/s, bytes of memory, bytes/s of memory, bytes/s in one direction of NVLink (per GPU) and of
    the network (per node of eight GPUs): vendors' datasheets, and the network of their reference systems."""

    flops: float
    memory: float
    memory_speed: float
    nvlink: float
    network: float


GPUS = {
    "a100": GPU(312e12, 80e9, 2.0e12, 300e9, 8 * 25e9),
    "h100": GPU(989e12, 80e9, 3.35e12, 450e9, 8 * 50e9),
}
EFFICIENCY = 0.45  # assumed share of a GPU's peak that forward and backward reach in bfloat16
LINK_EFFICIENCY = 0.75  # assumed share of a link's speed that collectives reach
HOP = 3e-6  # assumed seconds that each further rank adds to a ring collective


def sample_lengths(name: str, count: int, seed: int = 0) -> np.ndarray:
    """(count, 3) tokens of prompt, chosen and rejected, distributed as LENGTHS[name], at least 2 and at most 2,048."""
    means, spreads = (np.array(values) for values in LENGTHS[name])
    normal = np.random.default_rng(seed).normal(np.log(means) - spreads**2 / 2, spreads, size=(count, 3))
    return np.exp(normal).round().clip(2, 2048).astype(int)


def flops(model: PackedModel, segments: list) -> tuple[float, float]:
    """Floating-point operations of forward and backward of pairs with (prompt, chosen, rejected) tokens, as if each distinct
    token were computed once: (in the blocks, in the head). Two for each multiply-add; the backward is twice the forward."""
    config = model.model.config.get_text_config()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    weights = sum(p.numel() for block in blocks(model) for p in block.parameters() if p.ndim == 2)
    p, c, r = np.array(segments, dtype=float).T
    attended = (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2  # (query, key) pairs of each preference pair
    body = 6 * weights * (p + c + r) + 12 * width * len(blocks(model)) * attended
    return body.sum(), (6 * model.model.get_output_embeddings().weight.numel() * (c + r)).sum()


def kept_bytes(config, batch: MicroBatch, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Bytes that the forward of a micro-batch keeps for the backward: (in each block, outside the blocks)."""
    totals, values = [], config.to_dict()
    if "layer_types" in values:
        values["layer_types"] = None  # one for each layer, which fits no other number of layers: transformers makes them anew
    for layers in (1, 2):
        config = type(config).from_dict(values | {"num_hidden_layers": layers})
        kept = {}
        with FakeTensorMode() as mode:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="packed")
            parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
            tensors = (batch.input_ids, batch.position_ids, batch.predictors, batch.targets, batch.lengths)
            fake = MicroBatch(*(mode.from_tensor(tensor) for tensor in tensors), batch.segments)

            def keep(tensor, kept=kept, parameters=parameters):
                storage = tensor.untyped_storage()
                if storage._cdata not in parameters:
                    kept[storage._cdata] = (storage.nbytes(), tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                PackedModel(model)(fake)
        totals.append(sum(size for size, _ in kept.values()))
    one, two = totals
    return two - one, 2 * one - two


def fsdp_traffic(layers: int, inside: int, whole: int) -> tuple[int, int, int, int]:
    """What FSDP2 moves in a forward and backward in bfloat16: (gathers, gathered bytes, reductions, reduced bytes), in sizes of
    the whole tensors, for `layers` blocks with `inside` of the model's `whole` parameters.

    Blocks are gathered for the forward and again for the backward, what is in no block once; all gradients are reduced in
    float32.
    """
    return 2 * layers + 1, 2 * (whole + inside), layers + 1, 4 * whole


def plan(recipe: Config, config, gpus: int, gpu: GPU, lengths: str, pairs: int) -> dict:
    """The prediction for one recipe on a model of transformers' `config`: figures by name, bytes, seconds and operations.

    pairs: in an epoch. Raises InputError if the batch cannot be spread over the GPUs.
    """
    segments = []
    for p, c, r in sample_lengths(lengths, 64 * recipe.batch_size):
        cut = truncate([0] * p, [0] * c, [0] * r, recipe.max_length, recipe.max_prompt_length)
        segments.append(tuple(map(len, cut)))
    steps = [segments[i : i + recipe.batch_size] for i in range(0, len(segments), recipe.batch_size)]

    with torch.device("meta"):
        model, sharded = build_model(config), build_model(config)
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        shard(sharded, "cpu", torch.bfloat16, recipe.replicas)
        local = sum(p.to_local().numel() for p in sharded.parameters())
    finally:
        dist.destroy_process_group()
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    shards, layers, block, whole = gpus // recipe.replicas, len(sizes), max(sizes), sum(p.numel() for p in model.parameters())
    root = whole - sum(sizes)
    gathers, gathered, reductions, reduced = fsdp_traffic(layers, sum(sizes), whole)

    # Time: computation of the slowest rank in each micro-batch against the transfers of a micro-batch.
    vocabulary = config.get_text_config().vocab_size
    compute, micro_batches, largest = [], [], 0
    for step in steps:
        shares = split([sum(pair) for pair in step], gpus, recipe.micro_batch_tokens)
        micro_batches.append(len(shares))
        for micro_batch in shares:
            ranks = [[step[i] for i in share] for share in micro_batch]
            costliest = max(ranks, key=lambda share: sum(map(sum, share)))
            if sum(map(sum, costliest)) > largest:
                largest, widest = sum(map(sum, costliest)), costliest
            body, head = flops(model, costliest)
            # A second forward is a third more: of the blocks under activation checkpointing, of the head but for a chunk.
            chunks = -(-4 * vocabulary * sum(c + r for _, c, r in costliest) // LOGITS_BYTES["cuda"])
            body, head = body * (4 / 3 if recipe.activation_checkpointing else 1), head * (1 + (1 - 1 / chunks) / 3)
            compute.append((body + head) / gpu.flops / EFFICIENCY)
    # A ring over several nodes enters and leaves each of them once and has the node's whole network.
    link = LINK_EFFICIENCY * (gpu.nvlink if shards <= 8 else min(gpu.nvlink, gpu.network))
    transfer = (shards - 1) * ((gathered + reduced) / shards / link + (gathers + reductions) * HOP)
    if recipe.replicas > 1:
        # Between replicas every GPU has its share of the node's network.
        across = LINK_EFFICIENCY * (gpu.network / 8 if gpus > 8 else gpu.nvlink)
        # An all-reduce of each shard: a reduction and a gather.
        transfer += 2 * (recipe.replicas - 1) * (reduced / shards / recipe.replicas / across + reductions * HOP)
    forward_backward = sum(max(seconds, transfer) for seconds in compute) / len(steps)
    adam = 32 * local / gpu.memory_speed  # reads and writes of float32 parameters, gradients and moments, and the norm

    # Memory of a GPU, at the costliest micro-batch.
    batch = pack([([0] * p, [0] * c, [0] * r) for p, c, r in widest])
    per_block, outside = kept_bytes(model.model.config, batch)  # without dropout
    inputs = 2 * config.get_text_config().hidden_size * largest  # of one block, bfloat16
    activations = layers * inputs + per_block if recipe.activation_checkpointing else layers * per_block
    scored = int(batch.lengths.sum())
    memory = {
        "parameters": 4 * local,
        "gradients": 4 * local,
        "Adam": 8 * local,
        # Two blocks (one is fetched ahead) and what is in no block, with its gradient, in bfloat16; the reduction's input
        # and output, float32.
        "gathered": 2 * 2 * block + 2 * 2 * root + 4 * max(root, block) * (1 + 1 / shards),
        "activations": activations + outside,
        # A chunk's logits in float32, and in bfloat16 as they come from the head or as their gradient goes back to it.
        "logits": min(LOGITS_BYTES["cuda"], 4 * scored * vocabulary) * 1.5,
    }
    seconds = forward_backward + adam
    return {
        "micro_batches": float(np.mean(micro_batches)),
        "tokens": largest,
        "memory": memory,
        "compute": sum(compute) / len(steps),
        "transfer": transfer * float(np.mean(micro_batches)),
        "adam": adam,
        "step": seconds,
        "epoch": seconds * (pairs // recipe.batch_size),
        "model_flops": sum(sum(flops(model, step)) for step in steps) / len(steps) / gpus / gpu.flops / seconds,
        "fits": sum(memory.values()) < 0.92 * gpu.memory,  # the CUDA context, nccl's buffers and fragmentation take the rest
        "bound": "computation" if sum(compute) > transfer * sum(micro_batches) else "transfers",
    }


def row(result: dict) -> str:
    """The prediction in one line, as the tables of docs/plan.md have it."""
    memory, seconds = sum(result["memory"].values()) / 1e9, [result[name] for name in ("compute", "transfer", "step")]
    cells = [f"{memory:.0f}", *(f"{value:.2f}" for value in seconds), f"{result['epoch'] / 60:.1f}"]
    return " | ".join([*cells, f"{result['model_flops']:.0%}", result["bound"]])


def report(result: dict, gpu: GPU) -> str:
    """The prediction in full."""
    lines = [f"{name:<14}{size / 1e9:8.1f} GB" for name, size in result["memory"].items()]
    total = sum(result["memory"].values()) / 1e9
    lines.append(f"{'together':<14}{total:8.1f} GB of {gpu.memory / 1e9:.0f}: {'fits' if result['fits'] else 'DOES NOT FIT'}")
    lines.append(f"a step: {result['micro_batches']:.1f} micro-batches, the largest of {result['tokens']} tokens a GPU")
    lines.append(f"computation   {result['compute']:8.2f} s")
    lines.append(f"transfers     {result['transfer']:8.2f} s, hidden behind computation where that is longer")
    lines.append(f"optimizer     {result['adam']:8.3f} s")
    lines.append(f"together      {result['step']:8.2f} s, bound by {result['bound']}; {result['model_flops']:.0%} of the peak")
    lines.append(f"an epoch      {result['epoch'] / 3600:8.2f} h")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="80 GB each, eight a node")
    parser.add_argument("--lengths", choices=LENGTHS, default="ultrafeedback", help="of the pairs, before truncation")
    parser.add_argument("--pairs", type=int, default=60_000, help="pairs in an epoch")
    parser.add_argument("--row", action="store_true", help="print one line of docs/plan.md's table")
    args, rest = parser.parse_known_args()
    recipe = parse_args([args.recipe, *rest])
    try:
        config = AutoConfig.from_pretrained(resolve_model(recipe.model))
    except (OSError, ValueError) as error:
        raise InputError(f"no config can be loaded from {recipe.model}: {error}") from error
    result = plan(recipe, config, args.gpus, GPUS[args.gpu], args.lengths, args.pairs)
    print(row(result) if args.row else report(result, GPUS[args.gpu]))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
