"""The systems of a projection: solved many at a time, with everything that the host decides by in one transfer."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import in_range
from ..recording.host_reads import Reading
from .check import WeightStats, weight_stats
from .records import Projection

# On a GPU the tensors of about one decoder layer are solved in one launch, and their numbers are read when the next
# layer is under way: the host never waits for a queue to run empty. Two groups keep their factors meanwhile.
GROUP = 8


class System(NamedTuple):
    """K x = b, [n, n] and [n]; a pivot that is not above `cut` counts as zero."""

    K: Tensor
    b: Tensor
    cut: float


class Solved(NamedTuple):
    """The solution x [n], and on the host:

    projection, combined, retain_term: of the weights -x, add - x and add.
    residual: max_j |b - K x|_j / ‖g_j‖. spread: ‖(x_j ‖g_j‖)_j‖. used: samples with a gradient.
    """

    x: Tensor
    projection: WeightStats
    combined: WeightStats
    retain_term: WeightStats
    residual: float
    spread: float
    used: int
    rank: int
    finite: bool


Steps = Generator[System, Solved, Projection]  # a projection: stops where it needs a system solved


def _solve(systems: Sequence[System], damping: float, shifts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Solve the systems: x [l, n], and the numbers of each [l, 20], in the order of `Solved`.

    shifts: [3, n] and [3, 1]; the weights that are looked at are shifts[0] - shifts[1] x.
    """
    rhs = [in_range(s.K, s.b[:, None]) for s in systems]
    K, b, rhs = (_stacked(tensors) for tensors in ([s.K for s in systems], [s.b for s in systems], rhs))
    x, rank, _ = gram_solve_op(K, rhs, damping, systems[0].cut)
    x = x[..., 0]
    w = shifts[0] - shifts[1] * x[:, None]  # [l, 3, n]
    Kw = torch.bmm(w, K)
    norms = K.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    used = norms > 0
    residual = (b + Kw[:, 0]).abs() / norms.where(used, 1)
    finite = K.sum((1, 2)) + b.sum(1)
    rest = [residual.amax(1), (x * norms).norm(dim=1), used.sum(1), rank, finite]
    return x, torch.cat([weight_stats(w, Kw, norms, b).flatten(1), torch.stack([t.double() for t in rest], 1)], 1)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _solved(x: Tensor, numbers: list[float]) -> Solved:
    weights = [WeightStats(*numbers[k:15:3]) for k in range(3)]
    residual, spread, used, rank, finite = numbers[15:]
    return Solved(x, *weights, residual, spread, int(used), int(rank), math.isfinite(finite))


class Solver:
    """Runs projections up to the system they need, solves some of them together, and lets them go on.

    damping, rtol: see `projgrad.project_out`. add: w [n] float64: every projection also adds Σ_j w_j g_j.
    projections: what became of each, by name.
    """

    def __init__(self, damping: float, rtol: float | None, add: Tensor) -> None:
        self.damping, self.rtol, self.add = damping, rtol, add
        zero, one = torch.zeros_like(add), add.new_ones(())
        self.shifts = torch.stack([zero, add, add]), torch.stack([one, one, one - 1])[:, None]
        self.group, self.pipelined = (GROUP, True) if add.is_cuda else (1, False)
        self.waiting: list[tuple[str, Steps, System]] = []
        self.in_flight: tuple[list[tuple[str, Steps, System]], Tensor, Reading] | None = None
        self.projections: dict[str, Projection] = {}

    def start(self, name: str, steps: Steps) -> None:
        """Run a projection until it needs a system solved; on the CPU to its end."""
        system = next(steps)
        if self.waiting and self.waiting[0][2].cut != system.cut:
            self._submit()
        self.waiting.append((name, steps, system))
        if len(self.waiting) == self.group:
            self._submit()
            if not self.pipelined:
                self._collect()

    def finish(self) -> None:
        """Run all projections to their ends."""
        if self.waiting:
            self._submit()
        self._collect()

    def _submit(self) -> None:
        batch, self.waiting = self.waiting, []
        x, numbers = _solve([system for *_, system in batch], self.damping, self.shifts)
        reading = Reading(numbers)
        self._collect()
        self.in_flight = batch, x, reading

    def _collect(self) -> None:
        if self.in_flight is None:
            return
        (batch, x, reading), self.in_flight = self.in_flight, None
        for (name, steps, _), one, numbers in zip(batch, x, reading.wait(), strict=True):
            try:
                system = steps.send(_solved(one, numbers))
                while True:  # not solved well enough: rare, and the host waits
                    again, numbers = _solve([system], self.damping, self.shifts)
                    system = steps.send(_solved(again[0], numbers[0].tolist()))
            except StopIteration as stop:
                self.projections[name] = stop.value
