"""Forget objectives of language models, to be minimised: functions of the log-probabilities of whole sequences.

Give their mean as the forget loss to a method with `ascend=False`. A sequence's log-probability is the sum over its
answer tokens, prompt and padding left out.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _options


def npo_loss(log_probs: Tensor, reference_log_probs: Tensor, beta: float = 0.1) -> Tensor:
    """Compute the losses (n,) of negative preference optimisation.

    loss = 2/β log(1 + (π(y|x) / π_ref(y|x))^β) = -2/β log σ(-β (log π - log π_ref))

    Its gradient is that of gradient ascent times 2 π^β / (π^β + π_ref^β), in [0, 2]: 1 at first, and 0 for what is
    forgotten. β → 0 is gradient ascent.

    Args:
        log_probs: log π(y|x) of each sequence (n,).
        reference_log_probs: the same of the model before unlearning (n,); no gradient flows to them.
        beta: β > 0.

    Raises:
        ValueError: beta is not positive, or the log-probabilities have other shapes than (n,).

    Source: Zhang et al., "Negative Preference Optimization", arXiv 2404.05868, equation 3.

    Example:
        >>> from projgrad.methods.language_losses import npo_loss
        >>> round(npo_loss(torch.tensor([-3.0]), torch.tensor([-3.0]), beta=1.0).item(), 4)  # 2 log 2
        1.3863
    """
    _check_beta(beta)
    _check_shapes(log_probs, "reference_log_probs", reference_log_probs)
    return -2 / beta * logsigmoid(-beta * (log_probs - reference_log_probs.detach()))


def simnpo_loss(log_probs: Tensor, lengths: Tensor, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """Compute the losses (n,) of NPO without a reference model, which take the mean over each sequence's tokens.

    loss = -2/β log σ(-β/|y| log π(y|x) - γ)

    Args:
        log_probs: log π(y|x) of each sequence (n,).
        lengths: number of answer tokens |y| of each sequence (n,).
        beta: β > 0.
        gamma: margin γ ≥ 0.

    Raises:
        ValueError: beta is not positive, gamma is negative, or the tensors have other shapes than (n,).

    Source: Fan et al., "Simplicity Prevails", arXiv 2410.07163, equation 4.

    Example:
        >>> from projgrad.methods.language_losses import simnpo_loss
        >>> round(simnpo_loss(torch.tensor([0.0]), torch.tensor([7]), beta=1.0).item(), 4)  # 2 log 2
        1.3863
    """
    _check_beta(beta)
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0; got {gamma}")
    _check_shapes(log_probs, "lengths", lengths)
    return -2 / beta * logsigmoid(-beta / lengths * log_probs - gamma)


def _check_beta(beta: float) -> None:
    if not _options.number(beta) or not 0 < beta < torch.inf:
        raise ValueError(f"beta must be positive and finite; got {beta!r}")


def _check_shapes(log_probs: Tensor, name: str, other: Tensor) -> None:
    if log_probs.ndim != 1 or log_probs.shape != other.shape:
        shapes = f"{tuple(log_probs.shape)} and {tuple(other.shape)}"
        raise ValueError(f"log_probs and {name} must both be (n,), one number per sequence; got {shapes}")
