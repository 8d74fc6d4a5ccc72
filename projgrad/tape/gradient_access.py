"""Three ways to the products with per-sample gradients that a projection needs, and to the correction of p.grad."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..ops.numerics import product_dtype
from ..recording.backward import recomputing
from ..recording.graph import coarser
from ..recording.host_reads import inner, length, lengths, to_host
from .check import Checks, Measured, Outcome, Precision, exact_convolutions
from .consumers import CollectRules, Pieces, Products, add_
from .factors import ForgetFactors
from .passes import Passes


class GradientAccess:
    """Products with the per-sample gradients, and the correction of p.grad.

    parameters: whose p.grad are meant. rates: their weights in all inner products, 1 by default. factors: of p.grad,
    where known, until it changes. known: ‖p.grad‖², until it changes. dtype: of the products. stored: of p.grad, the
    coarsest. has_16bit_factor: whether 16-bit numbers limit what autograd and the rules can agree on.
    watch: a parameter whose K is also kept on its own, as `watched`. cheap_in_float64: see `Products`.
    """

    watch = ""
    cheap_in_float64 = False

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rates: Mapping[str, float] | None = None,
        factors: ForgetFactors | None = None,
    ) -> None:
        self.parameters, self.rates = parameters, rates or {}
        self.factors = ForgetFactors() if factors is None else factors
        self.stored = coarser(*(p.dtype for p in parameters.values()))
        self.has_16bit_factor = self.stored.itemsize == 2
        self.dtype = product_dtype(self.stored)
        self.known: float | None = None

    @property
    def precision(self) -> Precision:
        """Return the types that limit the self-check: the two sides may differ by the rounding of the products."""
        return Precision(self.dtype, torch.bfloat16 if self.has_16bit_factor else self.dtype)

    def grads(self) -> dict[str, Tensor]:
        """Return p.grad by name, where there is one."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def rate(self, name: str) -> float:
        """Return the weight of a parameter in all inner products."""
        return self.rates.get(name, 1.0)

    def numel(self) -> int:
        """Return the dimension of the space in which the per-sample gradients lie."""
        return sum(p.numel() for p in self.parameters.values())

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
        sums = self._sums(float64, gram=True)
        self.has_16bit_factor = self.has_16bit_factor or sums.has_16bit_factor
        self.K, self.watched = sums.K, sums.watched
        return sums.K, sums.v

    def dot(self, float64: bool) -> Tensor:
        """Return v = G u [n] for u = p.grad as it is now."""
        return self._sums(float64, gram=False).v

    def _sums(self, float64: bool, gram: bool) -> Products:
        sums = Products(self.grads(), gram, float64, self.rates, self.factors, self.watch, self.cheap_in_float64)
        self.run(sums)
        return sums

    def run(self, consumer: Products) -> None:
        """Hand all rules to a consumer."""
        raise NotImplementedError

    def apply(self, w: Tensor, max_abs: float, float64: bool = False) -> Outcome:
        """Add Gᵀ w to p.grad, multiplied in float64 if that is set and possible; max_abs = max_j |w_j|."""
        raise NotImplementedError

    def blame(self, w: Tensor) -> Callable[[], str]:
        """Return what to say where `apply(w)` came out wrong; it holds nothing of this object that is large."""
        return str


class TwoPasses(GradientAccess):
    """Products in a backward pass without weight gradients, the correction from plain autograd in another one."""

    def __init__(self, passes: Passes, losses: Tensor, rates=None, factors: ForgetFactors | None = None) -> None:
        super().__init__(passes.recording.parameters, rates, factors)
        self.passes, self.losses = passes, losses

    @property
    def precision(self) -> Precision:
        """Return the types that limit the self-check: a second backward pass rounds its own weights all along."""
        products, compared = super().precision
        return Precision(products, coarser(compared, self.passes.structure(self.losses).coarsest))

    def run(self, consumer: Products) -> None:
        with exact_convolutions(self.losses.is_cuda):  # the other pass must meet the same gradients at the outputs
            self.passes.run(self.losses, consumer)

    def apply(self, w: Tensor, max_abs: float, float64: bool = False, discard: bool = False) -> Outcome:
        """Add Gᵀ w to p.grad, or only measure it if `discard`."""
        if not discard:  # p.grad is about to change
            self.factors.clear()
            self.known = None
        self.measured: dict[str, tuple[Tensor, Tensor]] = {}  # ‖g‖² and ⟨p.grad, g⟩, each times the rate
        inputs = list(self.parameters.values())
        missing = [p for p in inputs if p.grad is None] if discard else []
        # A gradient of 1e-38 may have a weight beyond float32: then all weights are scaled, by a power of two.
        max_abs /= torch.finfo(self.losses.dtype).max / 16
        scale = 2.0 ** math.ceil(math.log2(max_abs)) if max_abs > 1 else 1.0
        weights = (w / scale).to(self.losses.dtype)
        hooks = [p.register_hook(self._measuring(name, p, discard, scale)) for name, p in self.parameters.items()]
        hooks += [p.register_post_accumulate_grad_hook(_drop_grad) for p in missing]
        try:
            with exact_convolutions(w.is_cuda), recomputing(self.passes.recording), torch.enable_grad():
                torch.autograd.backward(self.losses, weights, retain_graph=True, inputs=inputs)
        finally:
            for hook in hooks:
                hook.remove()
        columns = [[pair[k].to(w.device) for pair in self.measured.values()] for k in (0, 1)]
        return Outcome(*(Measured(torch.stack(column) if column else w.new_zeros(0)) for column in columns))

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


class FromRules(GradientAccess):
    """Everything from rules at hand: `pieces`, by parameter."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        pieces: Mapping[str, Pieces],
        losses: Tensor,
        rates: Mapping[str, float] | None = None,
        factors: ForgetFactors | None = None,
        cheap_in_float64: bool = False,
    ) -> None:
        super().__init__(parameters, rates, factors)
        self.n, self.device, self.cheap_in_float64 = len(losses), losses.device, cheap_in_float64
        self.uses = [(name, source, rule) for name, uses in pieces.items() for source, rule in uses]
        self.has_16bit_factor = self.has_16bit_factor or any(rule.has_16bit_factor for *_, rule in self.uses)

    def run(self, consumer: Products) -> None:
        for use in self.uses:
            consumer.add(*use)
        consumer.finalize(self.n, self.device)

    def apply(self, w: Tensor, max_abs: float, float64: bool = False) -> Outcome:
        for name in self.parameters:  # p.grad is about to change
            self.factors.pop(name, None)
        before = self.squares()
        for name, source, rule in self.uses:
            add_(source, functools.partial(rule.combine_, c=w, float64=float64), _grad_of(self.parameters[name]))
        self.known = None
        return Outcome(growth=self.growth(before))

    def check_watched(
        self, checks: Checks, name: str, K: Tensor, grad: Tensor | None, squares: Tensor, coarsest: torch.dtype
    ) -> None:
        """Check Σ_j g_j of one parameter, from plain autograd, against its K.

        K: of this parameter alone. grad: Σ_j g_j, None for zero. squares: ‖g_j‖² over all parameters [n].
        coarsest: the type in which autograd may have summed over the samples.
        """
        total = squares.clamp_min(0).sqrt().sum()
        squared_norm = torch.zeros_like(total) if grad is None else length(grad).square()
        precision = self.precision._replace(compared=coarser(self.precision.compared, coarsest))
        checks.check_parameter(name, torch.ones_like(K[0]), K, squared_norm, total, precision)


class KeptGradients(FromRules):
    """Everything from the rules of one backward pass, in which plain autograd checks the parameter `watch`."""

    def __init__(self, passes: Passes, losses: Tensor, rates, factors, checks: Checks, watch: str) -> None:
        parameters, rules = passes.recording.parameters, CollectRules()
        watched = [parameters[watch]] if watch else []
        self.grads_of_watch = passes.run(losses, rules, retain_graph=False, watch=watched, collect=True)
        super().__init__(parameters, rules.pieces, losses, rates, factors)
        self.checks, self.watch, self.coarsest = checks, watch, passes.structure(losses).coarsest

    def products(self, float64: bool) -> tuple[Tensor, Tensor]:
        K, v = super().products(float64)
        for grad in self.grads_of_watch:
            watched = self.watched if isinstance(self.watched, Tensor) else torch.zeros_like(K)
            self.check_watched(self.checks, self.watch, watched, grad, K.diagonal(), self.coarsest)
        self.grads_of_watch = ()
        return K, v


def _grad_of(p: Tensor) -> Tensor:
    """Return p.grad, made of zeros where there is none."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
    return p.grad


def _drop_grad(p: Tensor) -> None:
    p.grad = None


def _sum_of_squares(norms: list[float]) -> float:
    return sum(norm * norm for norm in norms)  # inf where norm**2 is an OverflowError
