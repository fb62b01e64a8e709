"""AdamW beyond the GPU's memory: masters and moments stay on the host, and visit the GPU once a
step, slice by slice. On the GPU stay 6 bytes a parameter: the weight, and the sum of its gradients.
Sealed; the docstrings of HostMaster and `stream` are enough.
"""

import types
import weakref
from pathlib import Path

import torch
from torch.optim.adamw import adamw

from runtime.errors import InputError

SLICE = 2**25  # values: two slices of three float32 tensors take 0.8 GB of the GPU
HOST_BYTES = 12  # a parameter: master and two moments
CGROUPS = Path("/sys/fs/cgroup")
MOMENTS = ("exp_avg", "exp_avg_sq")


class HostMaster(torch.nn.Parameter):
    """A float32 master on the host. Its gradient is that of its weight, on the GPU."""

    @property
    def grad(self) -> torch.Tensor:
        return self.weight.total

    @grad.setter
    def grad(self, value) -> None:
        if value is not None and value is not self.weight.total:
            raise ValueError("the gradient of a master on the host is its weight's: change that")


def stream(optimizer) -> None:
    """Have an AdamW over HostMasters make its steps on the GPU of their weights, which are renewed.
    Its state has the names and values that it would have there. Raises InputError for any other
    optimizer."""
    plain = type(optimizer) is torch.optim.AdamW
    if not plain or any(group["amsgrad"] for group in optimizer.param_groups):
        kind = "AMSGrad" if plain else type(optimizer).__name__
        raise InputError(f"stream_optimizer is for AdamW: it cannot be used with {kind}")
    optimizer.step = types.MethodType(streamed_step, optimizer)


@torch.no_grad()
def streamed_step(self) -> None:
    """The step of AdamW. While a slice is computed, the next is on its way to the GPU, and the one
    before on its way back: three streams, two sets of buffers. It returns when all is done."""
    masters = [master for group in self.param_groups for master in group["params"]]
    device = masters[0].weight.device
    streams = torch.get_device_module(device)
    compute, incoming, outgoing = streams.current_stream(), streams.Stream(), streams.Stream()
    size = min(SLICE, max(master.numel() for master in masters))
    sets = [[torch.empty(size, device=device) for _ in range(3)] for _ in range(2)]
    emptied, number = [None, None], 0  # of each set: the event after which it may be filled again
    incoming.wait_stream(compute)
    for group in self.param_groups:
        beta1, beta2 = group["betas"]
        names = ("lr", "weight_decay", "eps", "maximize")
        options = {"beta1": beta1, "beta2": beta2} | {name: group[name] for name in names}
        for master in group["params"]:
            state = self.state[master]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros(master.shape)
                state[name] = pinned(state[name], device)
            state.setdefault("step", torch.zeros(()))
            on_host = [tensor.view(-1) for tensor in (master, *(state[name] for name in MOMENTS))]
            weight, total = master.weight.view(-1), master.weight.total.view(-1)
            for start in range(0, master.numel(), size):
                part, mine = slice(start, start + size), number % 2
                host = [tensor[part] for tensor in on_host]
                here = [buffer[: len(host[0])] for buffer in sets[mine]]
                with streams.stream(incoming):
                    if emptied[mine] is not None:
                        incoming.wait_event(emptied[mine])
                    for there, tensor in zip(here, host):
                        there.copy_(tensor, non_blocking=True)
                compute.wait_stream(incoming)
                done = torch.full((), state["step"].item(), device=device)  # steps before this one
                value, *moments = ([tensor] for tensor in here)
                adamw(
                    value, [total[part]], *moments, [], [done], fused=True, amsgrad=False, **options
                )
                weight[part].copy_(here[0])
                outgoing.wait_stream(compute)
                with streams.stream(outgoing):
                    for there, tensor in zip(here, host):
                        tensor.copy_(there, non_blocking=True)
                    emptied[mine] = outgoing.record_event()
                number += 1
            state["step"] += 1
            master.renewed = True
    streams.synchronize(device)  # from here on, the masters on the host may be read


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in memory of the host that a GPU reads by itself, as long as the object lives."""
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    # pin_memory copies, and rounds the size up to a power of two. So large tensors are registered
    # in place; small ones, which share pages with others, are copied.
    if tensor.nbytes >= 2**20:
        cuda, place = torch.cuda.cudart(), tensor.data_ptr()
        if int(cuda.cudaHostRegister(place, tensor.nbytes, 0)) == 0:
            weakref.finalize(tensor, cuda.cudaHostUnregister, place)
            return tensor
    copy = tensor.pin_memory()
    return HostMaster(copy) if isinstance(tensor, HostMaster) else copy


def check_host(model: torch.nn.Module) -> None:
    """Raise InputError if the host has no memory for the masters and moments of a model."""
    needed = HOST_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if needed > (free := free_memory()):
        raise InputError(
            f"stream_optimizer keeps {needed / 1e9:.1f} GB on the host, which has {free / 1e9:.1f} "
            "GB left for this process (its container's limit counts)"
        )


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its containers' limits. Files
    that the kernel keeps in memory count as free."""
    lines = Path("/proc/meminfo").read_text().split("MemAvailable:")
    found = [int(lines[1].split()[0]) * 1024]
    for folder, limit, used in (
        (CGROUPS, "memory.max", "memory.current"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            statistics = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            files = sum(int(statistics.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
            taken = int((folder / used).read_text()) - files
            found.append(int((folder / limit).read_text()) - taken)  # "max": there is none
        except (OSError, ValueError):
            continue
    return min(found)
