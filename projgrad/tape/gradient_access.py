"""Two ways to the products with per-sample gradients that a projection needs, and to the correction of p.grad."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch_private import drop_gradient_hooks
from ..ops.numerics import product_dtype
from ..recording.backward import recomputing
from ..recording.graph import coarser
from ..recording.host_reads import inner, length, lengths
from .check import Measured, Outcome, Precision, exact_convolutions, of_parameter
from .consumers import CollectRules, Products, part
from .factors import ForgetFactors, few_positions
from .grouping import Group, Use, grouped
from .passes import Passes

FACTORS = torch.float64, torch.float32, torch.bfloat16  # the last one stands for all of 16 bits


@dataclass
class Block:
    """Parameters whose gradients are projected together, as one vector: all of them, or one.

    square: ‖p.grad‖² before the next correction, once it is known.
    factors: the coarsest type that its rules multiply, of `coarsest_factor`. has_16bit_factor: whether 16-bit numbers
    limit what autograd and rules can agree on.
    """

    name: str
    parameters: Mapping[str, Tensor]
    square: float = math.nan
    factors: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.stored = coarser(*(p.dtype for p in self.parameters.values()))  # the type of p.grad, the coarsest
        self.has_16bit_factor = 2 in (self.stored.itemsize, self.factors.itemsize)
        self.dtype = product_dtype(self.stored)  # of the products

    def numel(self) -> int:
        """Return the dimension of the space in which the per-sample gradients lie."""
        return sum(p.numel() for p in self.parameters.values())

    def grads(self) -> dict[str, Tensor]:
        """Return p.grad by name, where there is one."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def erase(self) -> None:
        """Set every p.grad to zero."""
        for g in self.grads().values():
            g.zero_()


class GradientAccess:
    """Products with the per-sample gradients, and the correction of p.grad, block by block.

    rates: weights of the parameters in all inner products, 1 by default. factors: of p.grad, where known, until it
    changes.
    """

    def __init__(
        self, passes: Passes, losses: Tensor, rates: Mapping[str, float], factors: ForgetFactors | None = None
    ) -> None:
        self.passes, self.losses, self.rates = passes, losses, rates
        self.factors = ForgetFactors() if factors is None else factors

    def precision(self, block: Block) -> Precision:
        """Return the types that limit the self-check: the two sides may differ by the rounding of the products."""
        compared = torch.bfloat16 if block.has_16bit_factor else coarser(block.dtype, block.factors)
        return Precision(block.dtype, compared)

    def rate(self, name: str) -> float:
        """Return the weight of a parameter in all inner products."""
        return self.rates.get(name, 1.0)

    def norms(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        """Return ‖p.grad‖ of every parameter that has one, as it is now, by block."""
        grads = {block.name: list(block.grads().values()) for block in blocks}
        counts, every = [len(some) for some in grads.values()], [g for some in grads.values() for g in some]
        if not every:
            return {}
        return dict(zip(grads, lengths(every).split(counts), strict=True))

    def square_of(self, block: Block) -> Callable[[Sequence[float]], float]:
        """Return the function of the `norms` of a block, on the host, that gives its ‖p.grad‖²."""
        return functools.partial(_square, [self.rate(name) for name in block.grads()])

    def products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        """Return K = G Gᵀ [l, n, n] and v = G u [l, n] for u = p.grad, multiplied in float64 if that is set."""
        raise NotImplementedError

    def dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        """Return v = G u [l, n] for u = p.grad as it is now."""
        raise NotImplementedError

    def apply(self, blocks: Sequence[Block], w: Tensor, max_abs: float, float64: bool = False) -> list[Outcome]:
        """Add Gᵀ w to p.grad, w [l, n], multiplied in float64 if that is set and possible; max_abs = max_j |w_j|."""
        raise NotImplementedError

    def agreed(self, *numbers: Tensor) -> Sequence[Tensor]:
        """Return the numbers that the host decides by: with several processes, the same ones on all of them."""
        return numbers

    def blame(self, w: Tensor) -> Callable[[], str]:
        """Return what to say where `apply(w)` came out wrong; it holds nothing of this object that is large."""
        return str

    def watched_numbers(self) -> tuple[str, Tensor, Precision] | None:
        """Return what `Checks.check_parameter` takes for one parameter, where `apply` did not go through autograd."""


class TwoPasses(GradientAccess):
    """Products in a backward pass without weight gradients, the correction from plain autograd in another one.

    There is one block, of all parameters.
    """

    def precision(self, block: Block) -> Precision:
        """Return the types that limit the self-check: a second backward pass rounds its own weights all along."""
        products, compared = super().precision(block)
        return Precision(products, coarser(compared, self.passes.structure(self.losses).coarsest))

    def products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        sums = self._sums(blocks[0], float64, gram=True)
        blocks[0].has_16bit_factor = blocks[0].has_16bit_factor or sums.has_16bit_factor
        return sums.K[None], sums.v[None]

    def dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        return self._sums(blocks[0], float64, gram=False).v[None]

    def _sums(self, block: Block, float64: bool, gram: bool) -> Products:
        sums = Products(block.grads(), gram, float64, self.rates, self.factors)
        with exact_convolutions(self.losses.is_cuda):  # the other pass must meet the same gradients at the outputs
            self.passes.run(self.losses, sums)
        return sums

    def apply(
        self, blocks: Sequence[Block], w: Tensor, max_abs: float, float64: bool = False, discard: bool = False
    ) -> list[Outcome]:
        """Add Gᵀ w to p.grad, or only measure it if `discard`."""
        if not discard:  # p.grad is about to change
            self.factors.clear()
        (block,), (w,) = blocks, w
        self.measured: dict[str, tuple[Tensor, Tensor]] = {}  # ‖g‖² and ⟨p.grad, g⟩, each times the rate
        inputs = list(block.parameters.values())
        missing = [p for p in inputs if p.grad is None] if discard else []
        # A gradient of 1e-38 may have a weight beyond float32: then all weights are scaled, by a power of two.
        max_abs /= torch.finfo(self.losses.dtype).max / 16
        scale = 2.0 ** math.ceil(math.log2(max_abs)) if max_abs > 1 else 1.0
        weights = (w / scale).to(self.losses.dtype)
        hooks = [self._measuring(name, p, discard, scale) for name, p in block.parameters.items()]
        try:
            try:
                for p, hook in zip(inputs, hooks, strict=True):
                    p.register_hook(hook)
                for p in missing:
                    p.register_post_accumulate_grad_hook(_drop_grad)
                with exact_convolutions(w.is_cuda), recomputing(self.passes.recording), torch.enable_grad():
                    torch.autograd.backward(self.losses, weights, retain_graph=True, inputs=inputs)
            finally:
                _drop_hooks(inputs, hooks)
        finally:  # Ctrl-C may have come in the first one
            _drop_hooks(inputs, hooks)
        columns = [[pair[k].to(w.device) for pair in self.measured.values()] for k in (0, 1)]
        return [Outcome(*(Measured(torch.stack(column) if column else w.new_zeros(0)) for column in columns))]

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


class KeptGradients(GradientAccess):
    """Everything from the rules of one backward pass, in which plain autograd checks the parameter `watch`.

    uses: of the parameters, with their rules.
    """

    def __init__(self, passes: Passes, losses: Tensor, rates, factors, watch: str) -> None:
        super().__init__(passes, losses, rates, factors)
        parameters, rules = passes.recording.parameters, CollectRules()
        watched = [parameters[watch]] if watch else []
        grads = passes.run(losses, rules, retain_graph=False, watch=watched, collect=True)
        self.uses = [Use(name, *piece) for name, pieces in rules.pieces.items() for piece in pieces]
        self.watch, self.grad_of_watch = watch, grads[0] if watch else None
        zero = losses.new_zeros(len(losses), dtype=torch.float64)
        self.watched, self.row_squares = zero.new_zeros(len(losses), len(losses)), zero  # K of `watch`, all ‖g_j‖²
        self._summed: set[str] = set()  # blocks that are in there
        self._grouped: tuple[object, list[Group]] = None, []  # of the blocks that were asked for last

    def blocks(self, per_tensor: bool) -> list[Block]:
        """Return the blocks to project: every tensor that the losses use, or all parameters in one."""
        parameters = self.passes.recording.parameters
        if not per_tensor:
            return [Block("", parameters, factors=coarsest_factor(self.uses))]
        uses: dict[str, list[Use]] = {}
        for use in self.uses:
            uses.setdefault(use.name, []).append(use)
        return [Block(name, {name: parameters[name]}, factors=coarsest_factor(some)) for name, some in uses.items()]

    def products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        K, v = self._sums(blocks, float64, gram=True)
        new = [k for k, block in enumerate(blocks) if block.name not in self._summed]
        self._summed.update(block.name for block in blocks)
        if new:
            rows = K if len(new) == len(blocks) else K[new]
            self.row_squares = self.row_squares + rows.diagonal(dim1=1, dim2=2).sum(0)
        return K, v

    def dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        return self._sums(blocks, float64, gram=False)[1]

    def row_lengths(self, blocks: Sequence[Block]) -> Tensor:
        """Return ‖g_j‖ [l, n], for which not all of K is needed: that of `watch` is computed."""
        groups, place = self._groups(blocks)
        squares = self.row_squares.new_zeros(len(blocks), len(self.losses))
        for group in groups:
            for use, one in zip(group, group.squares(group[0].rule.cheap), strict=True):
                squares[place[use.name]] += one
                if use.name == self.watch:
                    self.watched = self.watched + use.rule.gram(None, use.rule.cheap)[0]
        self.row_squares = self.row_squares + squares.sum(0)
        return squares.clamp_min(0).sqrt()

    def _groups(self, blocks: Sequence[Block]) -> tuple[list[Group], dict[str, int]]:
        """Return the uses of some blocks in groups, and the index of the block of every parameter."""
        place = {name: k for k, block in enumerate(blocks) for name in block.parameters}
        key = tuple(place), tuple(self.factors)
        if key != self._grouped[0]:
            short = {use.name for use in self.uses if use.name in self.factors and few_positions(use.rule)}
            self._grouped = key, grouped([use for use in self.uses if use.name in place], short)
        return self._grouped[1], place

    def _sums(self, blocks: Sequence[Block], float64: bool, gram: bool) -> tuple[Tensor, Tensor]:
        n, (groups, place) = len(self.losses), self._groups(blocks)
        zero = torch.zeros(n, dtype=torch.float64, device=self.losses.device)
        K, v = ([[] for _ in blocks] for _ in range(2))  # parts of every block's sums
        watched_before = any(block.name in self._summed for block in blocks if self.watch in block.parameters)
        for group in groups:
            k, w = self._of_group(group, float64, gram)
            if gram and not watched_before:
                for index in [index for index, use in enumerate(group) if use.name == self.watch]:
                    self.watched = self.watched + k[index]
            if len(blocks) == 1 and not self.rates:
                K[0].append(k.sum(0) if len(group) > 1 else k[0])
                v[0].append(w.sum(0) if len(group) > 1 else w[0])
                continue
            for use, one, other in zip(group, k, w, strict=True):
                rate = self.rate(use.name)
                K[place[use.name]].append(one if rate == 1 else rate * one)
                v[place[use.name]].append(other if rate == 1 else rate * other)
        return _stacked(K, zero.new_zeros(n, n)) if gram else zero, _stacked(v, zero)

    def _of_group(self, group: Group, float64: bool, gram: bool) -> tuple[Tensor, Tensor]:
        """Return K [l, n, n] and v [l, n] of the uses in a group."""
        rule = group[0].rule
        directions = [self.direction(use.name) for use in group]
        us = [None if u is None else part(use.source, u) for use, u in zip(group, directions, strict=True)]
        if not gram:
            v = group.dot(us, float64)
            return v.new_zeros(len(group), 0, 0), v
        short = few_positions(rule)
        self.factors.useful = self.factors.useful or short
        factored = self.factors.get(group[0].name) if short and group[0].source.whole else None
        # In float64 where that costs nothing to speak of.
        K, v = group.gram(us if factored is None else [None] * len(us), float64 or rule.cheap)
        if factored is not None:
            v = factored.dot(rule, float64).mT
        return K, v

    def direction(self, name: str) -> Tensor | None:
        """Return the tensor of a parameter whose products with the per-sample gradients are v; None counts as zero."""
        return self.passes.recording.parameters[name].grad

    def target(self, name: str) -> Tensor:
        """Return the tensor of a parameter that Gᵀ w is added to."""
        return _grad_of(self.passes.recording.parameters[name])

    def add_(self, blocks: Sequence[Block], w: Tensor, float64: bool = False) -> None:
        """Add Gᵀ w to the targets, w [l, n]."""
        groups, place = self._groups(blocks)
        for block in blocks:  # p.grad is about to change
            for name in block.parameters:
                self.factors.pop(name, None)
        rows = w.unbind()
        for group in groups:
            outs = [self.target(use.name) for use in group]
            # Picking rows by their indices would wait for a GPU.
            c = w[0] if len(blocks) == 1 else torch.stack([rows[place[use.name]] for use in group])
            group.combine_(outs, c, float64)

    def apply(self, blocks: Sequence[Block], w: Tensor, max_abs: float, float64: bool = False) -> list[Outcome]:
        self.add_(blocks, w, float64)
        norms = self.norms(blocks)
        return [Outcome(square=Measured(norms[block.name], self.square_of(block))) for block in blocks]

    def watched_numbers(self) -> tuple[str, Tensor, Precision] | None:
        """Compare Σ_j g_j of the parameter `watch`, from plain autograd, with its K."""
        if not self.watch:
            return None
        total = self.row_squares.clamp_min(0).sqrt().sum()
        grad, p = self.grad_of_watch, self.passes.recording.parameters[self.watch]
        squared_norm = torch.zeros_like(total) if grad is None else length(grad).square()
        precision = self.precision(Block(self.watch, {self.watch: p}, factors=coarsest_factor(self.uses)))
        coarsest = self.passes.structure(self.losses).coarsest  # in which autograd may have summed over the samples
        precision = precision._replace(compared=coarser(precision.compared, coarsest))
        numbers = of_parameter(torch.ones_like(self.row_squares), self.watched, squared_norm, total)
        return self.watch, numbers, precision


def coarsest_factor(uses: Iterable[Use]) -> torch.dtype:
    """Return the coarsest type that the rules of some uses multiply: one of `FACTORS`."""
    return coarser(FACTORS[0], *(FACTORS[2] if use.rule.has_16bit_factor else use.rule.dtype for use in uses))


def _square(rates: Sequence[float], norms: Sequence[float]) -> float:
    return sum(rate * norm * norm for rate, norm in zip(rates, norms, strict=True))  # norm**2 may be an OverflowError


def _stacked(parts: Sequence[Sequence[Tensor]], zero: Tensor) -> Tensor:
    """Return the sums of the parts of every block, [l, ...]."""
    return torch.stack([sum(some[1:], some[0]) if some else zero for some in parts])


def _grad_of(p: Tensor) -> Tensor:
    """Return p.grad, made of zeros where there is none."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
    return p.grad


def _drop_grad(p: Tensor) -> None:
    p.grad = None


def _drop_hooks(parameters: Sequence[Tensor], hooks: Sequence[Callable]) -> None:
    for p, hook in zip(parameters, hooks, strict=True):
        drop_gradient_hooks(p, (hook, _drop_grad))
