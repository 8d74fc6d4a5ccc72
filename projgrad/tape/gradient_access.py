"""Three ways to the products with per-sample gradients that a projection needs, and to the correction of p.grad."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..recording.host_reads import HostReads, inner, length, lengths, to_host
from ..recording.recording import Source
from ..rules.rule import Rule
from .check import (
    Checks,
    Measured,
    Outcome,
    WeightStats,
    check_finite,
    check_relative_error,
    coarser,
    exact_convolutions,
    tolerance_of,
    weight_stats_of,
)
from .consumers import CollectRules, PerParameter, Products, combine_, few_positions, part, products

if TYPE_CHECKING:
    from .tape import Tape


class GradientAccess:
    """Products with the per-sample gradients, and the correction of p.grad. `dtype`: of the products."""

    dtype: torch.dtype
    stored: torch.dtype  # of p.grad
    known: float | None = None  # ‖p.grad‖², until it changes
    has_16bit_factor = False  # whether 16-bit numbers limit what autograd and the rules can agree on

    @property
    def compared(self) -> torch.dtype:
        """The coarsest type in which the two sides of the self-check may differ: that of the products."""
        return torch.bfloat16 if self.has_16bit_factor else self.dtype

    def grads(self) -> dict[str, Tensor]:
        """p.grad by name, where there is one."""
        raise NotImplementedError

    def rate(self, name: str) -> float:
        """The weight of a parameter in all inner products."""
        return 1.0

    def numel(self) -> int:
        """Dimensions of the space in which the per-sample gradients lie."""
        raise NotImplementedError

    def squares(self) -> float:
        """‖p.grad‖² as it is now."""
        if self.known is None:
            self.known = _squared(to_host(self.sizes()))
        return self.known

    def sizes(self) -> Tensor:
        """Lengths of all p.grad as they are now, on the device."""
        grads = self.grads()
        if not grads:
            return torch.zeros(0, dtype=torch.float64)
        found, rates = lengths(list(grads.values())), [self.rate(name) ** 0.5 for name in grads]
        return found if all(rate == 1 for rate in rates) else found * found.new_tensor(rates)

    def growth(self, before: float) -> Measured:
        return Measured(self.sizes(), lambda sizes: _squared(sizes) - before)

    def erase(self) -> None:
        self.known = 0.0
        for g in self.grads().values():
            g.zero_()

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def dot(self, float64: bool) -> Tensor:
        """G u for u = p.grad as it is now."""
        raise NotImplementedError

    def apply(self, w: Tensor, top: float, float64: bool = False) -> Outcome:
        """p.grad += Gᵀ w, multiplied in float64 if `float64` and possible; top = max_j |w_j|."""
        raise NotImplementedError

    def blame(self, w: Tensor) -> Callable[[], str]:
        """What to say where `apply(w)` came out wrong; holds nothing of this object that is large."""
        return str


class TwoPasses(GradientAccess):
    """Products in a backward pass without weight gradients, the correction from plain autograd in another one."""

    def __init__(self, tape: Tape, losses: Tensor, rates: bool = True) -> None:
        self.tape, self.losses = tape, losses
        self.rates = tape.rates if rates else {}
        self.stored = max((p.dtype for p in tape.parameters.values()), key=lambda d: torch.finfo(d).eps)
        self.has_16bit_factor = self.stored.itemsize == 2
        self.dtype = torch.float32 if self.has_16bit_factor else self.stored

    @property
    def compared(self) -> torch.dtype:
        """Or of anything else that a second backward pass rounds in: its weights are other ones."""
        return coarser(super().compared, self.tape.structure(self.losses).coarsest)

    def numel(self) -> int:
        return sum(p.numel() for p in self.tape.parameters.values())

    def rate(self, name: str) -> float:
        return self.rates.get(name, 1.0)

    def grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.tape.parameters.items() if p.grad is not None}

    def _run(self, consumer: Products) -> None:
        with exact_convolutions(self.losses.is_cuda):  # the other pass must meet the same gradients at the outputs
            self.tape._run(self.losses, consumer)

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        consumer = Products(self.tape, self.grads(), float64=float64)
        self._run(consumer)
        self.has_16bit_factor = self.has_16bit_factor or consumer.has_16bit_factor
        return consumer.K, consumer.v

    def dot(self, float64: bool) -> Tensor:
        consumer = Products(self.tape, self.grads(), gram=False, float64=float64)
        self._run(consumer)
        return consumer.v

    def apply(self, w: Tensor, top: float, float64: bool = False, discard: bool = False) -> Outcome:
        if not discard:  # p.grad is about to change
            self.tape.forget_factors, self.known = {}, None
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        parameters = self.tape.parameters.items()
        missing = [p for _, p in parameters if p.grad is None] if discard else []
        # A gradient of 1e-38 may have a weight beyond float32: then all weights are scaled, by a power of two.
        top /= torch.finfo(self.losses.dtype).max / 16
        scale = 2.0 ** math.ceil(math.log2(top)) if top > 1 else 1.0
        hooks = [p.register_hook(self._noting(name, p, discard, scale)) for name, p in parameters]
        hooks += [p.register_post_accumulate_grad_hook(_drop_grad) for p in missing]
        try:
            with exact_convolutions(w.is_cuda), self.tape._again(), torch.enable_grad():
                torch.autograd.backward(
                    self.losses,
                    (w / scale).to(self.losses.dtype),
                    retain_graph=True,
                    inputs=list(self.tape.parameters.values()),
                )
        finally:
            for hook in hooks:
                hook.remove()
        found = list(self.found.values())
        return Outcome(*(Measured(_collected([pair[k] for pair in found], w)) for k in (0, 1)))

    def _noting(self, name: str, p: Tensor, discard: bool, scale: float) -> Callable[[Tensor], Tensor | None]:
        def note(g: Tensor) -> Tensor | None:
            if scale != 1.0:
                g = g * scale
            gg, rate = length(g).square(), self.rate(name)
            self.found[name] = rate * gg, gg.new_zeros(()) if p.grad is None or discard else rate * inner(p.grad, g)
            return g.new_zeros(()).expand_as(g) if discard and p.grad is not None else g

        return note

    def blame(self, w: Tensor) -> Callable[[], str]:
        """The parameter whose share differs most."""
        found = self.found

        def worst() -> str:
            consumer = CollectRules(self.tape)
            self.tape._run(self.losses, consumer)
            errors = {}
            for name, pieces in consumer.pieces.items():
                K = self.rate(name) * sum(rule.gram(None)[0] for _, rule in pieces)
                errors[name] = abs(float(w @ K @ w - (found[name][0] if name in found else 0.0)))
            errors |= {name: float(gg) for name, (gg, _) in found.items() if name not in errors}
            return f", most of all in {max(errors, key=errors.__getitem__)}" if errors else ""

        return worst


def _collected(numbers: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([t.to(like.device) for t in numbers]) if numbers else like.new_zeros(0)


def _squared(sizes: list[float]) -> float:
    return sum(size**2 for size in sizes)


def next_watched(tape: Tape, losses: Tensor) -> str:
    """The parameter whose turn it is: with one backward pass, plain autograd checks one tensor a step, not all."""
    structure = tape.structure(losses)
    names = [name for name in tape.parameters if name not in structure.loops]
    structure.compared.turns += 1
    return names[structure.compared.turns % len(names)] if names else ""


class KeptGradients(TwoPasses):
    """Everything from the rules of one backward pass; plain autograd checks all of it once, then a tensor a step."""

    def __init__(self, tape: Tape, losses: Tensor, checks: Checks) -> None:
        super().__init__(tape, losses)
        self.checks = checks
        consumer, self.watch = CollectRules(tape), next_watched(tape, losses)
        watch = [tape.parameters[self.watch]] if self.watch else []
        self.grads_of_watch = tape._run(losses, consumer, retain_graph=False, watch=watch)
        self.pieces: list[tuple[str, Source, Rule]] = [
            (name, source, rule) for name, some in consumer.pieces.items() for source, rule in some
        ]
        self.has_16bit_factor = self.has_16bit_factor or any(rule.has_16bit_factor for *_, rule in self.pieces)
        self.n = len(losses)

    compared = GradientAccess.compared  # there is no second pass

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        consumer = Products(self.tape, self.grads(), float64=float64, watch=self.watch)
        for name, source, rule in self.pieces:
            consumer.add(name, source, rule)
        consumer.finalize(self.n)
        for grad in self.grads_of_watch:
            K = consumer.watched if isinstance(consumer.watched, Tensor) else torch.zeros_like(consumer.K)
            total = consumer.K.diagonal().clamp_min(0).sqrt().sum()
            coarsest = self.tape.structure(self.losses).coarsest
            self.checks.check_watched(self, self.watch, K, grad, total, coarsest)
        self.grads_of_watch = ()
        return consumer.K, consumer.v

    def dot(self, float64: bool) -> Tensor:
        consumer = Products(self.tape, self.grads(), gram=False, float64=float64)
        for name, source, rule in self.pieces:
            consumer.add(name, source, rule)
        consumer.finalize(self.n)
        return consumer.v

    def apply(self, w: Tensor, top: float, float64: bool = False) -> Outcome:
        self.tape.forget_factors = {}
        before = self.squares()
        for name, source, rule in self.pieces:
            p = self.tape.parameters[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            combine_(source, rule, p.grad, w, float64)
        self.known = None
        return Outcome(growth=self.growth(before))

    def blame(self, w: Tensor) -> Callable[[], str]:
        return str


def _drop_grad(p: Tensor) -> None:
    p.grad = None


class OneTensor(GradientAccess):
    """One parameter, with all its pieces at hand."""

    def __init__(self, tape: Tape, name: str, pieces: list[tuple[Source, Rule]], n: int) -> None:
        p = tape.parameters[name]
        self.tape, self.p, self.pieces, self.n = tape, p, pieces, n
        self.outer = tape.forget_factors.pop(name, None)
        self.has_16bit_factor = p.dtype.itemsize == 2 or any(rule.has_16bit_factor for _, rule in pieces)
        self.stored, self.dtype = p.dtype, torch.float32 if p.dtype.itemsize == 2 else p.dtype

    def numel(self) -> int:
        return self.p.numel()

    def grads(self) -> dict[str, Tensor]:
        return {} if self.p.grad is None else {"": self.p.grad}

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        u = self.p.grad
        some = []
        for source, rule in self.pieces:
            self.tape.wants_forget_factors = self.tape.wants_forget_factors or few_positions(rule)
            outer = self.outer if source.whole else None
            some.append(products(rule, None if u is None else part(source, u)[None], outer, float64 or rule.cheap))
        K, v = zip(*some, strict=True)
        self.K, v = sum(K), sum(v)
        return self.K, v[:, 0] if v.shape[1] else self.K.new_zeros(self.n)

    def dot(self, float64: bool) -> Tensor:
        return sum(rule.dot(part(source, self.p.grad)[None], float64 or rule.cheap) for source, rule in self.pieces)[
            :, 0
        ]

    def apply(self, w: Tensor, top: float, float64: bool = False) -> Outcome:
        self.outer = None  # p.grad is about to change
        before = self.squares()
        if self.p.grad is None:
            self.p.grad = torch.zeros_like(self.p, memory_format=torch.contiguous_format)
        for source, rule in self.pieces:
            combine_(source, rule, self.p.grad, w, float64)
        self.known = None
        return Outcome(growth=self.growth(before))


def verify(tape: Tape, losses: Tensor) -> None:
    """Compare the rules with plain autograd, parameter by parameter, without a trace: ‖Gᵀ w‖² for w_j = ± 1 / ‖g_j‖,
    rounded to a power of two: the passes then round alike, however coarse the numbers on the way are.

    Two backward passes, one of them without weight gradients.

    Raises:
        ArithmeticError: they disagree.
    """
    n, method = len(losses), TwoPasses(tape, losses, rates=False)
    consumer = PerParameter(tape)
    with exact_convolutions(losses.is_cuda):
        tape._run(losses, consumer)
    K = sum(consumer.K.values(), torch.zeros(n, n, dtype=torch.float64, device=losses.device))
    check_finite(K, K)
    method.has_16bit_factor = method.has_16bit_factor or consumer.has_16bit_factor
    rows = K.diagonal().clamp_min(0).sqrt()
    signs = 1 - 2 * (torch.arange(n, device=K.device) * 0x9E3779B1 >> 16 & 1)
    w = signs * (rows.max() / rows.clamp_min(1e-6 * rows.max())).nan_to_num(1.0).log2().round().exp2()
    if tape.structure(losses).coarsest == torch.float16:  # larger ones may leave its range, in sums too
        w = 0.25 * signs.double()
    top, scale = to_host(w.abs().max(), w.abs() @ rows)
    method.apply(w, top, discard=True)
    noise = 100 * torch.finfo(method.dtype).eps * scale
    limit = tolerance_of(method.compared, K.is_cuda)
    host_reads, nothing = HostReads(), torch.zeros_like(K)
    for name in tape.parameters:
        weights = weight_stats_of(w, consumer.K.get(name, nothing))
        found = method.found[name][0] if name in method.found else nothing[0, 0]

        def answer(numbers: list[float], name: str = name) -> None:
            *some, square = numbers
            check_relative_error(0, square, WeightStats(*some), 0.0, limit, method.dtype, lambda: f", in {name}", noise)

        host_reads.defer(torch.cat([weights, found[None]]), answer)
    host_reads.flush()
