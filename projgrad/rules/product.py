"""The rule of products with a parameter: linear layers, contractions, and the same group by group.

Sizes: n samples, t positions, i inputs, o outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops import linear_impl
from ..ops.cost import GramRoute, layers_at_once, linear_route
from ..ops.numerics import product_dtype
from .lookup import Lookup
from .rule import Rule, Sum, add_, groups_of
from .tied import Tied


class Product(Rule):
    """g_j = Σ_t p_jt q_jtᵀ: linear layers, products and contractions with a parameter.

    p [n, t, *left], q [n, t, *right]; `order` permutes the parameter's dimensions into (*left, *right).
    """

    name = "product"
    fresh_chunks = True

    def __init__(self, p: Tensor, q: Tensor, left: Sequence[int], right: Sequence[int], order: Sequence[int]) -> None:
        self.n, self.p, self.q, self.device = p.shape[0], p, q, p.device
        self.left, self.right, self.order = tuple(left), tuple(right), tuple(order)
        self.dtype = product_dtype(p.dtype, q.dtype)
        self.has_16bit_factor = p.dtype.itemsize == 2 or q.dtype.itemsize == 2

    @property
    def inverse(self) -> tuple[int, ...]:
        """Return the dimensions of (*left, *right) in the order of the parameter."""
        return _inverse(self.order)

    @property
    def shape(self) -> torch.Size:
        sizes = self.left + self.right
        return torch.Size([sizes[d] for d in self.inverse])

    @property
    def form(self) -> tuple:
        return self.left, self.right, self.order

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        dtype = torch.float64 if float64 else self.dtype
        p, q = self.p.flatten(2), self.q.flatten(2)
        left, right = list(self.left), list(self.right)
        first = self.inverse[0] if self.shape else 0  # where the parameter's first dimension is in (*left, *right)
        length = rows.stop - rows.start
        if first < len(left):
            p = self.p.unflatten(2, left).narrow(2 + first, rows.start, length).flatten(2) if left else p
            left[first] = length
        else:
            q = self.q.unflatten(2, right).narrow(2 + first - len(left), rows.start, length).flatten(2)
            right[first - len(left)] = length
        g = linear_impl.gradients(q, p, dtype).view(self.n, *left, *right)
        return g.permute(0, *(1 + d for d in self.inverse)).reshape(self.n, length, self.cols)

    def matrix(self, u: Tensor) -> Tensor:
        """Return u [m, *shape] as [m, |left|, |right|]."""
        return u.permute(0, *(1 + d for d in self.order)).reshape(len(u), math.prod(self.left), math.prod(self.right))

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        p, q = self.p.flatten(2), self.q.flatten(2)
        u = p.new_empty((0, p.shape[2], q.shape[2])) if u is None else self.matrix(u)
        return linear_impl.gram_of_layer(q, p, u, float64)

    def squares(self, float64: bool = False) -> Tensor:
        p, q = self.p.flatten(2), self.q.flatten(2)
        (t, o), i = p.shape[1:], q.shape[2]
        if p.is_cuda or t * (i + o) > i * o:  # products of t² pairs of tokens against those of i o weights
            return super().squares(float64)
        return linear_impl.squares_of_layer(q, p, float64)

    def cost(self) -> GramRoute:
        i, o = math.prod(self.right), math.prod(self.left)
        itemsize = max(self.p.dtype.itemsize, self.q.dtype.itemsize)
        return linear_route(self.n, self.p.shape[1], i, o, itemsize=itemsize, device=self.device.type)

    def dot(self, u: Tensor, float64: bool = False) -> Tensor:
        return linear_impl.dot_of_layer(self.q.flatten(2), self.p.flatten(2), self.matrix(u), float64)

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        if float64:
            return super().combine_(out, c, float64)
        p, q, target = self.p.flatten(2), self.q.flatten(2), out.permute(self.order)
        if len(self.left) == 1 and len(self.right) == 1:
            linear_impl.combine_of_layer_(target, q, p, c)
        else:
            part = torch.zeros(p.shape[2], q.shape[2], dtype=self.dtype, device=p.device)
            linear_impl.combine_of_layer_(part, q, p, c)
            add_(target, part)

    @property
    def group_key(self) -> Hashable | None:
        if len(self.left) != 1 or len(self.right) != 1:
            return None
        return Product, self.p.shape, self.q.shape, self.p.dtype, self.q.dtype, self.order, self.device

    @classmethod
    def gram_of_group(
        cls, rules: Sequence[Product], us: Sequence[Tensor | None], float64: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        pairs = [
            linear_impl.linear_gram(q, p, None if us[0] is None else _stack(rules[0], us[part]), float64)
            for part, q, p in _stacked(rules)
        ]
        K, v = zip(*pairs, strict=True)
        return torch.cat(K), None if us[0] is None else torch.cat(v)

    @classmethod
    def dot_of_group(cls, rules: Sequence[Product], us: Sequence[Tensor], float64: bool = False) -> Tensor:
        parts = _stacked(rules)
        return torch.cat([linear_impl.linear_dot(q, p, _stack(rules[0], us[part]), float64) for part, q, p in parts])

    @classmethod
    def combine_group_(cls, rules: Sequence[Product], outs: Sequence[Tensor], c: Tensor, float64: bool = False) -> None:
        if float64:
            return super().combine_group_(rules, outs, c, float64)
        order = rules[0].order
        for part, q, p in _stacked(rules):
            targets = outs[part] if order == (0, 1) else [out.permute(order) for out in outs[part]]
            linear_impl.linear_combine_(targets, q, p, c[part] if c.ndim == 2 else c)

    def moments_(self, first: Tensor, second: Tensor) -> None:
        sums = linear_impl.linear_moments(self.q.flatten(2), self.p.flatten(2))
        for out, part in zip((first, second), sums, strict=True):
            add_(out.permute(self.order), part)

    def transposed(self) -> Product:
        """Return the rule of the transposed parameter."""
        return Product(self.p, self.q, self.left, self.right, [len(self.order) - 1 - d for d in self.order])


@functools.cache
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(d) for d in range(len(order)))


def _stack(rule: Product, xs: Sequence[Tensor]) -> Tensor:
    """Return tensors in the shape of the parameter as [l, o, i]; one tensor is not copied."""
    if rule.order != (0, 1):
        xs = [x.permute(rule.order) for x in xs]
    return xs[0][None] if len(xs) == 1 else torch.stack(xs)


def _stacked(rules: Sequence[Product]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield as many rules at a time as may be stacked, with their q [l, n, t, i] and p [l, n, t, o]."""
    first = rules[0]
    (n, t, i), o, itemsize = first.q.shape, first.p.shape[2], max(first.p.dtype.itemsize, first.q.dtype.itemsize)
    for part in groups_of(len(rules), layers_at_once(n, t, i, o, itemsize, first.device.type)):
        q, p = [rule.q for rule in rules[part]], [rule.p for rule in rules[part]]
        yield part, *(x[0][None] if len(x) == 1 else torch.stack(x) for x in (q, p))


class Grouped(Rule):
    """One product per group: g_j[h] = Σ_t p_jth q_jthᵀ for p [n, t, h, left], q [n, t, h, right]."""

    name = "grouped product"

    def __init__(self, p: Tensor, q: Tensor, groups: list[int], left: list[int], right: list[int], order: list[int]):
        self.n, self.p, self.q, self.order, self.device = len(p), p, q, order, p.device
        self.sizes = [*groups, *left, *right]
        self.inverse = [order.index(d) for d in range(len(order))]
        self.shape = torch.Size(self.sizes[d] for d in self.inverse)
        first = self._group(0)
        self.dtype, self.has_16bit_factor = first.dtype, first.has_16bit_factor

    def _group(self, h: int) -> Product:
        return Product(self.p[:, :, h], self.q[:, :, h], self.p.shape[3:], self.q.shape[3:], (0, 1))

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        dtype = torch.float64 if float64 else self.dtype
        p, q = (x.movedim(1, 2).flatten(0, 1) for x in (self.p, self.q))  # [n h, t, left], [n h, t, right]
        g = linear_impl.gradients(q, p, dtype).view(self.n, *self.sizes).permute(0, *(1 + d for d in self.inverse))
        return g.reshape(self.n, self.rows, self.cols)[:, rows]

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        count, shape = self.p.shape[2], (self.p.shape[3], self.q.shape[3])
        if u is not None:
            u = u.permute(0, *(1 + d for d in self.order)).reshape(len(u), count, *shape)
        passes = [self._group(h).gram(None if u is None else u[:, h], float64) for h in range(count)]
        K, v = zip(*passes, strict=True)
        return sum(K), sum(v)

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        if self.device.type == "cuda" and not float64:
            return super().combine_(out, c)
        dtype = torch.float64 if float64 else self.dtype
        p = self.p.to(dtype) * c.to(dtype).view(-1, 1, 1, 1)
        g = torch.einsum("nthl,nthr->hlr", p, self.q.to(dtype))
        add_(out, g.view(self.sizes).permute(self.inverse))

    def weighted_gram(self, d: Tensor, u: Tensor, float64: bool = False) -> tuple[Tensor, Tensor]:
        shape = self.p.shape[2], self.p.shape[3], self.q.shape[3]
        ds, us = (t.permute(self.order).reshape(shape) for t in (d, u))
        passes = [self._group(h).weighted_gram(ds[h], us[h], float64) for h in range(len(ds))]
        K, v = zip(*passes, strict=True)
        return sum(K), sum(v)


def joined(rules: Sequence[Rule]) -> Rule:
    """Return one rule for several uses of the same tensor: per-sample gradients are the sum over uses."""
    if len(rules) == 1:
        return rules[0]
    first = rules[0]
    if all(isinstance(r, Product) and r.form == first.form for r in rules):
        p, q = (torch.cat([getattr(r, name).flatten(2) for r in rules], 1) for name in "pq")
        return Product(p, q, first.left, first.right, first.order)
    tables = [r for r in rules if isinstance(r, Lookup)]
    heads = [r for r in rules if isinstance(r, Product) and len(r.left) == len(r.right) == 1]
    if len(rules) == 2 and len(tables) == len(heads) == 1:
        return Tied(tables[0], heads[0])
    return Sum(rules)
