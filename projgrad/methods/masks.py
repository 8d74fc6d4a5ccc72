"""The two tests that choose which coordinates of a change are made."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.feasible import feasible_op
from ..ops.t_test import quantile
from ..recording.host_reads import to_host
from ..tape.tape import Tape
from .common import Tensors, check_finite_tensors

# Of the aggregate test, our derivation: the levels at which one half of the samples sorts coordinates into nested sets,
# from the most certain to all that help forgetting. Chosen by simulated power; any choice keeps the level.
LEVELS = (0.3, 0.5, 0.7, 1.0)


class Sums(NamedTuple):
    """Of a change Δ and its mask m: the coordinates that were to move and that do, ‖Δ‖², ‖mΔ‖², ⟨mΔ, u⟩."""

    moved: float
    kept: float
    squared_norm: float
    kept_squared_norm: float
    forget_change: float


class Coordinate:
    """The test of every coordinate, with all samples.

    losses: (n,) of the retain samples, of the pass that the tape recorded.
    u: gradient of the forget objective, by name; None counts as zeros. delta: level of the test.
    mean, error: of ⟨g_j, mΔ⟩ over the samples that test, and the standard error of this mean.
    """

    least, choosing, testing = 2, slice(None), slice(None)  # samples: how many, and which of them choose and test

    def __init__(self, tape: Tape, losses: Tensor, u: dict[str, Tensor | None], delta: float) -> None:
        if len(losses) < self.least:
            raise ValueError(f"the test needs at least {self.least} retain losses; got {len(losses)}")
        self.tape, self.losses, self.u, self.delta = tape, losses, u, delta
        self.mean = self.error = 0.0
        chosen = torch.zeros_like(losses)
        chosen[self.choosing] = 1
        self.n = len(range(len(losses))[self.choosing])
        self.total, self.squares = tape.moments(losses, chosen)
        for moments in (self.total, self.squares):
            check_finite_tensors(moments, "the sums of the retain gradients or their squares")

    def choose(self, change: Tensors) -> tuple[Tensors, Sums]:
        """Return the masked change, and what the mask did."""
        masked, sums = self._mask(change, self.delta)
        self.mean, self.error = self._measure(masked)
        return masked, sums

    def _mask(self, change: Tensors, level: float) -> tuple[Tensors, Sums]:
        masked, parts = {}, []
        for name, d in change.items():
            u = torch.zeros_like(d) if self.u[name] is None else self.u[name]
            tensors = (x.reshape(-1) for x in (d, u, self.total[name], self.squares[name]))
            kept, sums = feasible_op(*tensors, self.n, level)
            masked[name] = kept.view(d.shape)
            parts.append(sums[:5].to(parts[0].device if parts else sums.device))
        return masked, Sums(*to_host(torch.stack(parts).sum(0)))

    def _measure(self, masked: Tensors) -> tuple[float, float]:
        """Return mean and standard error of ⟨g_j, mΔ⟩ over the samples that test."""
        x = self.tape.dot(self.losses, masked)[self.testing]
        return tuple(to_host(torch.stack([x.mean(), x.std() / math.sqrt(len(x))])))


class Aggregate(Coordinate):
    """The test of the whole change: even samples make nested sets, odd ones test them in a fixed sequence."""

    least, choosing, testing = 4, slice(0, None, 2), slice(1, None, 2)

    def choose(self, change: Tensors) -> tuple[Tensors, Sums]:
        q = quantile(self.delta, len(self.losses) // 2 - 1)
        best = None
        for level in LEVELS:
            masked, sums = self._mask(change, level)
            mean, error = self._measure(masked)
            if not mean + q * error <= 0:
                break
            best, self.mean, self.error = (masked, sums), mean, error
        if best is None:  # nothing moves
            nothing = {name: torch.zeros_like(d) for name, d in change.items()}
            best = nothing, sums._replace(kept=0.0, kept_squared_norm=0.0, forget_change=0.0)
        return best
