"""The projection of p.grad on the tape: products, solve, correction, refinement, and the check of all of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .. import _options
from ..ops.refinement import TAPE_PASSES, rank_tolerance, starts_in_float64
from ..recording.host_reads import HostReads, lengths, to_host
from ..recording.losses import check_shape, check_weights
from .check import Checks, WeightStats, check_finite
from .consumers import CollectRules, Pieces
from .factors import ForgetFactors
from .gradient_access import FromRules, GradientAccess, KeptGradients, TwoPasses
from .passes import Passes
from .records import Projection
from .systems import Solver, Steps, System
from .verify import next_watched, verify

RESIDUAL = 1e-6  # max_j |cos(g_j, result)| that float32 promises; above it the result is projected again


def project_(
    passes: Passes,
    losses: Tensor,
    scope: str = "global",
    damping: float = 0.0,
    rtol: float | None = None,
    keep_output_gradients: bool = True,
    add: Tensor | None = None,
    rates: Mapping[str, float] | None = None,
    factors: ForgetFactors | None = None,
) -> Projection:
    """Project every p.grad in place; see `Tape.project_`. factors: of p.grad, where known."""
    _options.check_choice("scope", scope, ("global", "per_tensor"))
    damping, rtol = _options.check_solver("", damping, rtol)
    check_shape(losses)
    check_weights("add", add, losses)
    parameters, reads = passes.recording.parameters, passes.recording.host_reads
    factors = ForgetFactors() if factors is None else factors
    _check_gradients(parameters)
    rates = {} if scope == "per_tensor" else _relative(rates or {}, parameters)
    squares = _defer_squares(parameters, factors, reads)
    structure = passes.structure(losses)
    reads.flush()  # if the structure was known already
    # A second pass with other weights would round too differently in 16 bits.
    keep = keep_output_gradients or structure.coarsest.itemsize == 2
    add = torch.zeros(len(losses), dtype=torch.float64, device=losses.device) if add is None else add.double()
    checks, solver = Checks(), Solver(damping, rtol, add)
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        try:
            if not all(map(math.isfinite, squares.values())):  # also of tensors that the losses do not use
                raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
            if keep or scope == "per_tensor":
                verify(passes, losses)
            if scope == "per_tensor":
                return _per_tensor(passes, losses, solver, squares, checks, factors)
            if keep:
                access = KeptGradients(passes, losses, rates, factors, checks, next_watched(passes, losses))
            else:
                access = TwoPasses(passes, losses, rates, factors)
            access.known = sum(access.rate(name) * square for name, square in squares.items())
            solver.start("", _steps(access, solver, checks))
            solver.finish()
            checks.flush()
            projection = solver.projections[""]
            projection.discrepancy = checks.worst[""]
            return projection
        except BaseException:
            for p in parameters.values():
                p.grad = None  # half-made: nothing that an optimizer should see
            raise


def _check_gradients(parameters: Mapping[str, Tensor]) -> None:
    """Make every p.grad contiguous; refuse sparse ones."""
    for name, p in parameters.items():
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: build the layer with sparse=False")
        if not p.grad.is_contiguous():
            p.grad = p.grad.contiguous()


def _relative(rates: Mapping[str, float], parameters: Collection[str]) -> dict[str, float]:
    """Return the rates over the largest; none if all are the same."""
    for name, rate in rates.items():
        if name not in parameters or not (rate >= 0 and math.isfinite(rate)):
            raise ValueError(f"rates must be finite, not negative, and of followed parameters; got {name!r}: {rate}")
    largest = max((rates.get(name, 1.0) for name in parameters), default=0.0)
    relative = {name: rates.get(name, 1.0) / largest for name in parameters} if largest else {}
    return {} if len(set(relative.values())) <= 1 else relative


def _defer_squares(parameters: Mapping[str, Tensor], factors: ForgetFactors, reads: HostReads) -> dict[str, float]:
    """Return a dictionary that holds ‖p.grad‖² by name once the host reads are flushed.

    Factors whose product is not p.grad are dropped then: something else was accumulated too.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    squares: dict[str, float] = {}
    if grads:
        reads.defer(
            lengths(list(grads.values())),
            lambda norms: squares.update((name, norm * norm) for name, norm in zip(grads, norms, strict=True)),
        )

    def compare(products: list[float]) -> None:
        for name, square in zip(list(factors), products, strict=True):
            if not abs(square - squares.get(name, 0.0)) <= 1e-4 * squares.get(name, 0.0):
                del factors[name]

    if factors:
        reads.defer(torch.stack([factored.squared_norm() for factored in factors.values()]), compare)
    return squares


def _steps(access: GradientAccess, solver: Solver, checks: Checks, name: str = "") -> Steps:
    """Project p.grad, repeat while the residual exceeds rounding, then add Gᵀ add. Yield each system to be solved."""
    add, rtol, n = solver.add, solver.rtol, len(solver.add)
    plain = not solver.damping and rtol is None
    float64 = starts_in_float64(n, access.dtype, rtol)
    u2 = access.squares()
    if not math.isfinite(u2):
        raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")

    def system(v: Tensor) -> System:
        return System(K, v, rank_tolerance(n, float64, rtol))

    def predicted_norm() -> float:
        """Return ‖u - Gᵀ x‖ as the products have it."""
        # In this order NaN stays NaN.
        return max(u2 + 2 * solved.projection.product + solved.projection.squared_norm, 0.0) ** 0.5

    K, v = _without_underflow(*access.products(float64), access.dtype)
    solved = yield system(v)
    if not solved.finite:
        check_finite(K, v)
    eps = torch.finfo(access.dtype).eps / 2
    limit = RESIDUAL if access.dtype != torch.float64 else 64 * torch.finfo(torch.float64).eps
    noise = 16 * n * eps * (u2**0.5 + solved.projection.weighted_norms)  # a result this short has no direction
    after = predicted_norm()
    if plain and not float64 and solved.rank < solved.used and solved.residual / (max(after, noise) or 1.0) > limit:
        float64 = True  # rows that look dependent in float32 and are not
        K, v = _without_underflow(*access.products(True), access.dtype)
        solved = yield system(v)
        after = predicted_norm()
    coarse = torch.finfo(access.stored).eps / 2  # what p.grad is rounded to
    rounding = coarse * (u2**0.5 + solved.spread) if plain else 0.0
    residual = (solved.residual + rounding) / (max(after, noise) or 1.0)

    def apply(w: Tensor, weights: WeightStats, float64: bool = False) -> None:
        if weights.max_abs != 0:
            outcome = access.apply(w, weights.max_abs, float64)
            checks.check(outcome, weights, u2, access.precision, name, access.blame(w))

    def nothing_left() -> Projection:
        access.erase()
        apply(add, solved.retain_term._replace(product=0.0))
        return _projection(rank, u2, 0.0, 0.0, refinements)

    rank, refinements, before = solved.rank, 0, float("inf")
    if plain and rank >= access.numel():  # nothing is orthogonal to that many
        return nothing_left()
    if not plain or access.has_16bit_factor or residual <= limit or not u2:
        apply(add - solved.x, solved.combined)
        return _projection(rank, u2, after, residual, 0)
    apply(-solved.x, solved.projection)
    while True:
        norms = K.diagonal().clamp_min(0).sqrt()
        r = access.dot(float64).masked_fill(norms == 0, 0.0)
        cosine = (r.abs() / norms.where(norms > 0, 1)).max()
        *tensor_norms, largest, product = to_host(access.norms(), cosine, add @ r)
        access.known = sum(norm * norm for norm in tensor_norms)
        after = access.known**0.5
        residual = largest / (max(after, noise) or 1.0)
        # Whatever is this small beside p.grad has no direction left; more passes only shuffle rounding.
        if residual <= limit / 2 or residual > before / 2 or refinements == TAPE_PASSES:
            break
        if not float64:
            float64, (K, r) = True, _without_underflow(*access.products(True), access.dtype)
        solved = yield system(r)
        rank, before = max(rank, solved.rank), residual
        if rank >= access.numel():
            return nothing_left()
        apply(-solved.x, solved.projection, float64)
        refinements += 1
    apply(add, solved.retain_term._replace(product=product))
    return _projection(rank, u2, after, residual, refinements)


def _projection(rank: int, u2: float, after: float, residual: float, refinements: int) -> Projection:
    preserved = after / u2**0.5 if u2 else 1.0
    return Projection(rank, preserved, min(residual, 1.0), refinements, 0.0, (u2, after**2))


def _without_underflow(K: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Count gradients shorter than 1e-31 in float32 as zero.

    Some of their digits are below the smallest number, and their weights would be near the largest.
    """
    limits = torch.finfo(dtype)
    lost = K.diagonal().sqrt() < limits.tiny / limits.eps
    return K.masked_fill(lost | lost[:, None], 0.0), v.masked_fill(lost, 0.0)


def _per_tensor(
    passes: Passes, losses: Tensor, solver: Solver, squares: dict[str, float], checks: Checks, factors: ForgetFactors
) -> Projection:
    """Project every tensor as soon as its last use has come by, in the one backward pass."""
    n, watch, parameters = len(losses), next_watched(passes, losses), passes.recording.parameters
    watched: list[FromRules] = []
    row_squares = torch.zeros(n, dtype=torch.float64, device=losses.device)  # ‖g_j‖² over all tensors

    def complete(name: str, pieces: Pieces) -> None:
        p, uses = {name: parameters[name]}, {name: pieces}
        access = FromRules(p, uses, losses, factors=factors, cheap_in_float64=True)
        access.known = squares.get(name, 0.0)
        solver.start(name, _steps(access, solver, checks, name))
        row_squares.add_(access.K.diagonal())
        if name == watch:
            watched.append(access)

    watch_tensors = [parameters[watch]] if watch else []
    grads = passes.run(losses, CollectRules(complete), retain_graph=False, watch=watch_tensors)
    solver.finish()
    for access in watched:
        coarsest = passes.structure(losses).coarsest
        access.check_watched(checks, watch, access.K, grads[0], row_squares, coarsest)
    checks.flush()
    tensors = solver.projections
    for name, projection in tensors.items():
        projection.discrepancy = checks.worst[name]
    for name, p in parameters.items():
        if name not in tensors and p.grad is not None:  # the losses do not use it
            tensors[name] = _projection(0, squares[name], squares[name] ** 0.5, 0.0, 0)
    before, after = (sum(t.squares[k] for t in tensors.values()) for k in (0, 1))
    return Projection(
        rank=sum(t.rank for t in tensors.values()),
        preserved_norm=(after / before) ** 0.5 if before else 1.0,
        residual=max((t.residual for t in tensors.values()), default=0.0),
        refinements=max((t.refinements for t in tensors.values()), default=0),
        discrepancy=max((t.discrepancy for t in tensors.values()), default=0.0),
        squares=(before, after),
        tensors={name: tensors[name] for name in parameters if name in tensors},
    )
