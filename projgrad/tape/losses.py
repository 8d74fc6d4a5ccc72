"""What losses of n samples must be like."""

import math

from torch import Tensor


def check_losses(losses: Tensor) -> None:
    check_shape(losses)
    check_values(losses.tolist())


def check_shape(losses: Tensor) -> None:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"one loss per sample is needed, shape (n,); got {got}: use reduction='none'")
    if not len(losses):
        raise ValueError("there are no losses: without samples there is nothing to be orthogonal to")
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on any parameter that the tape follows")


def check_values(losses: list[float]) -> list[float]:
    bad = [j for j, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise FloatingPointError(f"NaN or Inf in the losses of samples {bad[:8]}; nothing was changed")
    return losses
