"""The correction of a step in the metric of its optimizer, for a retain set in micro-batches that are never together.

Conjugate gradients for G D Gᵀ c = G F over all samples. r = F - D Gᵀ x is a change of the parameters, q = Gᵀ p and d
are gradients. So D multiplies, in K = G_b D G_bᵀ and r ← r - γ D q; it divides in ‖r‖² = Σ r²/D alone, and may have
zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..recording.host_reads import inner, lengths
from .consumers import part
from .gradient_access import Block
from .grouping import Group
from .micro_batch import MicroBatch, Vector
from .passes import Passes
from .placement import Spread
from .records import Projection
from .union import Batch, Union, UnionProjection
from .weighted import RetainSide

Notify = Callable[[int, int, float], object]  # see `Union`
Diagonal = Callable[[str], Tensor | float]
Carry = Callable[[str, Tensor], None]


def aside(t: Tensor) -> Tensor:
    """Return a copy that is not calculated with: in host memory."""
    return t.detach().to("cpu", copy=True)


class Recomputed(dict[str, Tensor]):
    """A vector that is not held: every look at it makes a tensor anew."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, name: str) -> Tensor:
        return self.make(name)


class HeldUnion(RetainSide):
    """The per-sample gradients of many micro-batches: `correct_` makes them anew, at the weights before the step.

    Args:
        batches, parameters, scope, tolerance, spread: see `Union`.
        alpha: α Σ_j g_j / N is added to every p.grad, here.
        max_passes: with the one that is made here.
        progress: makes a context that gives what is called after every visit.

    samples: in all micro-batches.

    Raises as `Union.run`.
    """

    reruns = True

    def __init__(
        self,
        batches: Sequence[Batch],
        parameters: Mapping[str, Tensor],
        scope: str,
        alpha: float,
        tolerance: float,
        max_passes: int,
        progress: Callable[[], AbstractContextManager[Notify]],
        spread: Spread | None = None,
    ) -> None:
        self.batches, self.parameters, self.scope, self.progress = batches, parameters, scope, progress
        self.tolerance, self.max_passes = tolerance, max_passes
        with progress() as notify:
            first = RetainPart(batches, parameters, scope, alpha, notify, spread)
            self.forgotten = first.add_()
        self.lengths, self.discrepancy, self.samples = first.lengths, first.discrepancy, first.samples
        self.spread = first.spread

    def correct_(
        self, change: dict[str, Tensor], diagonal: Diagonal, carry: Carry, damping: float, rtol: float | None
    ) -> Projection:
        local, processes = self.spread.placement.local, self.spread.placement.processes
        processes.agree()  # all have stepped
        stepped = {name: aside(local(p)) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(self.weights[name])
            del self.weights[name]
        with self.progress() as notify:
            union = ChangeUnion(self, change, stepped, diagonal, lambda k, b, r: notify(k + 1, b, r))
            projection = union.run()
        union.finish_(carry)
        for name, p in self.parameters.items():  # what was in a parameter stands in `weights` before it changes
            self.weights[name] = aside(p)
            local(p).copy_(stepped.pop(name))
        processes.agree()  # else one that failed would be the only one that puts everything back
        return projection


class RetainPart(Union):
    """The pass that is made before the optimizer steps: it adds α Σ_j g_j / N to every p.grad.

    lengths: ‖g_j‖ [l, n] of every micro-batch, in every parameter or in all together; zero where digits are missing.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        parameters: Mapping[str, Tensor],
        scope: str,
        alpha: float,
        notify: Notify,
        spread: Spread | None,
    ) -> None:
        self.given = {name for name, p in parameters.items() if p.grad is not None}
        super().__init__(batches, parameters, scope, alpha, 1.0, 2, {}, notify, spread)
        self.small, self.lengths = {}, []

    @torch.no_grad()
    def add_(self) -> dict[str, Tensor]:
        """Make the pass; return what p.grad was before it.

        Raises as `Union.run`, and FloatingPointError for NaN or Inf in the sum.
        """
        u2 = self._products(self.r, self.r)
        if not u2.isfinite().all():
            raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
        self._sweep(0, True, u2)
        for name, p in self.parameters.items():
            used = self.alpha and name not in self.unused
            if used or name in self.given:
                r, weight = self.r[name], self.alpha / self.samples
                total = torch.add(r, self.d.pop(name), alpha=weight) if used else r.clone()
                p.grad = self.placement.laid_out(name, total.to(p.dtype))
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        if names and not self.placement.norms(names).isfinite().all():
            raise FloatingPointError("NaN or Inf in the gradient of the step; nothing was changed")
        dtypes = {name: self.parameters[name].dtype for name in self.given}
        return {name: self.placement.laid_out(name, self.r[name].to(dtype)) for name, dtype in dtypes.items()}

    def _visit(self, passes: Passes, losses: Tensor, b: int, index: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        w, s, norms = super()._visit(passes, losses, b, index, last)
        self.lengths.append(norms)
        return w, s, norms


class ChangeBatch(MicroBatch):
    """The rules of one micro-batch, with K = G D Gᵀ.

    lost [l, n]: gradients that count as zero. numbers: D where it is one. diagonal: gives the others, of the parameters
    of a round. The other arguments as those of `MicroBatch`.
    """

    def __init__(self, *args: object, lost: Tensor, numbers: Mapping[str, float], diagonal: Diagonal) -> None:
        super().__init__(*args)
        self.lost, self.numbers, self.diagonal = lost, numbers, diagonal

    def _without_lost(self, K: Tensor, v: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        return K.masked_fill(self.lost[:, None] | self.lost[..., None], 0.0), v.masked_fill(self.lost, 0.0)

    def _of_group(self, group: Group, float64: bool, gram: bool) -> tuple[Tensor, Tensor]:
        if not gram:
            return super()._of_group(group, float64, gram)
        if all(use.name in self.numbers for use in group):
            K, v = super()._of_group(group, float64, gram)
            return K * K.new_tensor([self.numbers[use.name] for use in group])[:, None, None], v
        sums = []
        for name, source, rule in group:
            D, F = self.diagonal(name), self.direction(name)
            D = D.contiguous() if isinstance(D, Tensor) and D.ndim else torch.full_like(F, float(D))
            sums.append(rule.weighted_gram(part(source, D), part(source, F), float64 or rule.cheap))
        K, v = zip(*sums, strict=True)
        return torch.stack(K), torch.stack(v)


class ChangeUnion(Union):
    """Takes out of F, the forgetting part of a change, what moves a loss of any micro-batch: F' = F - D Gᵀ c.

    The last pass measures what the parameters will really change by, which is rounded as they are. Lengths of the
    iteration are those in the metric, √Σ r² / D; cosines are ordinary ones.

    Args:
        held: of the retain side.
        change: F by parameter, which becomes r.
        stepped: the parameters as the optimizer left them; `finish_` corrects them.
        diagonal: see `RetainSide`.
    """

    def __init__(
        self, held: HeldUnion, change: dict[str, Tensor], stepped: Vector, diagonal: Diagonal, notify: Notify
    ) -> None:
        parameters = {name: held.parameters[name] for name in change}
        left = held.max_passes - 1  # a pass was made before
        super().__init__(held.batches, parameters, held.scope, 0.0, held.tolerance, left, {}, notify, held.spread)
        self.r = {name: self.placement.local(F) for name, F in change.items()}
        self.change = {name: F.clone() for name, F in self.r.items()}
        self.stepped, self.discrepancy = stepped, held.discrepancy
        local = self.placement.local
        self.D = Recomputed(lambda name: local(diagonal(name)))  # what this process holds of it
        self.whole_D: Mapping[str, Tensor] = {}  # in a round of products
        self.numbers: dict[str, float] = {}
        for name in change:
            D = diagonal(name)
            if not isinstance(D, Tensor) or not D.ndim:
                self.numbers[name] = float(D)
        if held.scope == "per_tensor":
            rows = [k for k, name in enumerate(held.parameters) if name in change]
            self.lengths = [some[rows] for some in held.lengths]
        else:
            self.lengths = held.lengths
        for span in self.small.values():
            names = list(span.block.parameters)
            whole = self.placement.gathered(self.D, [name for name in names if name not in self.numbers])
            span.weigh([self.numbers[name] if name in self.numbers else whole[name] for name in names])
        self.before, self.rounding = self._squares().sqrt(), self.iterated.new_zeros(len(self.blocks))

    def finish_(self, carry: Carry) -> None:
        """Correct `stepped`, and tell `carry` what was added to F."""
        for name, p in self.parameters.items():
            delta, self.stepped[name] = self._rounded(name)
            carry(name, self.placement.laid_out(name, delta))
            p.grad = self.placement.laid_out(name, self.r[name].to(p.dtype))

    def _weight(self, name: str) -> Tensor | float:
        return self.numbers[name] if name in self.numbers else self.D[name]

    def _visit(self, passes: Passes, losses: Tensor, b: int, index: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.visited = self.lengths[b]
        visit = super()._visit(passes, losses, b, index, last)
        self.whole_D = {}
        return visit

    def _micro_batch(self, passes: Passes, losses: Tensor, _: str) -> ChangeBatch:
        given = passes, losses, self.rates, "", self.r, self.d, self.placement, self._gather
        lost, diagonal = self.visited == 0, lambda name: self.whole_D[name]
        return ChangeBatch(*given, lost=lost, numbers=self.numbers, diagonal=diagonal)

    def _gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        if self.multiplies:
            self.whole_D, some = {}, [name for name in names if name not in self.numbers]
            self.whole_D = self.placement.gathered(self.D, some)
        return super()._gather(names)

    def _norms(self, K: Tensor) -> Tensor:
        return self.visited

    def _sweep(self, index: int, last: bool, u2: Tensor) -> tuple[Tensor, Tensor]:
        if last:
            self._round()
        self.multiplies = not index or self.lacks
        return super()._sweep(index, last, u2)

    def _rounded(self, name: str) -> tuple[Tensor, Tensor]:
        """Return what is to be added to a parameter, r - F, and the parameter with it; d holds r."""
        r, p = self.d[name], self.stepped[name]
        delta = r - self.change[name]
        return delta, (p.to(r) + delta).to(p.dtype)

    def _round(self) -> None:
        """Make r what the parameters really change by; d keeps what it was."""
        squares = []
        for name, r in self.r.items():
            self.d[name] = r.clone()
            delta, after = self._rounded(name)
            rounding = (after.to(r.dtype) - self.stepped[name].to(r)).sub_(delta)
            squares.append(lengths([rounding])[0].to(self.iterated.device) ** 2)
            r.add_(rounding)
        self.rounding = self._of_blocks(torch.stack(squares), self.r).sqrt()

    def _take_back(self) -> None:
        for name, r in self.r.items():
            r.copy_(self.d[name])

    def _is_rounding(self, before: float) -> bool:
        return before <= self.tolerance

    def _measured(self, worst: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r2 = self._squares()
        short = 16 * self.samples * self.eps / 2 * self.before + 4 * self.rounding
        norms = torch.where(r2.sqrt() > short, r2.sqrt(), self.before)  # a change as short as that has no direction
        return r2, torch.where(norms > 0, worst / norms, 0.0)

    def _squares(self) -> Tensor:
        return self._of_blocks(lengths(list(self.r.values())).square().to(self.iterated.device), self.r)

    def _subtract(self, name: str, r: Tensor, step: float) -> None:
        D = self._weight(name)
        if isinstance(D, Tensor):
            r.addcmul_(D.to(r.dtype), self.q[name], value=-step)
        else:
            r.add_(self.q[name], alpha=-step * D)

    def _products(self, a: Vector, b: Vector) -> Tensor:
        """Return the inner product of two vectors: D multiplies where both are gradients, and divides two changes."""
        power = (a is not self.r) + (b is not self.r) - 1
        values = []
        for name, t in a.items():
            if power:
                t = t * self._weight(name) if power > 0 else _divided(t, self._weight(name))
            values.append(inner(t, b[name]).to(self.iterated.device))
        return self._of_blocks(torch.stack(values), a)

    def _of_blocks(self, values: Tensor, names: Iterable[str]) -> Tensor:
        values = self.placement.summed_products(values, list(names))
        return values.sum()[None] if len(self.blocks) == 1 else values

    def _finish(
        self, u2: Tensor, r2: Tensor, iterations: int, passes: int, error: float, cosines: Tensor
    ) -> UnionProjection:
        before, after, residuals = self.before.tolist(), r2.sqrt().tolist(), cosines.clamp_max(1.0).tolist()

        def numbers(b: float, a: float, residual: float) -> dict:
            return {
                "rank": None,
                "preserved_norm": a / b if b else 1.0,
                "residual": residual,
                "refinements": 0,
                "discrepancy": self.discrepancy,
                "squares": (b**2, a**2),
            }

        each = zip(self.blocks, before, after, residuals, strict=True)
        return UnionProjection(
            **numbers(math.hypot(*before), math.hypot(*after), max(residuals)),
            tensors={block.name: Projection(**numbers(*of_block)) for block, *of_block in each if block.name},
            samples=self.samples,
            iterations=iterations,
            passes=passes + 1,
            estimated_error=error if math.isfinite(error) else 0.0,
        )


def _divided(t: Tensor, D: Tensor | float) -> Tensor:
    """Return t / D, and 0 where D is: nothing moves there."""
    if isinstance(D, Tensor):
        return torch.where(D > 0, t / D, 0.0)
    return t / D if D else torch.zeros_like(t)
