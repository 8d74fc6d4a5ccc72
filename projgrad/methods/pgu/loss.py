"""The published forget loss of PGU."""

import math

import torch
from torch import Tensor

from ..._options import within


def unlearning_loss(logits: Tensor, labels: Tensor, offset: float = 0.05, entropy_weight: float = 0.2) -> Tensor:
    """Compute the published forget objective: low where the labels get little probability and the model is undecided.

    A scalar, to be minimised. `PGU.step` does that when its closure returns (logits, labels); this value, returned
    there, would be maximised.

    mean_j[ -log(1 - (p_j - offset)) ] - w mean_j H_j,    p_j the probability of label j, H_j the entropy in nats

    Formed from logarithms, so that neither p near 1 nor a large logit loses digits.

    Args:
        logits: (n, classes), floating point, n ≥ 1; half types are computed in float32.
        labels: (n,) integers of any type, what is to be forgotten.
        offset: keeps the logarithm finite, ≥ 0.
        entropy_weight: w, ≥ 0.

    Raises:
        ValueError: shapes that do not match, no samples, labels outside [0, classes), a negative offset or weight.
        TypeError: logits that are not floating point, labels that are no integers, an option that is no number.

    Source: PGU, arXiv 2312.04095.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
        >>> sure = projgrad.unlearning_loss(logits[1:], torch.tensor([0]))
        >>> bool(projgrad.unlearning_loss(logits[:1], torch.tensor([0])) < sure)
        True
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            "unlearning_loss: logits must be (n, classes) and labels (n,), n at least 1; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.is_floating_point():
        raise TypeError(f"unlearning_loss: logits must be floating point; got {logits.dtype}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"unlearning_loss: labels must be integers; got {labels.dtype}")
    labels = labels.long()
    low, high = labels.amin(), labels.amax()
    if not (low >= 0 and high < logits.shape[1]):
        raise ValueError(
            f"unlearning_loss: labels must be integers in [0, {logits.shape[1]}), the classes of the logits; got "
            f"{int(low)} to {int(high)}"
        )
    offset = within("unlearning_loss: offset", offset, "[0, inf)")
    entropy_weight = within("unlearning_loss: entropy_weight", entropy_weight, "[0, inf)")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    own = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, labels[:, None], True)
    others = log_p.masked_fill(own, -math.inf).logsumexp(1)  # log(1 - p)
    if offset:
        others = torch.logaddexp(others, torch.full_like(others, math.log(offset)))
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(1)  # 0 log 0 = 0: a class masked out
    return -others.mean() - entropy_weight * entropy.mean()
