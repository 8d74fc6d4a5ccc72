"""The systems of projections, solved together, with everything that the host decides by in one transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import finfo, in_range
from ..ops.refinement import rank_tolerance
from ..recording.host_reads import Differs, HostReads
from .check import Checks, WeightStats, check_finite, weight_stats
from .gradient_access import Block, GradientAccess
from .records import Projection

HELD = 64 << 20  # bytes of Gram matrices at one time
PROJECTION, COMBINED, RETAIN_TERM = range(3)  # the weights -x, add - x and add, for the solution x of K x = v


class Solved(NamedTuple):
    """What the host knows of a solution.

    projection, combined, retain_term: of each of its weights.
    residual: max_j |v - K x|_j / ‖g_j‖. spread: ‖(x_j ‖g_j‖)_j‖. used: samples with a gradient.
    """

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
    """Add Gᵀ w to p.grad, for one of the weights of the last solution, and check what came of it.

    weights: its numbers. u2: ‖u‖² at the beginning.
    """

    which: int
    weights: WeightStats
    float64: bool
    u2: float


class Look(NamedTuple):
    """Measure what is left."""

    float64: bool


class Erase(NamedTuple):
    """Set p.grad to zero."""

    float64: bool = False


class Left(NamedTuple):
    """v = G u [n] for u = p.grad, and on the host ‖u‖², max_j |v_j| / ‖g_j‖ and ⟨add, v⟩."""

    v: Tensor
    square: float
    cosine: float
    product: float


Request = Solve | Correct | Look | Erase
Steps = Generator[Request, Solved | Left | None, Projection]
T = TypeVar("T")


class Solver:
    """Runs the projections of some blocks side by side.

    reads: what else the host waits for, together with the first solution. checks: made once all is done.
    damping, rtol: see `projgrad.project_out`. add: w [n] float64: every projection also adds Σ_j w_j g_j.
    log: what was asked for, and what the device computed for it.
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
        self.access, self.reads, self.checks, self.rates = access, reads, checks, access.rates
        self.damping, self.rtol, self.add = damping, rtol, add
        zero, one = torch.zeros_like(add), add.new_ones(())
        self.shifts = torch.stack([zero, add, add]), torch.stack([one, one, one - 1])[:, None]
        self.K: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.w: dict[str, Tensor] = {}  # weights [3, n]
        self.log: list[tuple[tuple, object]] = []

    def run(self, steps: Mapping[str, Steps], blocks: Sequence[Block]) -> dict[str, Projection]:
        """Return what became of every block, by name."""
        size, done = max(1, HELD // (8 * len(self.add) ** 2)), {}
        for start in range(0, len(blocks), size):
            done |= self._run(steps, {block.name: block for block in blocks[start : start + size]})
            for held in (self.K, self.v, self.w):
                held.clear()
        return done

    def _run(self, steps: Mapping[str, Steps], blocks: Mapping[str, Block]) -> dict[str, Projection]:
        done: dict[str, Projection] = {}
        answers: dict[str, Solved | Left | None] = dict.fromkeys(blocks)
        while answers:
            asked: dict[tuple, list[tuple[Block, Request]]] = {}
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
                serve = {Solve: self._solve, Correct: self._correct, Look: self._look, Erase: self._erase}[kind]
                replies = serve(some, given, float64)
                answers |= dict(zip((block.name for block in some), replies, strict=True))
        return done

    def result(self, key: tuple, compute: Callable[[], T]) -> T:
        """Return what the device computes for a request; `key` says which."""
        self.log.append((key, compute()))
        return self.log[-1][1]

    def _solve(self, blocks: Sequence[Block], requests: Sequence[Solve], float64: bool) -> list[Solved]:
        key = Solve, _names(blocks), float64, requests[0].v is None
        numbers = self.result(key, lambda: self._solution(blocks, requests, float64))
        values, count = self.reads.flush(numbers), numbers.shape[1]
        return [_solved(values[k * count : (k + 1) * count]) for k in range(len(blocks))]

    def _solution(self, blocks: Sequence[Block], requests: Sequence[Solve], float64: bool) -> Tensor:
        if requests[0].v is None:
            K, v = self.access.products(blocks, float64)
            K, v = without_underflow(K, v, blocks)
            for block, one, other in zip(blocks, K, v, strict=True):
                self.K[block.name], self.v[block.name] = one, other
        else:
            K, v = torch.stack([self.K[block.name] for block in blocks]), torch.stack([r.v for r in requests])
        solution = solve(K, v, self.damping, rank_tolerance(K.shape[1], float64, self.rtol), self.shifts)
        w, numbers = self.access.agreed(*solution)
        self.w |= zip(_names(blocks), w.unbind(), strict=True)
        return numbers

    def _correct(self, blocks: Sequence[Block], requests: Sequence[Correct], float64: bool) -> list[None]:
        key = Correct, _names(blocks), float64, tuple(r.which for r in requests)
        outcomes = self.result(key, lambda: self._correction(blocks, requests, float64))
        for block, outcome, request in zip(blocks, outcomes, requests, strict=True):
            self.checks.check(outcome[0], request.weights, request.u2, block.square, *outcome[1:])
        return [None] * len(blocks)

    def _correction(self, blocks: Sequence[Block], requests: Sequence[Correct], float64: bool) -> list[tuple]:
        """Return, for every block, the outcome and what else `Checks.check` takes at its end."""
        ws = [self.w[block.name][request.which] for block, request in zip(blocks, requests, strict=True)]
        outcomes = self.access.apply(blocks, torch.stack(ws), max(r.weights.max_abs for r in requests), float64)
        return [
            (outcome, self.access.precision(block), block.name, self.access.blame(w))
            for outcome, block, w in zip(outcomes, blocks, ws, strict=True)
        ]

    def _look(self, blocks: Sequence[Block], _: Sequence[Look], float64: bool) -> list[Left]:
        v, numbers, squares = self.result((Look, _names(blocks), float64), lambda: self._view(blocks, float64))
        values = iter(self.reads.flush(*numbers))
        worst, products = ([next(values) for _ in blocks] for _ in range(2))
        lengths = [square([next(values) for _ in norms]) for square, norms in zip(squares, numbers[2:], strict=True)]
        return [Left(*of_block) for of_block in zip(v, lengths, worst, products, strict=True)]

    def _erase(self, blocks: Sequence[Block], _: Sequence[Erase], __: bool) -> list[None]:
        for block in blocks:
            block.square = 0.0
        self.result((Erase, _names(blocks)), lambda: [block.erase() for block in blocks])
        return [None] * len(blocks)

    def check_finite(self, name: str) -> None:
        """Refuse the products of a block if there is NaN or Inf in them."""
        check_finite(self.K[name], self.v[name])

    def check_watched(self) -> None:
        """Check one parameter against plain autograd, where the corrections did not go through it."""
        watched = self.result(("watched",), lambda: self.access.watched_numbers())
        if watched is not None:
            self.checks.check_parameter(*watched)

    def _view(self, blocks: Sequence[Block], float64: bool) -> tuple:
        norms = torch.stack([self.K[block.name].diagonal() for block in blocks]).clamp_min(0).sqrt()
        v = self.access.dot(blocks, float64).masked_fill(norms == 0, 0.0)
        cosines = (v.abs() / norms.where(norms > 0, 1)).amax(1)
        lengths = self.access.norms(blocks)
        numbers = [cosines, v @ self.add, *(lengths[block.name] for block in blocks)]
        return v, self.access.agreed(*numbers), [self.access.square_of(block) for block in blocks]


class Replay(Solver):
    """Goes through the log of a solver whose work on the device has been repeated since; holds nothing large.

    Raises Differs where the new numbers ask for something else.
    """

    def __init__(self, solver: Solver) -> None:
        self.rates, self.damping, self.rtol, self.add = solver.rates, solver.damping, solver.rtol, solver.add
        self.K, self.v, self.w, self.log = {}, {}, {}, solver.log

    def start(self, reads: HostReads) -> Replay:
        """Begin once more."""
        self.reads, self.checks, self._entries = reads, Checks(), iter(self.log)
        return self

    def result(self, key: tuple, _: Callable[[], T]) -> T:
        known, result = next(self._entries, (None, None))
        if known != key:
            raise Differs
        return result

    def check_finite(self, name: str) -> None:
        raise Differs  # the matrix is gone


def _names(blocks: Sequence[Block]) -> tuple[str, ...]:
    return tuple(block.name for block in blocks)


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


def _solved(numbers: list[float]) -> Solved:
    residual, spread, used, rank, finite = numbers[15:]
    weights = WeightStats(*numbers[0:15:3]), WeightStats(*numbers[1:15:3]), WeightStats(*numbers[2:15:3])
    return Solved(*weights, residual, spread, int(used), int(rank), math.isfinite(finite))


def without_underflow(K: Tensor, v: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Count gradients shorter than 1e-31 in float32 as zero.

    Some of their digits are below the smallest number, and their weights would be near the largest.
    """
    least = [finfo(block.dtype).tiny / finfo(block.dtype).eps for block in blocks]
    limit = least[0] if len(set(least)) == 1 else K.new_tensor(least)[:, None]
    lost = K.diagonal(dim1=1, dim2=2).sqrt() < limit
    return K.masked_fill(lost[:, None] | lost[..., None], 0.0), v.masked_fill(lost, 0.0)
