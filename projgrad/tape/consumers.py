"""What a pass over the sites makes of the per-sample gradients that it meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..ops.numerics import product_dtype
from ..recording.sites import Source
from ..rules.rule import Rule
from .factors import ForgetFactors, few_positions

Pieces = list[tuple[Source, Rule]]  # of one parameter


class Consumer:
    """What a pass hands per-sample gradients to."""

    def add(self, name: str, source: Source, rule: Rule) -> None:
        """Take the per-sample gradients of one part of a parameter."""
        raise NotImplementedError

    def parameter_done(self, name: str) -> None:
        """Note that all parts of a parameter were added."""

    def finalize(self, n: int, device: torch.device) -> None:
        """End the pass over n samples."""


class Products(Consumer):
    """K = G Gᵀ and v = G u in float64, summed over parameters, each by its rate.

    Args:
        u: by parameter; those without one count as zero.
        gram: whether K is wanted.
        float64: multiply in float64.
        rates: weights of the parameters in the sums, 1 by default.
        factors: of u, where known.
    """

    def __init__(
        self,
        u: Mapping[str, Tensor] | None = None,
        gram: bool = True,
        float64: bool = False,
        rates: Mapping[str, float] | None = None,
        factors: ForgetFactors | None = None,
    ) -> None:
        self.u, self.gram, self.float64, self.rates = u or {}, gram, float64, rates or {}
        self.factors = ForgetFactors() if factors is None else factors
        self.has_16bit_factor = False
        self.K: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def add(self, name: str, source: Source, rule: Rule) -> None:
        self.has_16bit_factor = self.has_16bit_factor or rule.has_16bit_factor
        u = self.u.get(name)
        u = None if u is None else part(source, u)[None]
        rate = self.rates.get(name, 1.0)
        float64 = self.float64 or rule.cheap  # where that costs nothing to speak of
        if self.gram:
            factored = self.factors.get(name) if source.whole and few_positions(rule) else None
            K, v = rule.gram(u if factored is None else None, float64)
            v = v if factored is None else factored.dot(rule, float64)
            self.factors.useful = self.factors.useful or few_positions(rule)
            self.K = self.K + (K if rate == 1 else rate * K)
        elif u is not None:
            v = rule.dot(u, float64)
        if u is not None:
            self.v = self.v + (v[:, 0] if rate == 1 else rate * v[:, 0])

    def finalize(self, n: int, device: torch.device) -> None:
        zero = torch.zeros(n, dtype=torch.float64, device=device)
        self.K = self.K if isinstance(self.K, Tensor) else zero.new_zeros((n, n))
        self.v = self.v if isinstance(self.v, Tensor) else zero


class PerParameter(Consumer):
    """K of every parameter."""

    def __init__(self) -> None:
        self.K: dict[str, Tensor] = {}
        self.has_16bit_factor = False

    def add(self, name: str, source: Source, rule: Rule) -> None:
        self.has_16bit_factor = self.has_16bit_factor or rule.has_16bit_factor
        K, _ = rule.gram(None)
        self.K[name] = self.K[name] + K if name in self.K else K


class Moments(Consumer):
    """Σ_j g_j and Σ_j g_j², in float32 or better: what is left of s² after rounding to 8 bits is noise."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.first, self.second = (
            {name: p.new_zeros(p.shape, dtype=product_dtype(p.dtype)) for name, p in parameters.items()}
            for _ in range(2)
        )

    def add(self, name: str, source: Source, rule: Rule) -> None:
        add_(source, rule.moments_, self.first[name], self.second[name])


class CollectRules(Consumer):
    """The rules themselves, by parameter, for as many products as are wanted.

    complete: called with a parameter's name and its pieces when there are no more of them; they are then dropped.
    """

    def __init__(self, complete: Callable[[str, Pieces], None] | None = None) -> None:
        self.pieces: dict[str, Pieces] = {}
        self.complete = complete

    def add(self, name: str, source: Source, rule: Rule) -> None:
        self.pieces.setdefault(name, []).append((source, rule))

    def parameter_done(self, name: str) -> None:
        if self.complete is not None:
            self.complete(name, self.pieces.pop(name))


def part(source: Source, t: Tensor) -> Tensor:
    """Return what of a tensor in the shape of the parameter belongs to a source; a view unless the source is rows."""
    return t if source.whole else source.view(t.contiguous()[None])[0]


def add_(source: Source, rule_adds: Callable[..., None], *outs: Tensor) -> None:
    """Call `rule_adds` with what of `outs`, contiguous and in the shape of the parameter, belongs to a source."""
    if source.rows is None:
        rule_adds(*(part(source, out) for out in outs))
        return
    sums = [out.new_zeros(source.tensor.shape) for out in outs]
    rule_adds(*sums)
    for out, rows in zip(outs, sums, strict=True):
        out.index_add_(0, source.rows.flatten(), rows.flatten(0, source.rows.ndim - 1))


def explicit(p: Tensor, pieces: Sequence[tuple[Source, Rule]], n: int) -> Tensor:
    """Return the per-sample gradients of one parameter in full, [n, *p.shape], float32 or better; no pieces: zeros."""
    if len(pieces) == 1 and pieces[0][0].whole:
        return pieces[0][1].dense()
    G = p.new_zeros((n, *p.shape), dtype=product_dtype(p.dtype))
    for source, rule in pieces:
        g = rule.dense()
        if source.rows is None:
            source.view(G).add_(g)
        else:
            G.index_add_(1, source.rows.flatten(), g.flatten(1, source.rows.ndim).to(G.dtype))
    return G
