"""Mixed precision on one device, without FSDP, which would copy and cast every weight and gradient
in every micro-batch: float32 masters, which the optimizer moves, and in the modules weights of the
dtype in which the model computes, renewed once a step. Sealed; keep_masters' docstring is enough.
"""

import functools
import types

import torch
import torch.nn.functional as F

from runtime.errors import InputError
from runtime.streaming import HostMaster, pinned

LINEAR = torch.nn.Linear.forward
BYTES = 18  # a parameter, with AdamW: master, sum of gradients and two moments, and the weight
SHARE = 0.85  # of the device's memory that these may take; the rest is for activations


@torch.no_grad()
def lighten(model: torch.nn.Module, dtype: torch.dtype, kept: set) -> None:
    """Make the frozen parameters of a model on "meta" of `dtype`, but for whole numbers: they are
    read as such."""
    for parameter in model.parameters():
        constant = not parameter.requires_grad and parameter.is_floating_point()
        if constant and parameter not in kept:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def keep_masters(
    model: torch.nn.Module, dtype: torch.dtype, kept: set, device: torch.device | None = None
) -> dict:
    """Give the modules weights of `dtype`, but for whole numbers. Returns the float32 masters of
    those that are trained, by name. Their .grad is the sum of the weights' gradients since `renew`,
    in float32: the product that is a linear layer's gradient is added to it unrounded; any other
    gradient is computed in `dtype`, and then added.

    kept: parameters that stay as they are. device: of the weights, if the model is on the host and
    its masters are to stay there, as HostMasters."""
    weights, masters = {parameter: parameter for parameter in kept}, {}
    for name, master in model.named_parameters():  # tied ones once
        if master in weights:
            continue
        own = dtype if master.is_floating_point() else master.dtype  # of a fork's indices
        weight = torch.nn.Parameter(master.to(device, own), master.requires_grad)
        weights[master] = weight
        if master.requires_grad:
            if device is not None:
                master = pinned(HostMaster(master.detach()), device)
            master.weight, masters[name] = weight, master
            weight.total = torch.zeros_like(weight, dtype=master.dtype)
            weight.register_post_accumulate_grad_hook(add_gradient)
    for module in model.modules():
        for name, master in module._parameters.items():
            module._parameters[name] = None if master is None else weights[master]
        # One that a fork has given another forward keeps it.
        plain = getattr(module.forward, "__func__", None) is LINEAR
        if plain and hasattr(module.weight, "total"):
            module.forward = types.MethodType(sum_linear, module)
    for parameter in kept if device is not None else ():
        parameter.data = parameter.data.to(device)
    for module in model.modules() if device is not None else ():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    renew(masters)
    return masters


@torch.no_grad()
def renew(masters: dict) -> None:
    """Make the weights of the masters anew, and set the sums of their gradients to 0."""
    for master in masters.values():
        if not vars(master).pop("renewed", False):  # by the optimizer's step
            master.weight.copy_(master)
        master.grad = master.weight.total.zero_()
        master.seen = master._version, master.weight._version  # for PackedModel.forward


def put_back(model: torch.nn.Module, masters: dict) -> None:
    """Give the modules the masters themselves, which are then float32 again; for the export."""
    found = {master.weight: master for master in masters.values()}
    if any(isinstance(master, HostMaster) for master in masters.values()):
        for weight in found:  # merge() wants all on one device, which has the memory of the sums
            del weight.total
        found = {w: torch.nn.Parameter(master.detach().to(w.device)) for w, master in found.items()}
    for module in model.modules():
        if getattr(module.forward, "__func__", None) is sum_linear:
            del module.forward
        for name, weight in module._parameters.items():
            module._parameters[name] = found.get(weight, weight)


def add_gradient(weight: torch.nn.Parameter) -> None:
    """Add a weight's gradient, if it is not in the sum yet."""
    if weight.grad is not None:
        weight.total.add_(weight.grad)
        weight.grad = None


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, summed in float32 also for a and b in bfloat16."""
    if total.is_cuda and total.dtype != a.dtype:
        if gives_float32():
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total.add_(a @ b)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@functools.cache
def gives_float32() -> bool:
    """Whether this GPU gives products of bfloat16 in float32."""
    a, total = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda"), torch.zeros(16, 16).cuda()
    try:
        torch.mm(a, a, out_dtype=torch.float32)
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def sum_linear(self, x: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer whose weight has a `total`."""
    return SumLinear.apply(x, self.weight, self.bias, self.weight.total)


class SumLinear(torch.autograd.Function):
    """F.linear, whose backward adds the weight's gradient to `total`. x: (..., in); weight: (out,
    in); bias: (out,) or None; total: (out, in) float32. Returns (..., out)."""

    @staticmethod
    def forward(ctx, x, weight, bias, total):
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.has_bias = total, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError("linear layers with masters have no second derivatives")
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:  # frozen for a while, it has none
            add_product(ctx.total, grad.flatten(0, -2).T, x.flatten(0, -2))
        grad_bias = grad.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return grad @ weight, None, grad_bias, None


def masters_fit(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether a device has memory for a model with masters, which take 2 bytes a parameter more
    than FSDP, and 2 less for a frozen one. Of a CPU's, whose limit is not known, true."""
    if device.type != "cuda":
        return True
    size = sum((BYTES if p.requires_grad else 2) * p.numel() for p in model.parameters())
    return size <= SHARE * torch.cuda.get_device_properties(device).total_memory


def check_memory(model: torch.nn.Module, device: torch.device, ranks: int, streamed: bool) -> None:
    """Raise InputError if the parameters of a model, with gradients and AdamW's moments, leave
    nothing of a GPU's memory."""
    if device.type != "cuda":
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = 6 if streamed else 16
    memory = torch.cuda.get_device_properties(device).total_memory
    if (needed := each * trained / ranks) > memory:
        ways = "more GPUs" if streamed or ranks > 1 else "more GPUs, or --stream_optimizer true"
        raise InputError(
            f"{trained / 1e9:.1f} billion parameters take {needed / 1e9:.0f} GB of each GPU, which "
            f"has {memory / 1e9:.0f}: {ways}, or fewer that are trained (forks/lora.patch). "
            "benchmarks/plan.py says what fits"
        )
