"""The processes of a run: rank and device, the process group, signals, what ranks tell each
other."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import datasets
import multiprocess
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from runtime.errors import InputError

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there if and only if the driver is loaded
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # each stops a run


class Stopped(Exception):
    """A signal has reached a rank: every rank saves a checkpoint and ends. args: its number."""


def say(text: str, file=None) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)


def start_process() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, from torchrun's environment; one process
    without it. Raises InputError if its GPU cannot be used."""
    on_signals(end_with_workers)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    libc = ctypes.CDLL(None)
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(libc, "prctl"):
        # A signal that torchrun does not pass on, as SIGUSR1, kills it: its ranks then get SIGTERM.
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or NVIDIA_DRIVER.exists() and not hidden:
        return rank, ranks, start_gpu()
    say(f"no GPU: {ranks} process(es) on the CPU")
    # Numbers below 1e-38 are treated as 0, as on GPUs: they make CPUs up to a hundred times slower.
    # Set before any thread starts, since threads inherit it.
    torch.set_flush_denormal(True)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_ranks > 1:  # torchrun gives each of them one thread; they can share all cores
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_ranks))
    elif hasattr(libc, "mallopt"):
        # glibc hands large freed buffers back to the kernel, and a sixth of every step went into
        # getting them again. (Between the buffers of a sharded model, memory would lie unused.)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: none of them is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    return rank, ranks, torch.device("cpu")


def start_gpu() -> torch.device:
    """This process's GPU. Raises InputError if torch cannot use it, since the run would take the
    CPU, or if there are fewer GPUs than processes."""
    if not torch.cuda.is_available():
        raise InputError(
            f"this machine has NVIDIA GPUs that torch {torch.__version__} cannot use: their driver "
            f"is too old, or torch is built for another CUDA ({torch.version.cuda or 'none'}). To "
            "train on the CPU, set CUDA_VISIBLE_DEVICES to an empty string."
        )
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        processes = os.environ["LOCAL_WORLD_SIZE"]
        raise InputError(f"{processes} processes for {count} GPUs: lower --nproc_per_node")
    # Micro-batches differ in length: of fixed segments, much would lie unused.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.cuda.set_device(local)
    # On H100s SDPA would prefer cuDNN's attention, which plans anew for every length: up to half a
    # second a call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype: auto is bfloat16 on GPUs that compute in it, elsewhere float32."""
    gpu = device.type == "cuda"
    fast = gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto" and gpu and not fast:
        say("this GPU has no bfloat16 of its own: it computes in float32")
    return getattr(torch, name.replace("auto", "bfloat16" if fast else "float32"))


def on_signals(handler: Callable | signal.Handlers) -> None:
    """Have SIGNALS handled, but for those that are ignored already, as nohup does with SIGHUP."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_with_workers(number: int, _=None) -> None:
    """What a signal does until start_group: by itself, it would leave datasets' workers behind."""
    for worker in multiprocess.active_children():
        worker.kill()
    if multiprocess.parent_process() is None and os.environ.get("RANK", "0") == "0":
        os.write(2, f"\nended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def start_group(device: torch.device) -> None:
    """The process group of torchrun's ranks, or of this process alone."""
    on_signals(signal.SIG_DFL)  # while a rank waits for another, no handler runs
    options = {"backend": "gloo", "timeout": timedelta(minutes=30)}
    if device.type == "cuda":
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    store, rank, ranks = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=options["timeout"]))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # several machines count restarts differently
            # After a restart, torchrun's store still holds the addresses of the failed attempt.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(**options, store=store, rank=rank, world_size=ranks)


def watch_signals() -> Callable[[], int]:
    """A function that gives the number of the signal that has arrived, 0 before: the ranks of a
    preempted job receive it at different times. After a second Ctrl-C, the process ends at once."""
    received = []

    def receive(number, _):
        if number == signal.SIGINT in received:
            end_with_workers(number)
        received.append(number)

    on_signals(receive)
    return lambda: received[0] if received else 0


def max_over_ranks(device: torch.device, *values, beside: torch.Tensor | None = None):
    """The largest over all ranks of each value, a number or a () tensor, sharded or not; and, if it
    is given, the values of the (n,) tensor `beside`, which come with them. Collective; one wait for
    the GPU."""
    values = [v.full_tensor() if isinstance(v, DTensor) else v for v in values]
    maxima = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    if beside is None:
        return maxima.tolist()
    found = torch.cat([maxima, beside]).tolist()
    return found[: len(values)], found[len(values) :]


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def gather(mine) -> list:
    """An object of every rank. Collective."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def peak_memory(device: torch.device) -> dict[str, float]:
    """{metric: GB that this process had at most}: allocated on its GPU, and what torch reserved for
    that, with the gaps between; or resident on the host."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory_gb": peaks[0] / 1e9, "peak_reserved_gb": peaks[1] / 1e9}
    if sys.platform == "linux":  # whose ru_maxrss counts the process that started this one, too
        status = Path("/proc/self/status").read_text()
        return {"peak_memory_gb": int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return {"peak_memory_gb": peak / 1e9}
