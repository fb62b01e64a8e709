"""A Hugging Face causal language model that is sharded with FSDP2 and reads packed pairs.

`load_model` → `PackedModel`, whose forward is MicroBatch → log-prob of every response token; `export` writes it back.
"""

import copy
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from data import InputError, MicroBatch, end_of_turn, pack

# The language-model head runs on as many response tokens at once as keep one float32 logits buffer below this size.
LOGITS_BYTES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20}


def resolve_model(name: str) -> str:
    """`name`, a hub id or a folder; for "demo" the folder of the demo's model, which is obtained on first use."""
    if name == "demo":
        from demo.smollm2 import demo_model

        return demo_model()
    return name


# ---- The packed forward ---------------------------------------------------------------------------------------------


class PackedModel(torch.nn.Module):
    """A causal language model whose forward takes packed pairs to log-probs and never builds the whole logits.

    model: a transformers model with the attention implementation "packed".
    stock_attention: the attention implementation that the model would have used on its own, for `plain_logps`.
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
        head = self.model.get_output_embeddings()
        return TokenLogps.apply(hidden[batch.predictors], head.weight, getattr(head, "bias", None), batch.targets)

    def reshard(self) -> None:
        """Free the parameters that a forward without a backward leaves gathered. There are none in a model that is not
        sharded; in one that is, FSDP's method of this name takes the place of this one."""

    def plain_logps(self, ids: torch.Tensor, attention: str | None = None) -> torch.Tensor:
        """Log-probs of ids[1:] by the model's own forward, nothing packed: (n,) int64 → (n-1,) float32.

        attention: transformers' name of an attention implementation; by default the model's own choice.
        """
        self.model.set_attn_implementation(attention or self.stock_attention)
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        self.model.set_attn_implementation("packed")
        return -F.cross_entropy(logits.float(), ids[1:], reduction="none")

    def head_difference(self, ids: torch.Tensor) -> torch.Tensor:
        """Largest difference between the model's own logits and its head applied to its last hidden states, relative to the
        largest logit: 0 unless the model does something to its logits after the head. (n,) int64 → () tensor."""
        self.model.set_attn_implementation(self.stock_attention)
        hidden = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
        logits = self.model(input_ids=ids[None], use_cache=False).logits
        self.model.set_attn_implementation("packed")
        return (self.model.get_output_embeddings()(hidden) - logits).abs().max() / logits.abs().max()


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets], without ever holding all logits: apply(hidden, weight, bias, targets).

    hidden: (R, d); weight: (V, d); bias: (V,) or None; targets: (R,) int64. Returns (R,) float32 (float64 for float64).

    Forward and backward go through the rows in chunks. The backward takes the last chunk's probabilities from the forward and
    computes the others' once more. Its sum over the chunks is taken in place, where autograd's would hold a further (V, d)
    gradient, and softmax is in float32 also where the model computes in bfloat16 (F.linear_cross_entropy rounds its result).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        chunks = -(-len(targets) * 4 * weight.shape[0] // LOGITS_BYTES[hidden.device.type])
        logps, normalizers, buffer = [], [], None
        for h, t in zip(hidden.chunk(chunks), targets[:, None].chunk(chunks)):
            del buffer  # before there is the next
            buffer = F.linear(h, weight, bias).to(torch.promote_types(h.dtype, torch.float32))  # logits
            largest, logit = buffer.amax(dim=1, keepdim=True), buffer.gather(1, t)
            # In place: torch.logsumexp would take a second buffer.
            normalizers.append(largest + buffer.sub_(largest).exp_().sum(dim=1, keepdim=True).log())
            logps.append((logit - normalizers[-1])[:, 0])
        ctx.save_for_backward(hidden, weight, bias, targets[:, None], torch.cat(normalizers))
        ctx.chunks, ctx.probabilities = chunks, buffer.mul_((largest - normalizers[-1]).exp())
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, *rows = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for h, t, normalizer, g in reversed(list(zip(*(x.chunk(ctx.chunks) for x in (hidden, *rows, grad[:, None]))))):
            p, ctx.probabilities = ctx.probabilities, None
            if p is None:
                p = F.linear(h, weight, bias).to(g.dtype).sub_(normalizer).exp_()
            # The gradient of log p(t) with respect to the logits is onehot(t) − p.
            grad_logits = p.mul_(-g).scatter_add_(1, t, g).to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            grad_weight.addmm_(grad_logits.T, h)
            if bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            del p, grad_logits  # before there are the next
        return torch.cat(grad_hidden[::-1]), grad_weight, grad_bias, None


def packed_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    micro_batch: MicroBatch | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within [prompt, chosen] and within [prompt, rejected] of every pair, and nowhere else.

    query: (1, heads, T, d); key, value: (1, key-value heads, T, d), of micro_batch's T tokens. Returns (1, T, heads, d).
    A function for transformers' AttentionInterface. Raises InputError for attention with further terms.
    """
    extra = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if micro_batch is None or extra:
        raise InputError(f"packed attention cannot do what this model's does: {', '.join(extra) or 'no segments arrived'}")

    def attend(q, k, v):  # causal attention of the last n of m tokens to all of them: (1, heads, n, d) → (1, n, heads, d)
        (n, m), mask = (q.shape[2], k.shape[2]), None
        window = sliding_window or m
        if n < m or window < m:
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n).triu(m - n - window + 1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    outputs = []
    sizes = [size for p, c, r in micro_batch.segments for size in (p + c, r)]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    for (p, _, _), first, (q, k, v) in zip(micro_batch.segments, parts, parts):  # first: prompt and chosen; then rejected
        outputs.append(attend(*first))
        again, k, v = (torch.cat((x[:, :, :p], y), dim=2) for x, y in zip(first, (q, k, v)))
        # On GPUs the prompt's queries run again and are cut off: only attention without a mask is fast there.
        outputs.append(attend(again, k, v)[:, p:] if q.is_cuda else attend(q, k, v))
    return torch.cat(outputs, dim=1), None


# Under torch.compile, blocks are compiled around this function. The lengths in a micro-batch always are others: passed on as
# an object, which the compiler does not look into, they do not have the blocks compiled again.
AttentionInterface.register("packed", torch.compiler.disable(packed_attention))


# ---- Loading and sharding -------------------------------------------------------------------------------------------


def build_model(config) -> PackedModel:
    """The architecture of a transformers config, float32, on the current default device, dropout off.

    Raises InputError if the model cannot run packed.
    """
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    try:
        stock = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="packed")
    except Exception as error:  # transformers has a different one for each kind of model that lacks what is needed
        raise InputError(f"a {config.model_type} model cannot be trained packed: {error!r}") from error
    return PackedModel(model, stock.config._attn_implementation)


def shard(model: PackedModel, device: str, dtype: torch.dtype, replicas: int = 1) -> None:
    """`fully_shard` every transformer block, then the rest, over all ranks, or over each of `replicas` groups of ranks.

    Parameters, their gradients' reduction and the optimizer's state stay float32; forward and backward run in `dtype`.
    """
    ranks = dist.get_world_size()
    if ranks % replicas:
        raise InputError(f"replicas={replicas} does not divide the number of ranks, {ranks}")
    shape, names = ((ranks,), ("shard",)) if replicas == 1 else ((replicas, ranks // replicas), ("replica", "shard"))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "plain_logps")
    register_fsdp_forward_method(model, "head_difference")


def blocks(model: PackedModel) -> list[torch.nn.Module]:
    """The transformer blocks, which transformers derives from a class of their own. Raises InputError if there are none."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise InputError(f"{type(model.model).__name__} has no blocks of transformers' class GradientCheckpointingLayer")
    return found


def load_model(
    name: str,
    device: str,
    dtype: torch.dtype,
    replicas: int = 1,
    activation_checkpointing: bool = False,
    compile: bool = False,
    longest: int = 32,
) -> PackedModel:
    """Load a model from a folder or hub id and shard it. Rank 0 alone reads the weights; the other ranks get theirs
    from it. `device` is "cpu" or "cuda"; `longest` the most tokens of prompt + response that will be used. Collective.

    Raises InputError if weights are missing, or if the packed forward does not equal the model's own (self_check).
    """
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = build_model(config)
    if activation_checkpointing:
        # Its name before transformers 5.23; vLLM still asks for an older one.
        enable = getattr(model.model, "activation_checkpointing_enable", None) or model.model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if not (dist.get_world_size() == replicas == 1 and dtype == torch.float32):
        # A single process in float32 has nothing to shard or cast, and FSDP would still copy every weight and gradient.
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
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # Rotary frequencies and the like are not in the state.
    for key, buffer in model.named_buffers():
        if whole:
            buffer.copy_(whole.get_buffer(key.removeprefix("model.")))
        dist.broadcast(buffer, src=0)
    model.train()
    self_check(model, device, longest, tolerance=1e-3 if dtype == torch.float32 else 0.05)
    for block in blocks(model) if compile else ():
        # A checkpoint is compiled as a whole or not at all, and the attention never is: so only what lies within it.
        for part in block.children() if activation_checkpointing else [block]:
            part.compile(dynamic=True)  # the number of tokens is another in every micro-batch
    return model


def read_weights(name: str):
    """The model with all its weights in CPU memory, in float32: lower precision would round its buffers too."""
    model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InputError(f"missing or of the wrong shape: {info}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head.weight is not embedding.weight:
        raise InputError("the config ties the head to the embeddings, but the file holds another head")
    return model


def weights_fingerprint(name: str) -> str:
    """SHA-256 over the weight files of a folder or hub id, which are fetched if need be. Raises InputError if it has none."""
    for kind in ("*.safetensors", "*.bin"):
        folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=kind, ignore_patterns="*/*")
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
    """Compare the packed forward with the model's own on random tokens: two short pairs and one of `longest` tokens, which
    shows sliding windows and rotary embeddings that change with the length. Collective.

    Raises InputError if a log-prob differs by more than `tolerance`, or by more than five times what the model's own
    forward differs between its attention implementation and the eager one (in bfloat16, rounding alone can do that); and
    if its logits are not what its head gives. Such are recurrent models, and models that scale or cap their logits.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5, 9), (4, 8, 3), (max(2, longest - 8), 8, 6)]  # tokens of prompt, chosen and rejected
    name, vocabulary = type(model.model).__name__, model.model.get_input_embeddings().weight.shape[0]
    pairs = [torch.randint(vocabulary, (sum(shape),), generator=generator).split(shape) for shape in shapes]

    def plain_logps(attention: str | None = None) -> torch.Tensor:
        responses = [(prompt, response) for prompt, *both in pairs for response in both]
        return torch.cat([model.plain_logps(torch.cat(ids).to(device), attention)[len(ids[0]) - 1 :] for ids in responses])

    try:
        packed = model(pack([tuple(ids.tolist() for ids in pair) for pair in pairs]).to(device))
        plain = plain_logps()
        off = torch.tensor([not (packed - plain).abs().max() <= tolerance], dtype=torch.int32, device=device)
        dist.all_reduce(off, op=dist.ReduceOp.MAX)  # what follows is collective
        if off.item():
            tolerance = max(tolerance, 5 * (plain_logps("eager") - plain).abs().max().item())
        head = model.head_difference(torch.cat(pairs[0]).to(device)).item()
    except Exception as error:
        raise InputError(f"{name} cannot be trained packed: {error!r}") from error
    model.reshard()
    difference = (packed - plain).abs().max().item()
    if not (difference <= tolerance and head <= 1e-3):  # also if one is NaN
        raise InputError(
            f"{name} cannot be trained packed: its log-probs differ from the model's own forward by up to {difference:.2g} "
            f"(accepted: {tolerance:.2g}), its logits from its head's by {head:.1%}. Recurrent models, and models that scale "
            f"or cap their logits after the head, are not supported."
        )


# ---- Export ---------------------------------------------------------------------------------------------------------


def export(model: PackedModel, name: str, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write the model, its tokenizer with chat template, and its generation config to `folder` in Hugging Face format,
    with the weights in `dtype`. `name` is where the model was loaded from. Collective; the folder appears whole.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)  # on rank 0, empty elsewhere
    if dist.get_rank() == 0:
        converted = {value.data_ptr(): value.to(dtype) for value in state.values()}  # tied weights stay one tensor
        state = {key.removeprefix("model."): converted[value.data_ptr()] for key, value in state.items()}
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
        whole.generation_config = GenerationConfig()
        scratch = folder.with_name(folder.name + ".part")
        shutil.rmtree(scratch, ignore_errors=True)
        whole.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)
        # As text: transformers refuses to save some generation configs that it loads, published ones among them.
        (scratch / "generation_config.json").write_text(json.dumps(generation_config(name, tokenizer), indent=2))
        os.rename(scratch, folder)
    dist.barrier()


def generation_config(name: str, tokenizer) -> dict:
    """The generation config that came with the model, made to stop at the end-of-turn token that was trained."""
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in ends if token is not None]
    if end_of_turn(tokenizer)[0] not in ends:
        ends.append(end_of_turn(tokenizer)[0])
    return config.to_diff_dict() | {"eos_token_id": ends}
