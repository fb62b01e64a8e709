"""A Hugging Face causal language model that is sharded with FSDP2 and reads packed rows.

`load_model` is build → surgery → shard → weights; the result is a PackedModel, whose forward
takes a MicroBatch to the log-prob of every response token.
"""

import copy
import functools
import inspect
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from data import MicroBatch
from runtime.errors import InputError
from runtime.masters import (
    add_product,
    check_memory,
    gives_float32,
    keep_masters,
    lighten,
    masters_fit,
    put_back,
    renew,
)
from runtime.norms import fuse_norms
from runtime.processes import say
from runtime.streaming import check_host
from runtime.weights import (
    check_surgery,
    first_values,
    load_config,
    lost_in_loading,
    model_class,
    other_parts,
    read_weights,
    stored_tensors,
    weights_folder,
    write_model,
)

# The language-model head runs on as many response tokens at once as keep one float32 logits buffer
# below this size.
LOGITS_BYTES = 192 * 2**20  # on CPUs; on a GPU, a 40th of its memory
# The operators of torch.ops.aten whose results selective checkpointing keeps. Some versions of
# torch lack some of them.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention")
PRODUCTS += ("_scaled_dot_product_efficient_attention",)
PRODUCTS += ("_scaled_dot_product_flash_attention_for_cpu",)


# ---- The packed forward --------------------------------------------------------------------------


class PackedModel(torch.nn.Module):
    """A causal language model whose forward takes packed rows to log-probs, and whose logits exist
    in chunks of LOGITS_BYTES only. What is optimized, clipped and saved is `optimized()`.

    model: a transformers model with the attention implementation "packed", registered below.
    stock_attention: the attention implementation that the model would have used on its own.
    dtype: in which it computes.
    packed: whether it packs, or computes by separate_logps.
    own_logits: whether separate_logps takes the model's own logits, of which all exist at a time.
    """

    def __init__(self, model, stock_attention: str = "sdpa"):
        super().__init__()
        self.model, self.stock_attention, self.dtype = model, stock_attention, torch.float32
        self.logit_scale, self.logit_cap = logit_scale(model.config), logit_cap(model.config)
        self.packed, self.own_logits = True, False
        self.kept = False  # weights are gathered once a step
        self.masters = None  # by name, if the modules' weights are not float32: see masters.py
        self.loaded = {}  # {parameter: whether it is trained} of those that load_model made

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Log-prob of every response token: (R,) float32, in the order of batch.targets. Raises
        InputError if an optimized parameter has changed since `refresh`, or if zero_grad has taken
        its gradient."""
        for name, master in (self.masters or {}).items():
            same = master.seen == (master._version, master.weight._version)
            if not same or master.grad is not master.weight.total:
                how = "after changing model.optimized(), call zero_grad(), then refresh()"
                raise InputError(f"{name} has changed, or its gradient: {how}")
        if not self.packed:
            return self.separate_logps(batch)
        hidden = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            micro_batch=batch,  # reaches packed_attention through the model's keyword arguments
            use_cache=False,
        ).last_hidden_state[0]  # (T, hidden size)
        return self.token_logps(hidden[batch.predictors], batch.targets)

    def separate_logps(self, batch: MicroBatch) -> torch.Tensor:
        """The same by the model's own forward, for models that cannot be packed: each response is a
        row with its prompt, padded on the right, where a causal model does not look. One forward
        for all rows, since FSDP wants as many on every rank."""
        sizes = [(p, n) for p, *responses in batch.segments for n in responses]
        rows = batch.input_ids[batch.keys].split([p + n for p, n in sizes])
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (N K, L)

        def predictors(states: torch.Tensor) -> torch.Tensor:
            """(N K, L, ·) → (R, ·): those from which the targets are predicted."""
            return torch.cat([row[p - 1 : p + n - 1] for row, (p, n) in zip(states, sizes)])

        if self.own_logits:
            logits = predictors(self.model(input_ids=rows, use_cache=False).logits)
            return logits.float().log_softmax(dim=-1).gather(1, batch.targets[:, None])[:, 0]
        hidden = self.model.base_model(input_ids=rows, use_cache=False).last_hidden_state
        return self.token_logps(predictors(hidden), batch.targets)

    def set_attention(self, name: str | None = None) -> None:
        """Compute with another attention implementation of transformers, or, by default, again with
        the one of forward."""
        name = name or ("packed" if self.packed else self.stock_attention)
        config, text = self.model.config, self.model.config.get_text_config()
        parts = [key for key in config.sub_configs if getattr(config, key) is text]
        # Parts for images or sound keep theirs: some have no other.
        self.model.set_attn_implementation(dict.fromkeys(["", *parts], name))

    def token_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The head's log-probs of `targets`: (R, hidden size), (R,) int64 → (R,) float32."""
        head = self.model.get_output_embeddings()
        shape = (self.logit_scale, self.logit_cap)
        hidden = hidden.to(head.weight.dtype)  # Mamba 2's last norm gives float32
        return TokenLogps.apply(hidden, head.weight, getattr(head, "bias", None), targets, *shape)

    def call(self, function, *args):
        """function(self, *args). The parameters of a sharded model are gathered, as for forward."""
        return function(self, *args)

    def optimized(self, part: torch.nn.Module | None = None) -> dict[str, torch.nn.Parameter]:
        """What the optimizer moves, by name, or what it moves of one module: float32 parameters
        that are not frozen, with their gradients; of a sharded model, this rank's shards. In
        bfloat16 on a single process they are masters (see masters.py), on the host with
        stream_optimizer, and the parameters of the modules have no gradients. Raises InputError for
        one that has been frozen or unfrozen since load_model."""
        for name, parameter in self.named_parameters():
            trained = parameter.requires_grad
            trained &= (self.masters or {}).get(name, parameter).requires_grad
            if self.loaded.get(parameter, trained) != trained:
                how = "unfrozen" if trained else "frozen"
                raise InputError(f"{name} was {how} after load_model: do it in surgery()")
        inside = {*(self if part is None else part).parameters()}
        own = {n: p for n, p in self.named_parameters() if p.requires_grad and p in inside}
        return own if self.masters is None else {name: self.masters[name] for name in own}

    def refresh(self) -> None:
        """Called whenever the optimized parameters have changed: what is computed with is renewed,
        and their gradients are 0 again, unless they are the parameters of the modules."""
        if self.masters is not None:
            renew(self.masters)

    def keep_gathered(self) -> None:
        """From now on, a sharded model's weights are gathered once a step instead of twice in every
        micro-batch: 2 bytes a parameter more on every rank."""
        self.kept = True
        self.set_reshard_after_forward(False)

    def begin_micro_batch(self, last: bool) -> None:
        """Called before every micro-batch of a step, also the `last`. FSDP's methods: replicas
        exchange a step's gradient once, and weights that are kept go after the last backward."""
        if isinstance(self, FSDPModule):
            self.set_requires_all_reduce(last)
            if self.kept:
                self.set_reshard_after_backward(last)

    def free_gathered(self) -> None:
        """Free what a forward without a backward, or one that was not the last of its step, leaves
        gathered. A model that is not sharded gathers nothing."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


# ---- Build, surgery, shard -----------------------------------------------------------------------


def surgery(model) -> None:
    """The place to freeze weights, to put adapters in, or to change layers. model: a transformers
    model on "meta": names and shapes, no values yet. Parameters that are added here get their first
    values from `reset_parameters` of their module; what the exported model must not have, `merge`
    takes out."""


@torch.no_grad()
def merge(model) -> None:
    """Take out what `surgery` put in, before the model is exported: it must then have the names and
    shapes of the model that training started from (LoRA adds its product to the weights here).
    model: the transformers model, sharded or not, or on "meta". Collective."""


def operate(config) -> tuple[PackedModel, dict[str, torch.Tensor]]:
    """The model on "meta", after surgery; and the tensors that its files hold, by name, as they
    were before. Raises InputError as build_model and check_surgery."""
    with torch.device("meta"):
        model = build_model(config)
        needed, before = stored_tensors(model.model), lost_in_loading(model.model)
        surgery(model.model)
    check_surgery(model.model, needed, before)
    return model, needed


def load_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    replicas: int = 1,
    activation_checkpointing: str = "false",
    stream_optimizer: bool = False,
) -> PackedModel:
    """Load a model from a folder or hub id and shard it; every rank reads its own shards only. It
    computes in `dtype`. activation_checkpointing: "true" keeps the inputs of blocks alone for the
    backward pass, "selective" also their matrix products and attention; all else is computed again.
    stream_optimizer: keep what the optimizer moves on the host. Collective. Raises InputError if
    weights are missing, if the model cannot be built, if surgery() does what it may not, if
    replicas or stream_optimizer do not fit the ranks and the dtype, or if there is no memory."""
    model, needed = operate(load_config(name))
    values = first_values(model.model, needed)
    if activation_checkpointing != "false":
        # Called gradient_checkpointing_enable before transformers 5.23; vLLM still needs an older
        # one.
        enable = getattr(model.model, "activation_checkpointing_enable", None)
        options = {"use_reentrant": False}
        if activation_checkpointing == "selective":
            options["context_fn"] = keep_products
        (enable or model.model.gradient_checkpointing_enable)(options)
    alone = dist.get_world_size() == replicas == 1
    # A single process has nothing to shard, and FSDP would copy every weight and gradient.
    if stream_optimizer:
        if not alone or dtype == torch.float32:
            raise InputError("stream_optimizer is for one process that computes in bfloat16")
        check_host(model)
    check_memory(model, device, dist.get_world_size() // replicas, stream_optimizer)
    alone = alone and (dtype == torch.float32 or stream_optimizer or masters_fit(model, device))
    if not alone:
        shard(model, device.type, dtype, replicas)
    elif dtype != torch.float32:
        lighten(model, dtype, {*other_parts(model.model).values()})
    model.to_empty(device="cpu" if stream_optimizer else device)
    model.model.tie_weights()  # to_empty may have given tied weights a tensor each
    read_weights(model.model, weights_folder(name, needed), values)
    if alone and dtype != torch.float32:
        model.dtype = dtype
        kept, home = {*other_parts(model.model).values()}, device if stream_optimizer else None
        model.masters = keep_masters(model, dtype, kept, home)
    fuse_norms(model, device, dtype)
    model.loaded = {parameter: parameter.requires_grad for parameter in model.parameters()}
    return model.train()


def keep_products() -> tuple:
    """For selective checkpointing: contexts of a block's forward, and of its repetition, in which
    the results of matrix products and attention are kept. Recomputing the rest is cheap."""
    kept = [getattr(torch.ops.aten, name) for name in PRODUCTS if hasattr(torch.ops.aten, name)]
    kept.append(torch.ops.torch_attn._varlen_attn)
    return create_selective_checkpoint_contexts([operator.default for operator in kept])


def compile_blocks(model: PackedModel) -> None:
    """torch.compile every transformer block."""
    for block in blocks(model):
        # A checkpointed block is compiled as a whole or not at all, and the attention never is: so
        # with checkpointing, what lies within a block is compiled.
        for part in block.children() if block.gradient_checkpointing else [block]:
            part.compile(dynamic=True)  # the number of tokens differs in every micro-batch


@torch.no_grad()
def export(
    model: PackedModel, name: str, tokenizer, folder: Path, card: str = "", read=None
) -> None:
    """merge, and write the model to `folder` in the dtype in which it computes: see write_model.
    Collective."""
    if model.masters is not None:
        put_back(model, model.masters)
        model.masters = None
    merge(model.model)
    write_model(model.model, name, tokenizer, folder, model.dtype, card, read)


def build_model(config) -> PackedModel:
    """The architecture of a transformers config, float32, on the current default device, without
    dropout and jitter. Raises InputError if transformers cannot build it."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            # Phi-MoE routes by its jitter at inference, too: check_forward refuses it.
            noise = "drop" in name or "jitter" in name and part.model_type != "phimoe"
            if noise and isinstance(value, float):
                setattr(part, name, 0.0)
    try:
        kind = model_class(config)
        model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
        packed = PackedModel(model, model.config.get_text_config()._attn_implementation)
        for parameter in other_parts(model).values():
            parameter.requires_grad_(False)
        try:
            packed.set_attention()
        except Exception:  # its attention is one of its own
            packed.packed = False
            packed.set_attention()
    except Exception as error:  # each kind of unfit model has an exception of its own
        raise InputError(f"a {config.model_type} model cannot be trained: {error!r}") from error
    return packed


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
    model.dtype = dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "call")


def logit_scale(config) -> float:
    """The factor of a model's logits, 1 of most models. Granite and MiniCPM3 divide by it,
    HyperCLOVA X, Cohere and Falcon-H1 multiply."""
    text = config.get_text_config()
    names = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
    factors = {name: getattr(text, name, None) or 1.0 for name in names}
    if text.model_type != "hyperclovax":
        factors["logits_scaling"] = 1 / factors["logits_scaling"]
    return math.prod(factors.values())


def logit_cap(config) -> float | None:
    """c, if a model's logits are c · tanh(logits / c), as Gemma's; else None."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


# ---- The head, in chunks: sealed; its docstring is enough ----------------------------------------


class TokenLogps(torch.autograd.Function):
    """log softmax(shaped(hidden @ weight.T + bias))[targets], with logits in chunks of
    LOGITS_BYTES: apply(hidden, weight, bias, targets, scale, cap).

    hidden: (R, d); weight: (V, d); bias: (V,) or None; targets: (R,) int64; scale and cap:
    shaped(x) is scale · x, or cap · tanh(scale · x / cap) if cap is not None.
    Returns (R,) float32 (float64 for float64).

    Forward and backward go through the rows in chunks, one float32 (rows, V) at a time. The
    backward starts with the last chunk, whose exponentials the forward has kept (without a cap),
    and computes the others' again. The weight's gradient is summed in place, where autograd would
    hold a second (V, d) one, and softmax is in float32 also where the model computes in bfloat16
    (F.linear_cross_entropy rounds its result).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale=1.0, cap=None):
        ctx.shape, ctx.total = (scale, cap), getattr(weight, "total", None)
        row_bytes = (8 if cap else 4) * weight.shape[0]  # the slope of a cap is a second buffer
        count = -(-len(targets) * row_bytes // logits_bytes(hidden.device))
        size = -(-len(targets) // count)
        ctx.chunks = [slice(start, start + size) for start in range(0, len(targets), size)]
        target_logits, normalizers = [], []
        for rows in ctx.chunks:
            ctx.kept = None  # one chunk's buffer is freed before the next takes its own
            logits = head_logits(hidden[rows], weight, bias, scale, cap)
            target_logits.append(logits.gather(1, targets[rows, None])[:, 0])
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()  # torch.logsumexp would take a second buffer
            sums = exponentials.sum(dim=1, keepdim=True)
            normalizers.append((largest + sums.log())[:, 0])
            ctx.kept = None if cap else (exponentials, sums)
            del logits, exponentials
        normalizers = torch.cat(normalizers)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        return torch.cat(target_logits) - normalizers

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError("the head has no second derivatives")
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        scale, cap = ctx.shape
        # Several chunks are summed in float32: bfloat16 would round the sum with each of them.
        sum_dtype = torch.float32 if len(ctx.chunks) > 1 else weight.dtype
        sum_dtype = torch.promote_types(weight.dtype, sum_dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # not of a frozen head
            new = ctx.total is None
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if new else ctx.total
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=sum_dtype)
        for rows in reversed(ctx.chunks):
            slope = scale
            if ctx.kept:
                softmax, sums = ctx.kept
                softmax.div_(sums)
                ctx.kept = None
            else:
                softmax = head_logits(hidden[rows], weight, bias, scale, cap)
                if cap:  # the derivative of tanh is 1 − tanh²
                    slope = (softmax / cap).square_().neg_().add_(1).mul_(scale)
                softmax.sub_(normalizers[rows, None]).exp_()
            # The gradient of log p(target) with respect to logits is onehot(target) − softmax.
            g = grad[rows, None]
            grad_logits = softmax.mul_(-g).scatter_add_(1, targets[rows, None], g)
            grad_logits = grad_logits.mul_(slope).to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[rows])
            if bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            del softmax, grad_logits, slope  # before the next chunk's
        grad_weight = None if ctx.total is not None else grad_weight  # it has been added already
        return grad_hidden, grad_weight, grad_bias, None, None, None  # autograd casts them


def logits_bytes(device: torch.device) -> int:
    """LOGITS_BYTES; on a GPU, a 40th of its memory."""
    if device.type != "cuda":
        return LOGITS_BYTES
    return torch.cuda.get_device_properties(device).total_memory // 40


def head_logits(hidden, weight, bias, scale: float, cap: float | None) -> torch.Tensor:
    """(n, d) → (n, V), in float32 at least. Arguments: of TokenLogps. Of bfloat16 arguments, the
    products are rounded to bfloat16 first, but on GPUs that can give them in float32."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16 and gives_float32():
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = F.linear(hidden, weight, bias)
    return shape_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), scale, cap)


def shape_logits(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """TokenLogps' shaped(logits), in place."""
    logits = logits if scale == 1 else logits.mul_(scale)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


# ---- Attention within rows: sealed, too ----------------------------------------------------------


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    micro_batch=None,
    **kwargs,
):
    """Causal attention of every prompt to itself, and of every response to its prompt and itself,
    and nowhere else. A function for transformers' AttentionInterface.

    query: (1, heads, T, d); key, value: (1, key-value heads, T, d), of micro_batch's T tokens.
    Returns (1, T, heads, d) and None, in place of weights.
    Raises InputError for attention with further terms.
    """
    # Transformers gives no mask; one that a model makes has terms of its own.
    terms = ("attention_mask", "softcap", "s_aux", "position_bias")
    given = kwargs | {"attention_mask": attention_mask}
    extra = [term for term in terms if given.get(term) is not None]
    if micro_batch is None or extra:
        reason = ", ".join(extra) or "no segments arrived"
        raise InputError(f"packed attention cannot do what this model's does: {reason}")
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if query.is_cuda and varlen_works(query.dtype, query.shape[-1], value.shape[-1]):
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
    # The first response is computed with its prompt, the others after it.
    sizes = [n for p, first, *rest in micro_batch.segments for n in (p + first, *rest)]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    for p, _, *rest in micro_batch.segments:
        q, k, v = next(parts)
        outputs.append(attend(q, k, v))
        prompt = k[:, :, :p], v[:, :, :p]
        for q, *own in (next(parts) for _ in rest):
            k, v = (torch.cat(both, dim=2) for both in zip(prompt, own))
            outputs.append(attend(q, k, v))
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1), None


def varlen_attention(query, key, value, sliding_window, micro_batch: MicroBatch, options: dict):
    """packed_attention in one kernel call, for GPUs: as many sequences of queries as of keys, in
    each of which the last query sees all keys."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    longest = max(p + max(responses) for p, *responses in micro_batch.segments)
    known = inspect.signature(varlen_attn).parameters  # torch 2.11 has no enable_gqa, nor needs it
    options = {name: value for name, value in options.items() if name in known}
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
def varlen_works(dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Whether this GPU's FlashAttention takes sequences of different lengths in one call; says so
    if it does not. The widths are those of a head's queries and values."""
    x = torch.zeros(1, 1, width, dtype=dtype, device="cuda", requires_grad=True)
    starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    works = width == value_width
    try:
        with torch.enable_grad():  # some cards have the forward of wide heads alone
            varlen_attn(x, x, x, starts, starts, 1, 1, window_size=(-1, 0)).sum().backward()
    except (RuntimeError, NotImplementedError):  # an older card, float32, or heads of another size
        works = False
    if not works:
        say(f"attention in {dtype}, heads of {width}: one call for each response, which is slow")
    return works


# Under torch.compile, blocks are compiled around this function. The lengths differ in every
# micro-batch: in an object that the compiler does not look into, they cause no recompilation.
AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
