"""The retain side of a step after the optimizer, where several processes have its samples; see `weighted`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..recording.host_reads import to_host
from .check import Checks, WeightStats, check_finite, weight_stats
from .correction import Places, Tensors, in_turn
from .spread import SpreadGradients
from .weighted import Held


class SpreadHeld(Held):
    """The per-sample gradients of all processes; F lies as the parameters do, whole or in shards.

    All processes call its functions alike. They end with the same bits.
    """

    access: SpreadGradients

    def add_(self) -> None:
        """Add Gᵀ add to p.grad, and check the rules against what came of it and against autograd.

        No factors are exchanged: K add is by how much v = G p.grad grows.
        """
        checks, access, w = Checks(), self.access, self.add
        for blocks in in_turn(self.blocks, self.n):
            norms, v, grads = access.row_lengths(blocks), access.dot(blocks, False), access.norms(blocks)
            numbers = iter(to_host(norms.sum(1) + v.sum(1), *grads.values()))
            finite = [math.isfinite(next(numbers)) for _ in blocks]
            for k, (block, is_finite) in enumerate(zip(blocks, finite, strict=True)):
                if not is_finite:
                    check_finite(torch.diag(norms[k]), v[k])
                self.lengths[block.name] = norms[k]
                block.square = access.square_of(block)([next(numbers) for _ in grads.get(block.name, ())])
                if not math.isfinite(block.square):
                    raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
            if not w.any():
                continue
            outcomes = access.apply(blocks, w.expand(len(blocks), -1), 0.0)
            Kw = access.dot(blocks, False) - v
            stats = weight_stats(w.expand(len(blocks), 1, -1), Kw[:, None], norms, v)[..., 0]  # [l, 5]
            for block, outcome, numbers in zip(blocks, outcomes, stats.tolist(), strict=True):
                weights, square = WeightStats(*numbers), block.square
                checks.check(outcome, weights, square, square, access.precision(block), block.name)
        self.make_checks(checks)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.access.placement.squares(tensors)

    def total(self, squares: Tensor) -> Tensor:
        return self.access.placement.total(squares)

    def products(
        self, Fs: Tensors, diagonal: Callable[[str], Tensor | float], place: Places, count: int, float64: bool
    ) -> tuple[Tensor, Tensor]:
        def whole(name: str) -> Tensor | float:
            return self.access.placement.whole({name: diagonal(name)}, "diagonal")[name]

        return self.access.products_with(Fs, place, count, float64, whole)

    def dot(self, Fs: Tensors, place: Places, count: int, float64: bool) -> Tensor:
        return self.access.dot_with(Fs, place, count, float64)

    def combined(self, Fs: Tensors, place: Places, w: Tensor, float64: bool) -> Iterator[Tensors]:
        processes, placement = self.access.processes, self.access.placement
        for names in placement.some(self.access.used(place)):
            sums = {}
            for name in names:
                dtype = torch.float64 if float64 else Fs[name].dtype
                sums[name] = torch.zeros(self.parameters[name].shape, dtype=dtype, device=processes.device)
            self.access.combine_(sums, w, place, float64)
            processes.agree()
            yield placement.summed(sums)


def hold_spread(access: SpreadGradients, scope: str, add: Tensor) -> SpreadHeld:
    """Take the per-sample gradients of all processes, and add Gᵀ add to p.grad; add [n]: over all samples.

    Raises as `project_spread_`.
    """
    with torch.no_grad(), torch.autocast(access.processes.device.type, enabled=False):
        held = SpreadHeld(access, access.parameters, add, scope == "per_tensor")
        held.add_()
    access.processes.agree()
    return held
