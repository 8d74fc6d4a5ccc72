"""The correction of a step in the metric of its optimizer: the retain side is held while the optimizer steps.

F is the forgetting part of the change of the parameters, D the diagonal by which the optimizer scales gradients:

    F' = F - D Gᵀ c,    G D Gᵀ c = G F
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import in_range
from ..ops.refinement import TAPE_PASSES, rank_tolerance, starts_in_float64
from ..recording.host_reads import lengths, to_host
from ..recording.losses import check_shape, check_weights
from .check import Checks, WeightStats, check_finite, weight_stats
from .consumers import part
from .factors import ForgetFactors
from .gradient_access import Block, KeptGradients
from .grouping import Group, Use, grouped
from .passes import Passes
from .project import RESIDUAL, check_gradients
from .records import Projection
from .systems import HELD
from .verify import next_watched, verify

Tensors = Mapping[str, Tensor]  # by parameter


class RetainSide(Protocol):
    """The retain side of a step until the optimizer has stepped.

    forgotten: p.grad of every parameter before the retain part came to it.
    reruns: whether `correct_` runs closures again, which may fail.
    weights: parameters as they were before the step, set before `correct_` where something may fail. `correct_` takes
        out those that it made what they were: all that is in there after an error has to be put back.
    """

    forgotten: dict[str, Tensor]
    reruns: bool = False
    weights: dict[str, Tensor]

    def correct_(
        self,
        change: dict[str, Tensor],
        diagonal: Callable[[str], Tensor | float],
        carry: Callable[[str, Tensor], None],
        damping: float,
        rtol: float | None,
    ) -> Projection:
        """Make F orthogonal to every per-sample gradient, and change the parameters by as much.

        Args:
            change: F by parameter, float32 or better, contiguous; those without one did not move, and stay as they are.
            diagonal: P of a parameter, a number or like the parameter, not negative; F changes by P Gᵀ w.
            carry: called with the name and P Gᵀ w for whatever is added to F of a parameter.
            damping, rtol: see `projgrad.project_out`.
        """


class Held(RetainSide):
    """The per-sample gradients of a batch, as rules.

    lengths: ‖g_j‖ [n] of every block. discrepancy: of the self-check, by block.
    """

    def __init__(self, passes: Passes, losses: Tensor, per_tensor: bool) -> None:
        self.parameters, self.n = passes.recording.parameters, len(losses)
        self.access = KeptGradients(passes, losses, {}, ForgetFactors(), next_watched(passes, losses))
        self.blocks, self.per_tensor = self.access.blocks(per_tensor), per_tensor
        self.forgotten = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        self.lengths: dict[str, Tensor] = {}
        self.discrepancy: Mapping[str, float] = {}

    def add_(self, add: Tensor) -> None:
        """Add Gᵀ add to p.grad, add [n] float64, and check the rules against what came of it and against autograd.

        The host reads what else was deferred meanwhile.
        """
        checks, access, reads = Checks(), self.access, self.access.passes.recording.host_reads
        w = add[None, None]
        for blocks in _in_turn(self.blocks, self.n):
            K, v = access.products(blocks, False)
            norms = K.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
            stats = weight_stats(w.expand(len(blocks), 1, -1), w @ K, norms, v)
            grads = access.norms(blocks)
            finite = K.sum((1, 2)) + v.sum(1)
            numbers = reads.flush(stats, finite, *(grads[block.name] for block in blocks if block.name in grads))
            for k, (block, is_finite) in enumerate(zip(blocks, numbers[5 * len(blocks) :], strict=False)):
                if not math.isfinite(is_finite):
                    check_finite(K[k], v[k])
                self.lengths[block.name] = norms[k]
            rest = iter(numbers[6 * len(blocks) :])
            for block in blocks:
                block.square = access.square_of(block)([next(rest) for _ in grads.get(block.name, ())])
                if not math.isfinite(block.square):
                    raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
            if not numbers[0]:  # nothing to add
                continue
            before = [block.square for block in blocks]
            outcomes = access.apply(blocks, add.expand(len(blocks), -1), 0.0)
            for k, (block, outcome) in enumerate(zip(blocks, outcomes, strict=True)):
                weights = WeightStats(*numbers[5 * k : 5 * k + 5])
                checks.check(outcome, weights, before[k], before[k], access.precision(block), block.name)
        reads.flush()  # if there was no block
        watched = access.watched_numbers()
        if watched is not None:
            checks.check_parameter(*watched)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        checks.defer(lengths(grads) if grads else add.new_zeros(0), _check_lengths)
        checks.flush()
        self.discrepancy = dict(checks.worst)

    def correct_(
        self,
        change: dict[str, Tensor],
        diagonal: Callable[[str], Tensor | float],
        carry: Callable[[str, Tensor], None],
        damping: float,
        rtol: float | None,
    ) -> Projection:
        return Correction(self, change, diagonal, carry, damping, rtol).make_()


def hold(passes: Passes, losses: Tensor, scope: str, add: Tensor) -> Held:
    """Take the per-sample gradients from one backward pass, and add Gᵀ add to p.grad; add [n].

    Raises as `Tape.project_`.
    """
    check_shape(losses)
    check_weights("add", add, losses)
    check_gradients(passes.recording.parameters)
    structure = passes.structure(losses, wait=False)
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        if not structure.compared.rules:
            passes.recording.host_reads.flush()
        verify(passes, losses)
        held = Held(passes, losses, scope == "per_tensor")
        held.add_(add.double())
    return held


class Correction:
    """Makes the forgetting part of an applied change orthogonal to every per-sample gradient; see `RetainSide`."""

    def __init__(
        self,
        held: Held,
        change: dict[str, Tensor],
        diagonal: Callable[[str], Tensor | float],
        carry: Callable[[str, Tensor], None],
        damping: float,
        rtol: float | None,
    ) -> None:
        self.held, self.change, self.diagonal, self.carry = held, change, diagonal, carry
        self.damping, self.rtol = damping, rtol
        self.uses: dict[str, list[Use]] = defaultdict(list)
        for use in held.access.uses:
            if use.name in change:
                self.uses[use.name].append(use)

    @torch.no_grad()
    def make_(self) -> Projection:
        """Change F, and the parameters by as much; measure what is left of every gradient in what was applied."""
        done: dict[str, Projection] = {}
        for blocks in _in_turn(self.held.blocks, self.held.n):
            for alike in {block.dtype: [b for b in blocks if b.dtype == block.dtype] for block in blocks}.values():
                done |= self._correct(alike)
        return self._of_all(done) if self.held.per_tensor else done[""]

    def _correct(self, blocks: Sequence[Block]) -> dict[str, Projection]:
        n, dtype, rtol = self.held.n, blocks[0].dtype, self.rtol
        float64, plain = starts_in_float64(n, dtype, rtol), not self.damping and rtol is None
        limit = RESIDUAL if dtype != torch.float64 else 64 * torch.finfo(torch.float64).eps
        noise = 16 * n * torch.finfo(dtype).eps / 2
        first = dict(zip([b.name for b in blocks], to_host(self._norms(blocks)), strict=True))
        done: dict[str, Projection] = {}
        worst = dict.fromkeys(first, math.inf)
        ranks = dict.fromkeys(first, 0)
        K, v = self._products(blocks, float64)
        for attempt in range(1 + TAPE_PASSES):
            lengths = torch.stack([self.held.lengths[block.name] for block in blocks])
            lost = lengths < torch.finfo(dtype).tiny / torch.finfo(dtype).eps  # digits are missing
            K, v = K.masked_fill(lost[:, None] | lost[..., None], 0.0), v.masked_fill(lost, 0.0)
            cut = rank_tolerance(n, float64, rtol)
            x, rank, _ = gram_solve_op(K, in_range(K, v[..., None]), self.damping, cut)
            rounding = self._apply(blocks, -x[..., 0], float64 and attempt > 0)
            v = self._dot(blocks, float64).masked_fill(lost, 0.0)
            cosines = (v.abs() / lengths.where(lengths > 0, 1)).amax(1)
            rows = torch.stack([cosines, self._norms(blocks), rounding, rank.double()])
            numbers = torch.tensor(to_host(rows), dtype=torch.float64).view(4, -1).T.tolist()
            pending = []
            for k, (block, (cosine, after, rounded, one)) in enumerate(zip(blocks, numbers, strict=True)):
                name, before = block.name, first[block.name]
                if not math.isfinite(cosine + after):
                    raise FloatingPointError("NaN or Inf in the state of the optimizer, or in the change it made")
                # A change as short as the rounding of the parameters has no direction.
                norm = after if after > noise * before + 4 * rounded else before
                residual = cosine / norm if norm else 0.0
                ranks[name] = max(ranks[name], int(one))
                done[name] = Projection(
                    ranks[name],
                    after / before if before else 1.0,
                    min(residual, 1.0),
                    attempt,
                    0.0,
                    (before**2, after**2),
                )
                # Rounding is spread over all elements: of it a gradient sees one direction.
                floor = max(limit, 8 * rounded / math.sqrt(block.numel()) / (norm or 1.0))
                if plain and not block.has_16bit_factor and floor < residual <= worst[name] / 2:
                    pending.append(k)
                worst[name] = residual
            if not pending:
                break
            blocks, v = [blocks[k] for k in pending], v[pending]
            if float64:
                K = K[pending]
            else:
                float64 = True
                K, v = self._products(blocks, True)
        for name, projection in done.items():
            projection.discrepancy = self.held.discrepancy.get(name, 0.0)
        return done

    def _names(self, blocks: Sequence[Block]) -> Iterator[tuple[int, str]]:
        """Yield the parameters that moved, with the index of their block."""
        for k, block in enumerate(blocks):
            for name in block.parameters:
                if name in self.change:
                    yield k, name

    def _norms(self, blocks: Sequence[Block]) -> Tensor:
        """Return ‖F‖ of every block [l]."""
        names = list(self._names(blocks))
        squares = torch.zeros(len(blocks), dtype=torch.float64, device=self.held.access.losses.device)
        if not names:
            return squares
        norms = lengths([self.change[name] for _, name in names]).to(squares.device)
        return squares.index_add_(0, torch.tensor([k for k, _ in names], device=squares.device), norms**2).sqrt()

    def _products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        """Return K = G D Gᵀ [l, n, n] and v = G F [l, n] in float64."""
        n, device = self.held.n, self.held.access.losses.device
        K = torch.zeros(len(blocks), n, n, dtype=torch.float64, device=device)
        v = K.new_zeros(len(blocks), n)
        for k, name in self._names(blocks):
            D = self.diagonal(name)
            for use in self.uses[name]:
                F = part(use.source, self.change[name])
                if isinstance(D, Tensor) and D.ndim:
                    one, other = use.rule.weighted_gram(part(use.source, D.contiguous()), F, float64 or use.rule.cheap)
                else:
                    one, other = use.rule.gram(F[None], float64 or use.rule.cheap)
                    one, other = D * one, other[:, 0]
                K[k] += one
                v[k] += other
        return K, v

    def _dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        """Return v = G F [l, n] in float64."""
        place = {name: k for k, name in self._names(blocks)}
        v = torch.zeros(len(blocks), self.held.n, dtype=torch.float64, device=self.held.access.losses.device)
        for group in grouped([use for name in place for use in self.uses[name]]):
            some = group.dot([part(use.source, self.change[use.name]) for use in group], float64)
            for use, one in zip(group, some, strict=True):
                v[place[use.name]] += one
        return v

    def _apply(self, blocks: Sequence[Block], w: Tensor, float64: bool) -> Tensor:
        """Add D Gᵀ w to the parameters, and what that really changed to F; return ‖rounding‖ [l]. w [l, n]."""
        squares: list[list[Tensor]] = [[] for _ in blocks]
        for k, name in self._names(blocks):
            if not self.uses[name]:
                continue
            p, F = self.held.parameters[name], self.change[name]
            dtype = torch.float64 if float64 else F.dtype
            combined = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
            for use in self.uses[name]:
                Group([use]).combine_([combined], w[k], float64)
            delta = combined * self.diagonal(name)
            after = (p.to(dtype) + delta).to(p.dtype)
            moved = after.to(dtype) - p.to(dtype)
            squares[k].append(lengths([moved - delta])[0].to(w.device) ** 2)
            F += moved
            p.copy_(after)
            self.carry(name, delta)
        return torch.stack([sum(some, w.new_zeros(())) for some in squares]).sqrt()

    def _of_all(self, tensors: dict[str, Projection]) -> Projection:
        """Return the record of all tensors; those that the losses do not use keep their change."""
        others = [name for name in self.change if name not in tensors]
        for name, norm in zip(
            others, to_host(lengths([self.change[n] for n in others])) if others else (), strict=True
        ):
            tensors[name] = Projection(0, 1.0, 0.0, 0, 0.0, (norm**2, norm**2))
        every = tensors.values()
        before, after = (sum(t.squares[k] for t in every) for k in (0, 1))
        return Projection(
            rank=sum(t.rank for t in every),
            preserved_norm=(after / before) ** 0.5 if before else 1.0,
            residual=max((t.residual for t in every), default=0.0),
            refinements=max((t.refinements for t in every), default=0),
            discrepancy=max(self.held.discrepancy.values(), default=0.0),
            squares=(before, after),
            tensors={name: tensors[name] for name in self.held.parameters if name in tensors},
        )


def _in_turn(blocks: Sequence[Block], n: int) -> Iterator[Sequence[Block]]:
    """Yield as many blocks at a time as their Gram matrices may be held."""
    size = max(1, HELD // (8 * n * n))
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def _check_lengths(values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise FloatingPointError("NaN or Inf in the gradient of the step; nothing was changed")
