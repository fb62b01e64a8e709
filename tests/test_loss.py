"""simper_loss against arithmetic by hand, a loop over Python floats, and its closed-form gradient."""

import math

import pytest
import torch

from loss import simper_loss

LENGTHS = [(3, 1), (1, 4), (2, 2), (5, 3)]


def make_logps(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random log-probs between -3 and 0 of four pairs, which require a gradient, and the lengths."""
    lengths = torch.tensor(LENGTHS)
    logps = -3 * torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logps.to(dtype).requires_grad_(), lengths


def responses(logps: torch.Tensor) -> list[list[float]]:
    """The log-probs of every response as Python floats: chosen, rejected, pair after pair."""
    values, start, result = logps.tolist(), 0, []
    for length in (length for pair in LENGTHS for length in pair):
        result.append(values[start : start + length])
        start += length
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_by_hand(dtype):
    # chosen, 3 tokens of probability 1/2, 1/4, 1/8: their product is 1/64, its third root 1/4.
    # rejected, 1 token of probability 1/16. Loss: 1/16 - 1/4 = -3/16. Summed instead of averaged: 1/16 - 1/64 > 0.
    logps = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16], dtype=dtype).log()
    lengths = torch.tensor([[3, 1]])
    loss, eps = simper_loss(logps, lengths), torch.finfo(dtype).eps
    assert loss.dtype == dtype and loss.shape == (1,)
    assert abs(loss.item() + 3 / 16) < 4 * eps


def test_pairs_against_a_loop():
    logps, lengths = make_logps()
    p = [math.exp(sum(tokens) / len(tokens)) for tokens in responses(logps)]
    expected = [rejected - chosen for chosen, rejected in zip(p[::2], p[1::2])]
    assert simper_loss(logps, lengths).tolist() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_gradient_is_the_closed_form():
    logps, lengths = make_logps()
    simper_loss(logps, lengths).sum().backward()
    expected = []
    for number, tokens in enumerate(responses(logps)):
        p, sign = math.exp(sum(tokens) / len(tokens)), -1 if number % 2 == 0 else 1  # chosen, then rejected
        expected += [sign * p / len(tokens)] * len(tokens)
    assert logps.grad.tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.autograd.gradcheck(lambda x: simper_loss(x, lengths), make_logps()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "chosen, rejected, expected", [(0, -1e4, -1), (-1e4, 0, 1), (-1e4, -1e4, 0), (0, 0, 0), (-1e-3, -9, -1)]
)
def test_extremes_are_finite_and_bounded(dtype, chosen, rejected, expected):
    logps = torch.tensor([chosen] * 2000 + [rejected] * 3, dtype=dtype, requires_grad=True)
    loss = simper_loss(logps, torch.tensor([[2000, 3]]))
    loss.sum().backward()
    assert -1 <= loss.item() <= 1 and loss.item() == pytest.approx(expected, abs=2e-3)
    assert logps.grad.isfinite().all() and logps.grad[:2000].abs().sum() <= 1.0001 and logps.grad[2000:].abs().sum() <= 1.0001


def test_random_losses_are_inside_the_bounds():
    lengths = torch.randint(1, 9, (300, 2), generator=torch.Generator().manual_seed(1))
    logps = -torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(2)) * 5 - 1e-3
    loss = simper_loss(logps, lengths)
    assert loss.abs().max() < 1 and loss.min() < 0 < loss.max()


def test_a_pair_does_not_depend_on_the_others():
    logps, lengths = make_logps(torch.float32)
    together, start = simper_loss(logps, lengths), 0
    for number, pair in enumerate(lengths):
        stop = start + int(pair.sum())
        assert simper_loss(logps[start:stop], pair[None]).item() == together[number].item()
        (gradient,) = torch.autograd.grad(together[number], logps, retain_graph=True)
        assert not gradient[:start].any() and gradient[start:stop].all() and not gradient[stop:].any()
        start = stop


@pytest.mark.parametrize("lengths", [[[3, 1]], [[3, 3]], [[5, 1]], [[2, 1], [1, 2]]])
def test_wrong_lengths_raise(lengths):
    with pytest.raises(RuntimeError):
        simper_loss(torch.zeros(5), torch.tensor(lengths))
