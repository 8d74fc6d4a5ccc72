"""The systems of projections, solved together, with everything that the host decides by in one transfer."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import in_range
from ..ops.refinement import rank_tolerance
from ..recording.host_reads import HostReads, to_host
from .check import Checks, WeightStats, weight_stats
from .gradient_access import Block, GradientAccess
from .records import Projection

HELD = 64 << 20  # bytes of Gram matrices at one time


class Solved(NamedTuple):
    """The weights -x, add - x and add [3, n], for the solution x of K x = v; and on the host:

    projection, combined, retain_term: of each of them.
    residual: max_j |v - K x|_j / ‖g_j‖. spread: ‖(x_j ‖g_j‖)_j‖. used: samples with a gradient.
    """

    w: Tensor
    projection: WeightStats
    combined: WeightStats
    retain_term: WeightStats
    residual: float
    spread: float
    used: int
    rank: int
    finite: bool


# What a projection asks for, one after the other; those of many blocks are answered together.


class Solve(NamedTuple):
    """Make K, and v = G u for u = p.grad as it is now, and solve K x = v. `v`: given, then K is the one made before."""

    float64: bool
    v: Tensor | None = None


class Correct(NamedTuple):
    """Add Gᵀ w to p.grad, for w [n] with these numbers, and check what came of it; u2: ‖u‖² at the beginning."""

    w: Tensor
    weights: WeightStats
    float64: bool
    u2: float


class Look(NamedTuple):
    """Measure what is left."""

    float64: bool


class Left(NamedTuple):
    """v = G u [n] for u = p.grad, and on the host ‖u‖², max_j |v_j| / ‖g_j‖ and ⟨add, v⟩."""

    v: Tensor
    square: float
    cosine: float
    product: float


Steps = Generator[Solve | Correct | Look, Solved | Left | None, Projection]


class Solver:
    """Runs the projections of some blocks side by side.

    reads: what else the host waits for, together with the first solution. checks: made once all is done.
    damping, rtol: see `projgrad.project_out`. add: w [n] float64: every projection also adds Σ_j w_j g_j.
    """

    def __init__(
        self,
        access: GradientAccess,
        reads: HostReads,
        checks: Checks,
        damping: float,
        rtol: float | None,
        add: Tensor,
    ) -> None:
        self.access, self.reads, self.checks = access, reads, checks
        self.damping, self.rtol, self.add = damping, rtol, add
        zero, one = torch.zeros_like(add), add.new_ones(())
        self.shifts = torch.stack([zero, add, add]), torch.stack([one, one, one - 1])[:, None]
        self.K: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}

    def run(self, steps: Mapping[str, Steps], blocks: Sequence[Block]) -> dict[str, Projection]:
        """Return what became of every block, by name."""
        size, done = max(1, HELD // (8 * len(self.add) ** 2)), {}
        for start in range(0, len(blocks), size):
            done |= self._run(steps, {block.name: block for block in blocks[start : start + size]})
            self.K.clear()
            self.v.clear()
        return done

    def _run(self, steps: Mapping[str, Steps], blocks: Mapping[str, Block]) -> dict[str, Projection]:
        done: dict[str, Projection] = {}
        answers: dict[str, Solved | Left | None] = dict.fromkeys(blocks)
        while answers:
            asked: dict[tuple, list[tuple[Block, Solve | Correct | Look]]] = {}
            for name, answer in answers.items():
                try:
                    request = steps[name].send(answer)
                except StopIteration as stop:
                    done[name] = stop.value
                    continue
                alike = type(request), request.float64, isinstance(request, Solve) and request.v is None
                asked.setdefault(alike, []).append((blocks[name], request))
            answers = {}
            for (kind, float64, _), requests in asked.items():
                some, given = zip(*requests, strict=True)
                serve = {Solve: self._solve, Correct: self._correct, Look: self._look}[kind]
                replies = serve(some, given, float64)
                answers |= dict(zip((block.name for block in some), replies, strict=True))
        return done

    def _solve(self, blocks: Sequence[Block], requests: Sequence[Solve], float64: bool) -> list[Solved]:
        if requests[0].v is None:
            K, v = self.access.products(blocks, float64)
            K, v = _without_underflow(K, v, blocks)
            for block, one, other in zip(blocks, K, v, strict=True):
                self.K[block.name], self.v[block.name] = one, other
        else:
            K, v = torch.stack([self.K[block.name] for block in blocks]), torch.stack([r.v for r in requests])
        solution = solve(K, v, self.damping, rank_tolerance(K.shape[1], float64, self.rtol), self.shifts)
        w, numbers = self.access.agreed(*solution)
        values, count = self.reads.flush(numbers), numbers.shape[1]
        return [_solved(one, values[k * count : (k + 1) * count]) for k, one in enumerate(w.unbind())]

    def _correct(self, blocks: Sequence[Block], requests: Sequence[Correct], float64: bool) -> list[None]:
        w, largest = torch.stack([r.w for r in requests]), max(r.weights.max_abs for r in requests)
        outcomes = self.access.apply(blocks, w, largest, float64)
        for block, outcome, request in zip(blocks, outcomes, requests, strict=True):
            blame, precision = self.access.blame(request.w), self.access.precision(block)
            self.checks.check(outcome, request.weights, request.u2, precision, block.name, blame)
        return [None] * len(blocks)

    def _look(self, blocks: Sequence[Block], _: Sequence[Look], float64: bool) -> list[Left]:
        norms = torch.stack([self.K[block.name].diagonal() for block in blocks]).clamp_min(0).sqrt()
        v = self.access.dot(blocks, float64).masked_fill(norms == 0, 0.0)
        cosines = (v.abs() / norms.where(norms > 0, 1)).amax(1)
        lengths = self.access.norms(blocks)
        numbers = [cosines, v @ self.add, *(lengths[block.name] for block in blocks)]
        numbers = iter(to_host(*self.access.agreed(*numbers)))
        worst, products = ([next(numbers) for _ in blocks] for _ in range(2))
        squares = [self.access.square(block, [next(numbers) for _ in lengths[block.name]]) for block in blocks]
        return [Left(*of_block) for of_block in zip(v, squares, worst, products, strict=True)]


def solve(K: Tensor, v: Tensor, damping: float, cut: float, shifts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Solve K x = v, [l, n, n] and [l, n]: weights w [l, 3, n], and the numbers of each [l, 20], as `Solved` has them.

    cut: a pivot that is not above it counts as zero. shifts: [3, n] and [3, 1]; w = shifts[0] - shifts[1] x.
    """
    x, rank, _ = gram_solve_op(K, in_range(K, v[..., None]), damping, cut)
    x = x[..., 0]
    w = shifts[0] - shifts[1] * x[:, None]  # [l, 3, n]
    Kw = torch.bmm(w, K)
    norms = K.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    used = norms > 0
    residual = (v + Kw[:, 0]).abs() / norms.where(used, 1)
    finite = K.sum((1, 2)) + v.sum(1)
    rest = [residual.amax(1), (x * norms).norm(dim=1), used.sum(1), rank, finite]
    return w, torch.cat([weight_stats(w, Kw, norms, v).flatten(1), torch.stack([t.double() for t in rest], 1)], 1)


def _solved(w: Tensor, numbers: list[float]) -> Solved:
    residual, spread, used, rank, finite = numbers[15:]
    weights = WeightStats(*numbers[0:15:3]), WeightStats(*numbers[1:15:3]), WeightStats(*numbers[2:15:3])
    return Solved(w, *weights, residual, spread, int(used), int(rank), math.isfinite(finite))


def _without_underflow(K: Tensor, v: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Count gradients shorter than 1e-31 in float32 as zero.

    Some of their digits are below the smallest number, and their weights would be near the largest.
    """
    least = [torch.finfo(block.dtype).tiny / torch.finfo(block.dtype).eps for block in blocks]
    limit = least[0] if len(set(least)) == 1 else K.new_tensor(least)[:, None]
    lost = K.diagonal(dim1=1, dim2=2).sqrt() < limit
    return K.masked_fill(lost[:, None] | lost[..., None], 0.0), v.masked_fill(lost, 0.0)
