"""The SimPER objective (Xiao et al., "SimPER: A Minimalist Approach to Preference Alignment without
Hyperparameters", ICLR 2025, arXiv 2502.00883, section 3), and the losses it is compared with."""

import torch
import torch.nn.functional as F


def simper_loss(token_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The loss of every preference pair, of a prompt x, a chosen response y_w and a rejected y_l:

        L = −exp( 1/|y_w| log p(y_w | x) ) + exp( 1/|y_l| log p(y_l | x) ) = −p_w + p_l

    p_w and p_l are the inverse perplexities of the two responses, the geometric means of their
    tokens' probabilities.

    token_logps: (tokens,) float32 or float64, log-probs of the response tokens, pair after pair,
        chosen before rejected.
    lengths: (pairs, 2) int64, number of tokens of the chosen and of the rejected response, each at
        least 1.
    Returns (pairs,) losses in the dtype of token_logps.

    Both inverse perplexities are in (0, 1), so a loss is in (−1, 1), and negative as soon as the
    chosen response is the likelier one per token. The gradient, with θ the model's parameters, is

        ∇L = p_l · 1/|y_l| ∇ log p(y_l | x) − p_w · 1/|y_w| ∇ log p(y_w | x)

    Each side's weight is its own inverse perplexity, at most 1: a response that is already unlikely
    is pushed less. Unlike DPO, it has no reference model; unlike SimPO, no margin γ; unlike
    both, no β and no sigmoid that couples the two sides. It has no hyperparameter.
    """
    mean_logps = sum_logps(token_logps, lengths) / lengths  # the length normalization
    chosen, rejected = mean_logps.exp().unbind(dim=1)  # inverse perplexities
    return rejected - chosen


def sum_logps(token_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """log p(response | prompt), the sum over its tokens, in the shape of `lengths`: (pairs, K) for
    K responses to a prompt. Arguments as in simper_loss."""
    # unsafe skips the check that the lengths sum to the number of tokens, for which the host would
    # have to wait for the GPU.
    return torch.segment_reduce(
        token_logps, "sum", lengths=lengths.flatten(), unsafe=token_logps.is_cuda
    ).view_as(lengths)


# ---- The losses that SimPER is compared with -----------------------------------------------------
#
# `--loss NAME` is the function NAME_loss of this file, `--loss_args beta=0.1` its keyword
# arguments, whose defaults are those of its paper or its authors' code. Arguments and result are
# those of simper_loss. Parameters without a default beyond the first two are given by name:
# `reference` is the summed log-probs of both responses under the model that training starts from,
# (pairs, 2) float32; any other name is a column of numbers of the data, (pairs,) float32.
#
# In the equations w and l are the chosen and the rejected response, |w| and |l| their numbers of
# tokens, s their summed and m their mean log-probs, r = s − reference; σ is the sigmoid. All are
# per pair: none depends on what else is in a batch.


def sft_loss(token_logps, lengths):
    """−m_w: supervised fine-tuning on the chosen response, the first; others are not used."""
    return -(sum_logps(token_logps, lengths) / lengths)[:, 0]


def rrhf_loss(token_logps, lengths, lambda_=1.0):
    """max(0, m_l − m_w) − λ s_w (Yuan et al. 2023, arXiv 2304.05302). Their code averages the
    second term over the padded row, prompt and padding included."""
    sums = sum_logps(token_logps, lengths)
    chosen, rejected = (sums / lengths).unbind(dim=1)
    return F.relu(rejected - chosen) - lambda_ * sums[:, 0]


def slic_hf_loss(token_logps, lengths, delta=1.0, lambda_=0.1):
    """max(0, δ − s_w + s_l) − λ s_w (Zhao et al. 2023, arXiv 2305.10425; their second term is
    of the SFT data's response). TRL's "hinge" is another: it has a reference and no second term."""
    chosen, rejected = sum_logps(token_logps, lengths).unbind(dim=1)
    return F.relu(delta - chosen + rejected) - lambda_ * chosen


def dpo_loss(token_logps, lengths, reference, beta=0.1):
    """−log σ(β (r_w − r_l)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    chosen, rejected = (sum_logps(token_logps, lengths) - reference).unbind(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo_loss(token_logps, lengths, reference, tau=0.1):
    """(r_w − r_l − 1/(2τ))² (Azar et al. 2023, arXiv 2310.12036, eq. 17). TRL and HALOs use
    means in place of the sums."""
    chosen, rejected = (sum_logps(token_logps, lengths) - reference).unbind(dim=1)
    return (chosen - rejected - 1 / (2 * tau)).square()


def cpo_loss(token_logps, lengths, beta=0.1, lambda_=1.0):
    """−log σ(β (s_w − s_l)) − λ s_w (Xu et al. 2024, arXiv 2401.08417). In their code and
    TRL the second term is a mean over the batch's tokens."""
    chosen, rejected = sum_logps(token_logps, lengths).unbind(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected)) - lambda_ * chosen


def kto_loss(token_logps, lengths, reference, beta=0.1, lambda_w=1.0, lambda_l=1.0):
    """λ_w (1 − σ(β (r_w − z_l))) + λ_l (1 − σ(β (z_w − r_l))), z = max(0, r) without
    gradient: the form for pairs of KTO (Ethayarajh et al. 2024, arXiv 2402.01306).

    KTO's z is the batch mean of r over mismatched prompts and responses; the form for pairs that
    TRL had (kto_pair) takes the mean of the other side's r over a device's batch. Here it is the
    pair's own, so that no split of a batch changes the loss. Tables after SimPO's print
    λ_l σ(z − β r_l) with a plus, which would raise the rejected response.
    """
    chosen, rejected = (sum_logps(token_logps, lengths) - reference).unbind(dim=1)
    z_chosen, z_rejected = chosen.detach().clamp(min=0), rejected.detach().clamp(min=0)
    loss_chosen = lambda_w * torch.sigmoid(beta * (z_rejected - chosen))
    return loss_chosen + lambda_l * torch.sigmoid(beta * (rejected - z_chosen))


def orpo_loss(token_logps, lengths, lambda_=0.1):
    """−m_w − λ log σ(logit(e^{m_w}) − logit(e^{m_l})) (Hong et al. 2024, arXiv 2403.07691).
    In their code and TRL the first term includes the prompt's tokens."""
    means = sum_logps(token_logps, lengths) / lengths
    below = means.clamp(max=-1e-6)  # the odds of a certain response are infinite, its gradient NaN
    log_odds = below - torch.log(-torch.expm1(below))  # m − log(1 − e^m)
    chosen, rejected = log_odds.unbind(dim=1)
    return -means[:, 0] - lambda_ * F.logsigmoid(chosen - rejected)


def r_dpo_loss(token_logps, lengths, reference, beta=0.1, alpha=0.01):
    """−log σ(β (r_w − r_l) + α (|w| − |l|)) (Park et al. 2024, arXiv 2403.19159): DPO for
    the reward minus α per token."""
    chosen, rejected = (sum_logps(token_logps, lengths) - reference).unbind(dim=1)
    longer = (lengths[:, 0] - lengths[:, 1]).to(chosen.dtype)
    return -F.logsigmoid(beta * (chosen - rejected) + alpha * longer)


def simpo_loss(token_logps, lengths, beta=2.0, gamma=1.0):
    """−log σ(β (m_w − m_l) − γ) (Meng et al. 2024, arXiv 2405.14734, eq. 6). Their code's
    option is γ/β."""
    chosen, rejected = (sum_logps(token_logps, lengths) / lengths).unbind(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def alphapo_loss(token_logps, lengths, alpha=0.25, beta=2.0, gamma=1.0):
    """−log σ(β (a_w − a_l) − γ), a = (1 − e^{−αm}) / α (Gupta et al. 2025, arXiv
    2501.03884). SimPO is α → 0. With α = −1 and γ = 0, a is e^m − 1, and for β → 0 the
    gradient is SimPER's, times β / 2."""
    means = sum_logps(token_logps, lengths) / lengths
    chosen, rejected = (-torch.expm1(-alpha * means) / alpha).unbind(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


# ---- SimPER without its parts --------------------------------------------------------------------


def simper_sum_loss(token_logps, lengths):
    """e^{s_l} − e^{s_w}: without length normalization. Below s ≈ −103 the exponential is 0 in
    float32, and so is its gradient."""
    chosen, rejected = sum_logps(token_logps, lengths).exp().unbind(dim=1)
    return rejected - chosen


def simper_log_loss(token_logps, lengths):
    """m_l − m_w: without the exponential; a difference of mean log-probs, unbounded below."""
    chosen, rejected = (sum_logps(token_logps, lengths) / lengths).unbind(dim=1)
    return rejected - chosen


def simper_reference_loss(token_logps, lengths, reference):
    """e^{r_l/|l|} − e^{r_w/|w|}: with a reference model; the inverse perplexities become their
    ratios to the reference's, which start at 1."""
    chosen, rejected = ((sum_logps(token_logps, lengths) - reference) / lengths).exp().unbind(dim=1)
    return rejected - chosen


# Every function above that is called NAME_loss, by its NAME.
LOSSES = {k.removesuffix("_loss"): v for k, v in globals().items() if k.endswith("_loss")}
