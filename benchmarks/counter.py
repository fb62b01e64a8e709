"""What a computation on fake tensors takes, which have shapes and no values: live bytes, operators,
floating-point operations, bytes moved. benchmarks/fake_gpu.py and benchmarks/plan.py count by it.
"""

import collections
import contextlib
import traceback
import weakref
from pathlib import Path

import torch
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

PROPAGATING = []  # DTensor works out shapes on whole tensors that it makes for the purpose
# Operators that do not simply read their inputs and write their output. STILL move nothing, LOOKUPS
# the rows that they look up, FILLS what they write, SCATTERS their source two or three times.
STILL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
STILL |= {"resize_", "_unsafe_view", "record_stream", "lift_fresh", "_local_scalar_dense"}
STILL |= {"all_gather_copy_in"}  # whose copies are dispatched on their own
LOOKUPS = {"embedding", "index_select", "index", "gather"}
FILLS = {"zeros", "zeros_like", "new_zeros", "zero_", "ones", "ones_like", "full", "full_like"}
FILLS |= {"fill_", "arange", "scalar_tensor"}
SCATTERS = {"scatter_add_": 3, "scatter_": 3, "index_put_": 2, "index_add": 3, "index_add_": 3}
TO_EMPTY = torch.nn.Module.to_empty


def to_empty(module, *, device, recurse=True):
    """Module.to_empty, which cannot swap fake tensors; of a sharded model, as it is."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return TO_EMPTY(module, device=device)
    made = {}
    for part in module.modules() if recurse else [module]:
        for name, old in part._parameters.items():
            if old is not None and old not in made:
                made[old] = torch.nn.Parameter(
                    torch.empty_like(old, device=device), old.requires_grad
                )
            part._parameters[name] = made.get(old)
        for name, old in part._buffers.items():
            part._buffers[name] = None if old is None else torch.empty_like(old, device=device)
    return module


def size(value) -> int:
    """Bytes of the tensors in `value`; of expanded ones, those that are there."""
    total = 0
    for tensor in tree_leaves(value):
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
            there = [n for n, stride in zip(tensor.shape, tensor.stride()) if stride]
            total += torch.Size(there).numel() * tensor.element_size() if tensor.numel() else 0
    return total


def moved_bytes(function, name: str, args: tuple, kwargs: dict, out) -> int:
    """Bytes that an operator other than a product or attention reads and writes."""
    if function.is_view or name in STILL or function.namespace in ("c10d", "_c10d_functional"):
        return 0
    if name in LOOKUPS:
        return 2 * size(out)
    if name in FILLS:
        return size(out)
    if name in SCATTERS:
        source = args[2 if name == "index_put_" else 3]
        return SCATTERS[name] * size(source) + (2 * size(args[0]) if name == "index_add" else 0)
    if name == "embedding_dense_backward":
        return 2 * size(args[0]) + size(out)
    if name in ("copy_", "_foreach_copy_"):
        return size(args[0]) + size(args[1])
    written, read = 0, size(args)
    for argument, value in zip(function._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += size(value)
    for key, value in kwargs.items():
        if key == "out":
            written += size(value)
        else:
            read += size(value)
    return read + (written or size(out))


class Recorder(TorchDispatchMode):
    """Counts, on the fake tensors of a type of device: live bytes and their peak, operators,
    floating-point operations, bytes that are moved, and where the host waited for a value."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.part = device, ["blocks"]
        self.live = self.peak = 0
        self.known, self.sizes = WeakIdKeyDictionary(), {}
        self.attended = 0  # (query, key) pairs of a call of varlen_attn, which torch does not count
        self.restart()

    def restart(self) -> None:
        """Count anew; what is allocated stays."""
        self.operators, self.waits, self.peak = 0, collections.Counter(), self.live
        self.products = self.attention = 0  # floating-point operations
        self.moved = collections.Counter()  # by part: see `within`

    def restart_peak(self) -> int:
        """The peak so far; the next begins with what lives."""
        peak, self.peak = self.peak, self.live
        return peak

    @property
    def flops(self) -> float:
        return self.products + self.attention

    @contextlib.contextmanager
    def within(self, part: str):
        """What is moved here counts as `part`."""
        self.part.append(part)
        try:
            yield
        finally:
            self.part.pop()

    def wait(self, name: str) -> None:
        """Note the line of this repository or of a library that asked for a value."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        frames = [f for f in frames if Path(f.filename).name not in ("counter.py", "fake_gpu.py")]
        self.waits[f"{name} {Path(frames[-1].filename).name}:{frames[-1].lineno}"] += 1

    def resize(self, key: int, size: int) -> None:
        size = -(-size // 512) * 512  # as the allocator rounds
        self.live += size - self.sizes.pop(key, 0)
        if size:
            self.sizes[key] = size
        self.peak = max(self.peak, self.live)

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device or isinstance(tensor, DTensor):
            return
        for storage in get_untyped_storages(tensor):
            if storage not in self.known:
                key = self.known[storage] = (len(self.known), id(storage))
                self.resize(key, storage.size())
                weakref.finalize(storage, self.resize, key, 0)

    def __enter__(self):
        self.real_resize = torch.UntypedStorage.resize_

        def resize_(storage, size):  # FSDP frees what it has gathered so
            self.real_resize(storage, size)
            if storage in self.known:
                self.resize(self.known[storage], storage.size())

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *args):
        torch.UntypedStorage.resize_ = self.real_resize
        return super().__exit__(*args)

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        if any(t == DTensor for t in types_):
            return NotImplemented
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = getattr(function, "_overloadpacket", function)
        name = getattr(packet, "__name__", str(packet))
        if not PROPAGATING and name != "device":
            self.operators += 1
            if name.startswith("_varlen_attn"):  # two products; five in the backward pass
                times = 2.5 if name.endswith("backward") else 1
                self.attention += times * 4 * self.attended * args[0].shape[1:].numel()
            elif name == "addmm_":
                self.products += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
            elif packet in flop_registry:
                count = flop_registry[packet](*args, **kwargs, out_val=out)
                if "attention" in name:
                    self.attention += count
                else:
                    self.products += count
            elif self.device in {
                t.device.type
                for t in tree_leaves((args, kwargs, out))
                if isinstance(t, torch.Tensor)
            }:
                self.moved[self.part[-1]] += moved_bytes(function, name, args, kwargs, out)
            tree_map_only(torch.Tensor, self.add, out)
        return out
