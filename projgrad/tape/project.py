"""The projection of p.grad on the tape: products, solve, correction, refinement, and the check of all of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..ops.flat import _gram_solve
from .check import check, check_finite, check_watched, squared
from .jobs import Kept
from .routes import KeptGradients, OneTensor, Route, TwoPasses, next_watched
from .rules import Rule
from .sites import Source

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
) -> Projection:
    if scope not in ("global", "per_tensor"):
        raise ValueError(f"scope must be 'global' or 'per_tensor'; got {scope!r}")
    if damping < 0 or (rtol is not None and rtol < 0):
        raise ValueError(f"damping and rtol must not be negative; got damping={damping}, rtol={rtol}")
    tape.structure(losses)
    keep = keep or losses.dtype.itemsize == 2  # weights of 16 bits are too coarse for a second pass
    for name, p in tape.parameters.items():
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: build the layer with sparse=False")
        if not p.grad.is_contiguous():
            p.grad = p.grad.contiguous()
    lengths = {name: squared(p.grad) for name, p in tape.parameters.items() if p.grad is not None}
    # Factors of p.grad are used only where nothing else has contributed to it.
    tape.outer = {
        name: outer
        for name, outer in tape.outer.items()
        if abs(outer.squared() - lengths.get(name, 0.0)) <= 1e-4 * lengths.get(name, 0.0)
    }
    n = len(losses)
    add = torch.zeros(n, dtype=torch.float64, device=losses.device) if add is None else add.double()
    with torch.no_grad():
        try:
            if keep or scope == "per_tensor":
                tape._verified(losses)
            if scope == "per_tensor":
                return _per_tensor(tape, losses, damping, rtol, add, lengths)
            method = (KeptGradients if keep else TwoPasses)(tape, losses)
            method.known = sum(lengths.values())
            return _solve(method, n, damping, rtol, add)
        except BaseException:
            for p in tape.parameters.values():
                p.grad = None  # half-made: nothing that an optimizer should see
            raise


def _solve(method: Route, n: int, damping: float, rtol: float | None, add: Tensor) -> Projection:
    """Project p.grad once; again as long as that leaves more than rounding; then add Gᵀ add."""
    wide, _ = reference.first_pass(n, method.dtype, rtol)
    u2 = method.squares()
    K, v = _without_underflow(*method.products(wide), method.dtype)
    check_finite(K, v, u2)

    def solved(b: Tensor) -> tuple[Tensor, int]:
        cut = reference.default_rtol(n, torch.float64 if wide else torch.float32) if rtol is None else rtol
        c, rank = _gram_solve(K[None], reference.in_range(K, b[:, None])[None], damping, cut)
        return c[0, :, 0], int(rank)

    def left(b: Tensor, after: float) -> float:
        """Largest cosine to a row of what has products b with the rows and length `after`."""
        norm = max(after, noise) or 1.0
        cosine = b.abs() / lengths.where(lengths > 0, 1) / norm
        return float(cosine.max()) if n else 0.0

    lengths = K.diagonal().clamp_min(0).sqrt()
    c, rank = solved(v)
    plain = not damping and rtol is None
    eps = torch.finfo(method.dtype).eps / 2
    limit = RESIDUAL if method.dtype != torch.float64 else 64 * torch.finfo(torch.float64).eps
    noise = 16 * n * eps * (u2**0.5 + float((c.abs() * lengths).sum()))  # a result this short has no direction
    after = float((u2 - 2 * c @ v + c @ K @ c).clamp_min(0)) ** 0.5
    if plain and not wide and rank < int((lengths > 0).sum()) and left(v - K @ c, after) > limit:
        wide = True  # rows that look dependent in float32 and are not
        K, v = _without_underflow(*method.products(True), method.dtype)
        c, rank = solved(v)
        after = float((u2 - 2 * c @ v + c @ K @ c).clamp_min(0)) ** 0.5
    coarse = torch.finfo(method.stored).eps / 2  # what p.grad is rounded to
    rounding = coarse * (u2**0.5 + float((c * lengths).norm())) / (max(after, noise) or 1.0)
    residual = left(v - K @ c, after) + rounding
    if damping or rtol is not None:
        residual = left(v - K @ c, after)
    discrepancy = method.discrepancy

    def apply(w: Tensor, b: Tensor, wide: bool = False) -> None:
        nonlocal discrepancy
        if bool((w == 0).all()):
            return
        found = method.apply(w, wide)
        discrepancy = max(discrepancy, check(method, found, w, K, b, u2))

    def nothing_left() -> Projection:
        method.erase()
        apply(add, torch.zeros_like(v))
        return _projection(rank, u2, 0.0, 0.0, refinements, discrepancy)

    refinements, before = 0, float("inf")
    if plain and rank >= method.numel():  # nothing is orthogonal to that many
        return nothing_left()
    if not plain or method.half or residual <= limit or not u2:
        apply(add - c, v)
        return _projection(rank, u2, after, residual, 0, discrepancy)
    apply(-c, v)
    while True:
        r = method.dot(wide)
        after = method.squares() ** 0.5
        residual = left(r, after)
        # Whatever is this small beside p.grad has no direction left; more passes only shuffle rounding.
        if residual <= limit / 2 or residual > before / 2 or refinements == 4:
            break
        if not wide:
            wide, (K, r) = True, _without_underflow(*method.products(True), method.dtype)
        c, again = solved(r)
        rank, before = max(rank, again), residual
        if rank >= method.numel():
            return nothing_left()
        apply(-c, r, wide)
        refinements += 1
    apply(add, r)
    return _projection(rank, u2, after, residual, refinements, discrepancy)


def _projection(rank, u2, after, residual, refinements, discrepancy) -> Projection:
    preserved = after / u2**0.5 if u2 else 1.0
    return Projection(rank, preserved, residual, refinements, discrepancy, (u2, after**2))


def _without_underflow(K: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients shorter than 1e-38 in float32 count as zero: their digits are lost, and so is their direction."""
    lost = K.diagonal().sqrt() < torch.finfo(dtype).tiny
    return K.masked_fill(lost | lost[:, None], 0.0), v.masked_fill(lost, 0.0)


def _per_tensor(
    tape: Tape, losses: Tensor, damping: float, rtol: float | None, add: Tensor, lengths: dict[str, float]
) -> Projection:
    """Every tensor as soon as its last use has come by, in the one backward pass."""
    n, tensors = len(losses), {}
    watch = next_watched(tape, losses)
    watched: list[OneTensor] = []
    squares: list[Tensor] = []  # ‖g_j‖² of every tensor

    def finished(name: str, pieces: list[tuple[Source, Rule]]) -> None:
        method = OneTensor(tape, name, pieces, n)
        method.known = lengths.get(name, 0.0)
        tensors[name] = _solve(method, n, damping, rtol, add)
        squares.append(method.K.diagonal())
        if name == watch:
            method.pieces = []
            watched.append(method)

    job = Kept(tape, finished)
    for grad in tape._run(losses, job, retain_graph=False, watch=[tape.parameters[watch]] if watch else []):
        for method in watched:
            check_watched(method, watch, method.K, grad, float(sum(squares).clamp_min(0).sqrt().sum()))
    for name, p in tape.parameters.items():
        if name not in tensors and p.grad is not None:  # the losses do not use it
            u2 = squared(p.grad)
            tensors[name] = _projection(0, u2, u2**0.5, 0.0, 0, 0.0)
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
