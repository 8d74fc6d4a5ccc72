"""Three ways to the products with per-sample gradients that a projection needs, and to the correction of p.grad."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .check import Outcome, check, check_finite, check_watched, inner, squared
from .jobs import Kept, PerParameter, Products, combine_, few_positions, part, products
from .rules import Rule
from .sites import Source

if TYPE_CHECKING:
    from .tape import Tape


class Route:
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


class TwoPasses(Route):
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
        hooks += [p.register_post_accumulate_grad_hook(_forget) for p in missing]
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
        return Outcome(*(sum(pair[k] for pair in self.found.values()) for k in (0, 1)))

    def _noting(self, name: str, p: Tensor, discard: bool, scale: float) -> Callable[[Tensor], Tensor | None]:
        def note(g: Tensor) -> Tensor | None:
            if scale != 1.0:
                g = g * scale
            ug = 0.0 if p.grad is None else inner(p.grad, g)
            self.found[name] = squared(g), ug
            return g.new_zeros(()).expand_as(g) if discard and p.grad is not None else g

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


def next_watched(tape: Tape, losses: Tensor) -> str:
    """The parameter whose turn it is: with one backward pass, plain autograd checks one tensor a step, not all."""
    structure = tape.structure(losses)
    names = [name for name in tape.parameters if name not in structure.loops]
    structure.turn += 1
    return names[structure.turn % len(names)] if names else ""


class KeptGradients(TwoPasses):
    """Everything from the rules of one backward pass; plain autograd checks all of it once, then a tensor a step."""

    def __init__(self, tape: Tape, losses: Tensor) -> None:
        super().__init__(tape, losses)
        job, self.watch = Kept(tape), next_watched(tape, losses)
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
            self.discrepancy = check_watched(self, self.watch, job.watched, grad, lengths)
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


def _forget(p: Tensor) -> None:
    p.grad = None


class OneTensor(Route):
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


def verify(tape: Tape, losses: Tensor) -> None:
    """Compare the rules with plain autograd, parameter by parameter, without a trace: ‖Gᵀ w‖² for w_j = ± 1 / ‖g_j‖.

    Two backward passes, one of them without weight gradients.

    Raises:
        ArithmeticError: they disagree.
    """
    n, method = len(losses), TwoPasses(tape, losses)
    job = PerParameter(tape)
    tape._run(losses, job)
    K = sum(job.K.values(), torch.zeros(n, n, dtype=torch.float64, device=losses.device))
    check_finite(K, K, 0.0)
    method.half = method.half or job.half
    lengths = K.diagonal().clamp_min(0).sqrt()
    signs = 1 - 2 * (torch.arange(n, device=K.device) * 0x9E3779B1 >> 16 & 1)
    w = signs * (lengths.max() / lengths.clamp_min(1e-6 * lengths.max())).nan_to_num()
    method.apply(w, discard=True)
    noise = 100 * torch.finfo(method.dtype).eps * float(w.abs() @ lengths)
    zero = torch.zeros_like(lengths)
    for name in tape.parameters:
        found = Outcome(length=method.found.get(name, (0.0, 0.0))[0])
        check(method, found, w, job.K.get(name, torch.zeros_like(K)), zero, 0.0, f", in {name}", noise)
