"""The projection on the complement of the per-sample gradients of many micro-batches, which are never held together.

Conjugate gradients for K x = v over all samples, preconditioned with the Gram matrices of the micro-batches. The
vectors of the iteration are kept as gradients, r = u - Gᵀ x and q = Gᵀ p, so that an iteration is one visit to every
micro-batch: one forward and one backward pass give s = G_b r, z = (G_b G_bᵀ)⁻¹ s and the sum of G_bᵀ z.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .._options import outside
from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import default_rtol, in_range, product_dtype
from ..recording.graph import coarser
from ..recording.host_reads import inner, lengths
from .check import Checks, WeightStats, check_finite, check_relative_error, tolerance_of
from .convergence import Convergence
from .gradient_access import FACTORS, Block, coarsest_factor
from .micro_batch import MicroBatch, Vector
from .passes import Passes
from .placement import InOneProcess, Spread
from .records import Projection
from .small_spans import SMALL, SmallSpan
from .systems import HELD
from .verify import next_watched, verify

Batch = Callable[[], AbstractContextManager[tuple[Passes, Tensor]]]  # a forward pass of one micro-batch, anew each time
NEAR = 8  # the residual of a pass, in tolerances, from which the next one may be the last: an iteration reduces it too


@dataclass
class UnionProjection(Projection):
    """What a projection on the complement of many micro-batches did; rank is None: that of the union is not known.

    samples: in all micro-batches. iterations: of conjugate gradients. passes: visits to every micro-batch.
    estimated_error: ‖result - exact result‖ / ‖result‖, estimated from how the iteration converged. Gradients that
        differ by less than about the tolerance, relative, may count as one: no direction that tells them apart is met.
    """

    samples: int = 0
    iterations: int = 0
    passes: int = 0
    estimated_error: float = 0.0


class Union:
    """Takes the span of the per-sample gradients of all micro-batches out of p.grad.

    `weighted_union.ChangeUnion` does so with the change that an optimizer made, by what is a method here of its own.

    Args:
        batches: each makes a forward pass of a micro-batch and gives its passes and losses.
        parameters: by name; their p.grad is u, and None while this runs.
        scope: "global": one system. "per_tensor": one for each tensor, side by side in the same passes.
        alpha: α Σ_j g_j / N over all N samples is added to the result.
        tolerance: of ‖result - exact‖ / ‖result‖, estimated, and of max_j |cos(g_j, result)|, measured.
        max_passes: after so many the result is taken as it is, with a warning.
        rates: weights of the parameters in all inner products, 1 by default.
        notify: called after every visit with the pass, the micro-batch and the residual of the pass before.
        spread: over processes that hold other micro-batches of the same union; all of them have the same parameters
            and u. One of them may have micro-batches of no samples, losses (0,). In shards all have equally many
            micro-batches, and visit them together: r and d lie in shards too, and are whole in rounds, for some
            parameters at a time.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        parameters: Mapping[str, Tensor],
        scope: str,
        alpha: float,
        tolerance: float,
        max_passes: int,
        rates: Mapping[str, float],
        notify: Callable[[int, int, float], object],
        spread: Spread | None = None,
    ) -> None:
        self.spread = spread or InOneProcess(parameters)
        self.placement, self.processes = self.spread.placement, self.spread.placement.processes
        self.batches, self.parameters, self.alpha = batches, parameters, alpha
        self.tolerance, self.max_passes, self.notify = tolerance, max_passes, notify
        self.rates = {} if scope == "per_tensor" else rates
        named = {name: {name: p} for name, p in parameters.items()} if scope == "per_tensor" else {"": parameters}
        self.blocks = [Block(name, params) for name, params in named.items()]
        self.place = {name: k for k, block in enumerate(self.blocks) for name in block.parameters}
        small = [k for k, block in enumerate(self.blocks) if block.numel() <= SMALL and not self.rates]
        self.small = {k: SmallSpan(self._followed(self.blocks[k])) for k in small}
        large = [0.0 if k in self.small else 1.0 for k in range(len(self.blocks))]
        self.iterated = torch.tensor(large, dtype=torch.float64, device=next(iter(parameters.values())).device)
        self.dtype = coarser(*(block.dtype for block in self.blocks))
        self.eps = torch.finfo(self.dtype).eps
        self.unused = {name for name, p in parameters.items() if p.grad is None}  # by forget, and by no micro-batch
        self.r = {name: self.placement.local(_taken(p)) for name, p in parameters.items()}
        self.d: Vector = {}
        self.q: Vector = {}
        self.K: list[Tensor | None] = [None] * len(batches)  # [l, n, n] of every micro-batch, as far as HELD allows
        self.held, self.lacks, self.samples = 0, False, 0  # lacks: not all K are held
        self.factors = FACTORS[0]  # the coarsest type that the rules of any micro-batch multiply
        self.discrepancy, self.residual = 0.0, math.nan

    @torch.no_grad()
    def run(self) -> UnionProjection:
        """Project, and write the result to p.grad.

        Raises FloatingPointError for NaN or Inf in u or a per-sample gradient, ArithmeticError where the rules
        contradict plain autograd or one another.
        """
        u2 = self._products(self.r, self.r)
        if not u2.isfinite().all():
            raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
        convergence = Convergence()
        passes, error, done = 0, math.inf, not u2.any()
        while True:
            last = done or passes + 1 == self.max_passes
            rho, worst = self._sweep(passes, last, u2)
            passes += 1
            noise = 16 * self.samples * self.eps / 2 * u2.sqrt()  # a result this short has no direction
            r2, cosines = self._measured(worst, noise)
            before, self.residual = self.residual, min(1.0, float(cosines.max()))
            only_rounding = last and self._is_rounding(before)
            if last and (self.residual <= self.tolerance or passes >= self.max_passes or only_rounding):
                break
            if last:
                self._take_back()
            else:
                if not convergence:
                    self._project_small()
                self._advance(rho, convergence)
                size = self._erase(u2)
                left = convergence.left(size, (64 * self.eps) ** 2 * u2).sum().sqrt()
                error = float(left / torch.maximum(size.sum(), noise.square().sum()).sqrt())
            # Half of it: the estimate may be too low.
            done = not last and error <= self.tolerance / 2 and self.residual <= NEAR * self.tolerance
        if (error > self.tolerance and u2.any()) or (self.residual > self.tolerance and not only_rounding):
            warnings.warn(
                f"after {passes} passes over {len(self.batches)} micro-batches the result has a cosine of "
                f"{self.residual:.1e} with a retain gradient, and differs from the exact one by about {error:.1e}, "
                f"relative; wanted was {self.tolerance:.1e}. Allow more with max_passes, or raise union_tolerance",
                stacklevel=outside(),
            )
        return self._finish(u2, r2, len(convergence), passes, error, cosines)

    def _measured(self, worst: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖r‖² and max_j |cos(g_j, r)| [l] from max_j |⟨g_j, r⟩| / ‖g_j‖; r is noise if it is as short."""
        r2 = self._squares()
        return r2, worst / torch.maximum(r2.sqrt(), noise).clamp_min(torch.finfo(torch.float64).tiny)

    def _squares(self) -> Tensor:
        """Return ‖r‖² [l], as the lengths of gradients are measured that r is multiplied with."""
        return self._products(self.r, self.r)

    def _is_rounding(self, before: float) -> bool:
        """Return whether what the last pass measured is due to how its result was rounded; before: to that."""
        return False

    def _take_back(self) -> None:
        """Take back what was done to r for the last pass, since it was not the last one."""

    def _sweep(self, index: int, last: bool, u2: Tensor) -> tuple[Tensor, Tensor]:
        """Visit every micro-batch: set d to Σ_b G_bᵀ z_b, or in the last pass to Σ_j g_j.

        Returns:
            ρ = ⟨s, z⟩ and max_j |s_j| / ‖g_j‖ [l], with s = G r.
        """
        self.d = self.d or {name: torch.empty_like(t) for name, t in self.r.items()}
        for t in self.d.values() if not last or self.alpha else ():
            t.zero_()
        zero = u2.new_zeros(len(self.blocks))
        worst, stats = zero, zero.new_zeros(len(self.blocks), 3)
        with self.processes.attempt():
            for b, batch in enumerate(self.batches):
                with batch() as (passes, losses), torch.autocast(losses.device.type, enabled=False):
                    w, s, norms = self._visit(passes, losses, b, index, last)
                cosines = (s.abs() / norms.where(norms > 0, 1)).amax(1)
                worst = torch.maximum(worst, cosines if last else cosines * self.iterated)
                size = w.abs()
                stats = stats + torch.stack([(s * w).sum(1), size.sum(1), (size * norms).sum(1)], 1)
                del passes, losses  # the next forward pass would run beside their graph
                self.notify(index, b, self.residual)
        self.processes.agree()
        if not last or self.alpha:
            self.placement.collect_(self.d)
        stats, worst = self.processes.sum_(stats, "K"), self.processes.largest_(worst)
        if not index:
            self._share()
        if not last:
            self._check(stats, self._products(self.r, self.d), self._squares())
        return stats[:, 0], worst

    def _share(self) -> None:
        """Make what the first visits found that of all processes."""
        used = [float(name not in self.unused) for name in self.parameters]
        found = self.iterated.new_tensor([FACTORS.index(self.factors), float(self.lacks), self.discrepancy, *used])
        factors, lacks, self.discrepancy, *used = self.processes.largest_(found).tolist()
        self.factors, self.lacks = FACTORS[int(factors)], bool(lacks)
        self.unused = {name for name, one in zip(self.parameters, used, strict=True) if not one}
        counts = self.iterated.new_tensor([self.samples, *(span.count for span in self.small.values())])
        self.samples, *counts = map(int, self.processes.sum_(counts, "K").tolist())
        if not self.samples:
            raise ValueError("no process has a retain sample: there is nothing to be orthogonal to")
        for span, count in zip(self.small.values(), counts, strict=True):
            span.sums, span.count = self.processes.sum_(span.sums, "K"), count

    def _visit(self, passes: Passes, losses: Tensor, b: int, index: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Add one micro-batch's share to d; return its weights, s = G_b r and ‖g_j‖, [l, n] each."""
        if not len(losses):
            self._visit_nothing(passes, losses, last)
            return (self.iterated.new_zeros(len(self.blocks), 1),) * 3
        batch = self._read(passes, losses, not index)
        K = self.K[b]
        if K is None:
            K, s = batch.products(self.blocks, False)
            check_finite(K.sum(0), s.sum(0))
            if self.held + K.nbytes <= HELD:
                self.K[b], self.held = K, self.held + K.nbytes
            else:
                self.lacks = True
        else:
            s = batch.dot(self.blocks, False)
        norms = self._norms(K)
        s = s.masked_fill(norms == 0, 0.0)
        if not index:
            self.samples += len(losses)
            self.unused.difference_update(use.name for use in batch.uses)
            self.factors = coarser(self.factors, coarsest_factor(batch.uses))
            for span in self.small.values():
                span.add(span.rows(batch.uses, len(losses)))
            checks = Checks()
            watched = batch.watched_numbers()
            if watched is not None:
                checks.check_parameter(*watched)
            checks.flush()
            self.discrepancy = max([self.discrepancy, *checks.worst.values()])
        if last:
            w = torch.ones_like(s)
        else:
            # Damped by the rounding of K: a row that nearly depends on others stays in, with a weight within range.
            w, *_ = gram_solve_op(K, in_range(K, s[..., None]), default_rtol(len(losses), self.dtype), 0.0)
            w = w[..., 0] * self.iterated[:, None]
        if not last or self.alpha:
            batch.add_(self.blocks, w)
        return w, s, norms

    def _read(self, passes: Passes, losses: Tensor, watched: bool) -> MicroBatch:
        """Return the rules of a micro-batch, from a backward pass; watched: plain autograd checks one parameter."""
        with self.spread.reading(passes, losses):
            verify(passes, losses)
            return self._micro_batch(passes, losses, next_watched(passes, losses) if watched else "")

    def _micro_batch(self, passes: Passes, losses: Tensor, watch: str) -> MicroBatch:
        return MicroBatch(passes, losses, self.rates, watch, self.r, self.d, self.placement, self._gather)

    def _gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return r of some parameters whole, in a round of products."""
        return self.placement.gathered(self.r, names)

    def _visit_nothing(self, passes: Passes, losses: Tensor, last: bool) -> None:
        """Do what a visit to no samples, losses (0,), has to do for the other processes."""
        with self.spread.reading(passes, losses):
            self.spread.read_nothing(losses)
        for names in self.placement.rounds(list(self.r)):
            self._gather(names)
        for names in self.placement.rounds(list(self.d)) if not last or self.alpha else ():
            self.placement.scatter_(self.placement.zeros(names, self.d), self.d)

    def _norms(self, K: Tensor) -> Tensor:
        """Return ‖g_j‖ [l, n] of the micro-batch that is visited; K are its Gram matrices."""
        return K.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()

    def _followed(self, block: Block) -> Block:
        """Return a block of what stands for its parameters in a forward pass: it is never in shards."""
        return Block(block.name, {name: self.spread.followed[name] for name in block.parameters})

    def _project_small(self) -> None:
        """Take the spans of small blocks out of r."""
        names = [name for span in self.small.values() for name in span.block.parameters]
        whole = self.placement.gathered(self.r, names) if names else {}
        for span in self.small.values():
            span.project_([whole[name] for name in span.block.parameters])
        for name in names:
            self.r[name].copy_(self.placement.part(name, whole[name]))

    def _advance(self, rho: Tensor, convergence: Convergence) -> None:
        """Make the next direction q of d, and step along it."""
        beta = convergence.next_beta(rho).tolist()
        if not self.q:
            self.q, self.d = self.d, {}
        else:
            for name, q in self.q.items():
                q.mul_(beta[self.place[name]]).add_(self.d[name])
        slope, square = self._products(self.r, self.q), self._products(self.q, self.q)
        step = torch.where(square > 0, slope / square, 0.0)
        convergence.add(step, slope * step)
        along = step.tolist()
        for name, r in self.r.items():
            self._subtract(name, r, along[self.place[name]])

    def _subtract(self, name: str, r: Tensor, step: float) -> None:
        """Take a multiple of the direction q out of r."""
        r.add_(self.q[name], alpha=-step)

    def _erase(self, u2: Tensor) -> Tensor:
        """Set r to zero in blocks where it is shorter than the tolerance times u; return ‖r‖² [l]."""
        size = self._products(self.r, self.r)
        gone = (size <= self.tolerance**2 * u2).tolist()
        for name, r in self.r.items():
            if gone[self.place[name]]:
                r.zero_()
        return size.where(size > self.tolerance**2 * u2, 0.0)

    def _check(self, stats: Tensor, product: Tensor, r2: Tensor) -> None:
        """Check that ⟨r, d⟩, as it came out, is what the products say."""
        limit = tolerance_of(coarser(self.factors, self.dtype), product.is_cuda)
        for block, row, value, square in zip(self.blocks, stats.tolist(), product.tolist(), r2.tolist(), strict=True):
            weights = WeightStats(0.0, row[1], row[2], 0.0, row[0])
            blame = lambda name=block.name: f" in {name}" if name else ""  # noqa: E731
            error = check_relative_error("product", value, weights, square, limit, self.dtype, blame)
            self.discrepancy = max(self.discrepancy, error)

    def _finish(
        self, u2: Tensor, r2: Tensor, iterations: int, passes: int, error: float, cosines: Tensor
    ) -> UnionProjection:
        """Add the retain part, write p.grad, and make the record."""
        for name, p in self.parameters.items():
            r = self.r.pop(name)
            if self.alpha:
                r.add_(self.d.pop(name), alpha=self.alpha / self.samples)
            p.grad = None if name in self.unused else self.placement.laid_out(name, r.to(p.dtype))
        # p.grad is rounded too.
        coarse = max(torch.finfo(b.stored).eps / 2 for b in self.blocks) if self.factors.itemsize == 2 else 0.0
        before, after, residuals = u2.tolist(), r2.tolist(), cosines.clamp_max(1.0).tolist()

        def numbers(b: float, a: float, residual: float) -> dict:
            return {
                "rank": None,
                "preserved_norm": (a / b) ** 0.5 if b else 1.0,
                "residual": max(residual, coarse) if b else 0.0,
                "refinements": 0,
                "discrepancy": self.discrepancy,
                "squares": (b, a),
            }

        each = zip(self.blocks, before, after, residuals, strict=True)
        tensors = {block.name: Projection(**numbers(*of_block)) for block, *of_block in each if block.name}
        return UnionProjection(
            **numbers(sum(before), sum(after), max(residuals)),
            tensors=tensors,
            samples=self.samples,
            iterations=iterations,
            passes=passes,
            estimated_error=error if math.isfinite(error) else 0.0,
        )

    def _products(self, a: Vector, b: Vector) -> Tensor:
        """Return the inner product of two vectors in every block, [l] float64."""
        if a is b:
            values = lengths(list(a.values())).square()
        else:
            values = torch.stack([inner(a[name], b[name]).to(self.iterated.device) for name in a])
        values = self.placement.summed_products(values, list(a))
        if self.rates:
            values = values * values.new_tensor([self.rates.get(name, 1.0) for name in a])
        return values.sum()[None] if len(self.blocks) == 1 else values  # blocks are in the order of the parameters


def _taken(p: Tensor) -> Tensor:
    """Return p.grad in float32 or better, contiguous, zeros where there is none; p.grad is None then."""
    grad, p.grad = p.grad, None
    dtype = product_dtype(p.dtype)
    if grad is None:
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    return grad.detach().to(dtype).contiguous()
