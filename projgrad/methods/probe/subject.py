"""What a probe does with a model: steps that are not taken, and forward passes at moved weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._options import kind
from ...recording.losses import check_losses
from ...tape.per_sample import per_sample
from ..closures import Closures
from ..common import (
    check_alone,
    learning_rates,
    loss_value,
    scalar_loss,
    trainable_parameters,
)
from ..orthograd import OrthoGrad
from ..protocol import Closure, SteppingOptimizer
from .cost import peak_bytes, seconds
from .report import Probe, ProbeRow, advise
from .step_length import FORGETTING, NOTHING, largest_rate
from .unchanged import Unchanged

FIRST_GAIN = 0.1  # the first trial of a learning rate raises the forget loss by this share of the losses
LEAST_GAIN = 0.5  # of the first-order one, that a step must really gain
LONGEST = 10.0  # steps more than so many times as long as the weights are not looked at

Tensors = dict[str, Tensor]


class Direction(NamedTuple):
    """What a step without retain part writes to `.grad`, by name.

    slope: what the forget loss gains by a step along it at rate 1, to first order. length: of that step.
    """

    grads: Tensors
    slope: float
    length: float


class Subject:
    """A model with its closures, whose steps are looked at and not taken.

    params: what steps would update, by name. rates: their learning rates over the largest, where they differ.

    Raises as `OrthoGrad`.
    """

    def __init__(
        self,
        model: nn.Module,
        forget: Closure,
        retain: Callable[[int], Tensor],
        alpha: float,
        ascend: bool,
        optimizer: SteppingOptimizer | None,
    ) -> None:
        self.model, self.alpha, self.ascend = model, alpha, ascend
        self.params, self.rates = _updated(model, optimizer)
        groups = [{"params": [p], "lr": self.rates.get(name, 1.0)} for name, p in self.params.items()]
        self.optimizer = torch.optim.SGD(groups, lr=1.0)
        check_alone(model, self.params, self.optimizer)
        self.device = next(iter(self.params.values())).device
        self._forget, self._retain = forget, retain
        self.eps = max(torch.finfo(p.dtype).eps for p in self.params.values())

    def probe(
        self, unchanged: Unchanged, sizes: Sequence[int], scopes: Sequence[str], tolerance: float, rounds: int
    ) -> Probe:
        """Look at every number of samples; see `probe` of the package."""
        self.unchanged, sizes, notes = unchanged, list(sizes), []
        forget_loss = loss_value(self._forget_loss())
        self.plain = self._plain_direction()
        while not self._fits(sizes[-1], is_last=len(sizes) == 1):
            notes.append(f"the memory is too small for n = {sizes.pop()}")
        self.plain = self.plain._replace(grads={})  # as large as the parameters
        count = len(self.all)
        if few := count < sizes[-1]:
            notes.append(f"retain({sizes[-1]}) returned {count} losses: there are no more")
        sizes = sorted({min(n, count) for n in sizes})
        rows: list[ProbeRow] = []
        for n in sizes:
            try:
                rows += self._rows(n, scopes, tolerance, rounds, notes)
            except torch.OutOfMemoryError:
                self._clear()
                if not rows:
                    raise
                notes.append(f"the memory is too small for n = {n}")
                break
        change = float(self.plain_products.abs().mean()) / self.plain.slope if self.plain.slope else 0.0
        verdict, advice = advise(rows, self.alpha, change if self.plain.slope else None, count if few else None)
        numbers = sum(p.numel() for p in self.params.values())
        retain_loss = float(self.all.mean())
        about = (forget_loss, retain_loss, change, numbers, self.alpha, tolerance, verdict, advice)
        return Probe(tuple(rows), *about, tuple(notes))

    def _fits(self, n: int, is_last: bool) -> bool:
        """Look at all retain samples, at most n. Return whether they fit into memory; raise if not and `is_last`."""
        try:
            self.all = self._all_losses(n)
            self.plain_products = self._products(self.plain)
        except torch.OutOfMemoryError:
            if is_last:
                raise
            return False
        return True

    def _rows(self, n: int, scopes: Sequence[str], tolerance: float, rounds: int, notes: list[str]) -> list[ProbeRow]:
        """Look at steps with n retain samples."""
        steps = [self._step(n, scope, self.alpha) for scope in scopes]
        rows = []
        for scope, step in zip(scopes, steps, strict=True):
            first = peak_bytes(self._step(n, scope, 0.0), self.device)
            row = {"scope": scope, "samples": n} | self._look(n, self._direction(), tolerance, notes)
            later = peak_bytes(step, self.device)
            self._clear()
            rows.append(row | {"peak_bytes": None if first is None or later is None else max(first, later)})
        plain = self._plain_step(n)
        common = {"plain_peak_bytes": peak_bytes(plain, self.device)}
        common["plain_seconds"], *times = seconds([plain, *steps], self.device, rounds)
        self._clear()
        return [ProbeRow(**row, **common, seconds=time) for row, time in zip(rows, times, strict=True)]

    def _step(self, n: int, scope: str, alpha: float) -> Callable[[], None]:
        """Return a function that writes an update to `.grad` and its record to `self.record`."""
        unlearner = OrthoGrad(self.model, self.optimizer, alpha, scope=scope, ascend=self.ascend)

        def step() -> None:
            self._clear()
            self.record = unlearner.backward(self.forget, lambda: self.retain(n))

        return step

    def _plain_step(self, n: int) -> Callable[[], None]:
        """Return a function that does the same without projection, as a training loop would."""
        params, sign = list(self.params.values()), -1.0 if self.ascend else 1.0

        def step() -> None:
            with Closures(self.model, self.optimizer, forget=self.forget, retain=self.retain) as closures:
                with closures.watch("forget"):
                    loss = scalar_loss(self.forget)
                torch.autograd.backward(loss, torch.full_like(loss, sign * (1 - self.alpha)), inputs=params)
                with closures.watch("retain"):
                    loss = self.retain(n).mean()
                torch.autograd.backward(loss, torch.full_like(loss, self.alpha), inputs=params)

        return step

    def _direction(self) -> Direction:
        """Take the update of a step without retain part out of `.grad`."""
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        self._clear()
        return Direction(grads, _squared_norm(grads, self.rates), _squared_norm(grads, self.rates, 2) ** 0.5)

    def _plain_direction(self) -> Direction:
        """Return the gradient of the forget loss."""
        with Closures(self.model, self.optimizer, batch_statistics=False, forget=self.forget) as closures:
            with closures.watch("forget"):
                loss = scalar_loss(self.forget)
            torch.autograd.backward(loss, inputs=list(self.params.values()))
        return self._direction()

    def _products(self, direction: Direction) -> Tensor:
        """Return what a step along a direction at rate 1 changes all retain losses by, to first order, (N,)."""
        scaled = {name: grad * self.rates.get(name, 1.0) for name, grad in direction.grads.items()}
        with torch.enable_grad(), per_sample(self.model, self.params) as tape:
            losses = self.retain(len(self.all))
        return tape.dot(losses, scaled).abs()

    def _look(self, n: int, direction: Direction, tolerance: float, notes: list[str]) -> dict:
        """Return the fields of a row that belong to its direction."""
        record = self.record
        row = {name: getattr(record, name) for name in ("rank", "preserved_norm", "residual")}
        row |= dict.fromkeys(("spill", "learning_rate", "step_length", "forget_change"))
        if not direction.slope or record.preserved_norm <= min(64 * self.eps, 0.05):
            return row | {"why": NOTHING}
        before = self._losses(n)
        if len(self.all) > n and self._are_first(before, notes):
            of_plain = float(self.plain_products[n:].mean()) / self.plain.slope
            of_this = float(self._products(direction)[n:].mean()) / direction.slope
            row["spill"] = of_this / of_plain if of_plain else None
        return row | self._limit(n, direction, before, tolerance)

    def _limit(self, n: int, direction: Direction, before: Tensor, tolerance: float) -> dict:
        """Return how far a step along a direction may go; see `largest_rate`."""
        forget_before, slope = self._forget_loss(), direction.slope
        size = float(before.abs().mean())
        noise = 4 * max(self.eps, self.loss_eps) * max(size / tolerance, abs(forget_before) / LEAST_GAIN)
        weights = _squared_norm({name: self.params[name].detach() for name in direction.grads}, {}) ** 0.5
        largest = LONGEST * (weights or 1.0) / direction.length
        smallest = min(noise / slope, largest)
        first = FIRST_GAIN * (max(abs(forget_before), size) or 1.0) / slope

        def look(rate: float) -> tuple[float, float, float]:
            """Return what the forget loss gains, and what retain losses and forget loss use of what they may."""
            self._move(direction, rate)
            gain = (self._forget_loss() - forget_before) * (1 if self.ascend else -1)
            changed = float((self._losses(n) - before).abs().mean())
            return gain, changed / (tolerance * slope * rate), (1 - gain / (slope * rate)) / (1 - LEAST_GAIN)

        def used(rate: float) -> float:
            found = look(rate)
            return max(found[1:]) if all(map(math.isfinite, found)) else math.inf

        limit = largest_rate(used, min(max(first, smallest), largest), smallest, largest)
        found = {"why": limit.why}
        if limit.rate is not None:
            gain, of_retain, of_forget = look(limit.rate)
            found = {
                "learning_rate": limit.rate / (1 - self.alpha),
                "step_length": limit.rate * direction.length,
                "forget_change": gain,
                "why": FORGETTING if of_forget > of_retain else "",
            }
        self._move()
        return found

    @torch.no_grad()
    def _move(self, direction: Direction | None = None, rate: float = 0.0) -> None:
        """Put the parameters where a step of SGD would; without a direction back where they were."""
        for name, p in self.params.items():
            p.copy_(self.unchanged.values[name])
            if direction is not None and name in direction.grads:
                p.add_(direction.grads[name], alpha=-rate * self.rates.get(name, 1.0))

    def _clear(self) -> None:
        for p in self.params.values():
            p.grad = None

    # The closures, always from the same random state.

    def forget(self) -> Tensor:
        return self._call("forget", self._forget)

    def retain(self, n: int) -> Tensor:
        losses = self._call("retain", self._retain, n)
        if isinstance(losses, Tensor) and losses.ndim == 1:
            _check_number(losses, n, n)
        return losses

    def _call(self, name: str, closure: Callable[..., Tensor], *args: int) -> Tensor:
        self.unchanged.states.put_back()
        try:
            return closure(*args)
        except StopIteration as error:
            raise RuntimeError(
                f"{name} raised StopIteration: it is called often, and must look at the same samples each time; "
                "take one batch out of the loader before, x, y = next(iter(loader))"
            ) from error

    def _forget_loss(self) -> float:
        with torch.enable_grad():
            return float(scalar_loss(self.forget).detach())

    def _losses(self, n: int) -> Tensor:
        """Return the retain losses, (n,) in float64."""
        with torch.enable_grad():
            return self.retain(n).detach().double()

    def _all_losses(self, n: int) -> Tensor:
        """Return the losses of as many retain samples as there are, up to n."""
        with torch.enable_grad():
            losses = self._call("retain", self._retain, n)
        check_losses(losses)
        _check_number(losses, n, 1)
        self.loss_eps = torch.finfo(losses.dtype).eps
        return losses.detach().double()

    def _are_first(self, losses: Tensor, notes: list[str]) -> bool:
        """Return whether these are the first losses of all; add a note otherwise."""
        difference = (losses - self.all[: len(losses)]).abs().max()
        if difference <= max(self.eps, self.loss_eps) ** 0.5 * max(float(self.all.abs().max()), 1e-30):
            return True
        notes.append(
            f"retain({len(losses)}) returned other losses than the first of retain({len(self.all)}): spill is unknown"
        )
        return False


def _check_number(losses: Tensor, n: int, least: int) -> None:
    if not least <= len(losses) <= n:
        raise ValueError(f"retain({n}) returned {len(losses)} losses: it must return those of the first {n} samples")


def _updated(model: nn.Module, optimizer: SteppingOptimizer | None) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """Return the parameters to look at, by name, and their learning rates over the largest, where these differ."""
    if optimizer is not None:
        params = trainable_parameters(model, optimizer)
        rates = learning_rates(optimizer, params)
        largest = max(rates.values(), default=0.0)
        return params, {name: rate / largest for name, rate in rates.items()} if largest else {}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {kind(model)}")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to look at")
    return params, {}


def _squared_norm(tensors: Mapping[str, Tensor], weights: Mapping[str, float], power: int = 1) -> float:
    """Return Σ_p weight_p^power ‖t_p‖², in float64."""
    norms = {name: torch.linalg.vector_norm(t, dtype=torch.float64) for name, t in tensors.items()}
    return float(sum(weights.get(name, 1.0) ** power * norm * norm for name, norm in norms.items()))
