"""Rules: per-sample gradients of one parameter from what one use of it left behind, without holding all of them.

The whole extension interface is `Rule`: `chunk(rows)`, and faster `gram`, `dot`, `combine_` where there are any.
Sizes: n samples, t positions, i inputs, o outputs; a parameter is a matrix of `rows` x `cols`, its first dimension
against the rest.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._torch_private import foreach_add_
from ..ops.cost import GramRoute, chunk_bytes, group_bytes
from ..ops.gram import gram_pass
from ..ops.numerics import product_dtype

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class Rule:
    """Per-sample gradients g_j of one tensor of shape `shape`, for samples j = 0 ... n - 1.

    A new rule sets `n`, `shape`, `dtype` and `device` and implements `chunk`. Everything else follows from it; override
    what the factors give for less.
    """

    n: int
    shape: torch.Size
    dtype: torch.dtype  # what chunks are made in, unless float64 is asked for
    device: torch.device
    has_16bit_factor = False  # whether a factor came in 16 bits
    cheap = False  # whether multiplying in float64 costs nothing to speak of
    fresh_chunks = False  # whether what `chunk` returns may be changed in place

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        """Return g_j for some rows of the parameter, [n, len(rows), cols]; multiplied in float64 if `float64`."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) else 1

    @property
    def cols(self) -> int:
        return math.prod(self.shape[1:])

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        """Return K = G Gᵀ [n, n] and v = G u [n, m] in float64; u [m, *shape], None for m = 0."""
        if not self.rows:
            K = torch.zeros(self.n, self.n, dtype=torch.float64, device=self.device)
            return K, K.new_zeros(self.n, 0 if u is None else len(u))
        K, v = 0.0, 0.0
        for rows, g in self._chunks(float64):
            k, w = gram(g, None if u is None else u.reshape(len(u), self.rows, self.cols)[:, rows], float64)
            K, v = K + k, v + w
        return K, v

    def weighted_gram(self, d: Tensor, u: Tensor, float64: bool = False) -> tuple[Tensor, Tensor]:
        """Return K = G diag(d) Gᵀ [n, n] and v = G u [n] in float64.

        d ≥ 0 and u have the shape `shape`; u is 0 where d is.
        """
        roots, scaled = weighted(d, u, float64)
        roots, scaled = roots.reshape(self.rows, self.cols), scaled.reshape(1, self.rows, self.cols)
        K = torch.zeros(self.n, self.n, dtype=torch.float64, device=self.device)
        v = K.new_zeros(self.n)
        for rows, g in self._chunks(float64, parts=4):  # all the state of the optimizer is in memory too
            g = g.mul_(roots[rows]) if self.fresh_chunks else g * roots[rows]
            k, w = gram(g, scaled[:, rows], float64)
            K += k
            v += w[:, 0]
        return K, v

    def squares(self, float64: bool = False) -> Tensor:
        """Return ‖g_j‖² [n] in float64."""
        return self.gram(None, float64)[0].diagonal()

    def dot(self, u: Tensor, float64: bool = False) -> Tensor:
        """Return G u [n, m] for u [m, *shape]."""
        return self.gram(u, float64)[1]

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        """Add Σ_j c_j g_j to out, of shape `shape`; c [n] float64."""
        for rows, g in self._chunks(float64):
            add_(out[rows] if out.ndim else out, torch.einsum("n,nrc->rc", c.to(g.dtype), g))

    @property
    def group_key(self) -> Hashable | None:
        """Return what rules of one class share that the next three functions may be given together; None: alone."""
        return None

    @classmethod
    def gram_of_group(
        cls, rules: Sequence[Self], us: Sequence[Tensor | None], float64: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return K [l, n, n] and v = G u [l, n] of l rules, each with its u of shape `shape`; all u None: no v."""
        pairs = [r.gram(None if u is None else u[None], float64) for r, u in zip(rules, us, strict=True)]
        K = torch.stack([K for K, _ in pairs])
        return K, None if us[0] is None else torch.stack([v[:, 0] for _, v in pairs])

    @classmethod
    def dot_of_group(cls, rules: Sequence[Self], us: Sequence[Tensor], float64: bool = False) -> Tensor:
        """Return v = G u [l, n] of l rules, each with its u of shape `shape`."""
        return torch.stack([r.dot(u[None], float64)[:, 0] for r, u in zip(rules, us, strict=True)])

    @classmethod
    def combine_group_(cls, rules: Sequence[Self], outs: Sequence[Tensor], c: Tensor, float64: bool = False) -> None:
        """Add Σ_j c_j g_j of every rule to its out, of shape `shape`; c [n] or [l, n] float64."""
        for rule, out, weights in zip(rules, outs, c.expand(len(rules), -1), strict=True):
            rule.combine_(out, weights, float64)

    def moments_(self, first: Tensor, second: Tensor) -> None:
        """Add Σ_j g_j to first and Σ_j g_j² to second, each of shape `shape`."""
        for rows, g in self._chunks():
            for out, part in ((first, g.sum(0)), (second, g.square().sum(0))):
                add_(out[rows] if out.ndim else out, part)

    def cost(self) -> GramRoute:
        """Return how `gram` goes about it: route, flops, bytes besides the factors."""
        step = self.chunk_rows(False)
        flops = self.n * (self.n + 1) * self.rows * self.cols
        bytes = self.n * min(step, self.rows) * self.cols * self.dtype.itemsize
        return GramRoute("chunks", step, self.cols, flops, bytes)

    def dense(self) -> Tensor:
        """Return G [n, *shape]."""
        return self.chunk(slice(0, self.rows)).reshape(self.n, *self.shape)

    def transposed(self) -> Rule:
        """Return the rule of the transposed parameter, for two dimensions; override what needs no gradients in full."""
        return Rows(self.dense().mT)

    def _chunks(self, float64: bool = False, parts: int = 1) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, self.chunk_rows(float64) // parts)
        for start in range(0, self.rows, step):
            rows = slice(start, min(self.rows, start + step))
            yield rows, self.chunk(rows, float64)

    def chunk_rows(self, float64: bool) -> int:
        """Return how many rows of the parameter make one chunk."""
        one = self.n * self.cols * (8 if float64 else self.dtype.itemsize)
        return max(1, chunk_bytes(self.device.type) // max(1, one))


def groups_of(count: int, most: int) -> Iterator[slice]:
    """Yield slices that cover `count` rules, of at most `most` each, but of one at least."""
    for start in range(0, count, max(1, most)):
        yield slice(start, start + max(1, most))


def add_(out: Tensor, part: Tensor) -> None:
    """Add a part with as many elements, in another shape perhaps."""
    out.add_(part.reshape(out.shape))


def weighted(d: Tensor, u: Tensor, float64: bool) -> tuple[Tensor, Tensor]:
    """Return √d and u / √d: rows g √d have the weighted Gram matrix, and with u / √d the products of g and u."""
    roots = (d.double() if float64 else d).sqrt()
    return roots, torch.where(roots > 0, u / roots, 0.0)


def gram(g: Tensor, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
    """Return K and v of an explicit chunk g [n, ...], u [m, ...] or None."""
    flat = g.reshape(len(g), -1)
    u = flat.new_empty((0, flat.shape[1])) if u is None else u.reshape(len(u), -1)
    return gram_pass(flat, u.to(flat.dtype), float64)


class Rows(Rule):
    """Per-sample gradients that are at hand: biases, scales, small free parameters."""

    name = "rows"

    def __init__(self, g: Tensor) -> None:
        self.g, self.device = g, g.device  # [n, *shape]
        self.n, self.shape, self.dtype = len(g), g.shape[1:], product_dtype(g.dtype)
        self.has_16bit_factor, self.cheap = g.dtype.itemsize == 2, g.numel() < 1 << 18

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        return self.g.reshape(self.n, self.rows, self.cols)[:, rows].to(product_dtype(self.g.dtype, float64=float64))

    @property
    def group_key(self) -> Hashable | None:
        return (Rows, self.g.shape, self.g.dtype, self.device) if self.cheap else None

    @classmethod
    def gram_of_group(
        cls, rules: Sequence[Rows], us: Sequence[Tensor | None], float64: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        K = torch.cat([G @ G.mT for _, G in _stacked(rules)])
        return K, None if us[0] is None else cls.dot_of_group(rules, us)

    @classmethod
    def dot_of_group(cls, rules: Sequence[Rows], us: Sequence[Tensor], float64: bool = False) -> Tensor:
        parts = [(G, torch.stack(us[part]).double().reshape(len(G), -1, 1)) for part, G in _stacked(rules)]
        return torch.cat([(G @ u)[..., 0] for G, u in parts])

    @classmethod
    def combine_group_(cls, rules: Sequence[Rows], outs: Sequence[Tensor], c: Tensor, float64: bool = False) -> None:
        for part, G in _stacked(rules):
            weights = c[part] if c.ndim == 2 else c
            foreach_add_(outs[part], (weights[..., None, :] @ G).view(len(G), *rules[0].shape).unbind())


def _stacked(rules: Sequence[Rows]) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rules at a time, with their gradients [l, n, k] in float64: cheap for as few as these."""
    first = rules[0]
    for part in groups_of(len(rules), group_bytes(first.device.type) // max(1, 8 * first.g.numel())):
        g = torch.stack([rule.g for rule in rules[part]]).double()
        yield part, g.reshape(len(g), first.n, first.rows * first.cols)


class Sum(Rule):
    """Several uses of one tensor: tied embedding and head, a weight used in different ways."""

    name = "sum"

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules, self.n, self.shape, self.device = rules, rules[0].n, rules[0].shape, rules[0].device
        self.dtype = max((r.dtype for r in rules), key=lambda d: d.itemsize)
        self.has_16bit_factor = any(r.has_16bit_factor for r in rules)

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        g = self.rules[0].chunk(rows, float64)
        for rule in self.rules[1:]:
            g = rule.add_chunk_(g, rows, float64) if hasattr(rule, "add_chunk_") else g + rule.chunk(rows, float64)
        return g

    def dot(self, u: Tensor, float64: bool = False) -> Tensor:
        return sum(rule.dot(u, float64) for rule in self.rules)

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        for rule in self.rules:
            rule.combine_(out, c, float64)
