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
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from data import (
    CACHE_DIR,
    InputError,
    MicroBatch,
    end_of_turn,
    files_digest,
    fingerprint,
    highest_token,
    pack,
    pack_rows,
)
from loss import sum_logps

# The language-model head runs on as many response tokens at once as keep one float32 logits buffer
# below this size.
LOGITS_BYTES = {"cpu": 192 * 2**20, "cuda": 2 * 2**30}
FILE_BYTES = 2**30  # of an exported file, unless one tensor is larger


# ---- The packed forward --------------------------------------------------------------------------


class PackedModel(torch.nn.Module):
    """A causal language model whose forward takes packed pairs to log-probs, and whose logits exist
    in chunks of LOGITS_BYTES only.

    model: a transformers model with the attention implementation "packed", registered below.
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
    """log softmax(hidden @ weight.T + bias)[targets], with logits in chunks of LOGITS_BYTES:
    apply(hidden, weight, bias, targets).

    hidden: (R, d); weight: (V, d); bias: (V,) or None; targets: (R,) int64.
    Returns (R,) float32 (float64 for float64).

    Forward and backward go through the rows in chunks, one float32 (rows, V) at a time. The
    backward starts with the last chunk, whose exponentials the forward has kept, and computes the
    others' again. The weight's gradient is summed in place, where autograd would hold a second
    (V, d) one, and softmax is in float32 also where the model computes in bfloat16
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
        # Several chunks are summed in float32: bfloat16 would round the sum with each of them.
        sum_dtype = torch.float32 if len(ctx.chunks) > 1 else weight.dtype
        sum_dtype = torch.promote_types(weight.dtype, sum_dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=sum_dtype)
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
            if sum_dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            else:
                grad_weight += grad_logits.T @ hidden[rows]
            if bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            del softmax, grad_logits  # before the next chunk's
        return grad_hidden, grad_weight, grad_bias, None  # autograd casts them


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
    one_width = query.shape[-1] == value.shape[-1]
    if query.is_cuda and one_width and varlen_works(query.dtype, query.shape[-1]):
        return varlen_attention(query, key, value, sliding_window, micro_batch, options), None

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
    sizes = [size for p, c, r in micro_batch.segments for size in (p + c, r)]
    parts = list(zip(*(x.split(sizes, dim=2) for x in (query, key, value))))
    for (p, _, _), first, rejected in zip(micro_batch.segments, parts[::2], parts[1::2]):
        q, k, v = first  # of prompt and chosen
        outputs.append(attend(q, k, v))
        k, v = (torch.cat((x[:, :, :p], y), dim=2) for x, y in zip((k, v), rejected[1:]))
        outputs.append(attend(rejected[0], k, v))
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1), None


def varlen_attention(query, key, value, sliding_window, micro_batch: MicroBatch, options: dict):
    """packed_attention in one kernel call, for GPUs: as many sequences of queries as of keys, in
    each of which the last query sees all keys."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    longest = max(p + max(c, r) for p, c, r in micro_batch.segments)
    return varlen_attn(
        q,
        k.index_select(0, micro_batch.keys),
        v.index_select(0, micro_batch.keys),
        micro_batch.query_starts,
        micro_batch.key_starts,
        max_q=longest,
        max_k=longest,
        window_size=((sliding_window or 0) - 1, 0),  # −1: no limit; 0: nothing that comes later
        **options,
    )[None]


@functools.cache
def varlen_works(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this GPU's FlashAttention takes sequences of different lengths in one call."""
    x = torch.zeros(1, 1, head_dim, dtype=dtype, device="cuda")
    starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    try:
        varlen_attn(x, x, x, starts, starts, 1, 1, window_size=(-1, 0))
    except (RuntimeError, NotImplementedError):  # an older card, float32, or heads of another size
        return False
    return True


# Under torch.compile, blocks are compiled around this function. The lengths differ in every
# micro-batch: in an object that the compiler does not look into, they cause no recompilation.
AttentionInterface.register("packed", torch.compiler.disable(packed_attention))


# ---- Loading and sharding ------------------------------------------------------------------------


def load_config(name: str):
    """The config of a folder or hub id. Never runs code that comes with it. Raises InputError if
    transformers can make nothing of it."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # not there, cut off, a kind of model that it does not know
        raise InputError(f"{name}: its config.json cannot be used: {error}") from error


def check_model(name: str, max_length: int, data_sets: list[Dataset]) -> str:
    """Fetch the weights of a folder or hub id. Returns model_fingerprint. To be called by every
    rank, while none waits for another: reading all files can take longer than a collective may.

    Raises InputError if there are none, if the model has fewer than max_length positions, or no
    embedding for a token of the data sets (see load_pairs).
    """
    config = load_config(name).get_text_config()
    positions = getattr(config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise InputError(f"max_length={max_length} exceeds the model's {positions} positions")
    highest = max(map(highest_token, data_sets))
    if highest >= config.vocab_size:
        problem = f"the tokenizer gives token {highest}, the model has {config.vocab_size}"
        raise InputError(f"{name}: {problem}: they do not belong together")
    weights_folder(name)
    return model_fingerprint(name)


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
    """Load a model from a folder or hub id and shard it; every rank reads its own shards only.
    `device` is "cpu" or "cuda"; `longest` the most tokens of prompt + response that will be used.
    Collective.

    Raises InputError if weights are missing, if the packed forward does not equal the model's own,
    or if attention is wrong on this machine (self_check).
    """
    with torch.device("meta"):
        model = build_model(load_config(name))
    if activation_checkpointing:
        # Called gradient_checkpointing_enable before transformers 5.23; vLLM still needs an older
        # one.
        enable = getattr(model.model, "activation_checkpointing_enable", None)
        (enable or model.model.gradient_checkpointing_enable)({"use_reentrant": False})
    if not (dist.get_world_size() == replicas == 1 and dtype == torch.float32):
        # A single process in float32 has nothing to shard or cast, and FSDP would copy every weight
        # and gradient.
        shard(model, device, dtype, replicas)
    model.to_empty(device=device)
    model.model.tie_weights()  # to_empty may have given tied weights a tensor each
    load_weights(model, weights_folder(name))
    model.train()
    self_check(model, device, longest, tolerance=1e-3 if dtype == torch.float32 else 0.05)
    for block in blocks(model) if compile else ():
        # A checkpointed block is compiled as a whole or not at all, and the attention never is: so
        # with checkpointing, what lies within a block is compiled.
        for part in block.children() if activation_checkpointing else [block]:
            part.compile(dynamic=True)  # the number of tokens differs in every micro-batch
    return model


@torch.no_grad()
def load_weights(model: PackedModel, folder: str) -> None:
    """Read a folder of weights_folder into the model, every rank only its own shards, and set what
    no file holds, such as rotary frequencies. Collective.

    Raises InputError if the config ties weights that differ in the file, or if one is not finite.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that transformers only sets the buffers
    model.model.initialize_weights()
    read = functools.partial(dcp.HuggingFaceStorageReader, folder)
    state = stored_tensors(model.model)
    dcp.load(state, storage_reader=read())
    for name, tensor in state.items():
        if not tensor.sum().isfinite():
            raise InputError(f"{folder}: {name} is not finite: its file is damaged")
    for name in read().read_metadata().state_dict_metadata:
        if name in model.model.state_dict() and name not in state:
            parameter = model.model.get_parameter(name)  # tied to another one, and in the file, too
            other = torch.empty_like(parameter)
            dcp.load({name: other}, storage_reader=read())
            if not torch.equal(parameter, other):  # the whole tensors, also if they are sharded
                raise InputError(f"{folder}: the config ties {name}, the file holds another one")


def stored_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors of a transformers model that its files hold, by name; tied ones once."""
    names = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return dict(model.named_parameters()) | buffers


def weights_folder(name: str) -> str:
    """A folder that holds the weights of a folder or hub id as safetensors with the model's own
    names: the folder itself (a hub id's is fetched) or, where its files are of another kind or name
    their tensors otherwise, a copy in the cache, converted once for each version of transformers.
    Any number of processes may call this at a time; they wait at a file lock and not in a
    collective.

    Raises InputError if weights are quantized, missing, there twice, or do not fit the config.
    """
    folder, config = fetch_weights(name), load_config(name)
    # Names and shapes can be those of a plain model: its 8-bit values would be taken as they are.
    if getattr(config, "quantization_config", None):
        raise InputError(f"{name}: its weights are quantized; give the model before quantization")
    with torch.device("meta"):
        needed = stored_tensors(build_model(config).model)
    try:
        stored = dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    except Exception:  # no safetensors, or broken ones: transformers will say how
        stored = {}
    twice = [key for key in needed if key in stored and len(stored[key].chunks) > 1]
    if twice:
        raise InputError(f"{folder}: more than one .safetensors file holds {twice[0]}: remove one")
    if all(key in stored and stored[key].size == value.shape for key, value in needed.items()):
        return folder
    # Versions of transformers name tensors differently.
    folder_name = f"{model_fingerprint(name)}-{transformers.__version__}"
    converted = CACHE_DIR / "weights" / folder_name
    converted.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{converted}.lock"):
        if not converted.exists():
            try:
                whole, info = AutoModelForCausalLM.from_pretrained(
                    name,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # the error below names them
                    trust_remote_code=False,
                )
            except Exception as error:
                raise InputError(f"{name}: the weights cannot be used: {error}") from error
            if info["missing_keys"] or info["mismatched_keys"]:
                raise InputError(f"{name}: weights are missing or of the wrong shape: {info}")
            scratch = Path(f"{converted}.part")
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir()
            tensors = {key: value.contiguous() for key, value in stored_tensors(whole).items()}
            save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
            os.rename(scratch, converted)
    return str(converted)


def fetch_weights(name: str) -> str:
    """The folder with the weight files of a folder or hub id; those of a hub id are fetched, in one
    format only. Raises InputError if there are none."""
    for kind in ("*.safetensors", "*.bin"):
        folder = name
        if not Path(name).is_dir():
            try:
                # Mistral's "consolidated" files are a second copy of the same weights.
                ignored = ["*/*", "consolidated*"]
                wanted = [kind, "config.json"]
                folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignored)
            except Exception as error:  # not there, a licence not accepted, no network
                raise InputError(f"{name}: the weights cannot be fetched: {error}") from error
        if any(Path(folder).glob(kind)):
            return folder
    raise InputError(f"{name}: no weights (.safetensors or .bin) are there")


def model_fingerprint(name: str) -> str:
    """SHA-256 over the weight files and the config of a folder or hub id."""
    folder = Path(fetch_weights(name))
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return files_digest([folder / "config.json", *weights])


@torch.no_grad()
def self_check(model: PackedModel, device: str, longest: int, tolerance: float) -> None:
    """Compare the packed forward with the model's own on random tokens: two short pairs and one of
    `longest` tokens, which shows sliding windows and rotary embeddings that change with the length.
    And compare packed_attention in every layer with one masked attention in float32. Collective.

    Raises InputError if a log-prob differs by more than `tolerance` and by more than five times the
    difference that the model's own forward has between its attention implementation and the eager
    one, on prompts of at most 2,000 tokens (in bfloat16, rounding alone can do that); if its logits
    are not what its head gives, as in models that scale or cap them; or if attention or its
    gradient is wrong by more than a tenth.
    """
    vocab_size = model.model.get_input_embeddings().weight.shape[0]
    random = np.random.default_rng(0)

    def random_pairs(*sizes: tuple[int, int, int]) -> list[list[list[int]]]:
        """Pairs of random tokens, of these numbers of tokens in prompt, chosen and rejected."""
        return [[random.integers(vocab_size, size=n).tolist() for n in row] for row in sizes]

    pairs = random_pairs((7, 5, 9), (4, 8, 3), (max(2, longest - 8), 8, 6))

    def plain_logps(attention: str | None = None, longest_prompt: int = longest) -> torch.Tensor:
        logps = []
        for prompt, *responses in pairs:
            for response in responses:
                ids = torch.tensor(prompt[-longest_prompt:] + response, device=device)
                logps.append(model.plain_logps(ids, attention)[-len(response) :])
        return torch.cat(logps)

    errors = []

    def checked(module, q, k, v, mask, scaling=None, sliding_window=None, **kwargs):
        for window in (sliding_window, 5):  # the layer's own, and one that shows
            errors.append(attention_error(q, k, v, scaling, window, kwargs["micro_batch"]))
        return packed_attention(module, q, k, v, mask, scaling, sliding_window, **kwargs)

    AttentionInterface.register("checked", checked)
    name = type(model.model).__name__
    try:
        packed, plain = model(pack(pairs).to(device)), plain_logps()
        difference = (packed - plain).abs().max().nan_to_num(torch.inf)
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)  # what follows is collective
        if difference > tolerance:
            # Eager attention holds every score: on a long prompt, more than there is memory for.
            eager, own = (plain_logps(attention, 2000) for attention in ("eager", None))
            tolerance = max(tolerance, 5 * (eager - own).abs().max().item())
        head = model.head_difference(torch.tensor(sum(pairs[0], []), device=device)).item()
        model.model.set_attn_implementation("checked")
        model(pack(random_pairs((7, 5, 9), (100, 60, 40))).to(device))
        model.model.set_attn_implementation("packed")
        if not errors:
            raise InputError("its layers do not use transformers' attention interface")
        attention = torch.stack(errors).max().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(f"{name} cannot be trained packed: {error!r}") from error
    model.reshard()
    if not (difference.item() <= tolerance and head <= 1e-3 and attention <= 0.1):
        raise InputError(
            f"{name} cannot be trained packed: its log-probs differ from the model's own forward "
            f"by up to {difference.item():.2g} (accepted: {tolerance:.2g}), its logits from its "
            f"head's by {head:.1%}, its attention from a masked one by {attention:.1%}. Recurrent "
            "models, and models that scale or cap their logits after the head, are not supported."
        )


def attention_error(query, key, value, scaling, window, micro_batch: MicroBatch) -> torch.Tensor:
    """Of packed_attention and its gradients, in the dtype of its arguments, against
    masked_attention in float32: the largest difference relative to the largest value, () float32.
    """
    direction, results = torch.randn_like(query[..., : value.shape[-1]]).transpose(1, 2), []
    for attend, dtype in ((packed_attention, query.dtype), (masked_attention, torch.float32)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            out, _ = attend(None, *inputs, None, scaling, window, micro_batch=micro_batch)
            results.append((out, *torch.autograd.grad(out, inputs, direction.to(dtype))))
    errors = [(ours - exact).abs().max() / exact.abs().max() for ours, exact in zip(*results)]
    return torch.stack(errors).max()


def masked_attention(module, query, key, value, mask, scaling, window, micro_batch):
    """What packed_attention computes, by one dense mask over the whole row. Arguments and result
    are packed_attention's."""
    position = micro_batch.position_ids
    lengths = torch.tensor(micro_batch.segments, device=query.device).flatten()
    part = torch.arange(len(lengths), device=query.device)
    part = part.repeat_interleave(lengths, output_size=len(position))
    pair, part = part // 3, part % 3  # part: 0 for the prompt, 1 for chosen, 2 for rejected
    visible = (pair[:, None] == pair) & ((part == 0) | (part[:, None] == part))
    distance = position[:, None] - position
    visible &= (distance >= 0) & (distance < (window or len(position)))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


# ---- Log-probs of whole data sets ----------------------------------------------------------------


@torch.no_grad()
def response_logps(model: PackedModel, pairs: Dataset, micro_batches: list) -> torch.Tensor:
    """log p(response | prompt) of every pair of load_pairs: (pairs, 2) float64 on the model's
    device, chosen and rejected. micro_batches: see spread_pairs. Collective."""
    rank, device = dist.get_rank(), next(model.parameters()).device
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    for shares in tqdm(micro_batches, "log-probs", disable=rank > 0, dynamic_ncols=True):
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
    found, file = [None], None
    if dist.get_rank() == 0:
        what = (fingerprint(pairs), model_fingerprint(name), dtype, transformers.__version__)
        # And the code of it, which a fork may have edited.
        what += tuple(inspect.getsource(sys.modules[name]) for name in ("data", "loss", "model"))
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        file = CACHE_DIR / "reference" / f"{key}.npy"
        try:
            found = [torch.from_numpy(np.load(file))]
        except (OSError, ValueError, EOFError):  # not there, or cut off
            file.parent.mkdir(parents=True, exist_ok=True)
    dist.broadcast_object_list(found, src=0)
    (sums,) = found
    if sums is None:
        sums = response_logps(model, pairs, micro_batches).cpu()
        if file:
            scratch = file.with_name(f"{uuid.uuid4().hex}.npy")
            np.save(scratch, sums.numpy())
            os.replace(scratch, file)
    return sums.float()


# ---- Export --------------------------------------------------------------------------------------


def export(model: PackedModel, name: str, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write the model, its tokenizer with chat template, and its generation config to `folder` in
    Hugging Face format, with the parameters in `dtype`. `name` is where the model was loaded from.
    Collective; the folder appears whole.
    """
    scratch = folder.with_name(folder.name + ".part")
    tensors, parameters = stored_tensors(model.model), dict(model.model.named_parameters())
    dtypes = {key: dtype if key in parameters else t.dtype for key, t in tensors.items()}
    with torch.device("meta"):
        shapes = {key: torch.empty(t.shape, dtype=dtypes[key]) for key, t in tensors.items()}
    files = split_torch_state_dict_into_shards(shapes, max_shard_size=FILE_BYTES)
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    weight_map = {}
    for file, names in files.filename_to_tensors.items():
        whole = {}
        for key in names:  # one tensor at a time is whole, and one file in rank 0's memory
            tensor = tensors[key].detach().to(dtypes[key])
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole |= {key: tensor.cpu().contiguous()} if dist.get_rank() == 0 else {}
        if dist.get_rank() == 0:
            whole = revert_weight_conversion(model.model, whole)  # to the names of published files
            save_file(whole, scratch / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(whole, file)
    if dist.get_rank() == 0:
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": weight_map}
            (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = load_config(name)
        config.architectures, config.dtype = [type(model.model).__name__], dtype
        config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        # As text: transformers refuses to save some of the generation configs that it loads.
        generation = json.dumps(generation_config(name, config, tokenizer), indent=2)
        (scratch / "generation_config.json").write_text(generation)
        os.sync()  # a run that has final/, be it empty after a power cut, is never continued
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
