"""The correction of the change that an optimizer applied, so that it is orthogonal to every per-sample gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._torch_private import version
from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import in_range
from ..ops.refinement import TAPE_PASSES, rank_tolerance, starts_in_float64
from ..recording.host_reads import to_host
from .gradient_access import Block
from .project import RESIDUAL
from .records import Projection
from .systems import HELD

Tensors = Mapping[str, Tensor]  # by parameter
Places = Mapping[str, int]  # by parameter


class WeightedProducts(Protocol):
    """Products with the per-sample gradients of n samples, and what a correction does with the parameters.

    F, and what is like it, is given by parameter and lies as the parameter does. `place` is the row of a result, or of
    w, that belongs to a parameter; those that are not in there do not count.

    lengths: ‖g_j‖ [n] of every block. discrepancy: of the self-check, by block.
    """

    parameters: Mapping[str, Tensor]
    n: int
    blocks: Sequence[Block]
    per_tensor: bool
    lengths: Mapping[str, Tensor]
    discrepancy: Mapping[str, float]

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros in float64."""

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return numbers that the host decides by: with several processes, the same ones on all of them."""

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ‖t‖² of tensors in float64, for `total`: with several processes, shares of it."""

    def total(self, squares: Tensor) -> Tensor:
        """Return sums of `squares` of whole tensors."""

    def products(
        self, Fs: Tensors, diagonal: Callable[[str], Tensor | float], place: Places, count: int, float64: bool
    ) -> tuple[Tensor, Tensor]:
        """Return K = G D Gᵀ [count, n, n] and v = G F [count, n] in float64, multiplied in it if that is set."""

    def dot(self, Fs: Tensors, place: Places, count: int, float64: bool) -> Tensor:
        """Return v = G F [count, n] in float64."""

    def combined(self, Fs: Tensors, place: Places, w: Tensor, float64: bool) -> Iterator[Tensors]:
        """Yield Gᵀ w, in the dtype of F or in float64, of some parameters at a time that samples use; w [count, n]."""


class Correction:
    """Makes the forgetting part of an applied change orthogonal to every per-sample gradient; see `RetainSide`."""

    def __init__(
        self,
        held: WeightedProducts,
        change: dict[str, Tensor],
        diagonal: Callable[[str], Tensor | float],
        carry: Callable[[str, Tensor], None],
        damping: float,
        rtol: float | None,
    ) -> None:
        self.held, self.change, self.diagonal, self.carry = held, change, diagonal, carry
        self.damping, self.rtol = damping, rtol

    @torch.no_grad()
    def make_(self) -> Projection:
        """Change F, and the parameters by as much; measure what is left of every gradient in what was applied."""
        done: dict[str, Projection] = {}
        for blocks in in_turn(self.held.blocks, self.held.n):
            for alike in {block.dtype: [b for b in blocks if b.dtype == block.dtype] for block in blocks}.values():
                done |= self._correct(alike)
        return self._of_all(done) if self.held.per_tensor else done[""]

    def _correct(self, blocks: Sequence[Block]) -> dict[str, Projection]:
        n, dtype, rtol = self.held.n, blocks[0].dtype, self.rtol
        float64, plain = starts_in_float64(n, dtype, rtol), not self.damping and rtol is None
        limit = RESIDUAL if dtype != torch.float64 else 64 * torch.finfo(torch.float64).eps
        noise = 16 * n * torch.finfo(dtype).eps / 2
        first = dict(zip([b.name for b in blocks], self._numbers(self._norms(blocks)[None])[0], strict=True))
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
            rounding = self._apply(blocks, self.held.agreed(-x[..., 0]), float64 and attempt > 0)
            v = self._dot(blocks, float64).masked_fill(lost, 0.0)
            cosines = (v.abs() / lengths.where(lengths > 0, 1)).amax(1)
            numbers = self._numbers(torch.stack([cosines, self._norms(blocks), rounding, rank.double()]))
            pending = []
            for k, (block, cosine, after, rounded, one) in enumerate(zip(blocks, *numbers, strict=True)):
                name, before = block.name, first[block.name]
                if not math.isfinite(cosine + after):
                    raise FloatingPointError("NaN or Inf in the state of the optimizer, or in the change it made")
                ranks[name] = max(ranks[name], int(one))
                # A change as short as the rounding of the parameters has no direction, nor what is left of one where
                # the samples span everything.
                short = after <= noise * before + 4 * rounded or ranks[name] >= block.numel()
                norm = before if short else after
                residual = cosine / norm if norm else 0.0
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

    def _place(self, blocks: Sequence[Block]) -> dict[str, int]:
        """Return the index of the block of every parameter that moved."""
        return {name: k for k, block in enumerate(blocks) for name in block.parameters if name in self.change}

    def _numbers(self, rows: Tensor) -> list[list[float]]:
        """Return numbers [k, l] that the host decides by."""
        values = to_host(self.held.agreed(rows))
        return [values[start : start + rows.shape[1]] for start in range(0, len(values), rows.shape[1])]

    def _norms(self, blocks: Sequence[Block]) -> Tensor:
        """Return ‖F‖ of every block [l]."""
        place, squares = self._place(blocks), self.held.zeros(len(blocks))
        if place:
            index = torch.tensor(list(place.values()), device=squares.device)
            squares.index_add_(0, index, self.held.squares([self.change[name] for name in place]))
        return self.held.total(squares).sqrt()

    def _products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        """Return K = G D Gᵀ [l, n, n] and v = G F [l, n] in float64."""
        return self.held.products(self.change, self.diagonal, self._place(blocks), len(blocks), float64)

    def _dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        """Return v = G F [l, n] in float64."""
        return self.held.dot(self.change, self._place(blocks), len(blocks), float64)

    def _apply(self, blocks: Sequence[Block], w: Tensor, float64: bool) -> Tensor:
        """Add D Gᵀ w to the parameters, and what that really changed to F; return ‖rounding‖ [l]. w [l, n]."""
        place, squares = self._place(blocks), self.held.zeros(len(blocks))
        for sums in self.held.combined(self.change, place, w, float64):
            for name, combined in sums.items():
                p, F = self.held.parameters[name], self.change[name]
                delta = combined.mul_(self.diagonal(name))
                moved = p.to(delta.dtype, copy=True)
                rounded = (moved + delta).to(p.dtype)
                moved.neg_().add_(rounded)
                versions = version(p), version(F)
                try:
                    p.copy_(rounded)
                    F += moved
                except BaseException:  # Ctrl-C: F stays what is in p
                    if version(p) != versions[0] and version(F) == versions[1]:
                        F += moved
                    raise
                squares[place[name]] += self.held.squares([moved.sub_(delta)])[0]
                self.carry(name, delta)
        return self.held.total(squares).sqrt()

    def _of_all(self, tensors: dict[str, Projection]) -> Projection:
        """Return the record of all tensors; those that the losses do not use keep their change."""
        others = [name for name in self.change if name not in tensors]
        if others:
            squares = self.held.total(self.held.squares([self.change[name] for name in others]))
            for name, square in zip(others, *self._numbers(squares[None]), strict=True):
                tensors[name] = Projection(0, 1.0, 0.0, 0, 0.0, (square, square))
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


def in_turn(blocks: Sequence[Block], n: int) -> Iterator[Sequence[Block]]:
    """Yield as many blocks at a time as their Gram matrices may be held."""
    size = max(1, HELD // (8 * n * n))
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]
