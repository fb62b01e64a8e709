"""A Hugging Face causal language model that is sharded with FSDP2 and reads packed pairs.

`load_model` → `PackedModel`, whose forward takes a MicroBatch to the log-prob of every response
token; `export` writes it back.
"""

import copy
import functools
import hashlib
import inspect
import json
import os
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp_state_dict
import torch.nn.functional as F
import transformers
from datasets import Dataset
from huggingface_hub import snapshot_download
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from data import CACHE_DIR, InputError, MicroBatch, end_of_turn, fingerprint, pack, pack_rows
from loss import sum_logps

# The language-model head runs on as many response tokens at once as keep one float32 logits buffer
# below this size.
LOGITS_BYTES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20}


# ---- The packed forward --------------------------------------------------------------------------


class PackedModel(torch.nn.Module):
    """A causal language model whose forward takes packed pairs to log-probs and never builds the
    whole logits.

    model: a transformers model with the attention implementation "packed".
    stock_attention: the attention implementation that the model would have used on its own.
    """

    def __init__(self, model, stock_attention: str = "sdpa"):
        super().__init__()
        self.model, self.stock_attention = model, stock_attention

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Log-prob of every response token: (R,) float32, in the order of batch.targets."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            micro_batch=batch,  # reaches packed_attention through the model's keyword arguments
            use_cache=False,
        ).last_hidden_state[0]  # (T, hidden size)
        return self.token_logps(hidden[batch.predictors], batch.targets)

    def token_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The head's log-probs of `targets`: (R, hidden size), (R,) int64 → (R,) float32."""
        head = self.model.get_output_embeddings()
        return TokenLogps.apply(hidden, head.weight, getattr(head, "bias", None), targets)

    def plain_hidden(self, ids: torch.Tensor, attention: str | None = None) -> torch.Tensor:
        """Last hidden states by the model's own forward, nothing packed: (n,) → (n, hidden size).

        attention: transformers' name of an implementation; None: the model's own choice.
        """
        self.model.set_attn_implementation(attention or self.stock_attention)
        hidden = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        self.model.set_attn_implementation("packed")
        return hidden

    def plain_logps(self, ids: torch.Tensor, attention: str | None = None) -> torch.Tensor:
        """Log-probs of ids[1:] by the model's own forward: (n,) int64 → (n-1,) float32."""
        return self.token_logps(self.plain_hidden(ids, attention)[:-1], ids[1:])

    def head_difference(self, ids: torch.Tensor) -> torch.Tensor:
        """Largest difference between the model's own logits and its head applied to its last hidden
        states, relative to the largest logit: 0 unless the model changes its logits after the head.
        (n,) int64 → () tensor."""
        expected = self.model.get_output_embeddings()(self.plain_hidden(ids))
        self.model.set_attn_implementation(self.stock_attention)
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
        self.model.set_attn_implementation("packed")
        return (expected - logits).abs().max() / logits.abs().max()

    def reshard(self) -> None:
        """Free the parameters that a forward without a backward leaves gathered: in a sharded model
        FSDP's method of this name replaces this one. A model that is not sharded gathers none."""


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets], without ever holding all logits:
    apply(hidden, weight, bias, targets).

    hidden: (R, d); weight: (V, d); bias: (V,) or None; targets: (R,) int64.
    Returns (R,) float32 (float64 for float64).

    Forward and backward go through the rows in chunks, one (rows, V) buffer at a time. The backward
    starts with the last chunk, whose exponentials the forward has kept, and computes the others'
    again. The weight's gradient is summed in place, where autograd would hold a second (V, d) one,
    and softmax is in float32 also where the model computes in bfloat16
    (F.linear_cross_entropy rounds its result).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        count = -(-len(targets) * 4 * weight.shape[0] // LOGITS_BYTES[hidden.device.type])
        size = -(-len(targets) // count)
        ctx.chunks = [slice(start, start + size) for start in range(0, len(targets), size)]
        target_logits, normalizers = [], []
        for rows in ctx.chunks:
            ctx.kept = None  # one chunk's buffer is freed before the next takes its own
            logits = head_logits(hidden[rows], weight, bias)
            target_logits.append(logits.gather(1, targets[rows, None])[:, 0])
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()  # torch.logsumexp would take a second buffer
            sums = exponentials.sum(dim=1, keepdim=True)
            normalizers.append((largest + sums.log())[:, 0])
            ctx.kept = exponentials, sums
            del logits, exponentials
        normalizers = torch.cat(normalizers)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        return torch.cat(target_logits) - normalizers

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for rows in reversed(ctx.chunks):
            if ctx.kept:
                softmax, sums = ctx.kept
                softmax.div_(sums)
                ctx.kept = None
            else:
                softmax = head_logits(hidden[rows], weight, bias)
                softmax.sub_(normalizers[rows, None]).exp_()
            # The gradient of log p(target) with respect to the logits is onehot(target) − softmax.
            g = grad[rows, None]
            grad_logits = softmax.mul_(-g).scatter_add_(1, targets[rows, None], g).to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight.addmm_(grad_logits.T, hidden[rows])
            if bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            del softmax, grad_logits  # before the next chunk's
        return grad_hidden, grad_weight, grad_bias, None


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
    """(n, d) → (n, V), in float32 at least."""
    logits = F.linear(hidden, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def packed_attention(
    module, query, key, value, mask, scaling=None, sliding_window=None, micro_batch=None, **kwargs
):
    """Causal attention within [prompt, chosen] and within [prompt, rejected] of every pair, and
    nowhere else. A function for transformers' AttentionInterface.

    query: (1, heads, T, d); key, value: (1, key-value heads, T, d), of micro_batch's T tokens; mask
    is not used. Returns (1, T, heads, d) and None, in place of weights.
    Raises InputError for attention with further terms.
    """
    extra = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if micro_batch is None or extra:
        reason = ", ".join(extra) or "no segments arrived"
        raise InputError(f"packed attention cannot do what this model's does: {reason}")
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}

    def attend(q, k, v):
        """Causal attention of the last n of m tokens to all m: (1, heads, n, d)."""
        n, m = q.shape[2], k.shape[2]
        window = sliding_window or m
        if n == m <= window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        visible = torch.ones(n, m, dtype=torch.bool, device=q.device)
        visible = visible.tril(m - n).triu(m - n - window + 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, **options)

    outputs = []
    sizes = [p + c + r for p, c, r in micro_batch.segments]
    of_pairs = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    for (p, c, _), pair in zip(micro_batch.segments, of_pairs):
        outputs.append(attend(*(x[:, :, : p + c] for x in pair)))
        q, k, v = pair
        k, v = (torch.cat((x[:, :, :p], x[:, :, p + c :]), dim=2) for x in (k, v))
        if q.is_cuda:  # the prompt's queries run again: attention is fast there without a mask only
            q = torch.cat((q[:, :, :p], q[:, :, p + c :]), dim=2)
            outputs.append(attend(q, k, v)[:, :, p:])
        else:
            outputs.append(attend(q[:, :, p + c :], k, v))
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1), None


# Under torch.compile, blocks are compiled around this function. The lengths differ in every
# micro-batch: passed on as an object, which the compiler does not look into, they do not have the
# blocks compiled again.
AttentionInterface.register("packed", torch.compiler.disable(packed_attention))


# ---- Loading and sharding ------------------------------------------------------------------------


def check_positions(name: str, max_length: int) -> None:
    """Raise InputError if the model has fewer than max_length positions."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    positions = getattr(config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise InputError(f"max_length={max_length} exceeds the model's {positions} positions")


def build_model(config) -> PackedModel:
    """The architecture of a transformers config, float32, on the current default device, without
    dropout. Raises InputError if the model cannot run packed."""
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    try:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        stock_attention = model.config._attn_implementation
        model.set_attn_implementation("packed")
    except Exception as error:  # each kind of unfit model has an exception of its own
        reason = f"a {config.model_type} model cannot be trained packed: {error!r}"
        raise InputError(reason) from error
    return PackedModel(model, stock_attention)


def blocks(model: PackedModel) -> list[torch.nn.Module]:
    """The transformer blocks, which transformers derives from a class of their own. Raises
    InputError if there are none."""
    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        name = type(model.model).__name__
        raise InputError(f"{name} has no blocks of transformers' class GradientCheckpointingLayer")
    return found


def shard(model: PackedModel, device: str, dtype: torch.dtype, replicas: int = 1) -> None:
    """`fully_shard` every transformer block, then the rest, over all ranks, or over each of
    `replicas` groups of ranks.

    Parameters, their gradients' reduction and the optimizer's state stay float32; forward and
    backward run in `dtype`.
    """
    ranks = dist.get_world_size()
    if ranks % replicas:
        raise InputError(f"replicas={replicas} does not divide the number of ranks, {ranks}")
    if replicas == 1:
        mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    else:
        shape = (replicas, ranks // replicas)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replica", "shard"))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "plain_logps")
    register_fsdp_forward_method(model, "head_difference")


def load_model(
    name: str,
    device: str,
    dtype: torch.dtype,
    replicas: int = 1,
    activation_checkpointing: bool = False,
    compile: bool = False,
    longest: int = 32,
) -> PackedModel:
    """Load a model from a folder or hub id and shard it. Only rank 0 reads the weights; the other
    ranks get theirs from it. `device` is "cpu" or "cuda"; `longest` the most tokens of prompt +
    response that will be used. Collective.

    Raises InputError if weights are missing, or if the packed forward does not equal the model's
    own (self_check).
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        model = build_model(config)
    if activation_checkpointing:
        # Called gradient_checkpointing_enable before transformers 5.23; vLLM still needs an older
        # one.
        enable = getattr(model.model, "activation_checkpointing_enable", None)
        (enable or model.model.gradient_checkpointing_enable)({"use_reentrant": False})
    if not (dist.get_world_size() == replicas == 1 and dtype == torch.float32):
        # A single process in float32 has nothing to shard or cast, and FSDP would copy every weight
        # and gradient.
        shard(model, device, dtype, replicas)
    whole, problem = None, [None]
    if dist.get_rank() == 0:
        try:
            whole = read_weights(name)
        except Exception as error:
            problem = [f"{name}: the weights cannot be used: {error}"]
    dist.broadcast_object_list(problem, src=0)  # so that no rank waits for weights that do not come
    if problem[0]:
        raise InputError(problem[0])
    model.to_empty(device=device)
    model.model.tie_weights()  # to_empty may have given tied weights a tensor each
    state = {f"model.{key}": value for key, value in whole.state_dict().items()} if whole else {}
    options = dcp_state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state_dict.set_model_state_dict(model, state, options=options)
    for key, buffer in model.named_buffers():  # rotary frequencies and the like
        if whole:
            buffer.copy_(whole.get_buffer(key.removeprefix("model.")))
        dist.broadcast(buffer, src=0)
    model.train()
    self_check(model, device, longest, tolerance=1e-3 if dtype == torch.float32 else 0.05)
    for block in blocks(model) if compile else ():
        # A checkpoint is compiled as a whole or not at all, and the attention never is: so with
        # checkpointing, what lies within a block is compiled.
        for part in block.children() if activation_checkpointing else [block]:
            part.compile(dynamic=True)  # the number of tokens differs in every micro-batch
    return model


def read_weights(name: str):
    """The model with all its weights in CPU memory, in float32: a lower precision would round its
    buffers, too. Raises InputError if weights are missing or do not fit the config."""
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InputError(f"missing or of the wrong shape: {info}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and head.weight is not embedding.weight:
        raise InputError("the config ties the head to the embeddings, but the file holds both")
    return model


def weights_fingerprint(name: str) -> str:
    """SHA-256 over the weight files of a folder or hub id, which are fetched if need be. Raises
    InputError if it has none."""
    for kind in ("*.safetensors", "*.bin"):
        folder = name
        if not Path(name).is_dir():
            folder = snapshot_download(name, allow_patterns=kind, ignore_patterns="*/*")
        files = sorted(Path(folder).glob(kind))
        if files:
            break
    else:
        raise InputError(f"{name}: no weights (.safetensors or .bin) are there")
    digest = hashlib.sha256()
    for path in files:
        digest.update(file_digest(path, path.stat().st_size, path.stat().st_mtime_ns))
    return digest.hexdigest()


@functools.cache
def file_digest(path: Path, size: int, time: int) -> bytes:
    """SHA-256 of a file, read once for each size and time in ns that it has."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@torch.no_grad()
def self_check(model: PackedModel, device: str, longest: int, tolerance: float) -> None:
    """Compare the packed forward with the model's own on random tokens: two short pairs and one of
    `longest` tokens, which shows sliding windows and rotary embeddings that change with the length.
    Collective.

    Raises InputError if a log-prob differs by more than `tolerance`, or by more than five times
    what the model's own forward differs between its attention implementation and the eager one (in
    bfloat16, rounding alone can do that), or if its logits are not what its head gives. Such are
    recurrent models, and models that scale or cap their logits.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (7, 5, 9),
        (4, 8, 3),
        (max(2, longest - 8), 8, 6),
    ]  # tokens of prompt, chosen, rejected
    words = model.model.get_input_embeddings().weight.shape[0]
    pairs = [torch.randint(words, (sum(n),), generator=generator).split(n) for n in shapes]

    def plain_logps(attention: str | None = None) -> torch.Tensor:
        logps = []
        for prompt, *responses in pairs:
            for response in responses:
                ids = torch.cat((prompt, response)).to(device)
                logps.append(model.plain_logps(ids, attention)[len(prompt) - 1 :])
        return torch.cat(logps)

    name = type(model.model).__name__
    try:
        packed = model(pack([tuple(ids.tolist() for ids in pair) for pair in pairs]).to(device))
        plain = plain_logps()
        difference = (packed - plain).abs().max()
        exceeds = (~(difference <= tolerance)).int()  # also if it is NaN
        dist.all_reduce(exceeds, op=dist.ReduceOp.MAX)  # what follows is collective
        if exceeds.item():
            tolerance = max(tolerance, 5 * (plain_logps("eager") - plain).abs().max().item())
        head = model.head_difference(torch.cat(pairs[0]).to(device)).item()
    except Exception as error:
        raise InputError(f"{name} cannot be trained packed: {error!r}") from error
    model.reshard()
    if not (difference.item() <= tolerance and head <= 1e-3):
        raise InputError(
            f"{name} cannot be trained packed: its log-probs differ from the model's own forward "
            f"by up to {difference.item():.2g} (accepted: {tolerance:.2g}), its logits from its "
            f"head's by {head:.1%}. Recurrent models, and models that scale or cap their logits "
            "after the head, are not supported."
        )


# ---- Log-probs of whole data sets ----------------------------------------------------------------


@torch.no_grad()
def response_logps(model: PackedModel, pairs: Dataset, micro_batches: list) -> torch.Tensor:
    """log p(response | prompt) of every pair of load_pairs: (pairs, 2) float64 on the model's
    device, chosen and rejected. micro_batches: of spread_pairs. Collective."""
    rank, device = dist.get_rank(), next(model.parameters()).device
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    progress = tqdm(micro_batches, "log-probs", disable=rank > 0, dynamic_ncols=True)
    for shares in progress:
        batch = pack_rows(pairs, shares[rank]).to(device)
        sums[shares[rank]] = sum_logps(model(batch).double(), batch.lengths)
    model.reshard()
    dist.all_reduce(sums)  # every pair is on one rank, and 0 on the others
    return sums


def reference_logps(
    model: PackedModel, name: str, pairs: Dataset, micro_batches: list, dtype: torch.dtype
) -> torch.Tensor:
    """response_logps of the model as it was loaded from `name`, as float32 on CPU. Collective.

    Rank 0 keeps them beside the tokenized pairs: for the same tokens, weights and dtype they are
    read from there.
    """
    file, sums = None, None
    if dist.get_rank() == 0:
        code = inspect.getsource(
            sys.modules[__name__]
        )  # a fork that edits this file never meets stale log-probs
        key = (
            fingerprint(pairs),
            weights_fingerprint(name),
            code,
            str(dtype),
            transformers.__version__,
        )
        file = (
            CACHE_DIR / "reference" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
        )
        if file.exists():
            sums = torch.from_numpy(np.load(file))
    found = [sums]
    dist.broadcast_object_list(found, src=0)
    sums = found[0]
    if sums is None:
        sums = response_logps(model, pairs, micro_batches).cpu()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_name(f"{uuid.uuid4().hex}.npy")
            np.save(scratch, sums.numpy())
            os.replace(scratch, file)
    return sums.float()


# ---- Export --------------------------------------------------------------------------------------


def export(model: PackedModel, name: str, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write the model, its tokenizer with chat template, and its generation config to `folder` in
    Hugging Face format, with the weights in `dtype`. `name` is where the model was loaded from.
    Collective; the folder appears whole.
    """
    options = dcp_state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state_dict.get_model_state_dict(model, options=options)  # empty on ranks above 0
    if dist.get_rank() == 0:
        # Tied weights stay one tensor.
        converted = {value.data_ptr(): value.to(dtype) for value in state.values()}
        state = {k.removeprefix("model."): converted[v.data_ptr()] for k, v in state.items()}
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        whole.generation_config = GenerationConfig()
        scratch = folder.with_name(folder.name + ".part")
        shutil.rmtree(scratch, ignore_errors=True)
        whole.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)
        # As text: transformers refuses to save some of the generation configs that it loads.
        generation = json.dumps(generation_config(name, config, tokenizer), indent=2)
        (scratch / "generation_config.json").write_text(generation)
        os.rename(scratch, folder)
    dist.barrier()


def generation_config(name: str, config, tokenizer) -> dict:
    """The generation config that came with the model, made to stop at the end-of-turn token that
    was trained."""
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none
        generation = GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = {token: None for token in (*ends, end_of_turn(tokenizer)[0]) if token is not None}
    return generation.to_diff_dict() | {"eos_token_id": [*ends]}
