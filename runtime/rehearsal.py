"""The rehearsal: what needs the most memory comes first; and how much fits."""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from runtime.processes import max_over_ranks
from runtime.streaming import HostMaster

KEPT_FREE = 0.1  # of a GPU's memory: lengths differ, and so fragments lie unused
GATHERED = 0.6  # of it, for parameters, gradients, moments and weights that stay gathered


@contextlib.contextmanager
def memory_of_a_step(model, several: bool):
    """What a step finds in memory: AdamW's two moments, which exist from the first step on, and, of
    one of `several` micro-batches, gradients of earlier ones. All is forgotten again."""
    weights = [*model.optimized().values()]
    there = [weight for weight in weights if not isinstance(weight, HostMaster)]
    moments = [torch.zeros_like(weight) for weight in there for _ in range(2)]
    for weight in weights if several else ():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    model.begin_micro_batch(last=False)  # weights that are kept stay gathered
    if isinstance(model, FSDPModule):  # what replicas do not reduce now, the first step would add
        model.set_requires_all_reduce(True)
    yield
    del moments
    model.free_gathered()
    model.zero_grad()
    model.refresh()


def rehearse(model, data, device: torch.device) -> None:
    """Run forward and backward of the micro-batches with the most tokens (for the blocks' memory)
    and the most response tokens (for the head's) on one rank, in the memory that a step leaves
    them, and forget the result: a run that does not fit fails now, with a note, and not hours
    later. Collective.

    data: a DataSet with the schedule of training.
    """
    steps = range(min(len(data.schedule), 20_000))  # seconds' work; a longer run has many alike
    micro_batches = [shares for step in steps for shares in data.schedule[step]]
    responses = data.lengths[:, 1:].sum(axis=1)

    def largest(cost) -> list[list[int]]:
        return max(micro_batches, key=lambda shares: max(map(cost, shares)))

    heaviest = [largest(data.cost), largest(lambda share: responses[share].sum())]
    try:
        with memory_of_a_step(model, len(micro_batches) > len(steps)):
            for shares in heaviest[: 1 if heaviest[0] is heaviest[1] else 2]:
                model(data.pack(shares[dist.get_rank()]).to(device)).sum().backward()
    except RuntimeError as error:
        explain(error, max(map(data.cost, heaviest[0])), data.costs.max())
        raise


def gathered_fits(model, device: torch.device) -> bool:
    """Whether the weights of a sharded model may stay gathered for a step, by its size alone.
    Collective."""
    if device.type != "cuda" or dist.get_world_size() == 1:
        return False
    size = 0
    for parameter in model.parameters():
        size += (16 if parameter.requires_grad else 4) * parameter.to_local().numel()
        size += model.dtype.itemsize * parameter.numel()
    # Ranks may have other shards, and other cards: one answer for all.
    share = size / torch.cuda.get_device_properties(device).total_memory
    (largest,) = max_over_ranks(device, share)
    return largest <= GATHERED


def tokens_that_fit(model, data, device: torch.device, batch_size: int) -> int:
    """The most tokens of a micro-batch, the same on every rank, with which KEPT_FREE of the GPU
    stays free: by the memory that its longest row takes, and twice as many tokens each time, until
    what fits is near. On the CPU 8,192; at least the longest row. Collective.

    data: a DataSet; its schedule does not matter.
    """
    longest = int(data.costs.max())
    if device.type != "cuda":
        return max(8192, longest)
    by_cost = np.argsort(-data.costs, kind="stable")
    whole = int(data.costs[by_cost[:batch_size]].sum())  # of any step
    sizes, peaks, count, fits = [], [], 1, longest
    with memory_of_a_step(model, several=True):
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        base = torch.cuda.memory_allocated()
        free, base = (-value for value in max_over_ranks(device, -free, -base))
        most = (1 - KEPT_FREE) * free
        while True:
            rows = by_cost[:count].tolist()
            torch.cuda.reset_peak_memory_stats()
            try:
                model(data.pack(rows).to(device)).sum().backward()
            except torch.OutOfMemoryError as error:
                # FSDP does not recover from a backward pass that has ended early.
                if isinstance(model, FSDPModule) or count == 1:
                    explain(error, data.cost(rows), longest)
                    raise
                fits = sizes[-1]
                break
            sizes.append(data.cost(rows))
            peaks.extend(max_over_ranks(device, torch.cuda.max_memory_allocated()))
            # After one size, only this is known: memory grows at most in proportion to the tokens.
            (size0, peak0), (size1, peak1) = [(0, base), *zip(sizes, peaks)][-2:]
            slope = max(1.0, (peak1 - peak0) / (size1 - size0))
            fits = size1 + (most - peak1) / slope
            if size1 >= whole or len(sizes) > 1 and fits <= 1.5 * size1:
                break
            goal = size1 * min(2, (most - base) / max(1, peak1 - base))
            while count < len(by_cost) and data.cost(by_cost[: count + 1]) <= goal:
                count += 1
            if len(rows) == count:
                break
    return max(longest, min(int(fits) // 256 * 256, whole))


def explain(error: RuntimeError, tokens: int, longest: int) -> None:
    """Add a note on what to lower, if it is memory that is lacking, or to set, if the model changes
    the result of a product in place."""
    if "selective activation checkpoint has been mutated" in str(error):
        error.add_note("This model needs --activation_checkpointing true, or false.")
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        streaming = ", or --stream_optimizer true" if dist.get_world_size() == 1 else ""
        error.add_note(
            f"The run's largest micro-batch, {tokens} tokens on a rank, needs too much memory: "
            f"lower --micro_batch_tokens (the longest pair has {longest}), or set "
            f"--activation_checkpointing selective, or true{streaming}."
        )
