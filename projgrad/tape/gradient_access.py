"""Three ways to the products with per-sample gradients that a projection needs, and to the correction of p.grad."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..recording.backward import recomputing
from ..recording.graph import coarser
from ..recording.host_reads import inner, length, lengths, to_host
from ..recording.sites import Source
from ..rules.rule import Rule
from .check import Checks, Measured, Outcome, Precision, exact_convolutions
from .consumers import CollectRules, Pieces, Products, combine_, part
from .factors import ForgetFactors, few_positions, products
from .passes import Passes


class GradientAccess:
    """Products with the per-sample gradients, and the correction of p.grad.

    dtype: of the products. stored: of p.grad. known: ‖p.grad‖², until it changes.
    has_16bit_factor: whether 16-bit numbers limit what autograd and the rules can agree on.
    """

    dtype: torch.dtype
    stored: torch.dtype
    known: float | None = None
    has_16bit_factor = False

    @property
    def precision(self) -> Precision:
        """Return the types that limit the self-check: the two sides may differ by the rounding of the products."""
        return Precision(self.dtype, torch.bfloat16 if self.has_16bit_factor else self.dtype)

    def grads(self) -> dict[str, Tensor]:
        """Return p.grad by name, where there is one."""
        raise NotImplementedError

    def rate(self, name: str) -> float:
        """Return the weight of a parameter in all inner products."""
        return 1.0

    def numel(self) -> int:
        """Return the dimension of the space in which the per-sample gradients lie."""
        raise NotImplementedError

    def squares(self) -> float:
        """Return ‖p.grad‖² as it is now."""
        if self.known is None:
            self.known = _sum_of_squares(to_host(self.norms()))
        return self.known

    def norms(self) -> Tensor:
        """Return the norms of all p.grad as they are now, each times the root of its rate, on the device."""
        grads = self.grads()
        if not grads:
            return torch.zeros(0, dtype=torch.float64)
        norms, roots = lengths(list(grads.values())), [self.rate(name) ** 0.5 for name in grads]
        return norms if all(root == 1 for root in roots) else norms * norms.new_tensor(roots)

    def growth(self, before: float) -> Measured:
        """Measure how much ‖p.grad‖² is above `before`."""
        return Measured(self.norms(), lambda norms: _sum_of_squares(norms) - before)

    def erase(self) -> None:
        """Set every p.grad to zero."""
        self.known = 0.0
        for g in self.grads().values():
            g.zero_()

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        """Return K [n, n] and v = G u [n] for u = p.grad as it is now, multiplied in float64 if that is set."""
        raise NotImplementedError

    def dot(self, float64: bool) -> Tensor:
        """Return v = G u [n] for u = p.grad as it is now."""
        raise NotImplementedError

    def apply(self, w: Tensor, max_abs: float, float64: bool = False) -> Outcome:
        """Add Gᵀ w to p.grad, multiplied in float64 if that is set and possible; max_abs = max_j |w_j|."""
        raise NotImplementedError

    def blame(self, w: Tensor) -> Callable[[], str]:
        """Return what to say where `apply(w)` came out wrong; it holds nothing of this object that is large."""
        return str


class TwoPasses(GradientAccess):
    """Products in a backward pass without weight gradients, the correction from plain autograd in another one."""

    def __init__(
        self,
        passes: Passes,
        losses: Tensor,
        rates: Mapping[str, float] | None = None,
        factors: ForgetFactors | None = None,
    ) -> None:
        self.passes, self.losses, self.rates = passes, losses, rates or {}
        self.factors = ForgetFactors() if factors is None else factors
        self.parameters = passes.recording.parameters
        self.stored = coarser(*(p.dtype for p in self.parameters.values()))
        self.has_16bit_factor = self.stored.itemsize == 2
        self.dtype = torch.float32 if self.has_16bit_factor else self.stored

    @property
    def precision(self) -> Precision:
        """Return the types that limit the self-check: a second backward pass rounds its own weights all along."""
        products, compared = super().precision
        return Precision(products, coarser(compared, self.passes.structure(self.losses).coarsest))

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def rate(self, name: str) -> float:
        return self.rates.get(name, 1.0)

    def grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _run(self, consumer: Products) -> None:
        with exact_convolutions(self.losses.is_cuda):  # the other pass must meet the same gradients at the outputs
            self.passes.run(self.losses, consumer)

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        consumer = Products(self.grads(), float64=float64, rates=self.rates, factors=self.factors)
        self._run(consumer)
        self.has_16bit_factor = self.has_16bit_factor or consumer.has_16bit_factor
        return consumer.K, consumer.v

    def dot(self, float64: bool) -> Tensor:
        consumer = Products(self.grads(), gram=False, float64=float64, rates=self.rates)
        self._run(consumer)
        return consumer.v

    def apply(self, w: Tensor, max_abs: float, float64: bool = False, discard: bool = False) -> Outcome:
        """Add Gᵀ w to p.grad, or only measure it if `discard`."""
        if not discard:  # p.grad is about to change
            self.factors.clear()
            self.known = None
        self.measured: dict[str, tuple[Tensor, Tensor]] = {}  # ‖g‖² and ⟨p.grad, g⟩, each times the rate
        parameters = self.parameters.items()
        missing = [p for _, p in parameters if p.grad is None] if discard else []
        # A gradient of 1e-38 may have a weight beyond float32: then all weights are scaled, by a power of two.
        max_abs /= torch.finfo(self.losses.dtype).max / 16
        scale = 2.0 ** math.ceil(math.log2(max_abs)) if max_abs > 1 else 1.0
        hooks = [p.register_hook(self._measuring(name, p, discard, scale)) for name, p in parameters]
        hooks += [p.register_post_accumulate_grad_hook(_drop_grad) for p in missing]
        try:
            with exact_convolutions(w.is_cuda), recomputing(self.passes.recording), torch.enable_grad():
                torch.autograd.backward(
                    self.losses,
                    (w / scale).to(self.losses.dtype),
                    retain_graph=True,
                    inputs=list(self.parameters.values()),
                )
        finally:
            for hook in hooks:
                hook.remove()
        pairs = list(self.measured.values())
        return Outcome(*(Measured(_stacked([pair[k] for pair in pairs], w)) for k in (0, 1)))

    def _measuring(self, name: str, p: Tensor, discard: bool, scale: float) -> Callable[[Tensor], Tensor | None]:
        """Return a hook that measures the gradient of p and keeps it from p.grad if `discard`."""

        def measure(g: Tensor) -> Tensor | None:
            if scale != 1.0:
                g = g * scale
            gg, rate = length(g).square(), self.rate(name)
            ug = gg.new_zeros(()) if p.grad is None or discard else rate * inner(p.grad, g)
            self.measured[name] = rate * gg, ug
            return g.new_zeros(()).expand_as(g) if discard and p.grad is not None else g

        return measure

    def blame(self, w: Tensor) -> Callable[[], str]:
        """Return a function that names the parameter whose share differs most."""
        measured = self.measured

        def worst() -> str:
            consumer = CollectRules()
            self.passes.run(self.losses, consumer)
            errors = {}
            for name, pieces in consumer.pieces.items():
                K = self.rate(name) * sum(rule.gram(None)[0] for _, rule in pieces)
                errors[name] = abs(float(w @ K @ w - (measured[name][0] if name in measured else 0.0)))
            errors |= {name: float(gg) for name, (gg, _) in measured.items() if name not in errors}
            return f", most of all in {max(errors, key=errors.__getitem__)}" if errors else ""

        return worst


class KeptGradients(TwoPasses):
    """Everything from the rules of one backward pass; plain autograd checks all of it once, then a tensor a step."""

    precision = GradientAccess.precision  # there is no second pass

    def __init__(
        self, passes: Passes, losses: Tensor, checks: Checks, rates: Mapping[str, float], factors: ForgetFactors
    ) -> None:
        super().__init__(passes, losses, rates, factors)
        self.checks, self.n, self.device = checks, len(losses), losses.device
        consumer, self.watch = CollectRules(), next_watched(passes, losses)
        watch = [self.parameters[self.watch]] if self.watch else []
        self.grads_of_watch = passes.run(losses, consumer, retain_graph=False, watch=watch)
        self.pieces: list[tuple[str, Source, Rule]] = [
            (name, source, rule) for name, pieces in consumer.pieces.items() for source, rule in pieces
        ]
        self.has_16bit_factor = self.has_16bit_factor or any(rule.has_16bit_factor for *_, rule in self.pieces)

    def _run(self, consumer: Products) -> None:
        for name, source, rule in self.pieces:
            consumer.add(name, source, rule)
        consumer.finalize(self.n, self.device)

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        consumer = Products(self.grads(), float64=float64, rates=self.rates, factors=self.factors, watch=self.watch)
        self._run(consumer)
        for grad in self.grads_of_watch:
            K = consumer.watched if isinstance(consumer.watched, Tensor) else torch.zeros_like(consumer.K)
            total = consumer.K.diagonal().clamp_min(0).sqrt().sum()
            coarsest = self.passes.structure(self.losses).coarsest
            self.checks.check_watched(self.watch, K, grad, total, self.precision, coarsest)
        self.grads_of_watch = ()
        return consumer.K, consumer.v

    def apply(self, w: Tensor, max_abs: float, float64: bool = False) -> Outcome:
        self.factors.clear()
        before = self.squares()
        for name, source, rule in self.pieces:
            combine_(source, rule, _grad_of(self.parameters[name]), w, float64)
        self.known = None
        return Outcome(growth=self.growth(before))

    def blame(self, w: Tensor) -> Callable[[], str]:
        return str


class OneTensor(GradientAccess):
    """One parameter, with all its pieces at hand."""

    def __init__(self, p: Tensor, name: str, pieces: Pieces, n: int, factors: ForgetFactors) -> None:
        self.p, self.pieces, self.n, self.factors = p, pieces, n, factors
        self.factored = factors.pop(name, None)
        self.has_16bit_factor = p.dtype.itemsize == 2 or any(rule.has_16bit_factor for _, rule in pieces)
        self.stored, self.dtype = p.dtype, torch.float32 if p.dtype.itemsize == 2 else p.dtype

    def numel(self) -> int:
        return self.p.numel()

    def grads(self) -> dict[str, Tensor]:
        return {} if self.p.grad is None else {"": self.p.grad}

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        u, pairs = self.p.grad, []
        for source, rule in self.pieces:
            self.factors.useful = self.factors.useful or few_positions(rule)
            factored = self.factored if source.whole else None
            mine = None if u is None else part(source, u)[None]
            pairs.append(products(rule, mine, factored, float64 or rule.cheap))
        K, v = zip(*pairs, strict=True)
        self.K, v = sum(K), sum(v)
        return self.K, v[:, 0] if v.shape[1] else self.K.new_zeros(self.n)

    def dot(self, float64: bool) -> Tensor:
        dots = [rule.dot(part(source, self.p.grad)[None], float64 or rule.cheap) for source, rule in self.pieces]
        return sum(dots)[:, 0]

    def apply(self, w: Tensor, max_abs: float, float64: bool = False) -> Outcome:
        self.factored = None  # p.grad is about to change
        before = self.squares()
        for source, rule in self.pieces:
            combine_(source, rule, _grad_of(self.p), w, float64)
        self.known = None
        return Outcome(growth=self.growth(before))


def next_watched(passes: Passes, losses: Tensor) -> str:
    """Return the parameter whose turn it is: with one backward pass, plain autograd checks one tensor a step."""
    structure = passes.structure(losses)
    names = [name for name in passes.recording.parameters if name not in structure.loops]
    structure.compared.turns += 1
    return names[structure.compared.turns % len(names)] if names else ""


def _grad_of(p: Tensor) -> Tensor:
    """Return p.grad, made of zeros where there is none."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
    return p.grad


def _drop_grad(p: Tensor) -> None:
    p.grad = None


def _stacked(numbers: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([t.to(like.device) for t in numbers]) if numbers else like.new_zeros(0)


def _sum_of_squares(norms: list[float]) -> float:
    return sum(norm**2 for norm in norms)
