"""Can MODEL be trained on these GPUs, with which setting, and how long does it take?

    python benchmarks/plan.py Qwen/Qwen3-4B --gpu 4090
    python benchmarks/plan.py Qwen/Qwen3-32B --gpu h100 --gpus 8 --pairs 20000
    python benchmarks/plan.py MODEL --gpu_memory 48 --tflops 150 --bandwidth 0.77
    python benchmarks/plan.py recipes/llama-3-8b-instruct.yaml --gpus 64 --replicas 8

MODEL is a folder, a hub id or a recipe. Flags that --help does not list are those of train.py; of
--activation_checkpointing, all values are tried if none is given. Only the model's config is
needed: no weights, no GPU, and no CUDA build of torch.

Counted: the parameters on each rank, and what forward and backward of a micro-batch keep, move and
multiply, by running the model on tensors without data, with the operators that a GPU runs; the
number and bytes of the collectives. Whether a model is packed is tried on a tiny one of its kind.
Assumed: the GPUs' datasheets and the constants below; that FSDP's transfers hide behind computation
wherever they are shorter; and pairs with the lengths in LENGTHS. docs/plan.md compares predictions
with runs.
"""

import bisect
import contextlib
import copy
import functools
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface

import model as model_module
from benchmarks.counter import Recorder, to_empty
from data import pack, spread_rows, truncate
from eval.results import at_least, make_parser
from model import PackedModel, blocks, build_model, keep_products, shape_logits, shard
from model import varlen_attention as one_kernel
from runtime import masters, norms, streaming
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.rehearsal import GATHERED, KEPT_FREE
from runtime.weights import load_config, other_parts, resolve_model
from train import Config, parse_args

# Mean tokens of prompt, chosen and rejected, and the standard deviations of the logarithms of the
# tokens (log-normal). The means of hh are those of Anthropic's harmless-base under SmolLM2's
# tokenizer; all other values are round numbers.
LENGTHS = {
    "hh": ((125, 40, 50), (0.8, 0.9, 0.9)),
    "ultrafeedback": ((150, 300, 250), (1.0, 0.7, 0.7)),
}
PAPER = str(Path(__file__).resolve().parent.parent / "recipes" / "llama-3-8b-instruct.yaml")
STEPS = 16  # a prediction is the mean over so many steps with pairs of sampled lengths


@dataclass(frozen=True)
class GPU:
    """The vendor's datasheet, and the network of the vendor's reference system, if it has one."""

    name: str
    memory: float  # bytes
    flops: float  # dense bfloat16 operations/s with float32 sums
    bandwidth: float  # of its memory, bytes/s
    pcie: float  # to the host, bytes/s in one direction
    link: float  # between the GPUs of a node, bytes/s in one direction, of each GPU: NVLink or PCIe
    network: float = 12.5e9  # bytes/s in one direction, of each node of eight GPUs

    @property
    def products(self) -> float:
        """The operations/s of a large matrix product."""
        return MATMUL * self.flops

    @property
    def copies(self) -> float:
        """The bytes/s of operators that are bound by memory."""
        return COPY * self.bandwidth


# NVIDIA's datasheets: A100 (both sizes: SXM), H100 SXM, H200 SXM, DGX B200 (an eighth of it), L40S,
# RTX A6000, and the white papers of Ada and RTX Blackwell (4090, 5090). Where a sheet gives
# operations with sparsity, half of them.
GPUS = [
    GPU("4090", 24e9, 165e12, 1.008e12, 32e9, link=32e9),
    GPU("5090", 32e9, 209.5e12, 1.792e12, 64e9, link=64e9),
    GPU("a100-40", 40e9, 312e12, 1.555e12, 32e9, link=300e9, network=8 * 25e9),
    GPU("a6000", 48e9, 154.8e12, 0.768e12, 32e9, link=32e9),
    GPU("l40s", 48e9, 362e12, 0.864e12, 32e9, link=32e9),
    GPU("a100", 80e9, 312e12, 2.039e12, 32e9, link=300e9, network=8 * 25e9),
    GPU("h100", 80e9, 989e12, 3.35e12, 64e9, link=450e9, network=8 * 50e9),
    GPU("h200", 141e9, 989e12, 4.8e12, 64e9, link=450e9, network=8 * 50e9),
    GPU("b200", 180e9, 2250e12, 8e12, 64e9, link=900e9, network=8 * 50e9),
]
GPUS = {gpu.name: gpu for gpu in GPUS}
# An 8,192³ product reached 795e12 on the H100 and 790e12 on the H200 (docs/notes/speed.md), 0.80 of
# the datasheet's; the step's products reach 0.97 of that, and copies 0.9 · 0.85 of the bandwidth,
# fitted to the two runs' totals. Assumed for the other cards.
LARGE = 0.80  # of the datasheet's operations/s, by an 8,192³ product
MATMUL, COPY, ATTENTION = LARGE * 0.97, 0.90 * 0.85, 0.25
IDLE = 0.010  # s a micro-batch; fitted to the same runs
COMPILED = 1.04  # what --compile true added on the one GPU where it was measured, an H200
# On several GPUs everything takes so much longer: NCCL's kernels beside the computation, transfers
# that do not hide, clocks of a longer run. Fitted to torchtitan's Llama-3-8B (docs/plan.md), whose
# H100s had 500 of 700 W; other cards as H100s.
SEVERAL = {"a100": 1.05, "a100-40": 1.05}
SEVERAL_OTHERS = 1.34
LINK_EFFICIENCY = 0.75  # assumed share of a link's speed that collectives reach
HOP = 3e-6  # assumed seconds that each additional rank adds to a ring collective
CONTEXT = {True: 0.6e9, False: 2e9}  # bytes of CUDA's context on one GPU; with NCCL on several
# Bytes that FSDP moves in each micro-batch, for each parameter of its shard (casts and sums) and
# for each that is gathered (copies): benchmarks/fake_gpu.py on one rank and on eight.
SHARD_BYTES, GATHERED_BYTES = 30, 11


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
    Every weight of the blocks counts, an expert's too.
    """
    config = model.model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(p.numel() for block in blocks(model) for p in block.parameters() if p.ndim == 2)
    p, c, r = np.array(segments, dtype=float).T
    body = 6 * weights * (p + c + r) + 12 * width * len(blocks(model)) * attended(segments)
    return body.sum(), (6 * model.model.get_output_embeddings().weight.numel() * (c + r)).sum()


def attended(segments: list) -> np.ndarray:
    """(pairs,) how many (query, key) pairs attention has in each."""
    p, c, r = np.array(segments, dtype=float).T
    return (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2


# ---- What a micro-batch takes --------------------------------------------------------------------


def attention(module, query, key, value, mask, scaling=None, sliding_window=None, **kwargs):
    """packed_attention as on a GPU, on any device."""
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    return one_kernel(query, key, value, sliding_window, kwargs["micro_batch"], options), None


AttentionInterface.register("one_kernel", attention)


@dataclass(frozen=True)
class Setting:
    """How a model is computed. how: "packed", or as benchmarks/models.py says it; fused: whether
    norms are one kernel."""

    how: str
    checkpointing: str = "false"
    fused: bool = True


@dataclass(frozen=True)
class Counts:
    """What forward and backward of a micro-batch take, beside the weights: bytes at the peak until
    the last block's backward pass begins, from there until the first block's, and at that after it;
    bytes moved, floating-point operations of products and of attention."""

    head: float
    blocks: float
    end: float
    moved: float
    products: float
    attention: float

    @property
    def peak(self) -> float:
        return max(self.head, self.blocks, self.end)

    def extended(self, other: "Counts", times: float) -> "Counts":
        """This, and `times` the difference of the other to it."""
        pairs = [(mine, getattr(other, name)) for name, mine in vars(self).items()]
        return Counts(*(mine + times * (its - mine) for mine, its in pairs))


def is_rms_norm(module, width: int, device, dtype) -> bool:
    """norms.is_rms_norm, with real values on the CPU."""
    with unset_fake_temporarily(), patch.object(torch.nn.functional, "rms_norm", RMS_NORM):
        return IS_RMS_NORM(module, width, torch.device("cpu"), dtype)


IS_RMS_NORM, RMS_NORM = norms.is_rms_norm, torch.nn.functional.rms_norm


class FusedNorm(torch.autograd.Function):
    """What F.rms_norm keeps and moves on a GPU: on a CPU it is several operators."""

    @staticmethod
    def forward(ctx, x, weight, recorder):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.moved = recorder.moved
        ctx.moved["blocks"] += 2 * x.nbytes
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        ctx.moved["blocks"] += 3 * x.nbytes
        return torch.empty_like(x), torch.empty_like(weight), None


@contextlib.contextmanager
def kernels_of_a_gpu(recorder: Recorder, memory: float):
    """On the CPU's fake tensors, what a GPU with so many bytes runs in one kernel, is one."""

    def add_product(total, a, b):
        recorder.products += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    def head_logits(hidden, weight, bias, scale, cap):
        recorder.products += 2 * hidden.shape[0] * weight.numel()
        return shape_logits(
            hidden.new_empty(len(hidden), len(weight), dtype=torch.float32), scale, cap
        )

    def rms_norm(x, shape, weight, eps):
        return FusedNorm.apply(x, weight, recorder)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.nn.functional, "rms_norm", rms_norm),
            (masters, "add_product", add_product),
            (model_module, "add_product", add_product),
            (model_module, "head_logits", head_logits),
            (model_module, "logits_bytes", lambda device: int(memory // 40)),
            (norms, "DEVICES", {"cpu"}),
            (norms, "is_rms_norm", is_rms_norm),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def count(config, setting: Setting, segments: tuple, memory: float) -> Counts:
    """The Counts of a model of transformers' `config`, in bfloat16, on a GPU with so many bytes.
    segments: (prompt, chosen, rejected) tokens of the pairs."""
    layers = config.get_text_config().num_hidden_layers
    if layers > 3 and alike(config):
        two, three = (count(shortened(config, n), setting, segments, memory) for n in (2, 3))
        return two.extended(three, layers - 2)
    recorder, dtype = Recorder("cpu"), torch.bfloat16
    with torch.device("meta"):
        model = build_model(config)
    with kernels_of_a_gpu(recorder, memory), FakeTensorMode(allow_non_fake_inputs=True):
        to_empty(model, device="cpu")
        model.model.tie_weights()
        model.packed, model.own_logits = setting.how == "packed", "all logits" in setting.how
        model.set_attention("one_kernel" if model.packed else None)
        if setting.checkpointing != "false":
            options = {"use_reentrant": False}
            if setting.checkpointing == "selective":
                options["context_fn"] = keep_products
            model.model.activation_checkpointing_enable(options)
        model.dtype = dtype
        model.masters = masters.keep_masters(model, dtype, {*other_parts(model.model).values()})
        if setting.fused:
            norms.fuse_norms(model, torch.device("cpu"), dtype)
        model.train()
        recorder.attended = attended(segments).sum()  # a query sees half of its own keys
        peaks = []

        def begins(module, inputs, out):
            out = out if isinstance(out, torch.Tensor) else out[0]
            out.register_hook(lambda gradient: peaks.append(recorder.restart_peak()))

        for block in text_blocks(model)[-1], text_blocks(model)[0]:
            block.register_forward_hook(begins)
        for tensor in (*model.parameters(), *model.buffers()):
            recorder.add(tensor)
        weights = recorder.live
        with recorder:
            model(pack([[[0] * n for n in sizes] for sizes in segments])).sum().backward()
    before = [peak - weights for peak in (*peaks[:2], recorder.peak)]
    moved = sum(recorder.moved.values())
    return Counts(*before, moved, recorder.products, recorder.attention)


def alike(config) -> bool:
    """Whether all blocks of a model have the same shapes and kind."""
    with torch.device("meta"):
        model = build_model(config)
    kinds = [
        [(name, p.shape) for name, p in block.named_parameters()] for block in text_blocks(model)
    ]
    text = config.get_text_config()
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == len(kinds)]
    return all(kind == kinds[0] for kind in kinds) and all(len({*map(str, v)}) == 1 for v in lists)


def text_blocks(model: PackedModel) -> list[torch.nn.Module]:
    """Those of a multimodal model's text part."""
    others = {*other_parts(model.model).values()}
    return [b for b in blocks(model) if not others & {*b.parameters()}]


def shortened(config, layers: int):
    """The config with fewer blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in [*vars(text).items()]:
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


@functools.cache
def forward_of(kind: str) -> str:
    """How train.py computes models of this kind, tried on a tiny one. Raises InputError if it
    refuses them, or if none can be made."""
    from benchmarks.models import choose

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return choose(kind, Path(folder))
        except InputError as error:
            raise InputError(f"models of the kind {kind} are refused: {error}") from None
        except Exception as error:
            raise InputError(f"no tiny model of the kind {kind} can be tried: {error}") from error


# ---- The prediction ------------------------------------------------------------------------------


def fsdp_traffic(layers: int, inside: int, whole: int) -> tuple[int, int, int, int]:
    """What FSDP2 moves in a forward and a backward pass in bfloat16: (gathers, gathered bytes,
    reductions, reduced bytes), with the sizes of the whole tensors. The model has `whole`
    parameters, `inside` of them in its `layers` blocks.

    Blocks are gathered for the forward pass and again for the backward pass, everything else once;
    all gradients are reduced in float32.
    """
    return 2 * layers + 1, 2 * (whole + inside), layers + 1, 4 * whole


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: on this rank, outside of all blocks, of the head, of the largest
    block, and of parts for images or sound."""

    whole: int
    local: int
    root: int
    head: int
    block: int
    layers: int
    others: int


def sizes_of(config, gpus: int, replicas: int) -> Sizes:
    """Of a model that is sharded over so many GPUs. Raises InputError if it cannot be."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with torch.device("meta"):
            model = build_model(config)
        others = sum(p.numel() for p in other_parts(model.model).values())
        blocks_of_text = [sum(p.numel() for p in b.parameters()) for b in text_blocks(model)]
        whole = sum(p.numel() for p in model.parameters()) - others
        head = model.model.get_output_embeddings().weight.numel()
        shard(model, "cpu", torch.bfloat16, replicas)
        local = sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()
    root, block = whole - sum(blocks_of_text), max(blocks_of_text)
    return Sizes(whole, local, root, head, block, len(blocks_of_text), others)


def masters_fit(sizes: Sizes, gpu: GPU) -> bool:
    """runtime/masters.py's decision."""
    taken = masters.BYTES * sizes.whole + 4 * sizes.others
    return taken <= masters.SHARE * gpu.memory


def parts_of_memory(
    sizes: Sizes, way: str, shards: int, counts: Counts, several: bool
) -> dict[str, float]:
    """Bytes on a GPU. way: "FSDP", or "gathered" if weights stay so for a step, or "alone" without
    it, or "streamed"; several: whether a step has several micro-batches."""
    others = {"other parts": 4 * sizes.others / shards} if sizes.others else {}
    if way in ("alone", "streamed"):
        parts = {"weights": 2, "gradients": 4}
        parts |= {"masters": 4, "Adam": 8} if way == "alone" else {}
        memory = {name: size * sizes.whole for name, size in parts.items()}
        return memory | others | {"activations": counts.peak}
    memory = {"parameters": 4 * sizes.local, "Adam": 8 * sizes.local} | others
    earlier = 4 * sizes.local if several else 0  # gradients of earlier micro-batches
    once = 1 + (shards > 1) / shards  # input and, on several ranks, output of a reduction
    root = 2 * sizes.root + 2 * sizes.head  # gathered, and the gradient of the head
    moments = [
        # The head: one block is gathered.
        {"gradients": earlier, "gathered": 2 * sizes.block + root, "activations": counts.head},
        # The blocks: two are gathered, one has a gradient, and that of the one before, whose
        # activations are gone, is reduced in float32.
        {
            "gradients": earlier,
            "gathered": 3 * 2 * sizes.block + root,
            "reduced": max(0, 4 * sizes.block * once - counts.blocks / sizes.layers),
            "activations": counts.blocks,
        },
        # The end: what is outside of the blocks, and its gradient.
        {
            "gradients": 4 * sizes.local,
            "gathered": (2 if shards > 1 else 4) * sizes.root,
            "reduced": 4 * sizes.root * once,
        },
    ]
    if way == "gathered":
        for moment, gradients in zip(moments, (2 * sizes.head, 2 * (sizes.head + sizes.block), 0)):
            moment["gathered"] = 2 * sizes.whole + gradients
        moments[2]["gathered"] = 2 * sizes.whole + 2 * sizes.root
    return memory | max(moments, key=lambda parts: sum(parts.values()))


def plan(
    recipe: Config,
    config,
    gpus: int,
    gpu: GPU,
    lengths: str,
    pairs: int,
    how: str = "packed",
    fused: bool = True,
    way: str = "",
    only_fits: bool = False,
) -> dict:
    """The prediction for a recipe on a model of transformers' `config`: figures by name, in bytes,
    seconds and operations.

    lengths: a name in LENGTHS; pairs: how many an epoch has; how, fused: see Setting; way: see
    parts_of_memory, by default train.py's. Of what does not fit, or with only_fits, the result is
    "fits", "way", "memory" and "peak", with the longest pair alone. Raises InputError if the batch
    cannot be spread over the GPUs, or if the model cannot be counted.
    """
    sizes = sizes_of(config, gpus, recipe.replicas)
    shards = gpus // recipe.replicas
    if not way:
        way = "alone" if gpus == 1 and masters_fit(sizes, gpu) else "FSDP"
        way = "streamed" if recipe.stream_optimizer else way
        kept = 16 * sizes.local + 2 * sizes.whole <= GATHERED * gpu.memory
        if gpus > 1 and kept and not recipe.micro_batch_tokens:
            way = "gathered"
    setting = Setting(how, recipe.activation_checkpointing, fused)

    # Pairs, and what each costs alone.
    segments = []
    for row in sample_lengths(lengths, STEPS * recipe.batch_size):
        cut = truncate([[0] * n for n in row], recipe.max_length, recipe.max_prompt_length)
        segments.append(tuple(map(len, cut)))
    padded = how != "packed"
    costs = [2 * (p + max(c, r)) if padded else p + c + r for p, c, r in segments]

    def cost(share) -> int:
        mine = [costs[i] for i in share]
        return len(mine) * max(mine) if padded else sum(mine)

    def take(share, setting: Setting = setting) -> Counts:
        try:
            return count(config, setting, tuple(segments[i] for i in share), gpu.memory)
        except Exception as error:  # a forward that asks for values, which fake tensors have not
            raise InputError(f"the model cannot be counted: {error!r}"[:500]) from error

    # Micro-batches: as runtime/rehearsal.py measures what fits.
    longest = sorted(range(len(costs)), key=lambda i: -costs[i])
    usable = gpu.memory - CONTEXT[gpus == 1]
    one = take(longest[:1])
    taken = functools.partial(parts_of_memory, sizes, way, shards)
    memory = taken(one, True)
    fits = sum(memory.values()) <= usable
    tokens = recipe.micro_batch_tokens
    known = {"fits": fits, "way": way, "memory": memory, "peak": one.peak}
    if only_fits or not (fits or tokens):
        return known
    if not tokens:
        two, sizes_of_two = take(longest[:2]), (cost(longest[:1]), cost(longest[:2]))

        def room(tokens: int) -> float:
            """What so many leave of the memory, a share of which stays free."""
            times = (tokens - sizes_of_two[0]) / (sizes_of_two[1] - sizes_of_two[0])
            parts = taken(one.extended(two, times), True)
            return (1 - KEPT_FREE) * usable - sum(parts.values())

        candidates = range(sizes_of_two[0], sum(costs[i] for i in longest[: recipe.batch_size]) + 1)
        tokens = candidates[max(0, bisect.bisect(candidates, 0, key=lambda n: -room(n)) - 1)]
    slowest = []
    for start in range(0, len(segments), recipe.batch_size):
        step = range(start, start + recipe.batch_size)
        for shares in spread_rows(step, costs, gpus, tokens, padded):
            slowest.append(max(shares, key=cost))
    largest = max(slowest, key=cost)
    counts = take(largest)
    micro_batches = len(slowest) / STEPS
    memory = taken(counts, micro_batches > 1)
    if recipe.micro_batch_tokens:
        fits = sum(memory.values()) <= usable

    # Time: in each micro-batch, the longer of the slowest rank's computation and the transfers.
    gathers, gathered, reductions, reduced = fsdp_traffic(
        sizes.layers, sizes.whole - sizes.root, sizes.whole
    )
    copied = SHARD_BYTES * sizes.local + GATHERED_BYTES * sizes.whole
    copied = 0 if way in ("alone", "streamed") else copied
    if way == "gathered":  # about half of it is of weights, now once a step
        copied *= (1 + 1 / micro_batches) / 2
        gathers, gathered = (sizes.layers + 1) / micro_batches, 2 * sizes.whole / micro_batches
    slower = SEVERAL.get(gpu.name, SEVERAL_OTHERS) if gpus > 1 else 1
    speed = (COMPILED if recipe.compile else 1) / slower
    attends = attended([segments[i] for i in largest]).sum()
    compute = []
    for share in slowest:
        part = cost(share) / cost(largest)
        looks = part if padded else attended([segments[i] for i in share]).sum() / attends
        compute.append(seconds(counts, part, looks, copied, gpu) / speed)
    # A ring over several nodes enters and leaves each node once and has the node's whole network.
    link = LINK_EFFICIENCY * (gpu.link if shards <= 8 else min(gpu.link, gpu.network))
    transfer = (shards - 1) * ((gathered + reduced) / shards / link + (gathers + reductions) * HOP)
    if recipe.replicas > 1:
        # Between replicas, every GPU has its share of the node's network. The all-reduce of each
        # shard is a reduction and a gather.
        across = LINK_EFFICIENCY * (gpu.network / 8 if gpus > 8 else gpu.link)
        one_way = reduced / shards / recipe.replicas / across + reductions * HOP
        transfer += 2 * (recipe.replicas - 1) * one_way / micro_batches  # once a step
    # What AdamW, the clipped norm, and the renewal of the weights read and write.
    adam = (50 if way in ("alone", "streamed") else 40) * sizes.local / gpu.copies
    if way == "streamed":  # there and back at the same time
        adam = max(adam, streaming.HOST_BYTES * sizes.local / (LINK_EFFICIENCY * gpu.pcie))
    step_seconds = sum(max(seconds, transfer) for seconds in compute) / STEPS + adam
    once = counts  # without what is computed again
    if setting.checkpointing != "false":
        once = take(largest, replace(setting, checkpointing="false"))
    needed = once.products + once.attention
    needed *= sum(map(cost, slowest)) / cost(largest) / STEPS
    return {
        "way": way,
        "how": how,
        "checkpointing": recipe.activation_checkpointing,
        "micro_batches": micro_batches,
        "largest_tokens": cost(largest),
        "memory": memory,
        "peak": counts.peak,
        "host_memory": streaming.HOST_BYTES * sizes.local if way == "streamed" else 0,
        "compute": sum(compute) / STEPS,
        "transfer": transfer * micro_batches,
        "adam": adam,
        "step": step_seconds,
        "epoch": step_seconds * (pairs // recipe.batch_size),
        "model_flops": needed / gpu.flops / step_seconds,
        "fits": fits,
        "bound": "computation" if sum(compute) > transfer * len(slowest) else "transfers",
    }


def seconds(counts: Counts, part: float, looks: float, copied: float, gpu: GPU) -> float:
    """Of a micro-batch that has `part` of the counted tokens and `looks` of the counted attention,
    in which FSDP moves `copied` bytes."""
    products = counts.products * part / gpu.products
    attention = counts.attention * looks / (ATTENTION * gpu.flops)
    return IDLE + products + attention + (counts.moved * part + copied) / gpu.copies


def cheapest(recipe: Config, config, gpus: int, gpu: GPU, **rest) -> dict:
    """The fastest plan that fits, of all values of activation_checkpointing and, on one GPU, of
    stream_optimizer; or the smallest."""
    found = []
    for streamed in {recipe.stream_optimizer, gpus == 1}:
        for value in ("false", "selective", "true"):
            values = {"activation_checkpointing": value, "stream_optimizer": streamed}
            try:
                found.append(plan(replace(recipe, **values), config, gpus, gpu, **rest))
            except InputError:  # some models change a product that would be kept
                if value != "selective":
                    raise
    fitting = [result for result in found if result["fits"]]
    if fitting:
        return min(fitting, key=lambda result: result["step"])
    return min(found, key=lambda result: sum(result["memory"].values()))


def alternatives(recipe: Config, config, gpus: int, gpu: GPU, **rest) -> list[str]:
    """What would fit, where nothing does: more of these GPUs, one of another, adapters."""
    found, recipe = [], replace(recipe, activation_checkpointing="true")

    def fits(number: int, card: GPU) -> bool:
        streamed = replace(recipe, stream_optimizer=number == 1)
        return plan(streamed, config, number, card, **rest, only_fits=True)["fits"]

    counts = [n for n in (2, 4, 8, 16, 32, 64) if gpus < n <= recipe.batch_size]
    if enough := next((n for n in counts if fits(n, gpu)), None):
        found.append(f"--gpus {enough}")
    larger = sorted((c for c in GPUS.values() if c.memory > gpu.memory), key=lambda c: c.memory)
    if card := next((card for card in larger if fits(gpus, card)), None):
        found.append(f"--gpu {card.name}")
    sizes = sizes_of(config, 1, 1)
    adapters = (
        2 * sizes.whole
        + 4 * sizes.others
        + plan(recipe, config, 1, gpu, **rest, only_fits=True)["peak"]
    )
    if gpus == 1 and adapters < gpu.memory:
        found.append(f"adapters, forks/lora.patch: about {adapters / 1e9:.0f} GB")
    return found


def row(result: dict) -> str:
    """The prediction in one line, as in the table of docs/plan.md."""
    cells = [f"{sum(result['memory'].values()) / 1e9:.0f}"]
    cells += [f"{result[name]:.2f}" for name in ("compute", "transfer", "step")]
    cells += [f"{result['epoch'] / 60:.1f}", f"{result['model_flops']:.0%}", result["bound"]]
    return " | ".join(cells)


REPORT = """\
a step: {micro_batches:.1f} micro-batches, the largest of {largest_tokens} tokens a GPU ({how})
computation   {compute:8.2f} s
transfers     {transfer:8.2f} s, hidden behind computation where that is longer
optimizer     {adam:8.3f} s
together      {step:8.2f} s, bound by {bound}; {model_flops:.0%} of the datasheet's operations
an epoch      {hours:8.2f} h
with          --activation_checkpointing {checkpointing}{streaming}"""


def report(result: dict, gpu: GPU) -> str:
    """The prediction in full; of what does not fit, its memory."""
    total = sum(result["memory"].values()) / 1e9
    memory = [f"{name:<14}{size / 1e9:8.1f} GB\n" for name, size in result["memory"].items()]
    memory.append(f"together      {total:8.1f} GB of {gpu.memory / 1e9:.0f}: ")
    memory.append("fits\n" if result["fits"] else "DOES NOT FIT")
    if not result["fits"]:
        return "".join(memory)
    more = {"hours": result["epoch"] / 3600, "streaming": ""}
    if result["way"] == "streamed":
        host = f" and {result['host_memory'] / 1e9:.0f} GB of the host's memory"
        more["streaming"] = " --stream_optimizer true" + host
    return "".join(memory) + REPORT.format(**result, **more)


def choose_gpu(args) -> GPU:
    """The card of the table, or the one that flags describe."""
    gpu = GPUS[args.gpu]
    given = {"memory": args.gpu_memory, "flops": args.tflops, "bandwidth": args.bandwidth}
    scales = {"memory": 1e9, "flops": 1e12, "bandwidth": 1e12}
    return replace(gpu, **{key: value * scales[key] for key, value in given.items() if value})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", help="folder, hub id, or a recipe with its values")
    parser.add_argument("--gpus", type=at_least(1), default=1, help="GPUs in all, eight in a node")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpu_memory", type=float, help="GB, of another card")
    parser.add_argument("--tflops", type=float, help="its datasheet's, dense, bfloat16")
    parser.add_argument("--bandwidth", type=float, help="of its memory, TB/s")
    parser.add_argument(
        "--lengths",
        choices=LENGTHS,
        default="ultrafeedback",
        help="the pairs' lengths, before truncation",
    )
    parser.add_argument("--pairs", type=at_least(1), default=60_000, help="pairs in an epoch")
    parser.add_argument("--row", action="store_true", help="the recipe as it is, in a line")
    args, flags = parser.parse_known_args()
    base = [args.model] if args.model.endswith(".yaml") else [PAPER, "--model", args.model]
    recipe, gpu = parse_args([*base, *flags]), choose_gpu(args)
    config = load_config(resolve_model(recipe.model))
    how = forward_of(config.model_type)
    rest = {"lengths": args.lengths, "pairs": args.pairs, "how": how}
    given = any(flag.startswith("--activation_checkpointing") for flag in flags)
    result = (plan if given or args.row else cheapest)(recipe, config, args.gpus, gpu, **rest)
    if args.row and result["fits"]:
        print(row(result))
        return
    print(report(result, gpu))
    if not result["fits"]:
        found = alternatives(recipe, config, args.gpus, gpu, **rest)
        print("what fits:", "; or ".join(found) or "nothing that is known here")


if __name__ == "__main__":
    run_command(main, shows=True)
