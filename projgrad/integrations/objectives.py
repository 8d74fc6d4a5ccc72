"""Forget objectives that are plain losses: their gradients need no projection."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import _options
from ..methods.language_losses import npo_loss, simnpo_loss
from .token_losses import TokenSums


class Terms(NamedTuple):
    """The loss of a step: forget_weight · mean of the forget terms + retain_weight · mean of the retain losses.

    forget: makes the terms (n,) of the token sums of n forget samples, and of their log-probabilities (n,) before
        unlearning if needs_reference; None: they are the samples' losses.
    """

    forget_weight: float
    retain_weight: float
    forget: Callable[[TokenSums, Tensor | None], Tensor] | None = None
    needs_reference: bool = False


def grad_ascent() -> Terms:
    return Terms(-1.0, 0.0)


def finetune() -> Terms:
    return Terms(0.0, 1.0)


def neggrad(alpha: float = 0.95) -> Terms:
    alpha = _options.within("alpha weighs the mean retain gradient and", alpha, "[0, 1]")
    return Terms(alpha - 1, alpha)


def graddiff(alpha: float = 1.0, gamma: float = 1.0) -> Terms:
    return Terms(-_weight("gamma", gamma), _weight("alpha", alpha))


def npo(alpha: float = 1.0, gamma: float = 1.0, beta: float = 0.1) -> Terms:
    _options.within("beta", beta, "(0, inf)")

    def forget(sums: TokenSums, reference: Tensor | None) -> Tensor:
        return npo_loss(-sums.losses, reference, beta)

    return Terms(_weight("gamma", gamma), _weight("alpha", alpha), forget, needs_reference=True)


def simnpo(alpha: float = 1.0, gamma: float = 0.125, beta: float = 1.0, delta: float = 0.0) -> Terms:
    """Make the terms of SimNPO, with the names and defaults of open-unlearning: delta is the margin."""
    _options.within("beta", beta, "(0, inf)")
    _options.within("delta", delta, "[0, inf)")

    def forget(sums: TokenSums, _: Tensor | None) -> Tensor:
        return simnpo_loss(-sums.losses, sums.weights, beta, delta)

    return Terms(_weight("gamma", gamma), _weight("alpha", alpha), forget)


def _weight(name: str, value: float) -> float:
    return _options.within(f"{name}, a weight of a loss,", value, "[0, inf)")
