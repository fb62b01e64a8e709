"""The rehearsal: what needs the most memory comes first; and how much fits."""

import contextlib

import numpy as np
import torch
import torch.distributed as dist

from runtime.processes import max_over_ranks

KEPT_FREE = 0.1  # of a GPU's memory: lengths differ, and so fragments lie unused


@contextlib.contextmanager
def memory_of_a_step(model, several: bool):
    """What a step finds in memory: AdamW's two moments, which exist from the first step on, and, of
    one of `several` micro-batches, gradients of earlier ones. All is forgotten again."""
    weights = [*model.optimized().values()]
    moments = [torch.zeros_like(weight) for weight in weights for _ in range(2)]
    for weight in weights if several else ():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    yield
    del moments
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

    def largest(cost) -> int:
        costs = [max(map(cost, shares)) for shares in micro_batches]
        return costs.index(max(costs))

    with memory_of_a_step(model, len(micro_batches) > len(steps)):
        try:
            for number in {largest(data.cost), largest(lambda share: responses[share].sum())}:
                shares = micro_batches[number]
                model(data.pack(shares[dist.get_rank()]).to(device)).sum().backward()
        except RuntimeError as error:
            explain(error, max(map(data.cost, shares)), data.costs.max())
            raise


def tokens_that_fit(model, data, device: torch.device, batch_size: int) -> int:
    """The most tokens of a micro-batch, the same on every rank, with which KEPT_FREE of the GPU
    stays free: by the memory that its longest row takes, and twice as many tokens. On the CPU
    8,192; at least the longest row. Collective.

    data: a DataSet; its schedule does not matter.
    """
    longest = int(data.costs.max())
    if device.type != "cuda":
        return max(8192, longest)
    by_cost = np.argsort(-data.costs, kind="stable")
    counts = [1, 2]
    while len(by_cost) > counts[1] and data.cost(by_cost[: counts[1]]) < 2 * longest:
        counts[1] += 1
    sizes, peaks = [], []
    with memory_of_a_step(model, several=True):
        for count in counts:
            torch.cuda.reset_peak_memory_stats()
            rows = by_cost[:count].tolist()
            try:
                model(data.pack(rows).to(device)).sum().backward()
            except torch.OutOfMemoryError as error:
                if dist.get_world_size() > 1 or count == 1:
                    explain(error, data.cost(rows), longest)
                    raise
                return longest
            sizes.append(data.cost(rows))
            peaks.append(torch.cuda.max_memory_allocated())
        available = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    slope = max(1.0, (peaks[1] - peaks[0]) / max(1, sizes[1] - sizes[0]))
    fits = sizes[0] + ((1 - KEPT_FREE) * available - peaks[0]) / slope
    (fewest,) = max_over_ranks(device, -fits)
    whole = int(data.costs[by_cost[:batch_size]].sum())  # of any step
    return max(longest, min(int(-fewest) // 256 * 256, whole))


def explain(error: RuntimeError, tokens: int, longest: int) -> None:
    """Add a note on what to lower, if it is memory that is lacking."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        error.add_note(
            f"The run's largest micro-batch, {tokens} tokens on a rank, needs too much memory: "
            f"lower --micro_batch_tokens (the longest pair has {longest}), or set "
            "--activation_checkpointing selective, or true."
        )
