"""What torch's optimizers make of a gradient: the diagonal, and the momentum of its parts.

The letters are those of `optimizer_metric`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .._options import kind
from .._torch_private import version
from ..ops.numerics import product_dtype
from .protocol import SteppingOptimizer

State = dict[str, Any]
Diagonal = Tensor | float


class Response:
    """What an optimizer makes of a gradient: Δ = -D ∘ (linear in it and in those before it) + (what it does not enter).

    `state` and `group` are those of one parameter after the step, unless said otherwise. Here: without momentum.
    """

    buffer = "momentum_buffer"  # the name of the optimizer's own momentum in its state
    updates = 2

    def diagonal(self, p: Tensor, state: State, group: State) -> Diagonal:
        """Return D, a number or like p."""
        return group["lr"]

    def has_momentum(self, group: State) -> bool:
        """Return whether earlier gradients move the parameter too."""
        return False

    def decay(self, group: State) -> float:
        """Return by what a step without a forget gradient multiplies M; 1 where it leaves its own momentum alone."""
        return 1.0

    def starts_with_gradient(self, state: State) -> bool:
        """Return, from the state before the step, whether the momentum will be a copy of the gradient."""
        return False

    def change(
        self,
        u: Tensor,
        h: Tensor,
        M: Tensor | None,
        D: Diagonal,
        first: bool,
        state: State,
        group: State,
        updated: bool = False,
    ) -> Tensor:
        """Return F, float32 or better, and bring M up to date in place.

        h: the gradient that the optimizer stepped on, u its forget part. first: what `starts_with_gradient` said.
        updated: M is up to date already; that takes `updates` changes in place.
        """
        return -D * u.to(product_dtype(u.dtype))

    def carry(self, M: Tensor, share: Tensor, state: State, group: State) -> None:
        """Make M and the optimizer's own momentum what led to F + D share instead of F."""

    def take_out(self, part: Tensor, M: Tensor, state: State) -> None:
        """Take a part of M out of it and of the optimizer's own momentum."""
        momenta = M, state[self.buffer]
        versions = [version(momentum) for momentum in momenta]
        try:
            for momentum in momenta:
                momentum.sub_(part)
        except BaseException:  # Ctrl-C: from both, or M is no part of the optimizer's momentum any more
            for momentum, before in zip(momenta, versions, strict=True):
                if version(momentum) == before:
                    momentum.sub_(part)
            raise


class SGD(Response):
    """D = lr; F = -lr M, or -lr (u + μ M) with Nesterov's momentum."""

    def has_momentum(self, group: State) -> bool:
        return bool(group["momentum"])

    def decay(self, group: State) -> float:
        return group["momentum"] or 1.0

    def starts_with_gradient(self, state: State) -> bool:
        return state.get("momentum_buffer") is None

    def change(
        self,
        u: Tensor,
        h: Tensor,
        M: Tensor | None,
        D: Diagonal,
        first: bool,
        state: State,
        group: State,
        updated: bool = False,
    ) -> Tensor:
        if M is None:
            return super().change(u, h, M, D, first, state, group)
        if not updated:
            M.mul_(group["momentum"]).add_(u, alpha=1 if first else 1 - group["dampening"])
        direction = u.add(M, alpha=group["momentum"]) if group["nesterov"] else M
        return -D * direction.to(product_dtype(u.dtype))

    def carry(self, M: Tensor, share: Tensor, state: State, group: State) -> None:
        share = share / (1 + group["momentum"]) if group["nesterov"] else share
        self.take_out(share, M, state)


class Adam(Response):
    """D = lr / (√v̂ + eps); F = -D M̂ - (D - E) R̂; v̂ is the largest so far with amsgrad, M̂ = M / (1 - β₁ᵗ)."""

    buffer = "exp_avg"
    updates = 1

    def diagonal(self, p: Tensor, state: State, group: State) -> Diagonal:
        return self._root(state, group).add_(group["eps"]).reciprocal_().mul_(group["lr"])

    def _root(self, state: State, group: State) -> Tensor:
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        bias = 1 - group["betas"][1] ** _steps(state)
        return v.to(product_dtype(v.dtype)).sqrt().div_(bias**0.5)

    def has_momentum(self, group: State) -> bool:
        return True

    def decay(self, group: State) -> float:
        return group["betas"][0]

    def change(
        self,
        u: Tensor,
        h: Tensor,
        M: Tensor | None,
        D: Diagonal,
        first: bool,
        state: State,
        group: State,
        updated: bool = False,
    ) -> Tensor:
        if not updated:
            M.lerp_(u, 1 - group["betas"][0])
        bias = self._bias(state, group)
        moment, both = (t.to(product_dtype(u.dtype)) / bias for t in (M, state["exp_avg"]))
        rest = both.sub_(moment)
        E = _lifted(self._root(state, group), moment, rest, self._least(state, group)).add_(group["eps"])
        E = E.reciprocal_().mul_(group["lr"])
        return moment.mul_(D).add_(rest.mul_(E.neg_().add_(D))).neg_()

    def carry(self, M: Tensor, share: Tensor, state: State, group: State) -> None:
        self.take_out(share * self._bias(state, group), M, state)

    def _bias(self, state: State, group: State) -> Diagonal:
        return 1 - group["betas"][0] ** _steps(state)

    def _least(self, state: State, group: State) -> Diagonal:
        """Return the least √v̂ / |m̂| of any series of gradients, by Cauchy-Schwarz; 0 where there is no bound."""
        (a, b), t = group["betas"], _steps(state)
        if a and not a * a < b:  # b may be 0, too
            return 0.0
        q = a * a / b if a else 0.0
        return (1 - a**t) / (1 - a) * ((1 - b) * (1 - q) / ((1 - b**t) * (1 - q**t))) ** 0.5


class RMSprop(Response):
    """D = lr / (√v + eps), with v - mean² where centered; F = -D u - (D - E) r, or -lr M of what that is a series of.

    E is D where centered and with coupled decay: √v has no lower bound there.
    """

    def diagonal(self, p: Tensor, state: State, group: State) -> Diagonal:
        return group["lr"] / self._root(state, group)

    def _root(self, state: State, group: State) -> Tensor:
        v = state["square_avg"].to(product_dtype(state["square_avg"].dtype))
        if group["centered"]:
            mean = state["grad_avg"].to(v.dtype)
            v = v.addcmul(mean, mean, value=-1)
        return v.sqrt() + group["eps"]

    def has_momentum(self, group: State) -> bool:
        return group["momentum"] > 0

    def decay(self, group: State) -> float:
        return group["momentum"] or 1.0

    def change(
        self,
        u: Tensor,
        h: Tensor,
        M: Tensor | None,
        D: Diagonal,
        first: bool,
        state: State,
        group: State,
        updated: bool = False,
    ) -> Tensor:
        plain = not group["centered"] and not group["weight_decay"]
        least = (1 - group["alpha"]) ** 0.5 if plain else 0.0
        scaled = _scaled(u, h, self._root(state, group), group["eps"], least)
        if M is not None:
            scaled = M if updated else M.mul_(group["momentum"]).add_(scaled)
        return -group["lr"] * scaled.to(product_dtype(u.dtype))

    def carry(self, M: Tensor, share: Tensor, state: State, group: State) -> None:
        self.take_out(share / self._root(state, group), M, state)


class Adagrad(Response):
    """D = lr / (1 + (k - 1) lr_decay) / (√s + eps) in step k, with s the sum of all squares; F = -D u - (D - E) r.

    E is D with coupled decay.
    """

    def diagonal(self, p: Tensor, state: State, group: State) -> Diagonal:
        return self._rate(state, group) / self._root(state, group)

    def _rate(self, state: State, group: State) -> Diagonal:
        return group["lr"] / (1 + (_steps(state) - 1) * group["lr_decay"])

    def _root(self, state: State, group: State) -> Tensor:
        return state["sum"].to(product_dtype(state["sum"].dtype)).sqrt() + group["eps"]

    def change(
        self,
        u: Tensor,
        h: Tensor,
        M: Tensor | None,
        D: Diagonal,
        first: bool,
        state: State,
        group: State,
        updated: bool = False,
    ) -> Tensor:
        least = 0.0 if group["weight_decay"] else 1.0
        scaled = _scaled(u, h, self._root(state, group), group["eps"], least)
        return -self._rate(state, group) * scaled.to(product_dtype(u.dtype))


class Custom(Response):
    """What an optimizer says of itself: `diagonal(p, state, group)`, after a step in which u moved p by -D ∘ u."""

    def __init__(self, optimizer: SteppingOptimizer) -> None:
        self.diagonal = optimizer.diagonal


ADVICE = "Any other one without momentum can say it in a method `diagonal(param, state, group) -> Tensor`"
KNOWN: dict[type, Response] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(),
    torch.optim.AdamW: Adam(),
    torch.optim.RMSprop: RMSprop(),
    torch.optim.Adagrad: Adagrad(),
}


def known_response(optimizer: object) -> Response | None:
    """Return how one of torch's optimizers answers, or a subclass that changes only how it is made; None of others."""
    kinds = type(optimizer).__mro__
    base = next((k for k in kinds if k in KNOWN), None)
    if base is None:
        return None
    names = {name for k in kinds[: kinds.index(base)] for name in vars(k) if not name.startswith("__")}
    # torch wraps `step` in every class of which it makes an optimizer.
    same = [inspect.unwrap(getattr(kinds[0], n)) is inspect.unwrap(getattr(base, n)) for n in names if hasattr(base, n)]
    return KNOWN[base] if all(same) else None


def response_of(optimizer: SteppingOptimizer) -> Response:
    """Return how an optimizer answers gradients; raises ValueError where it is not known."""
    if callable(getattr(optimizer, "diagonal", None)):
        return Custom(optimizer)
    known = known_response(optimizer)
    if known is None:
        got = f"{kind(optimizer)} of {type(optimizer).__module__}"  # others have an AdamW too
        inside = getattr(optimizer, "optimizer", None)
        wraps = known_response(inside) is not None or callable(getattr(inside, "diagonal", None))
        advice = "Give OrthoGrad the one inside of it, `optimizer.optimizer`" if wraps else ADVICE
        raise ValueError(
            'metric="optimizer" must know the diagonal of the optimizer: torch.optim.SGD, Adam, AdamW, RMSprop and '
            f"Adagrad are known; got {got}. {advice}"
        )
    return known


def _scaled(u: Tensor, h: Tensor, root: Tensor, eps: float, least: Diagonal) -> Tensor:
    """Return u / (√v + eps) + r / (√v + eps) - r / (√v' + eps) for root = √v + eps and h = u + r; see `_lifted`.

    least: 0 where √v' has no lower bound, and is √v.
    """
    scaled = u / root
    if least:
        rest = (h - u).to(root.dtype)
        scaled += rest / root - rest / (_lifted(root - eps, u, rest, least) + eps)
    return scaled


def _lifted(root: Tensor, u: Tensor, r: Tensor, least: Diagonal) -> Tensor:
    """Make √v what it would be at least, had the longer one of the parts u and r come alone: where they cancel."""
    longer = u.abs()
    torch.maximum(longer, r.abs(), out=longer)
    return torch.maximum(root, longer.mul_(0.999 * least), out=root)  # rounding lifts nothing


def _steps(state: State) -> Diagonal:
    """Return the number of steps: on a GPU it stays there."""
    step = state["step"]
    return step if isinstance(step, Tensor) and step.is_cuda else float(step)
