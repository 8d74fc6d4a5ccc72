"""The correction of a step in the metric of its optimizer: the retain side is held while the optimizer steps.

F is the forgetting part of the change of the parameters, D the diagonal by which the optimizer scales gradients:

    F' = F - D Gᵀ c,    G D Gᵀ c = G F
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..recording.host_reads import HostReads, lengths
from ..recording.losses import check_shape, check_weights
from .check import Checks, check_finite
from .consumers import part
from .correction import Correction, Places, Tensors, WeightedProducts, in_turn
from .factors import ForgetFactors
from .gradient_access import Block, KeptGradients
from .grouping import Group, Use, grouped
from .passes import Passes
from .project import check_gradients
from .records import Projection
from .verify import next_watched, verify


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
            carry: called with the name and P Gᵀ w for whatever is added to F of a parameter; it may overwrite that.
            damping, rtol: see `projgrad.project_out`.
        """


class Held(RetainSide, WeightedProducts):
    """The per-sample gradients of n samples, as rules; add [n]: Gᵀ add is the retain part of the gradient."""

    def __init__(self, access: KeptGradients, parameters: Mapping[str, Tensor], add: Tensor, per_tensor: bool) -> None:
        self.access, self.parameters, self.n, self.add = access, parameters, len(add), add.double()
        self.blocks, self.per_tensor = access.blocks(per_tensor), per_tensor
        self.forgotten = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        self.lengths: dict[str, Tensor] = {}
        self.discrepancy: Mapping[str, float] = {}

    def add_(self, reads: HostReads) -> None:
        """Add Gᵀ add to p.grad, and check the rules against what came of it and against autograd.

        The host reads what else was deferred meanwhile.
        """
        access, largest = self.access, self.add.abs().amax()
        for blocks in in_turn(self.blocks, self.n):
            norms, grads = access.row_lengths(blocks), access.norms(blocks)
            numbers = iter(reads.flush(largest, norms.sum(1), *grads.values()))
            adds = next(numbers) > 0
            finite = [math.isfinite(next(numbers)) for _ in blocks]
            for k, (block, is_finite) in enumerate(zip(blocks, finite, strict=True)):
                if not is_finite:
                    check_finite(torch.diag(norms[k]), norms.new_zeros(self.n))
                self.lengths[block.name] = norms[k]
                block.square = access.square_of(block)([next(numbers) for _ in grads.get(block.name, ())])
                if not math.isfinite(block.square):
                    raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
            if adds:
                access.add_(blocks, self.add.expand(len(blocks), -1))
        reads.flush()  # if there was no block
        self.make_checks(Checks())

    def make_checks(self, checks: Checks) -> None:
        """Make the checks of `add_`, and two more."""
        watched = self.access.watched_numbers()
        if watched is not None:
            checks.check_parameter(*watched)
        grads = self.access.norms([Block("", self.parameters)])
        checks.defer(grads.get("", self.zeros(0)), _check_lengths)
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

    def zeros(self, *shape: int) -> Tensor:
        return self.add.new_zeros(shape)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        return lengths(tensors).square().to(self.add.device)

    def total(self, squares: Tensor) -> Tensor:
        return squares

    def agreed(self, numbers: Tensor) -> Tensor:
        return self.access.agreed(numbers)[0]

    def products(
        self, Fs: Tensors, diagonal: Callable[[str], Tensor | float], place: Places, count: int, float64: bool
    ) -> tuple[Tensor, Tensor]:
        K, v = self.zeros(count, self.n, self.n), self.zeros(count, self.n)
        for name, uses in self._uses(place).items():
            D = diagonal(name)
            for use in uses:
                F = part(use.source, Fs[name])
                if isinstance(D, Tensor) and D.ndim:
                    one, other = use.rule.weighted_gram(part(use.source, D.contiguous()), F, float64 or use.rule.cheap)
                else:
                    one, other = use.rule.gram(F[None], float64 or use.rule.cheap)
                    one, other = D * one, other[:, 0]
                K[place[name]] += one
                v[place[name]] += other
        return K, v

    def dot(self, Fs: Tensors, place: Places, count: int, float64: bool) -> Tensor:
        v = self.zeros(count, self.n)
        for group in grouped([use for uses in self._uses(place).values() for use in uses]):
            some = group.dot([part(use.source, Fs[use.name]) for use in group], float64)
            for use, one in zip(group, some, strict=True):
                v[place[use.name]] += one
        return v

    def combined(self, Fs: Tensors, place: Places, w: Tensor, float64: bool) -> Iterator[Tensors]:
        for name, uses in self._uses(place).items():
            dtype = torch.float64 if float64 else Fs[name].dtype
            out = torch.zeros_like(self.parameters[name], dtype=dtype, memory_format=torch.contiguous_format)
            for use in uses:
                Group([use]).combine_([out], w[place[name]], float64)
            yield {name: out}

    def _uses(self, place: Places) -> dict[str, list[Use]]:
        """Return the uses of some parameters, in the order of these."""
        uses: dict[str, list[Use]] = {name: [] for name in place}
        for use in self.access.uses:
            if use.name in uses:
                uses[use.name].append(use)
        return {name: some for name, some in uses.items() if some}


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
        access = KeptGradients(passes, losses, {}, ForgetFactors(), next_watched(passes, losses))
        held = Held(access, passes.recording.parameters, add, scope == "per_tensor")
        held.add_(passes.recording.host_reads)
    return held


def _check_lengths(values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise FloatingPointError("NaN or Inf in the gradient of the step; nothing was changed")
