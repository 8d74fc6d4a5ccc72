"""The projection of p.grad on the tape: products, solve, correction, refinement, and the check of all of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _options
from ..ops import refinement
from ..recording.host_reads import lengths, to_host
from ..recording.recording import Source
from ..rules.rule import Rule
from .check import Checks, WeightStats, check_finite
from .consumers import CollectRules
from .gradient_access import GradientAccess, KeptGradients, OneTensor, TwoPasses, next_watched
from .systems import Solver, Steps, System

if TYPE_CHECKING:
    from .tape import Tape

RESIDUAL = 1e-6  # max_j |cos(g_j, result)| that float32 promises; above it the result is projected again


@dataclass
class Projection:
    """What a projection did.

    rank: independent per-sample gradients projected out, summed over tensors with scope="per_tensor".
    preserved_norm: ‖result‖ / ‖p.grad‖ over all parameters, before anything is added.
    residual: max_j |cos(g_j, result)|, the largest over tensors: what solving left, and the rounding to expect;
        measured with another pass where the result had to be refined.
    refinements: times the result was projected again.
    discrepancy: largest relative difference between ‖Gᵀ w‖², ⟨u, Gᵀ w⟩ as the rules predict them and as they came out.
    squares: ‖p.grad‖² and ‖result‖².
    tensors: the same for every tensor, with scope="per_tensor".
    """

    rank: int
    preserved_norm: float
    residual: float
    refinements: int
    discrepancy: float
    squares: tuple[float, float]
    tensors: dict[str, Projection] = field(default_factory=dict)


def project_(
    tape: Tape,
    losses: Tensor,
    scope: str,
    damping: float,
    rtol: float | None,
    keep: bool,
    add: Tensor | None,
    rates: Mapping[str, float],
) -> Projection:
    _options.check_choice("scope", scope, ("global", "per_tensor"))
    damping, rtol = _options.check_solver("", damping, rtol)
    for name, p in tape.parameters.items():
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: build the layer with sparse=False")
        if not p.grad.is_contiguous():
            p.grad = p.grad.contiguous()
    tape.rates = {} if scope == "per_tensor" else _relative(rates, tape.parameters)
    squares = _ask_squares(tape)
    structure = tape.structure(losses)
    tape.host_reads.flush()  # if the structure was known already
    keep = keep or structure.coarsest.itemsize == 2  # a second pass with other weights would round too differently
    n = len(losses)
    add = torch.zeros(n, dtype=torch.float64, device=losses.device) if add is None else add.double()
    checks, solver = Checks(), Solver(damping, add)
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        try:
            if not all(map(math.isfinite, squares.values())):  # also of tensors that the losses do not use
                raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
            if keep or scope == "per_tensor":
                tape._verified(losses)
            if scope == "per_tensor":
                return _per_tensor(tape, losses, solver, rtol, squares, checks)
            method = KeptGradients(tape, losses, checks) if keep else TwoPasses(tape, losses)
            method.known = sum(method.rate(name) * square for name, square in squares.items())
            solver.start("", _steps(method, n, solver, rtol, checks))
            solver.finish()
            checks.flush()
            done = solver.done[""]
            done.discrepancy = checks.worst[""]
            return done
        except BaseException:
            for p in tape.parameters.values():
                p.grad = None  # half-made: nothing that an optimizer should see
            raise


def _relative(rates: Mapping[str, float], parameters: Collection[str]) -> dict[str, float]:
    """Rates over the largest; none if all are the same."""
    for name, rate in rates.items():
        if name not in parameters or not (rate >= 0 and math.isfinite(rate)):
            raise ValueError(f"rates must be finite, not negative, and of followed parameters; got {name!r}: {rate}")
    largest = max((rates.get(name, 1.0) for name in parameters), default=0.0)
    found = {name: rates.get(name, 1.0) / largest for name in parameters} if largest else {}
    return {} if len(set(found.values())) <= 1 else found


def _ask_squares(tape: Tape) -> dict[str, float]:
    """‖p.grad‖² by name, once the host reads are flushed. Factors of p.grad are kept only if nothing else is in it."""
    grads = {name: p.grad for name, p in tape.parameters.items() if p.grad is not None}
    squares: dict[str, float] = {}
    if grads:
        tape.host_reads.defer(
            lengths(list(grads.values())),
            lambda found: squares.update((name, size**2) for name, size in zip(grads, found, strict=True)),
        )

    def compare(found: list[float]) -> None:
        for name, square in zip(list(tape.forget_factors), found, strict=True):
            if not abs(square - squares.get(name, 0.0)) <= 1e-4 * squares.get(name, 0.0):
                del tape.forget_factors[name]

    if tape.forget_factors:
        tape.host_reads.defer(torch.stack([outer.squared() for outer in tape.forget_factors.values()]), compare)
    return squares


def _steps(method: GradientAccess, n: int, solver: Solver, rtol: float | None, checks: Checks, name: str = "") -> Steps:
    """Project p.grad once; again as long as that leaves more than rounding; then add Gᵀ add."""
    add, plain = solver.add, not solver.damping and rtol is None
    float64 = refinement.starts_in_float64(n, method.dtype, rtol)
    u2 = method.squares()
    if not math.isfinite(u2):
        raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")

    def system(b: Tensor) -> System:
        return System(K, b, refinement.rank_tolerance(n, float64, rtol))

    def length_left() -> float:
        """‖u - Gᵀ x‖ as the products have it."""
        return max(u2 + 2 * at.minus.product + at.minus.length, 0.0) ** 0.5  # in this order NaN stays NaN

    K, v = _without_underflow(*method.products(float64), method.dtype)
    at = yield system(v)
    if not at.finite:
        check_finite(K, v)
    eps = torch.finfo(method.dtype).eps / 2
    limit = RESIDUAL if method.dtype != torch.float64 else 64 * torch.finfo(torch.float64).eps
    noise = 16 * n * eps * (u2**0.5 + at.minus.scale)  # a result this short has no direction
    after = length_left()
    if plain and not float64 and at.rank < at.used and at.left / (max(after, noise) or 1.0) > limit:
        float64 = True  # rows that look dependent in float32 and are not
        K, v = _without_underflow(*method.products(True), method.dtype)
        at = yield system(v)
        after = length_left()
    coarse = torch.finfo(method.stored).eps / 2  # what p.grad is rounded to
    rounding = coarse * (u2**0.5 + at.spread) if plain else 0.0
    residual = (at.left + rounding) / (max(after, noise) or 1.0)

    def apply(w: Tensor, weights: WeightStats, float64: bool = False) -> None:
        if weights.top != 0:
            found = method.apply(w, weights.top, float64)
            checks.check(method, found, weights, u2, name, method.blame(w))

    def nothing_left() -> Projection:
        method.erase()
        apply(add, at.added._replace(product=0.0))
        return _projection(rank, u2, 0.0, 0.0, refinements)

    rank, refinements, before = at.rank, 0, float("inf")
    if plain and rank >= method.numel():  # nothing is orthogonal to that many
        return nothing_left()
    if not plain or method.has_16bit_factor or residual <= limit or not u2:
        apply(add - at.x, at.both)
        return _projection(rank, u2, after, residual, 0)
    apply(-at.x, at.minus)
    while True:
        rows = K.diagonal().clamp_min(0).sqrt()
        r = method.dot(float64).masked_fill(rows == 0, 0.0)
        cosine = (r.abs() / rows.where(rows > 0, 1)).max()
        *sizes, left, product = to_host(method.sizes(), cosine, add @ r)
        method.known = sum(size**2 for size in sizes)
        after = method.known**0.5
        residual = left / (max(after, noise) or 1.0)
        # Whatever is this small beside p.grad has no direction left; more passes only shuffle rounding.
        if residual <= limit / 2 or residual > before / 2 or refinements == 4:
            break
        if not float64:
            float64, (K, r) = True, _without_underflow(*method.products(True), method.dtype)
        at = yield system(r)
        rank, before = max(rank, at.rank), residual
        if rank >= method.numel():
            return nothing_left()
        apply(-at.x, at.minus, float64)
        refinements += 1
    apply(add, at.added._replace(product=product))
    return _projection(rank, u2, after, residual, refinements)


def _projection(rank: int, u2: float, after: float, residual: float, refinements: int) -> Projection:
    preserved = after / u2**0.5 if u2 else 1.0
    return Projection(rank, preserved, min(residual, 1.0), refinements, 0.0, (u2, after**2))


def _without_underflow(K: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients shorter than 1e-31 in float32 count as zero: some digits of theirs are below the smallest number, and
    their weights would be near the largest."""
    limits = torch.finfo(dtype)
    lost = K.diagonal().sqrt() < limits.tiny / limits.eps
    return K.masked_fill(lost | lost[:, None], 0.0), v.masked_fill(lost, 0.0)


def _per_tensor(
    tape: Tape, losses: Tensor, solver: Solver, rtol: float | None, squares: dict[str, float], checks: Checks
) -> Projection:
    """Every tensor as soon as its last use has come by, in the one backward pass."""
    n, watch = len(losses), next_watched(tape, losses)
    watched: list[OneTensor] = []
    rows = torch.zeros(n, dtype=torch.float64, device=losses.device)  # ‖g_j‖² over all tensors

    def finished(name: str, pieces: list[tuple[Source, Rule]]) -> None:
        method = OneTensor(tape, name, pieces, n)
        method.known = squares.get(name, 0.0)
        solver.start(name, _steps(method, n, solver, rtol, checks, name))
        rows.add_(method.K.diagonal())
        if name == watch:
            watched.append(method)

    consumer = CollectRules(tape, finished)
    grads = tape._run(losses, consumer, retain_graph=False, watch=[tape.parameters[watch]] if watch else [])
    solver.finish()
    for method in watched:
        total = rows.clamp_min(0).sqrt().sum()
        checks.check_watched(method, watch, method.K, grads[0], total, tape.structure(losses).coarsest)
    checks.flush()
    tensors = solver.done
    for name, done in tensors.items():
        done.discrepancy = checks.worst[name]
    for name, p in tape.parameters.items():
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
        tensors={name: tensors[name] for name in tape.parameters if name in tensors},
    )
