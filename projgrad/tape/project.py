"""The projection of p.grad on the tape: products, solve, correction, refinement, and the check of all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops.flat import _gram_solve
from .jobs import Kept, PerParameter, Products, combine_, few_positions, part, products
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
            method = (_KeptGradients if keep else _TwoPasses)(tape, losses)
            method.known = sum(lengths.values())
            return _solve(method, n, damping, rtol, add)
        except BaseException:
            for p in tape.parameters.values():
                p.grad = None  # half-made: nothing that an optimizer should see
            raise


def verify(tape: Tape, losses: Tensor) -> None:
    """Compare the rules with plain autograd, parameter by parameter, without a trace: ‖Gᵀ w‖² for w_j = ± 1 / ‖g_j‖.

    Two backward passes, one of them without weight gradients.

    Raises:
        ArithmeticError: they disagree.
    """
    n, method = len(losses), _TwoPasses(tape, losses)
    job = PerParameter(tape)
    tape._run(losses, job)
    K = sum(job.K.values(), torch.zeros(n, n, dtype=torch.float64, device=losses.device))
    _check_finite(K, K, 0.0)
    method.half = method.half or job.half
    lengths = K.diagonal().clamp_min(0).sqrt()
    signs = 1 - 2 * (torch.arange(n, device=K.device) * 0x9E3779B1 >> 16 & 1)
    w = signs * (lengths.max() / lengths.clamp_min(1e-6 * lengths.max())).nan_to_num()
    method.apply(w, discard=True)
    noise = 100 * torch.finfo(method.dtype).eps * float(w.abs() @ lengths)
    zero = torch.zeros_like(lengths)
    for name in tape.parameters:
        found = Outcome(length=method.found.get(name, (0.0, 0.0))[0])
        _check(method, found, w, job.K.get(name, torch.zeros_like(K)), zero, 0.0, f", in {name}", noise)


class Outcome(NamedTuple):
    """What adding Gᵀ w to u did, measured: ‖Gᵀ w‖², ⟨u, Gᵀ w⟩ and the growth of ‖u‖²; NaN where not known."""

    length: float | None = None
    product: float | None = None
    growth: float | None = None


class _Method:
    """Products with the per-sample gradients, and the correction of p.grad. `dtype`: of the products."""

    dtype: torch.dtype
    stored: torch.dtype  # of p.grad
    discrepancy = 0.0  # found so far
    known: float | None = None  # ‖p.grad‖², until it changes
    half = False  # whether 16-bit numbers limit what autograd and the rules can agree on

    def grads(self) -> dict[str, Tensor]:
        """p.grad by name, where there is one."""
        raise NotImplementedError

    def numel(self) -> int:
        """Dimensions of the space in which the per-sample gradients lie."""
        raise NotImplementedError

    def squares(self) -> float:
        """‖p.grad‖² as it is now."""
        if self.known is None:
            self.known = sum(squared(g) for g in self.grads().values())
        return self.known

    def erase(self) -> None:
        self.known = 0.0
        for g in self.grads().values():
            g.zero_()

    def products(self, wide: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def dot(self, wide: bool) -> Tensor:
        """G u for u = p.grad as it is now."""
        raise NotImplementedError

    def apply(self, w: Tensor, wide: bool = False) -> Outcome:
        """p.grad += Gᵀ w, multiplied in float64 if `wide` and possible."""
        raise NotImplementedError

    def blame(self, w: Tensor) -> str:
        return ""


def _solve(method: _Method, n: int, damping: float, rtol: float | None, add: Tensor) -> Projection:
    """Project p.grad once; again as long as that leaves more than rounding; then add Gᵀ add."""
    wide, _ = reference.first_pass(n, method.dtype, rtol)
    u2 = method.squares()
    K, v = _without_underflow(*method.products(wide), method.dtype)
    _check_finite(K, v, u2)

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
        discrepancy = max(discrepancy, _check(method, found, w, K, b, u2))

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


def _check_finite(K: Tensor, v: Tensor, u2: float) -> None:
    if not torch.isfinite(torch.tensor(u2)):
        raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
    if not (K.isfinite().all() and v.isfinite().all()):
        bad = (~K.diagonal().isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"NaN or Inf in the gradients of samples {bad[:8]}; nothing was changed")


def _check(
    method: _Method,
    found: Outcome,
    w: Tensor,
    K: Tensor,
    v: Tensor,
    u2: float,
    where: str | None = None,
    floor: float = 0.0,
) -> float:
    """The self-check: K and v come from the rules, the correction from plain autograd.

    A tensor whose gradient is the rounding of much larger terms is noise on both sides: `floor` is the length of that.

    Raises:
        ArithmeticError: they disagree.
    """
    tolerance = 5e-2 if method.half else 1e-3 if method.dtype != torch.float64 else 1e-9
    scale = max(float(w.abs() @ K.diagonal().clamp_min(0).sqrt()), floor)
    length, product = float(w @ K @ w), float(w @ v)
    predicted = Outcome(length, product, length + 2 * product)
    sizes = Outcome(scale**2, scale * u2**0.5, (scale + u2**0.5) ** 2)
    lost = float(w.abs().sum()) * 1e3 * torch.finfo(method.dtype).tiny  # near the smallest numbers digits are missing
    worst = 0.0
    for value, expected, size in zip(found, predicted, sizes, strict=True):
        if value is None:
            continue
        error = abs(value - expected)
        worst = max(worst, error / size if size else 0.0)
        if not error <= tolerance * abs(expected) + 0.1 * tolerance * size + (floor if where else 0.0) ** 2 + lost**2:
            raise ArithmeticError(
                f"per-sample gradients and plain autograd disagree ({value:.6e} against {expected:.6e})"
                f"{method.blame(w) if where is None else where}. Please report the model"
            )
    return worst


def squared(t: Tensor) -> float:
    """‖t‖² in float64."""
    norm = float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)))
    if not 1e-15 < norm < 1e15:  # squares may have left the range of float32
        norm = float(torch.linalg.vector_norm(t, dtype=torch.float64))
    return norm**2


class _TwoPasses(_Method):
    """Products in a backward pass without weight gradients, the correction from plain autograd in another one."""

    def __init__(self, tape: Tape, losses: Tensor) -> None:
        self.tape, self.losses = tape, losses
        self.stored = max((p.dtype for p in tape.parameters.values()), key=lambda d: torch.finfo(d).eps)
        self.half = self.stored.itemsize == 2
        self.dtype = torch.float32 if self.half else self.stored

    def numel(self) -> int:
        return sum(p.numel() for p in self.tape.parameters.values())

    def grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.tape.parameters.items() if p.grad is not None}

    def products(self, wide: bool) -> tuple[Tensor, Tensor]:
        job = Products(self.tape, self.grads(), wide=wide)
        self.tape._run(self.losses, job)
        self.half = self.half or job.half
        return job.K, job.v

    def dot(self, wide: bool) -> Tensor:
        job = Products(self.tape, self.grads(), gram=False, wide=wide)
        self.tape._run(self.losses, job)
        return job.v

    def apply(self, w: Tensor, wide: bool = False, discard: bool = False) -> Outcome:
        if not discard:  # p.grad is about to change
            self.tape.outer, self.known = {}, None
        self.found: dict[str, tuple[float, float]] = {}
        parameters = self.tape.parameters.items()
        missing = [p for _, p in parameters if p.grad is None] if discard else []
        # A gradient of 1e-38 may have a weight beyond float32: then all weights are scaled, by a power of two.
        top = float(w.abs().max()) / (torch.finfo(self.losses.dtype).max / 16)
        scale = 2.0 ** math.ceil(math.log2(top)) if top > 1 else 1.0
        hooks = [p.register_hook(self._noting(name, p, discard, scale)) for name, p in parameters]
        try:
            with self.tape._again(), torch.enable_grad():
                torch.autograd.backward(
                    self.losses,
                    (w / scale).to(self.losses.dtype),
                    retain_graph=True,
                    inputs=list(self.tape.parameters.values()),
                )
        finally:
            for hook in hooks:
                hook.remove()
            for p in missing:
                p.grad = None
        return Outcome(*(sum(pair[k] for pair in self.found.values()) for k in (0, 1)))

    def _noting(self, name: str, p: Tensor, discard: bool, scale: float) -> Callable[[Tensor], Tensor | None]:
        def note(g: Tensor) -> Tensor | None:
            if scale != 1.0:
                g = g * scale
            ug = 0.0 if p.grad is None else _inner(p.grad, g)
            self.found[name] = squared(g), ug
            return g.new_zeros(()).expand_as(g) if discard else g

        return note

    def blame(self, w: Tensor) -> str:
        """The parameter whose share differs most."""
        job = Kept(self.tape)
        self.tape._run(self.losses, job)
        errors = {}
        for name, pieces in job.pieces.items():
            K = sum(rule.gram(None)[0] for _, rule in pieces)
            errors[name] = abs(float(w @ K @ w) - self.found.get(name, (0.0, 0.0))[0])
        missing = {name: gg for name, (gg, _) in self.found.items() if name not in errors}
        errors |= missing
        return f", most of all in {max(errors, key=errors.__getitem__)}" if errors else ""


def _watched(tape: Tape, losses: Tensor) -> str:
    """The parameter whose turn it is: with one backward pass, plain autograd checks one tensor a step, not all."""
    structure = tape.structure(losses)
    names = [name for name in tape.parameters if name not in structure.loops]
    structure.turn += 1
    return names[structure.turn % len(names)] if names else ""


def _check_watched(method: _Method, name: str, K: Tensor | float, grad: Tensor | None, lengths: float) -> float:
    """`lengths`: Σ_j ‖g_j‖ over all parameters."""
    if not name:
        return 0.0
    n, floor = method.n, 100 * torch.finfo(method.dtype).eps * lengths
    K = K if isinstance(K, Tensor) else torch.zeros(n, n, dtype=torch.float64)
    outcome = Outcome(length=0.0 if grad is None else squared(grad))
    ones = torch.ones(n, dtype=torch.float64, device=K.device)
    return _check(method, outcome, ones, K, torch.zeros_like(ones), 0.0, f", in {name}", floor)


class _KeptGradients(_TwoPasses):
    """Everything from the rules of one backward pass; plain autograd checks all of it once, then a tensor a step."""

    def __init__(self, tape: Tape, losses: Tensor) -> None:
        super().__init__(tape, losses)
        job, self.watch = Kept(tape), _watched(tape, losses)
        watch = [tape.parameters[self.watch]] if self.watch else []
        self.grads_of_watch = tape._run(losses, job, retain_graph=False, watch=watch)
        self.pieces: list[tuple[str, Source, Rule]] = [
            (name, source, rule) for name, some in job.pieces.items() for source, rule in some
        ]
        self.half = self.half or any(rule.half for *_, rule in self.pieces)
        self.n = len(losses)

    def products(self, wide: bool) -> tuple[Tensor, Tensor]:
        job = Products(self.tape, self.grads(), wide=wide, watch=self.watch)
        for name, source, rule in self.pieces:
            job.piece(name, source, rule)
        job.finish(self.n)
        for grad in self.grads_of_watch:
            lengths = float(job.K.diagonal().clamp_min(0).sqrt().sum())
            self.discrepancy = _check_watched(self, self.watch, job.watched, grad, lengths)
        self.grads_of_watch = ()
        return job.K, job.v

    def dot(self, wide: bool) -> Tensor:
        job = Products(self.tape, self.grads(), gram=False, wide=wide)
        for name, source, rule in self.pieces:
            job.piece(name, source, rule)
        job.finish(self.n)
        return job.v

    def apply(self, w: Tensor, wide: bool = False) -> Outcome:
        self.tape.outer = {}
        before = self.squares()
        for name, source, rule in self.pieces:
            p = self.tape.parameters[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            combine_(source, rule, p.grad, w, wide)
        self.known = None
        return Outcome(growth=self.squares() - before)

    def blame(self, w: Tensor) -> str:
        return ""


class _Tensor(_Method):
    """One parameter, with all its pieces at hand."""

    def __init__(self, tape: Tape, name: str, pieces: list[tuple[Source, Rule]], n: int) -> None:
        p = tape.parameters[name]
        self.tape, self.p, self.pieces, self.n = tape, p, pieces, n
        self.outer = tape.outer.pop(name, None)
        self.half = p.dtype.itemsize == 2 or any(rule.half for _, rule in pieces)
        self.stored, self.dtype = p.dtype, torch.float32 if p.dtype.itemsize == 2 else p.dtype

    def numel(self) -> int:
        return self.p.numel()

    def grads(self) -> dict[str, Tensor]:
        return {} if self.p.grad is None else {"": self.p.grad}

    def products(self, wide: bool) -> tuple[Tensor, Tensor]:
        u = self.p.grad
        some = []
        for source, rule in self.pieces:
            self.tape.flat = self.tape.flat or few_positions(rule)
            outer = self.outer if source.whole else None
            some.append(products(rule, None if u is None else part(source, u)[None], outer, wide or rule.cheap))
        K, v = zip(*some, strict=True)
        self.K, v = sum(K), sum(v)
        return self.K, v[:, 0] if v.shape[1] else self.K.new_zeros(self.n)

    def dot(self, wide: bool) -> Tensor:
        return sum(rule.dot(part(source, self.p.grad)[None], wide or rule.cheap) for source, rule in self.pieces)[:, 0]

    def apply(self, w: Tensor, wide: bool = False) -> Outcome:
        self.outer = None  # p.grad is about to change
        before = self.squares()
        if self.p.grad is None:
            self.p.grad = torch.zeros_like(self.p, memory_format=torch.contiguous_format)
        for source, rule in self.pieces:
            combine_(source, rule, self.p.grad, w, wide)
        self.known = None
        return Outcome(growth=self.squares() - before)


def _per_tensor(
    tape: Tape, losses: Tensor, damping: float, rtol: float | None, add: Tensor, lengths: dict[str, float]
) -> Projection:
    """Every tensor as soon as its last use has come by, in the one backward pass."""
    n, tensors = len(losses), {}
    watch = _watched(tape, losses)
    watched: list[_Tensor] = []
    squares: list[Tensor] = []  # ‖g_j‖² of every tensor

    def finished(name: str, pieces: list[tuple[Source, Rule]]) -> None:
        method = _Tensor(tape, name, pieces, n)
        method.known = lengths.get(name, 0.0)
        tensors[name] = _solve(method, n, damping, rtol, add)
        squares.append(method.K.diagonal())
        if name == watch:
            method.pieces = []
            watched.append(method)

    job = Kept(tape, finished)
    for grad in tape._run(losses, job, retain_graph=False, watch=[tape.parameters[watch]] if watch else []):
        for method in watched:
            _check_watched(method, watch, method.K, grad, float(sum(squares).clamp_min(0).sqrt().sum()))
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


def _inner(a: Tensor, b: Tensor) -> float:
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.flatten().to(dtype), b.flatten().to(dtype)
    product = float(torch.dot(a, b))
    return product if 1e-30 < abs(product) < 1e30 else float(torch.dot(a.double(), b.double()))
