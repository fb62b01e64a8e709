"""The SimPER objective (Xiao et al., "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
ICLR 2025, arXiv 2502.00883, section 3)."""

import torch


def simper_loss(token_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The loss of every preference pair:

        L = exp( 1/|y_l| Σ_t log p(y_l,t | x, y_l,<t) ) − exp( 1/|y_w| Σ_t log p(y_w,t | x, y_w,<t) )

    with x the prompt, y_w the chosen and y_l the rejected response. exp(mean log-likelihood) is the inverse perplexity of
    a response, the geometric mean of its tokens' probabilities.

    token_logps: (tokens,) float32 or float64, log-probs of the response tokens, pair after pair, chosen before rejected.
    lengths: (pairs, 2) int64, number of tokens of the chosen and of the rejected response, each at least 1.
    Returns (pairs,) losses in the dtype of token_logps.

    Both inverse perplexities are in (0, 1), so a loss is in (−1, 1): negative as soon as the chosen response is the
    likelier one per token, and −1 would be a model that is certain of every chosen and of no rejected response.

    The gradient, with θ the model's parameters, p_w and p_l the two inverse perplexities:

        ∇L = p_l · 1/|y_l| ∇ log p(y_l | x) − p_w · 1/|y_w| ∇ log p(y_w | x)

    Each side is weighted by its own inverse perplexity and so is bounded; what is already unlikely is pushed down less.

    Compared with DPO there is no reference model, no β and no sigmoid; compared with SimPO there is no β, no margin γ
    and no sigmoid that couples the two sides. Nothing is left to tune.
    """
    mean_logps = sum_logps(token_logps, lengths) / lengths  # the length normalization
    chosen, rejected = mean_logps.exp().unbind(dim=1)  # inverse perplexities
    return rejected - chosen


def sum_logps(token_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """log p(response | prompt), the sum over its tokens: (pairs, 2), chosen and rejected. Arguments as in simper_loss."""
    # unsafe skips the check that the lengths sum to the number of tokens: the host would have to wait for the GPU.
    sums = torch.segment_reduce(token_logps, "sum", lengths=lengths.flatten(), unsafe=token_logps.is_cuda)
    return sums.view_as(lengths)
