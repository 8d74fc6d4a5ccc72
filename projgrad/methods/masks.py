"""The two tests that choose which coordinates of a change are made."""

import math

import torch
from torch import Tensor

from ..ops.feasible import feasible_op
from ..ops.t_test import quantile
from ..recording.host_reads import lengths, to_host
from ..tape.tape import Tape

Tensors = dict[str, Tensor]

# Of the aggregate test, our derivation: the levels at which one half of the samples sorts coordinates into nested sets,
# from the most certain to all that help forgetting. Chosen by simulated power; any choice keeps the level.
LEVELS = (0.3, 0.5, 0.7, 1.0)


class Coordinate:
    """The test of every coordinate, with all samples."""

    least, choosing, testing = 2, slice(None), slice(None)

    def __init__(self, tape: Tape, losses: Tensor, u: dict[str, Tensor | None], delta: float) -> None:
        if len(losses) < self.least:
            raise ValueError(f"the test needs at least {self.least} retain losses; got {len(losses)}")
        self.tape, self.losses, self.u, self.delta = tape, losses, u, delta
        self.mean = self.error = 0.0
        choosing = torch.zeros_like(losses)
        choosing[self.choosing] = 1
        self.n = len(range(len(losses))[self.choosing])
        self.total, self.squares = tape.moments(losses, choosing)
        for moments in (self.total, self.squares):
            check_all(moments, "the sums of the retain gradients or their squares")

    def choose(self, change: Tensors) -> tuple[Tensors, list[float]]:
        """The masked change, and moved, kept, ‖Δ‖², ‖mΔ‖², ⟨mΔ, u⟩."""
        masked, sums = self._mask(change, self.delta)
        self._measure(masked)
        return masked, sums

    def _mask(self, change: Tensors, level: float) -> tuple[Tensors, list[float]]:
        masked, parts = {}, []
        for name, d in change.items():
            u = self.u[name]
            u = torch.zeros_like(d) if u is None else u
            tensors = (x.reshape(-1) for x in (d, u, self.total[name], self.squares[name]))
            masked[name], sums = feasible_op(*tensors, self.n, level)
            masked[name] = masked[name].view(d.shape)
            parts.append(sums[:5].to(parts[0].device if parts else sums.device))
        return masked, to_host(torch.stack(parts).sum(0))

    def _measure(self, masked: Tensors) -> tuple[float, float]:
        """Mean and standard error of ⟨g_j, mΔ⟩ over the samples that test."""
        x = self.tape.dot(self.losses, masked)[self.testing]
        self.mean, self.error = to_host(torch.stack([x.mean(), x.std() / math.sqrt(len(x))]))
        return self.mean, self.error


class Aggregate(Coordinate):
    """The test of the whole change: even samples make nested sets, odd ones test them in a fixed sequence."""

    least, choosing, testing = 4, slice(0, None, 2), slice(1, None, 2)

    def choose(self, change: Tensors) -> tuple[Tensors, list[float]]:
        q = quantile(self.delta, len(self.losses) // 2 - 1)
        best, measured = None, (0.0, 0.0)
        for level in LEVELS:
            masked, sums = self._mask(change, level)
            mean, error = self._measure(masked)
            if not mean + q * error <= 0:
                break
            best, measured = (masked, sums), (mean, error)
        self.mean, self.error = measured
        if best is None:
            best = {name: torch.zeros_like(d) for name, d in change.items()}, [*sums[:1], 0.0, sums[2], 0.0, 0.0]
        return best


def check_all(tensors: Tensors, what: str) -> None:
    norms = to_host(lengths(list(tensors.values())))
    bad = [name for name, norm in zip(tensors, norms, strict=True) if not math.isfinite(norm)]
    if bad:
        raise FloatingPointError(f"NaN or Inf in {what}, at {', '.join(bad[:4])}; no parameter was changed")
