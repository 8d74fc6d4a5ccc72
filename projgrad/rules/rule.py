"""Rules: per-sample gradients of one parameter from what one use of it left behind, without holding all of them.

The whole extension interface is `Rule`: `chunk(rows)`, and faster `gram`, `dot`, `combine_` where there are any.
Sizes: n samples, t positions, i inputs, o outputs; a parameter is a matrix of `rows` x `cols`, its first dimension
against the rest.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops import linear_impl
from ..ops.cost import GramRoute, chunk_bytes, linear_route
from ..ops.gram import gram_op
from ..ops.numerics import product_dtype


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

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        """g_j for some rows of the parameter, [n, len(rows), cols]; multiplied in float64 if `float64`."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) else 1

    @property
    def cols(self) -> int:
        return math.prod(self.shape[1:])

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        """K = G Gᵀ [n, n] and v = G u [n, m] in float64; u [m, *shape], None for m = 0."""
        if not self.rows:
            K = torch.zeros(self.n, self.n, dtype=torch.float64, device=self.device)
            return K, K.new_zeros(self.n, 0 if u is None else len(u))
        K, v = 0.0, 0.0
        for rows, g in self._chunks(float64):
            k, w = gram(g, None if u is None else u.reshape(len(u), self.rows, self.cols)[:, rows], float64)
            K, v = K + k, v + w
        return K, v

    def dot(self, u: Tensor, float64: bool = False) -> Tensor:
        """G u [n, m] for u [m, *shape]."""
        return self.gram(u, float64)[1]

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        """out += Σ_j c_j g_j; c [n] float64, out of shape `shape`."""
        for rows, g in self._chunks(float64):
            self._add(out, rows, torch.einsum("n,nrc->rc", c.to(g.dtype), g))

    def moments_(self, first: Tensor, second: Tensor) -> None:
        """first += Σ_j g_j and second += Σ_j g_j², each of shape `shape`."""
        for rows, g in self._chunks():
            self._add(first, rows, g.sum(0))
            self._add(second, rows, g.square().sum(0))

    def _add(self, out: Tensor, rows: slice, part: Tensor) -> None:
        target = out[rows] if out.ndim else out
        target.add_(part.reshape(target.shape))

    def cost(self) -> GramRoute:
        """How `gram` goes about it: route, flops, bytes besides the factors."""
        step = self._step(False)
        flops = self.n * (self.n + 1) * self.rows * self.cols
        return GramRoute(
            "chunks", step, self.cols, flops, self.n * min(step, self.rows) * self.cols * self.dtype.itemsize
        )

    def dense(self) -> Tensor:
        """G [n, *shape]."""
        return self.chunk(slice(0, self.rows)).reshape(self.n, *self.shape)

    def _chunks(self, float64: bool = False) -> Iterator[tuple[slice, Tensor]]:
        step = self._step(float64)
        for start in range(0, self.rows, step):
            rows = slice(start, min(self.rows, start + step))
            yield rows, self.chunk(rows, float64)

    def _step(self, float64: bool) -> int:
        """Rows of the parameter in one chunk."""
        one = self.n * self.cols * (8 if float64 else self.dtype.itemsize)
        return max(1, chunk_bytes(self.device.type) // max(1, one))


def gram(g: Tensor, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
    """K and v of an explicit chunk g [n, ...], u [m, ...] or None."""
    flat = g.reshape(len(g), -1)
    u = flat.new_empty((0, flat.shape[1])) if u is None else u.reshape(len(u), -1)
    return gram_op(flat, u.to(flat.dtype), float64)


class Rows(Rule):
    """Per-sample gradients that are at hand: biases, scales, small free parameters."""

    name = "rows"

    def __init__(self, g: Tensor) -> None:
        self.g, self.device = g, g.device  # [n, *shape]
        self.n, self.shape, self.dtype = len(g), g.shape[1:], product_dtype(g.dtype)
        self.has_16bit_factor, self.cheap = g.dtype.itemsize == 2, g.numel() < 1 << 18

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        return self.g.reshape(self.n, self.rows, self.cols)[:, rows].to(product_dtype(self.g.dtype, float64=float64))


class Product(Rule):
    """g_j = Σ_t p_jt q_jtᵀ: linear layers, products and contractions with a parameter.

    p [n, t, *left], q [n, t, *right]; `order` permutes the parameter's dimensions into (*left, *right).
    """

    name = "product"

    def __init__(self, p: Tensor, q: Tensor, left: Sequence[int], right: Sequence[int], order: Sequence[int]) -> None:
        self.n, self.p, self.q, self.device = len(p), p, q, p.device
        self.left, self.right, self.order = tuple(left), tuple(right), tuple(order)
        sizes = self.left + self.right
        self.inverse = tuple(self.order.index(d) for d in range(len(order)))
        self.shape = torch.Size(sizes[d] for d in self.inverse)
        self.dtype = product_dtype(p.dtype, q.dtype)
        self.has_16bit_factor = p.dtype.itemsize == 2 or q.dtype.itemsize == 2

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
        g = torch.bmm(p.to(dtype).mT, q.to(dtype)).view(self.n, *left, *right)
        return g.permute(0, *(1 + d for d in self.inverse)).reshape(self.n, length, self.cols)

    def matrix(self, u: Tensor) -> Tensor:
        """u [m, *shape] -> [m, |left|, |right|]."""
        return u.permute(0, *(1 + d for d in self.order)).reshape(len(u), math.prod(self.left), math.prod(self.right))

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        p, q = self.p.flatten(2), self.q.flatten(2)
        u = p.new_empty((0, p.shape[2], q.shape[2])) if u is None else self.matrix(u)
        return linear_impl.linear_gram(q, p, u, float64)

    def cost(self) -> GramRoute:
        i, o = math.prod(self.right), math.prod(self.left)
        itemsize = max(self.p.dtype.itemsize, self.q.dtype.itemsize)
        return linear_route(self.n, self.p.shape[1], i, o, itemsize=itemsize, device=self.device.type)

    def dot(self, u: Tensor, float64: bool = False) -> Tensor:
        return linear_impl.linear_dot(self.q.flatten(2), self.p.flatten(2), self.matrix(u), float64)

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        if float64:
            return super().combine_(out, c, float64)
        p, q, target = self.p.flatten(2), self.q.flatten(2), out.permute(self.order)
        if len(self.left) == 1 and len(self.right) == 1:
            linear_impl.linear_combine_(target, q, p, c)
        else:
            part = torch.zeros(p.shape[2], q.shape[2], dtype=self.dtype, device=p.device)
            linear_impl.linear_combine_(part, q, p, c)
            target.add_(part.view(target.shape))

    def moments_(self, first: Tensor, second: Tensor) -> None:
        for out, part in zip(
            (first, second), linear_impl.linear_moments(self.q.flatten(2), self.p.flatten(2)), strict=True
        ):
            target = out.permute(self.order)
            target.add_(part.view(target.shape))

    def transposed(self) -> "Product":
        """The same for the transposed parameter."""
        flip = [d for d in range(len(self.order))][::-1]
        return Product(self.p, self.q, self.left, self.right, [flip[d] for d in self.order])


class Grouped(Rule):
    """One product per group: g_j[h] = Σ_t p_jth q_jthᵀ for p [n, t, h, left], q [n, t, h, right]."""

    name = "grouped product"

    def __init__(self, p: Tensor, q: Tensor, groups: list[int], left: list[int], right: list[int], order: list[int]):
        self.n, self.p, self.q, self.order, self.device = len(p), p, q, order, p.device
        self.sizes = [*groups, *left, *right]
        self.inverse = [order.index(d) for d in range(len(order))]
        self.shape = torch.Size(self.sizes[d] for d in self.inverse)
        first = Product(p[:, :, 0], q[:, :, 0], p.shape[3:], q.shape[3:], (0, 1))
        self.dtype, self.has_16bit_factor = first.dtype, first.has_16bit_factor

    def _group(self, h: int) -> Product:
        return Product(self.p[:, :, h], self.q[:, :, h], self.p.shape[3:], self.q.shape[3:], (0, 1))

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        dtype = torch.float64 if float64 else self.dtype
        p, q = self.p.movedim(1, 3).to(dtype), self.q.movedim(1, 2).to(dtype)  # [n, h, left, t], [n, h, t, right]
        g = torch.matmul(p, q).reshape(self.n, *self.sizes).permute(0, *(1 + d for d in self.inverse))
        return g.reshape(self.n, self.rows, self.cols)[:, rows]

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        count, shape = self.p.shape[2], (self.p.shape[3], self.q.shape[3])
        if u is not None:
            u = u.permute(0, *(1 + d for d in self.order)).reshape(len(u), count, *shape)
        passes = [self._group(h).gram(None if u is None else u[:, h], float64) for h in range(count)]
        K, v = zip(*passes, strict=True)
        return sum(K), sum(v)


def joined(rules: Sequence[Rule]) -> Rule:
    """One rule for several uses of the same tensor: per-sample gradients are the sum over uses."""
    if len(rules) == 1:
        return rules[0]
    first = rules[0]
    if all(isinstance(r, Product) and r.form == first.form for r in rules):
        p, q = (torch.cat([getattr(r, name).flatten(2) for r in rules], 1) for name in "pq")
        return Product(p, q, first.left, first.right, first.order)
    return Sum(rules)


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
