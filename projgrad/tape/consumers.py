"""What a pass over the sites makes of the per-sample gradients it meets."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops.numerics import product_dtype
from ..recording.recording import Source
from ..rules.rule import Product, Rule

if TYPE_CHECKING:
    from .tape import Tape


def part(source: Source, t: Tensor) -> Tensor:
    """What of a tensor in the shape of the parameter belongs to a source; a view unless the source is rows."""
    return source.view(t[None] if source.whole else t.contiguous()[None])[0]


def combine_(source: Source, rule: Rule, out: Tensor, c: Tensor, float64: bool = False) -> None:
    """out += Σ_j c_j g_j for `out` in the shape of the parameter, contiguous."""
    if source.rows is None:
        rule.combine_(part(source, out), c, float64)
        return
    rows = out.new_zeros(source.tensor.shape)
    rule.combine_(rows, c, float64)
    out.index_add_(0, source.rows.flatten(), rows.flatten(0, source.rows.ndim - 1))


class Consumer:
    """What a pass makes of the per-sample gradients; `piece` is called as they come, `done` when a parameter is."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def add(self, name: str, source: Source, rule: Rule) -> None:
        raise NotImplementedError

    def parameter_done(self, name: str) -> None: ...

    def finalize(self, n: int) -> None: ...


class Products(Consumer):
    """K = G Gᵀ and v = G u, summed over parameters, each by its rate."""

    def __init__(
        self, tape: Tape, u: dict[str, Tensor] | None = None, gram: bool = True, float64: bool = False, watch: str = ""
    ) -> None:
        super().__init__(tape)
        self.watch, self.watched = watch, 0.0  # K of this parameter alone
        self.u, self.gram, self.float64, self.has_16bit_factor = u or {}, gram, float64, False
        self.K: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def add(self, name: str, source: Source, rule: Rule) -> None:
        self.has_16bit_factor = self.has_16bit_factor or rule.has_16bit_factor
        u = self.u.get(name)
        u = None if u is None else part(source, u)[None]
        rate = self.tape.rates.get(name, 1.0)
        if self.gram:
            K, v = products(rule, u, self.tape.forget_factors.get(name) if source.whole else None, self.float64)
            self.tape.wants_forget_factors = self.tape.wants_forget_factors or few_positions(rule)
            self.K = self.K + (K if rate == 1 else rate * K)
            if name == self.watch:
                self.watched = self.watched + K
        elif u is not None:
            v = rule.dot(u, self.float64)
        if u is not None:
            self.v = self.v + (v[:, 0] if rate == 1 else rate * v[:, 0])

    def finalize(self, n: int) -> None:
        zero = torch.zeros(n, dtype=torch.float64, device=self.tape.anchor.device)
        self.K = self.K if isinstance(self.K, Tensor) else zero.new_zeros((n, n))
        self.v = self.v if isinstance(self.v, Tensor) else zero


class FactoredGradient(NamedTuple):
    """A gradient of a linear layer as the factors it is made of: Σ_r p_r q_rᵀ, p [rows, o] and q [rows, i]."""

    p: Tensor
    q: Tensor

    def squared(self) -> Tensor:
        """‖Σ_r p_r q_rᵀ‖² in float64, ()."""
        return ((self.p @ self.p.mT) * (self.q @ self.q.mT)).sum(dtype=torch.float64)

    def dot(self, rule: Product, float64: bool) -> Tensor:
        """⟨g_j, Σ_r p_r q_rᵀ⟩ [n, 1]: far fewer operations than with the product itself where positions are few."""
        dtype = torch.float64 if float64 else rule.dtype
        pairs = [f.flatten(0, 1).flatten(1).to(dtype) @ o.to(dtype).mT for f, o in ((rule.p, self.p), (rule.q, self.q))]
        return (pairs[0] * pairs[1]).view(rule.n, -1).sum(1, keepdim=True, dtype=torch.float64)


def few_positions(rule: Rule) -> bool:
    """Whether the inner product with a gradient is cheaper from the factors of the gradient, of as many samples."""
    if not (isinstance(rule, Product) and len(rule.left) == len(rule.right) == 1):
        return False
    (o,), (i,), tokens = rule.left, rule.right, rule.n * rule.p.shape[1]
    return 4 * tokens * (i + o) < i * o


def products(rule: Rule, u: Tensor | None, outer: FactoredGradient | None, float64: bool) -> tuple[Tensor, Tensor]:
    """K and v of one rule; `outer`: the factors of u, if they are known."""
    if outer is None or not few_positions(rule):
        return rule.gram(u, float64)
    return rule.gram(None, float64)[0], outer.dot(rule, float64)


class PerParameter(Consumer):
    """K of every parameter."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape)
        self.K: dict[str, Tensor] = {}
        self.has_16bit_factor = False

    def add(self, name: str, source: Source, rule: Rule) -> None:
        self.has_16bit_factor = self.has_16bit_factor or rule.has_16bit_factor
        K, _ = rule.gram(None)
        self.K[name] = self.K[name] + K if name in self.K else K


class Moments(Consumer):
    """Σ_j g_j and Σ_j g_j², of half types in float32: what is left of s² after rounding to 8 bits is noise."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape)
        self.first, self.second = (
            {name: p.new_zeros(p.shape, dtype=product_dtype(p.dtype)) for name, p in tape.parameters.items()}
            for _ in range(2)
        )

    def add(self, name: str, source: Source, rule: Rule) -> None:
        targets = self.first[name], self.second[name]
        if source.rows is None:
            rule.moments_(*(part(source, t) for t in targets))
            return
        sums = [t.new_zeros(source.tensor.shape) for t in targets]
        rule.moments_(*sums)
        for target, rows in zip(targets, sums, strict=True):
            target.index_add_(0, source.rows.flatten(), rows.flatten(0, source.rows.ndim - 1))


class CollectRules(Consumer):
    """The rules themselves, for as many products as are wanted, by parameter."""

    def __init__(self, tape: Tape, finished=None) -> None:
        super().__init__(tape)
        self.pieces: dict[str, list[tuple[Source, Rule]]] = {}
        self.finished = finished  # called with a parameter's name when its pieces are complete; they are dropped then

    def add(self, name: str, source: Source, rule: Rule) -> None:
        self.pieces.setdefault(name, []).append((source, rule))

    def parameter_done(self, name: str) -> None:
        if self.finished is not None:
            self.finished(name, self.pieces.pop(name))
