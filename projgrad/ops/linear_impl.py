"""How the products of one linear layer are computed: two routes to its Gram matrix, and single matrix products.

a [n, t, i] are the inputs of the layer and b [n, t, o] the gradients at its output; g_j = Σ_t b_jt a_jtᵀ [o, i].
No function holds more than one chunk of per-sample gradients; `cost.py` picks the route and sizes the chunk.
The leaves are made of library products here; `kernels/layer.py` puts kernels of its own in their place on CUDA.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.library import Library

from .cost import GramRoute, chunk_bytes, linear_route
from .flat import _gram

library = Library("projgrad", "FRAGMENT")
composed: dict[str, Callable] = {}  # the leaves by name, made of library products


def leaf(schema: str) -> Callable:
    """A private operator that a device may compute in its own way, without gradients; the function is the default."""

    def register(function: Callable) -> Callable:
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, function, "CompositeExplicitAutograd")
        composed[name] = function
        return getattr(torch.ops.projgrad, name).default

    return register


def _multiplied(*tensors: Tensor, float64: bool = False) -> torch.dtype:
    """The precision in which these are multiplied: float64 if one of them has it or `float64` is set, else float32."""
    float64 = float64 or any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if float64 else torch.float32


def _rounded(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


# Chunks: blocks of the per-sample gradients of all samples. Products have `out`, which autocast leaves alone.


def _blocks(a: Tensor, b: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[tuple, Tensor]]:
    """Every rows x columns block of W and its per-sample gradients [n, r, c], each in the memory of the one before."""
    n, i, o = len(a), a.shape[2], b.shape[2]
    buffer = a.new_empty(n * rows * columns, dtype=dtype)
    for r in range(0, o, rows):
        for c in range(0, i, columns):
            y, x = b[:, :, r : r + rows], a[:, :, c : c + columns]
            g = buffer[: n * y.shape[2] * x.shape[2]].view(n, y.shape[2], x.shape[2])
            _sample_products_(g, y, x)
            yield (slice(r, r + rows), slice(c, c + columns)), g


@leaf("sample_products_(Tensor(a!) g, Tensor b, Tensor a) -> ()")
def _sample_products_(g: Tensor, b: Tensor, a: Tensor) -> None:
    """g_j [n, o, i] = b_jᵀ a_j, multiplied in the precision of g."""
    t, (_, rows, columns) = a.shape[1], g.shape
    converts = a.dtype != g.dtype or b.dtype != g.dtype
    step = max(64, rows * columns // (rows + columns)) if converts else max(1, t)  # copies no larger than the chunk
    for s in range(0, max(1, t), step):
        part = slice(s, s + step)
        torch.baddbmm(g, b[:, part].to(g.dtype).mT, a[:, part].to(g.dtype), beta=min(s, 1), out=g)


def _chunks(a: Tensor, b: Tensor, u: Tensor, float64: bool, route: GramRoute) -> tuple[Tensor, Tensor]:
    """K [n, n] and v [n, m] from one pass over the per-sample gradients."""
    dtype, parts = _multiplied(a, b, float64=float64), None
    for (r, c), g in _blocks(a, b, route.rows, route.columns, dtype):
        one = _gram(g.flatten(1), u[:, r, c].to(dtype).flatten(1), float64)
        parts = one if parts is None else tuple(map(torch.add, parts, one))
    return parts or tuple(a.new_zeros((len(a), k), dtype=torch.float64) for k in (len(a), len(u)))


def _chunks_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, route: GramRoute) -> Tensor:
    """K [n, n2] between two groups of samples, block by block."""
    K = a.new_zeros((a.shape[0], a2.shape[0]), dtype=torch.float64)
    dtype = _multiplied(a, b)
    blocks = (_blocks(*factors, route.rows, route.columns, dtype) for factors in ((a, b), (a2, b2)))
    for (_, g), (_, g2) in zip(*blocks, strict=True):
        K += _cross_gram(g.flatten(1), g2.flatten(1), dtype == torch.float64)
    return K


@leaf("cross_gram(Tensor G, Tensor G2, bool float64) -> Tensor")
def _cross_gram(G: Tensor, G2: Tensor, float64: bool) -> Tensor:
    """G G2ᵀ [n, n2] in float64."""
    return _gram(G, G2, float64)[1]


# Factors: <b aᵀ, b' a'ᵀ> = (a · a') (b · b') for every pair of tokens, in tiles of some samples against the others.


def _pair_sums(a: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    """The sums of a ∘ b [n t, m t2] over the tokens of each pair of samples [n, m]; overwrites a."""
    if a.shape == (n, m):
        return a.mul_(b)
    if a.numel() == 0:
        return a.new_zeros((n, m))
    return a.mul_(b).view(n, -1, a.shape[1]).sum(1).view(n, m, -1).sum(2)


@leaf("token_gram(Tensor a, Tensor b, bool float64, int samples) -> Tensor")
def _token_gram(a: Tensor, b: Tensor, float64: bool, samples: int) -> Tensor:
    """K [n, n]: every tile of some samples with itself and the samples after it."""
    n, t = a.shape[:2]
    A, B = a.flatten(0, 1), b.flatten(0, 1)
    K = a.new_empty((n, n), dtype=torch.float64)
    for s in range(0, n, samples):
        e = min(n, s + samples)
        (own_a, rest_a), (own_b, rest_b) = (_gram(x[s * t : e * t], x[e * t :], float64) for x in (A, B))
        own = _pair_sums(own_a, own_b, e - s, e - s)
        K[s:e, s:e] = own if t == 1 else (own + own.mT) / 2  # sums of tokens round differently
        if e < n:
            rest = _pair_sums(rest_a, rest_b, e - s, n - e)
            K[s:e, e:], K[e:, s:e] = rest, rest.mT
    return K


@leaf("token_gram_across(Tensor a, Tensor b, Tensor a2, Tensor b2, int samples) -> Tensor")
def _token_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, samples: int) -> Tensor:
    """K [n, n2] between two groups of samples."""
    (n, t), (n2, _) = a.shape[:2], a2.shape[:2]
    float64 = _multiplied(a, b) == torch.float64
    A, B, A2, B2 = (x.flatten(0, 1) for x in (a, b, a2, b2))
    K = a.new_empty((n, n2), dtype=torch.float64)
    for s in range(0, n, samples):
        e = min(n, s + samples)
        tokens = slice(s * t, e * t)
        K[s:e] = _pair_sums(*(_cross_gram(x[tokens], y, float64) for x, y in ((A, A2), (B, B2))), e - s, n2)
    return K


# What the ops and the tape run.


@torch.no_grad()
def _linear_gram(
    a: Tensor, b: Tensor, u: Tensor, float64: bool = False, budget: int | None = None
) -> tuple[Tensor, Tensor]:
    """K [n, n] and v = <g_j, u_m> [n, m] for u [m, o, i], both float64; multiplied in float64 too if `float64`."""
    route = _route(a, b, m=len(u), float64=float64, budget=budget)
    float64 = _multiplied(a, b, float64=float64) == torch.float64
    if route.name == "chunks":
        return _chunks(a, b, u, float64, route)
    return _token_gram(a, b, float64, route.rows), _linear_dot(a, b, u, float64)


@torch.no_grad()
def _linear_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """K [n, n2] between two groups of samples."""
    route = _route(a, b, a2)
    if route.name == "chunks":
        return _chunks_across(a, b, a2, b2, route)
    return _token_gram_across(a, b, a2, b2, route.rows)


def _route(a: Tensor, b: Tensor, *others: Tensor, float64: bool = False, **options) -> GramRoute:
    n, t = sum(x.shape[0] for x in (a, *others)), max(x.shape[1] for x in (a, *others))
    itemsize = 8 if float64 else max(a.dtype.itemsize, b.dtype.itemsize)
    return linear_route(n, t, a.shape[2], b.shape[2], itemsize=itemsize, device=a.device.type, **options)


@torch.no_grad()
def _linear_dot(a: Tensor, b: Tensor, u: Tensor, float64: bool = False) -> Tensor:
    """v_jm = Σ_t b_jtᵀ u_m a_jt [n, m] in float64 for u [m, o, i]."""
    if 0 in (*a.shape, *u.shape):
        return a.new_zeros((a.shape[0], u.shape[0]), dtype=torch.float64)
    return _layer_dot(a, b, u, float64)


@leaf("layer_dot(Tensor a, Tensor b, Tensor u, bool float64) -> Tensor")
def _layer_dot(a: Tensor, b: Tensor, u: Tensor, float64: bool) -> Tensor:
    """One product with u from the side that leaves less."""
    (n, t, i), (m, o) = a.shape, u.shape[:2]
    dtype = _multiplied(a, b, u, float64=float64)
    v = a.new_zeros((n, m), dtype=torch.float64)
    x, y, w = (a, b, u.mT) if o <= i else (b, a, u)
    samples = max(1, min(n, chunk_bytes(a.device.type) // (dtype.itemsize * t * (i + o))))
    buffer = a.new_empty(samples * t, w.shape[2], dtype=dtype)
    shift = _exponents(u)
    units = torch.ldexp(u.new_ones(m, dtype=dtype), -shift)  # exact, as all powers of two
    for s in range(0, n, samples):
        part, other = (z[s : s + samples].to(dtype) for z in (x, y))
        exponents = _exponents(part)
        scales = torch.ldexp(part.new_ones(exponents.shape), -exponents)
        part = (part * scales[:, None, None]).flatten(0, 1)  # [samples t, i or o]
        for k in range(m):
            xw = torch.mm(part, w[k].to(dtype), out=buffer[: part.shape[0]])
            xw.mul_(units[k]).mul_(other.flatten(0, 1))
            v[s : s + samples, k] = torch.ldexp(xw.sum(1).view(-1, t).sum(1, dtype=torch.float64), exponents + shift[k])
    return v


def _exponents(x: Tensor) -> Tensor:
    """The power of two that brings the largest element of each x_j near 1 [n], within what float32 holds.

    Products of tiny gradients with tiny directions leave float32 where neither of them does.
    """
    if x[:1].numel() == 0:
        return x.new_zeros(x.shape[0], dtype=torch.int32)
    x = x.flatten(1)
    return torch.frexp(torch.maximum(x.amax(1), -x.amin(1)).double()).exponent.clamp(-120, 120)


@torch.no_grad()
def _linear_combine_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """out [o, i] += Σ_j c_j g_j, for c [n]. Any strides of out."""
    if 0 not in (*a.shape, *b.shape):
        _layer_combine_(out, a, b, c)


@leaf("layer_combine_(Tensor(a!) out, Tensor a, Tensor b, Tensor c) -> ()")
def _layer_combine_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """One matrix product, with the smaller factor scaled."""
    budget = chunk_bytes(a.device.type)
    (n, t, i), o = a.shape, b.shape[2]
    dtype = _multiplied(out, a, b)
    if out.dtype != dtype:  # a gradient in a half type is rounded once, not once per product
        rows = max(1, budget // (dtype.itemsize * i))
        for part, y in zip(out.split(rows), b.split(rows, 2), strict=True):
            exact = part.to(dtype)
            _layer_combine_(exact, a, y, c)
            part.copy_(exact)
        return
    root = c.double().abs().sqrt()  # twice √c: c of tiny gradients leaves float32, the products c b do not
    scales = [r.to(dtype)[:, None, None] for r in (root, root * c.sign())]
    samples = max(1, budget // (dtype.itemsize * t * (i + o)))
    for s in range(0, n, samples):
        x, y, first, second = (z[s : s + samples].to(dtype) for z in (a, b, *scales))
        if i <= o:
            x = (x * first).mul_(second)
        else:
            y = (y * first).mul_(second)
        out.addmm_(y.flatten(0, 1).mT, x.flatten(0, 1))


@leaf("layer_moments(Tensor a, Tensor b) -> (Tensor, Tensor)")
def _linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j g_j and Σ_j g_j² [o, i]. Of single positions both are products: g² = (b²)ᵀ a²."""
    (n, t, i), o, dtype = a.shape, b.shape[2], _multiplied(a, b)
    total, squares = (a.new_zeros((o, i), dtype=dtype) for _ in range(2))
    if t == 1:
        _linear_combine_(total, a, b, a.new_ones(n))
        x = a[:, 0].double().square()  # squares of float32 leave its range
        rows = max(1, chunk_bytes(a.device.type) // (8 * max(1, n, i)))
        for part, y in zip(squares.split(rows), b[:, 0].split(rows, 1), strict=True):
            part.copy_(torch.mm(y.double().square().mT, x))
        return total, squares
    route = _route(a, b, only="chunks")
    for block, g in _blocks(a, b, route.rows, route.columns, dtype):
        total[block] = g.sum(0)
        squares[block] = g.square_().sum(0)
    return total, squares
