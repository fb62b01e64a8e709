"""The rehearsal: what needs the most memory comes first."""

import torch
import torch.distributed as dist


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

    weights = [*model.optimized().values()]
    # As much as AdamW's two moments take, which exist from the first step on.
    moments = [torch.zeros_like(weight) for weight in weights for _ in range(2)]
    if len(micro_batches) > len(steps):  # there are gradients of earlier micro-batches
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    try:
        for number in {largest(data.cost), largest(lambda share: responses[share].sum())}:
            shares = micro_batches[number]
            model(data.pack(shares[dist.get_rank()]).to(device)).sum().backward()
    except RuntimeError as error:
        explain(error, max(map(data.cost, shares)), data.costs.max())
        raise
    del moments
    model.zero_grad()
    model.refresh()


def explain(error: RuntimeError, tokens: int, longest: int) -> None:
    """Add a note on what to lower, if it is memory that is lacking."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        error.add_note(
            f"The run's largest micro-batch, {tokens} tokens on a rank, needs too much memory: "
            f"lower --micro_batch_tokens (the longest pair has {longest}), or set "
            "--activation_checkpointing selective, or true."
        )
