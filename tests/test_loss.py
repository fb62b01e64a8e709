"""The losses against arithmetic by hand, loops over Python floats, and their closed-form
gradients."""

import inspect
import math
from math import exp, log

import pytest
import torch

from loss import LOSSES, simper_loss

LENGTHS = [(3, 1), (1, 4), (2, 2), (5, 3)]


def make_logps(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random log-probs between -3 and 0 of four pairs, which require a gradient, and the
    lengths."""
    lengths = torch.tensor(LENGTHS)
    logps = -3 * torch.rand(
        int(lengths.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
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
    # rejected, 1 token of probability 1/16. Loss: 1/16 - 1/4 = -3/16. Summed instead of averaged:
    # 1/16 - 1/64 > 0.
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
        p, sign = (
            math.exp(sum(tokens) / len(tokens)),
            -1 if number % 2 == 0 else 1,
        )  # chosen, then rejected
        expected += [sign * p / len(tokens)] * len(tokens)
    assert logps.grad.tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.autograd.gradcheck(lambda x: simper_loss(x, lengths), make_logps()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [(0, -1e4, -1), (-1e4, 0, 1), (-1e4, -1e4, 0), (0, 0, 0), (-1e-3, -9, -1)],
)
def test_extremes_are_finite_and_bounded(dtype, chosen, rejected, expected):
    logps = torch.tensor([chosen] * 2000 + [rejected] * 3, dtype=dtype, requires_grad=True)
    loss = simper_loss(logps, torch.tensor([[2000, 3]]))
    loss.sum().backward()
    assert -1 <= loss.item() <= 1 and loss.item() == pytest.approx(expected, abs=2e-3)
    assert (
        logps.grad.isfinite().all()
        and logps.grad[:2000].abs().sum() <= 1.0001
        and logps.grad[2000:].abs().sum() <= 1.0001
    )


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
        assert (
            not gradient[:start].any() and gradient[start:stop].all() and not gradient[stop:].any()
        )
        start = stop


@pytest.mark.parametrize("lengths", [[[3, 1]], [[3, 3]], [[5, 1]], [[2, 1], [1, 2]]])
def test_wrong_lengths_raise(lengths):
    with pytest.raises(RuntimeError):
        simper_loss(torch.zeros(5), torch.tensor(lengths))


# ---- The losses that SimPER is compared with -----------------------------------------------------

# One pair by hand. The chosen response has 3 tokens of probability 1/2, 1/4, 1/8: p = 1/64, e^m =
# 1/4. The rejected one has a single token of probability 1/16. Under the reference both have 1/32,
# so that their ratios to it are 1/2 and 2.
BY_HAND = {
    "simper": ({}, 1 / 16 - 1 / 4),
    "sft": ({}, log(4)),
    "rrhf": ({"lambda_": 0.5}, 0 + 0.5 * log(64)),
    "slic_hf": ({"delta": 2.0, "lambda_": 0.5}, 2 + log(64) - log(16) + 0.5 * log(64)),
    "dpo": ({"beta": 1.0}, log(5)),  # σ(−log 2 − log 2) = 1/5
    "ipo": ({"tau": 0.25}, (-log(4) - 2) ** 2),
    "cpo": ({"beta": 1.0, "lambda_": 0.5}, log(5) + 0.5 * log(64)),  # σ(log 1/64 − log 1/16) = 1/5
    "kto": (
        {"beta": 1.0, "lambda_w": 3.0, "lambda_l": 6.0},
        3 * 4 / 5 + 6 * 2 / 3,
    ),  # z_w = 0, z_l = log 2
    "orpo": ({"lambda_": 0.5}, log(4) + 0.5 * log(6 / 5)),  # odds 1/3 and 1/15
    "r_dpo": ({"beta": 1.0, "alpha": log(2) / 2}, log(3)),  # σ(−log 4 + log 2) = 1/3
    "simpo": ({"beta": 1.0, "gamma": log(2)}, log(3 / 2)),  # σ(log 1/4 − log 1/16 − log 2) = 2/3
    # (1 − 4) − (1 − 16) = 12; σ(2 log 2 − log 2) = 2/3
    "alphapo": ({"alpha": 1.0, "beta": log(2) / 6, "gamma": log(2)}, log(3 / 2)),
    "simper_sum": ({}, 1 / 16 - 1 / 64),
    "simper_log": ({}, -log(4)),
    "simper_reference": ({}, 2 - 2 ** (-1 / 3)),
}


def call(name: str, logps, lengths, reference, **arguments):
    if "reference" in inspect.signature(LOSSES[name]).parameters:
        arguments["reference"] = reference
    return LOSSES[name](logps, lengths, **arguments)


@pytest.mark.repo
def test_every_loss_is_in_the_table():
    assert list(LOSSES) == list(BY_HAND) == list(GRADIENTS)


@pytest.mark.repo
def test_hyperparameters_are_those_of_the_papers_or_their_code():
    expected = {"rrhf": {"lambda_": 1.0}, "slic_hf": {"delta": 1.0, "lambda_": 0.1}}
    expected |= {"dpo": {"beta": 0.1}, "ipo": {"tau": 0.1}, "cpo": {"beta": 0.1, "lambda_": 1.0}}
    expected |= {"kto": {"beta": 0.1, "lambda_w": 1.0, "lambda_l": 1.0}, "orpo": {"lambda_": 0.1}}
    expected |= {"r_dpo": {"beta": 0.1, "alpha": 0.01}, "simpo": {"beta": 2.0, "gamma": 1.0}}
    expected |= {"alphapo": {"alpha": 0.25, "beta": 2.0, "gamma": 1.0}}
    found = {}
    for name in BY_HAND:
        parameters = inspect.signature(LOSSES[name]).parameters.values()
        found[name] = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert {name: values for name, values in found.items() if values} == expected


@pytest.mark.parametrize("name", BY_HAND)
def test_a_certain_response_has_a_finite_gradient(name):
    """Every token of one response has probability 1; its odds are infinite."""
    for logps, lengths in (([0.0, 0.0, -3.0], [[2, 1]]), ([-3.0, 0.0, 0.0], [[1, 2]])):
        logps = torch.tensor(logps, requires_grad=True)
        loss = call(name, logps, torch.tensor(lengths), torch.zeros(1, 2))
        loss.sum().backward()
        assert loss.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("name", BY_HAND)
def test_long_responses_far_apart_have_a_finite_gradient(name):
    """Summed log-probs of −15000 and −0.5: e^1500, beyond float64, is the ratio at β = 0.1."""
    for chosen, rejected in ((-30.0, -1e-3), (-1e-3, -30.0)):
        logps = torch.tensor([chosen] * 500 + [rejected] * 500, requires_grad=True)
        loss = call(name, logps, torch.tensor([[500, 500]]), torch.zeros(1, 2))
        loss.sum().backward()
        assert loss.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BY_HAND)
def test_losses_by_hand(name, dtype):
    logps, reference = (
        torch.tensor(values, dtype=dtype).log()
        for values in ([1 / 2, 1 / 4, 1 / 8, 1 / 16], [[1 / 32] * 2])
    )
    arguments, expected = BY_HAND[name]
    loss = call(name, logps, torch.tensor([[3, 1]]), reference, **arguments)
    assert loss.dtype == dtype and loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, rel=8 * torch.finfo(dtype).eps)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def alphapo_slopes(s, n, r):
    """da / ds = e^{−αm} / n."""
    powers = [exp(-0.25 * sum_ / count) for sum_, count in zip(s, n)]
    weight = 2 * sigmoid(1 - 2 * (powers[1] - powers[0]) / 0.25)
    return -weight * powers[0] / n[0], weight * powers[1] / n[1]


def orpo_slopes(s, n, r):
    p_w, p_l = exp(s[0] / n[0]), exp(s[1] / n[1])
    outside = 0.1 * sigmoid(log(p_l / (1 - p_l)) - log(p_w / (1 - p_w)))
    return -1 / n[0] - outside / (1 - p_w) / n[0], outside / (1 - p_l) / n[1]


# (∂L/∂s_w, ∂L/∂s_l) of every loss with its default arguments, differentiated by hand: s summed
# log-probs, n lengths, r their ratios to the reference, each (chosen, rejected).
GRADIENTS = {
    "simper": lambda s, n, r: (-exp(s[0] / n[0]) / n[0], exp(s[1] / n[1]) / n[1]),
    "sft": lambda s, n, r: (-1 / n[0], 0),
    "rrhf": lambda s, n, r: (
        -(s[1] / n[1] > s[0] / n[0]) / n[0] - 1,
        (s[1] / n[1] > s[0] / n[0]) / n[1],
    ),
    "slic_hf": lambda s, n, r: (-int(1 - s[0] + s[1] > 0) - 0.1, int(1 - s[0] + s[1] > 0)),
    "dpo": lambda s, n, r: (
        -0.1 * sigmoid(0.1 * (r[1] - r[0])),
        0.1 * sigmoid(0.1 * (r[1] - r[0])),
    ),
    "ipo": lambda s, n, r: (2 * (r[0] - r[1] - 5), -2 * (r[0] - r[1] - 5)),
    "cpo": lambda s, n, r: (
        -0.1 * sigmoid(0.1 * (s[1] - s[0])) - 1,
        0.1 * sigmoid(0.1 * (s[1] - s[0])),
    ),
    "kto": lambda s, n, r: (
        -0.1 * sigmoid(0.1 * (r[0] - max(0, r[1]))) * sigmoid(-0.1 * (r[0] - max(0, r[1]))),
        0.1 * sigmoid(0.1 * (max(0, r[0]) - r[1])) * sigmoid(-0.1 * (max(0, r[0]) - r[1])),
    ),
    "orpo": orpo_slopes,
    "r_dpo": lambda s, n, r: (
        -0.1 * sigmoid(0.1 * (r[1] - r[0]) - 0.01 * (n[0] - n[1])),
        0.1 * sigmoid(0.1 * (r[1] - r[0]) - 0.01 * (n[0] - n[1])),
    ),
    "simpo": lambda s, n, r: (
        -2 / n[0] * sigmoid(1 - 2 * (s[0] / n[0] - s[1] / n[1])),
        2 / n[1] * sigmoid(1 - 2 * (s[0] / n[0] - s[1] / n[1])),
    ),
    "alphapo": alphapo_slopes,
    "simper_sum": lambda s, n, r: (-exp(s[0]), exp(s[1])),
    "simper_log": lambda s, n, r: (-1 / n[0], 1 / n[1]),
    "simper_reference": lambda s, n, r: (-exp(r[0] / n[0]) / n[0], exp(r[1] / n[1]) / n[1]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_closed_forms(name):
    logps, lengths = make_logps()
    reference = (
        -3
        * torch.rand(
            len(LENGTHS), 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64
        )
        * lengths
    )
    call(name, logps, lengths, reference).sum().backward()
    expected, sums = [], [sum(tokens) for tokens in responses(logps)]
    for pair, n in enumerate(LENGTHS):
        s = sums[2 * pair : 2 * pair + 2]
        r = [value - other for value, other in zip(s, reference[pair].tolist())]
        slopes = GRADIENTS[name](s, n, r)
        expected += [slopes[0]] * n[0] + [slopes[1]] * n[1]
    assert logps.grad.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_loss_of_a_pair_does_not_depend_on_the_others(name):
    logps, lengths = make_logps()
    reference, start = torch.linspace(-9, -1, 2 * len(LENGTHS), dtype=torch.float64).view(-1, 2), 0
    together = call(name, logps, lengths, reference)
    for number, pair in enumerate(lengths):
        stop = start + int(pair.sum())
        alone = call(name, logps[start:stop], pair[None], reference[number][None])
        assert alone.item() == pytest.approx(together[number].item(), rel=1e-14)
        start = stop


def test_orpo_of_a_response_that_is_nearly_certain():
    """Its odds are those of its probability, up to where float32 has none."""
    for probability in (0.999, 0.99999):
        logps = torch.tensor([probability, 0.5], dtype=torch.float64).log()
        odds = probability / (1 - probability)  # the other's are 1
        expected = -math.log(probability) + 0.1 * math.log(1 + 1 / odds)
        (found,) = LOSSES["orpo"](logps, torch.tensor([[1, 1]]))
        assert found.item() == pytest.approx(expected, rel=1e-9)


def test_simper_and_simpo_are_corners_of_alphapo():
    """Of AlphaPO, its formula written out: σ's slope times SimPER's gradient, exactly."""
    logps, lengths = make_logps()
    (simper,) = torch.autograd.grad(LOSSES["simper"](logps, lengths).sum(), logps)
    loss = LOSSES["alphapo"](logps, lengths, alpha=-1.0, beta=3.0, gamma=0.0)
    (found,) = torch.autograd.grad(loss.sum(), logps)
    start = 0
    for pair, n in enumerate(lengths.tolist()):
        of_pair = slice(start, start + sum(n))
        start += sum(n)
        p = [part.mean().exp().item() for part in logps[of_pair].split(n)]
        weight = 3 * sigmoid(-3 * (p[0] - p[1]))
        assert found[of_pair].tolist() == pytest.approx((weight * simper[of_pair]).tolist()), pair
    near = LOSSES["alphapo"](logps, lengths, alpha=1e-6)
    assert near.tolist() == pytest.approx(LOSSES["simpo"](logps, lengths).tolist(), rel=1e-4)
