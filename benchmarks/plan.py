"""Predict a recipe's memory and time on GPUs before paying for them.

    python benchmarks/plan.py recipes/llama-3-8b-instruct.yaml --gpus 8 --gpu a100
    python benchmarks/plan.py recipes/llama-3-8b-instruct.yaml --gpus 64 --replicas 8

Flags that --help does not list are those of train.py. Only the model's config is needed: no weights
and no GPU.

Counted exactly: the parameters on each rank (the model is sharded over as many simulated ranks),
the floating-point operations, the bytes that the forward pass keeps for the backward pass
(transformers' code runs on tensors without data), and the number and bytes of the collectives.
Assumed: the figures of the GPUs' datasheets; EFFICIENCY, LINK_EFFICIENCY and HOP below; that FSDP's
transfers hide behind the computation wherever they are shorter than it; and pairs with the lengths
in LENGTHS. docs/plan.md compares two predictions with runs on one GPU each.
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
from transformers import AttentionInterface, AutoModelForCausalLM

from data import pack, spread_rows, truncate
from eval.report import at_least
from model import LOGITS_BYTES, PackedModel, blocks, build_model, shard, varlen_attention
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.weights import load_config, other_parts, resolve_model
from train import Config, parse_args

# Mean tokens of prompt, chosen and rejected, and the standard deviations of the logarithms of the
# tokens (log-normal). The means of hh are those of Anthropic's harmless-base under SmolLM2's
# tokenizer; all other values are round numbers.
LENGTHS = {
    "hh": ((125, 40, 50), (0.8, 0.9, 0.9)),
    "ultrafeedback": ((150, 300, 250), (1.0, 0.7, 0.7)),
}
STEPS = 64  # a prediction is the mean over so many steps with pairs of sampled lengths


@dataclass
class GPU:
    """The vendor's datasheet, and the network of the vendor's reference system."""

    name: str
    flops: float  # dense bfloat16 operations/s
    memory: float  # bytes
    memory_speed: float  # bytes/s
    nvlink: float  # bytes/s in one direction, of each GPU
    network: float  # bytes/s in one direction, of each node of eight GPUs


GPUS = {
    "a100": GPU("a100", 312e12, 80e9, memory_speed=2.0e12, nvlink=300e9, network=8 * 25e9),
    "h100": GPU("h100", 989e12, 80e9, memory_speed=3.35e12, nvlink=450e9, network=8 * 50e9),
}
# The share of a GPU's peak that forward and backward reach in bfloat16: torchtitan's published runs
# of Llama-3-8B (docs/plan.md) come out within 15 % with these.
EFFICIENCY = {"a100": 0.50, "h100": 0.33}
COMPILED = 1.04  # what --compile true added on the one GPU where it was measured, an H200
LINK_EFFICIENCY = 0.75  # assumed share of a link's speed that collectives reach
HOP = 3e-6  # assumed seconds that each additional rank adds to a ring collective


def speed(gpu: GPU, compiled: bool) -> float:
    """The operations/s that forward and backward are expected to reach."""
    return gpu.flops * EFFICIENCY[gpu.name] * (COMPILED if compiled else 1)


def sample_lengths(name: str, count: int, seed: int = 0) -> np.ndarray:
    """(count, 3) tokens of prompt, chosen and rejected, distributed as in LENGTHS[name], limited to
    between 2 and 2,048."""
    means, spreads = (np.array(values) for values in LENGTHS[name])
    generator = np.random.default_rng(seed)
    logarithms = generator.normal(np.log(means) - spreads**2 / 2, spreads, size=(count, 3))
    return np.exp(logarithms).round().clip(2, 2048).astype(int)


def flops(model: PackedModel, segments: list) -> tuple[float, float]:
    """Floating-point operations of the forward and backward passes over pairs with `segments`
    (prompt, chosen, rejected) tokens, counted as if each distinct token were computed once: (in the
    blocks, in the head). A multiply-add counts as two; the backward pass takes twice the forward's.
    """
    config = model.model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(p.numel() for block in blocks(model) for p in block.parameters() if p.ndim == 2)
    p, c, r = np.array(segments, dtype=float).T
    attended = (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2  # (query, key) pairs
    body = 6 * weights * (p + c + r) + 12 * width * len(blocks(model)) * attended
    return body.sum(), (6 * model.model.get_output_embeddings().weight.numel() * (c + r)).sum()


def one_kernel(module, query, key, value, mask, scaling=None, sliding_window=None, **kwargs):
    """packed_attention as on a GPU, on any device. Raises InputError as it does."""
    terms = ("softcap", "s_aux", "position_bias")
    if extra := [term for term in terms if kwargs.get(term) is not None]:
        raise InputError(f"a model whose attention has {extra[0]} cannot be planned here")
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    batch = kwargs["micro_batch"]
    return varlen_attention(query, key, value, sliding_window, batch, options), None


AttentionInterface.register("one_kernel", one_kernel)


def kept_bytes(
    config, segments: list, dtype: torch.dtype = torch.bfloat16, attention: str = "one_kernel"
) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass in a micro-batch of pairs with
    `segments` (prompt, chosen, rejected) tokens: (in each block, outside the blocks)."""

    def count(layers: int) -> int:
        values = config.to_dict() | {"num_hidden_layers": layers}
        values.pop("layer_types", None)  # one for each layer; transformers fills them in again
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(
                type(config).from_dict(values), dtype=dtype, attn_implementation=attention
            )
            batch = pack([[[0] * n for n in sizes] for sizes in segments])
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                PackedModel(model)(batch)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
        return sum(size for size, _ in storages.values())

    one, two = count(layers=1), count(layers=2)
    return two - one, 2 * one - two


def fsdp_traffic(layers: int, inside: int, whole: int) -> tuple[int, int, int, int]:
    """What FSDP2 moves in a forward and a backward pass in bfloat16: (gathers, gathered bytes,
    reductions, reduced bytes), with the sizes of the whole tensors. The model has `whole`
    parameters, `inside` of them in its `layers` blocks.

    Blocks are gathered for the forward pass and again for the backward pass, everything else once;
    all gradients are reduced in float32.
    """
    return 2 * layers + 1, 2 * (whole + inside), layers + 1, 4 * whole


def plan(recipe: Config, config, gpus: int, gpu: GPU, lengths: str, pairs: int) -> dict:
    """The prediction for a recipe on a model of transformers' `config`: figures by name, in bytes,
    seconds and operations.

    lengths: a name in LENGTHS; pairs: how many an epoch has. Raises InputError if the batch cannot
    be spread over the GPUs.
    """
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with torch.device("meta"):
            model = build_model(config)
        if not model.packed or other_parts(model.model):
            reason = "is not packed" if not model.packed else "has parts for images or sound"
            raise InputError(f"a {config.model_type} model {reason}: it cannot be planned here")
        shard(model, "cpu", torch.bfloat16, recipe.replicas)
        local = sum(p.to_local().numel() for p in model.parameters())
    finally:
        dist.destroy_process_group()
    block_sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    layers, inside, block = len(block_sizes), sum(block_sizes), max(block_sizes)
    whole = sum(p.numel() for p in model.parameters())
    root = whole - inside  # parameters that are in no block
    head_size = model.model.get_output_embeddings().weight.numel()
    shards = gpus // recipe.replicas
    vocabulary = config.get_text_config().vocab_size

    # The slowest rank of each micro-batch: the segments of its pairs. What fits is not known here.
    tokens_in_a_forward = recipe.micro_batch_tokens or 4096
    segments = []
    for sizes in sample_lengths(lengths, STEPS * recipe.batch_size):
        whole_pair = [[0] * n for n in sizes]
        cut = truncate(whole_pair, recipe.max_length, recipe.max_prompt_length)
        segments.append(tuple(map(len, cut)))
    pair_tokens = [sum(segment) for segment in segments]
    slowest = []
    for start in range(0, len(segments), recipe.batch_size):
        step = range(start, start + recipe.batch_size)
        for shares in spread_rows(step, pair_tokens, gpus, tokens_in_a_forward):
            share = max(shares, key=lambda indices: sum(pair_tokens[i] for i in indices))
            slowest.append([segments[i] for i in share])
    largest = max(slowest, key=lambda rank: sum(map(sum, rank)))
    largest_tokens = sum(map(sum, largest))
    response_tokens = sum(c + r for _, c, r in largest)
    micro_batches = len(slowest) / STEPS

    # Time: in each micro-batch, the longer of the slowest rank's computation and the transfers.
    compute = []
    for rank in slowest:
        body, head = flops(model, rank)
        # A second forward pass adds a third: in the blocks under activation checkpointing, in the
        # head for all chunks except one.
        chunks = -(-4 * vocabulary * sum(c + r for _, c, r in rank) // LOGITS_BYTES["cuda"])
        body *= 4 / 3 if recipe.activation_checkpointing == "true" else 1
        head *= 1 + (1 - 1 / chunks) / 3
        compute.append((body + head) / speed(gpu, recipe.compile))
    # A ring over several nodes enters and leaves each node once and has the node's whole network.
    gathers, gathered, reductions, reduced = fsdp_traffic(layers, inside, whole)
    link = LINK_EFFICIENCY * (gpu.nvlink if shards <= 8 else min(gpu.nvlink, gpu.network))
    transfer = (shards - 1) * ((gathered + reduced) / shards / link + (gathers + reductions) * HOP)
    if recipe.replicas > 1:
        # Between replicas, every GPU has its share of the node's network. The all-reduce of each
        # shard is a reduction and a gather.
        across = LINK_EFFICIENCY * (gpu.network / 8 if gpus > 8 else gpu.nvlink)
        one_way = reduced / shards / recipe.replicas / across + reductions * HOP
        transfer += 2 * (recipe.replicas - 1) * one_way / micro_batches  # once a step
    # Reads and writes of parameters, gradients and moments in float32, by AdamW and for the norm.
    adam = 32 * local / gpu.memory_speed
    step_seconds = sum(max(seconds, transfer) for seconds in compute) / STEPS + adam

    # Memory of a GPU in the largest micro-batch.
    per_block, outside = kept_bytes(model.model.config, largest)  # this config is without dropout
    activations = layers * per_block
    if (
        recipe.activation_checkpointing == "true"
    ):  # the inputs of all blocks, in bfloat16, and one block
        activations = layers * 2 * config.get_text_config().hidden_size * largest_tokens + per_block
    turn = {  # where the forward pass turns into the backward pass
        "gradients": 4 * local if micro_batches > 1 else 0,  # of earlier micro-batches
        # In bfloat16 two blocks (one is fetched ahead), what is outside them, the head's gradient.
        "gathered": 2 * 2 * block + 2 * root + 2 * head_size,
        "activations": activations + outside,
        # A chunk's logits in float32, and in bfloat16 as the head gives them or as their gradient
        # goes back to it.
        "logits": min(LOGITS_BYTES["cuda"], 4 * response_tokens * vocabulary) * 1.5,
    }
    # At the end of the backward pass: what is outside the blocks and its gradient in bfloat16, and
    # input and output of its reduction in float32.
    end = {"gradients": 4 * local, "gathered": 4 * root + 4 * root * (1 + 1 / shards)}
    memory = {"parameters": 4 * local, "Adam": 8 * local}
    memory |= max(turn, end, key=lambda part: sum(part.values()))
    return {
        "micro_batches": micro_batches,
        "largest_tokens": largest_tokens,
        "memory": memory,
        "compute": sum(compute) / STEPS,
        "transfer": transfer * micro_batches,
        "adam": adam,
        "step": step_seconds,
        "epoch": step_seconds * (pairs // recipe.batch_size),
        "model_flops": sum(flops(model, segments)) / STEPS / gpus / gpu.flops / step_seconds,
        # The CUDA context, nccl's buffers and fragmentation take the remaining 8 %.
        "fits": sum(memory.values()) < 0.92 * gpu.memory,
        "bound": "computation" if sum(compute) > transfer * len(slowest) else "transfers",
    }


def row(result: dict) -> str:
    """The prediction in one line, as in the table of docs/plan.md."""
    cells = [f"{sum(result['memory'].values()) / 1e9:.0f}"]
    cells += [f"{result[name]:.2f}" for name in ("compute", "transfer", "step")]
    cells += [f"{result['epoch'] / 60:.1f}", f"{result['model_flops']:.0%}", result["bound"]]
    return " | ".join(cells)


REPORT = """\
together      {total:8.1f} GB of {capacity:.0f}: {fits_or_not}
a step: {micro_batches:.1f} micro-batches, the largest of {largest_tokens} tokens a GPU
computation   {compute:8.2f} s
transfers     {transfer:8.2f} s, hidden behind computation where that is longer
optimizer     {adam:8.3f} s
together      {step:8.2f} s, bound by {bound}; {model_flops:.0%} of the peak
an epoch      {hours:8.2f} h"""


def report(result: dict, gpu: GPU) -> str:
    """The prediction in full."""
    memory = [f"{name:<14}{size / 1e9:8.1f} GB\n" for name, size in result["memory"].items()]
    return "".join(memory) + REPORT.format(
        **result,
        total=sum(result["memory"].values()) / 1e9,
        capacity=gpu.memory / 1e9,
        fits_or_not="fits" if result["fits"] else "DOES NOT FIT",
        hours=result["epoch"] / 3600,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--gpus", type=at_least(1), required=True, help="GPUs in all")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="80 GB each, eight in a node")
    parser.add_argument(
        "--lengths",
        choices=LENGTHS,
        default="ultrafeedback",
        help="the pairs' lengths, before truncation",
    )
    parser.add_argument("--pairs", type=at_least(1), default=60_000, help="pairs in an epoch")
    parser.add_argument("--row", action="store_true", help="print one line of docs/plan.md's table")
    args, train_flags = parser.parse_known_args()
    recipe = parse_args([args.recipe, *train_flags])
    config = load_config(resolve_model(recipe.model))
    result = plan(recipe, config, args.gpus, GPUS[args.gpu], args.lengths, args.pairs)
    print(row(result) if args.row else report(result, GPUS[args.gpu]))


if __name__ == "__main__":
    run_command(main, shows=True)
