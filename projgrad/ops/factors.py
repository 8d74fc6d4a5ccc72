"""The ops on the factors of one linear layer y = x Wᵀ, whose per-sample gradient is g_j = Σ_t b_jt a_jtᵀ [o, i].

a [n, t, i] are the inputs of the layer and b [n, t, o] the gradients at its output. No op holds more than one chunk of
per-sample gradients; `cost.py` says which route a Gram matrix takes and how large the chunk is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..cost import CHUNK_BYTES, Route, linear_route
from .flat import DTYPES, _check_reverse_mode, _gram, _product, _vmap_loop


def _multiplied(*tensors: Tensor, wide: bool = False) -> torch.dtype:
    """The precision in which these are multiplied: float64 if one of them has it, or `wide`, else float32."""
    wide = wide or any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def _rounded(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


# Chunks: blocks of the per-sample gradients of all samples. Products have `out`, which autocast leaves alone.


def _blocks(a: Tensor, b: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[tuple, Tensor]]:
    """Every rows x columns block of W and its per-sample gradients [n, r, c], each in the memory of the one before."""
    (n, t, i), o = a.shape, b.shape[2]
    buffer = a.new_empty(n * rows * columns, dtype=dtype)
    converts = a.dtype != dtype or b.dtype != dtype
    step = max(64, rows * columns // (rows + columns)) if converts else max(1, t)  # copies no larger than the chunk
    for r in range(0, o, rows):
        for c in range(0, i, columns):
            y, x = b[:, :, r : r + rows], a[:, :, c : c + columns]
            g = buffer[: n * y.shape[2] * x.shape[2]].view(n, y.shape[2], x.shape[2])
            for s in range(0, max(1, t), step):
                part = slice(s, s + step)
                torch.baddbmm(g, y[:, part].to(dtype).mT, x[:, part].to(dtype), beta=min(s, 1), out=g)
            yield (slice(r, r + rows), slice(c, c + columns)), g


def _chunks(a: Tensor, b: Tensor, u: Tensor, wide: bool, route: Route) -> tuple[Tensor, Tensor]:
    """K [n, n] and v [n, m] from one pass over the per-sample gradients."""
    n, m, dtype = a.shape[0], u.shape[0], _multiplied(a, b, wide=wide)
    K, v = (a.new_zeros(shape, dtype=torch.float64) for shape in ((n, n), (n, m)))
    for (r, c), g in _blocks(a, b, route.rows, route.columns, dtype):
        part, dots = _gram(g.flatten(1), u[:, r, c].to(dtype).flatten(1), wide)
        K += part
        v += dots
    return K, v


def _chunks_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, route: Route) -> Tensor:
    """K [n, n2] between two groups of samples, block by block."""
    K = a.new_zeros((a.shape[0], a2.shape[0]), dtype=torch.float64)
    dtype = _multiplied(a, b)
    blocks = (_blocks(*factors, route.rows, route.columns, dtype) for factors in ((a, b), (a2, b2)))
    for (_, g), (_, g2) in zip(*blocks, strict=True):
        K += _gram(g.flatten(1), g2.flatten(1), False)[1]
    return K


# Factors: <b aᵀ, b' a'ᵀ> = (a · a') (b · b') for every pair of tokens, in tiles of some samples against the others.


def _pair_sums(a: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    """The sums of a ∘ b [n t, m t2] over the tokens of each pair of samples [n, m]; overwrites a."""
    if a.shape == (n, m):
        return a.mul_(b)
    if a.numel() == 0:
        return a.new_zeros((n, m))
    return a.mul_(b).view(n, -1, a.shape[1]).sum(1).view(n, m, -1).sum(2)


def _factors(a: Tensor, b: Tensor, wide: bool, route: Route) -> Tensor:
    """K [n, n]: every tile with itself and the samples after it."""
    n, t = a.shape[:2]
    A, B = a.flatten(0, 1), b.flatten(0, 1)
    K = a.new_empty((n, n), dtype=torch.float64)
    for s in range(0, n, route.rows):
        e = min(n, s + route.rows)
        (own_a, rest_a), (own_b, rest_b) = (_gram(x[s * t : e * t], x[e * t :], wide) for x in (A, B))
        own = _pair_sums(own_a, own_b, e - s, e - s)
        K[s:e, s:e] = own if t == 1 else (own + own.mT) / 2  # sums of tokens round differently
        if e < n:
            rest = _pair_sums(rest_a, rest_b, e - s, n - e)
            K[s:e, e:], K[e:, s:e] = rest, rest.mT
    return K


def _factors_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, route: Route) -> Tensor:
    """K [n, n2] between two groups of samples."""
    (n, t), (n2, _) = a.shape[:2], a2.shape[:2]
    wide = _multiplied(a, b) == torch.float64
    A, B, A2, B2 = (x.flatten(0, 1) for x in (a, b, a2, b2))
    K = a.new_empty((n, n2), dtype=torch.float64)
    for s in range(0, n, route.rows):
        e = min(n, s + route.rows)
        tokens = slice(s * t, e * t)
        K[s:e] = _pair_sums(_gram(A[tokens], A2, wide)[1], _gram(B[tokens], B2, wide)[1], e - s, n2)
    return K


# What the ops and the tape run.


@torch.no_grad()
def _linear_gram(
    a: Tensor, b: Tensor, u: Tensor, wide: bool = False, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """K [n, n] and v = <g_j, u_m> [n, m], float64, for u [m, o, i]; `wide`: multiply in float64 whatever the dtype."""
    (n, t, i), (m, o) = a.shape, u.shape[:2]
    dtype = _multiplied(a, b, wide=wide)
    route = linear_route(n, t, i, o, m=m, itemsize=dtype.itemsize, budget=chunk_bytes)
    wide = dtype == torch.float64
    if route.name == "chunks":
        return _chunks(a, b, u, wide, route)
    return _factors(a, b, wide, route), _linear_dot(a, b, u, wide, chunk_bytes)


@torch.no_grad()
def _linear_dot(a: Tensor, b: Tensor, u: Tensor, wide: bool = False, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """v_jm = Σ_t b_jtᵀ u_m a_jt [n, m] in float64: one product with u [m, o, i] from the side that leaves less."""
    (n, t, i), (m, o) = a.shape, u.shape[:2]
    dtype = _multiplied(a, b, u, wide=wide)
    v = a.new_zeros((n, m), dtype=torch.float64)
    if v.numel() == 0 or t == 0:
        return v
    x, y, w = (a, b, u.mT) if o <= i else (b, a, u)
    samples = max(1, min(n, chunk_bytes // (dtype.itemsize * t * max(1, i + o))))
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
def _linear_combine_(out: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_bytes: int = CHUNK_BYTES) -> None:
    """out [o, i] += Σ_j c_j g_j, for c [n]: one matrix product, with the smaller factor scaled. Any strides of out."""
    (n, t, i), o = a.shape, b.shape[2]
    dtype = _multiplied(out, a, b)
    if out.dtype != dtype:  # a gradient in a half type is rounded once, not once per product
        rows = max(1, chunk_bytes // (dtype.itemsize * max(1, i)))
        for part, y in zip(out.split(rows), b.split(rows, 2), strict=True):
            exact = part.to(dtype)
            _linear_combine_(exact, a, y, c, chunk_bytes)
            part.copy_(exact)
        return
    root = c.double().abs().sqrt()  # twice √c: c of tiny gradients leaves float32, the products c b do not
    scales = [r.to(dtype)[:, None, None] for r in (root, root * c.sign())]
    samples = max(1, chunk_bytes // (dtype.itemsize * max(1, t * (i + o))))
    for s in range(0, n, samples):
        x, y, first, second = (z[s : s + samples].to(dtype) for z in (a, b, *scales))
        if i <= o:
            x = (x * first).mul_(second)
        else:
            y = (y * first).mul_(second)
        out.addmm_(y.flatten(0, 1).mT, x.flatten(0, 1))


def _linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j g_j and Σ_j g_j² [o, i]. Of single positions both are products: g² = (b²)ᵀ a²."""
    (n, t, i), o, dtype = a.shape, b.shape[2], _multiplied(a, b)
    total, squares = (a.new_zeros((o, i), dtype=dtype) for _ in range(2))
    if t == 1:
        _linear_combine_(total, a, b, a.new_ones(n))
        x = a[:, 0].double().square()  # squares of float32 leave its range
        rows = max(1, CHUNK_BYTES // (8 * max(1, n, i)))
        for part, y in zip(squares.split(rows), b[:, 0].split(rows, 1), strict=True):
            part.copy_(torch.mm(y.double().square().mT, x))
        return total, squares
    route = linear_route(n, t, i, o, itemsize=dtype.itemsize, only="chunks")
    for block, g in _blocks(a, b, route.rows, route.columns, dtype):
        total[block] = g.sum(0)
        squares[block] = g.square_().sum(0)
    return total, squares


# The schemas. Inside them a is always [n, t, i], b [n, t, o], u [m, o, i] and c [m, n]. No leaf kernels here: the
# default kernels are made of products and `gram`, on every device.


@custom_op("projgrad::linear_gram", mutates_args=())
def _linear_gram_op(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> Tensor:
    if a2 is None or b2 is None:
        return _linear_gram(a, b, a.new_empty(0, b.shape[2], a.shape[2]))[0]
    n, t, itemsize = a.shape[0] + a2.shape[0], max(a.shape[1], a2.shape[1]), _multiplied(a, b).itemsize
    route = linear_route(n, t, a.shape[2], b.shape[2], itemsize=itemsize)
    return (_chunks_across if route.name == "chunks" else _factors_across)(a, b, a2, b2, route)


@custom_op("projgrad::linear_dot", mutates_args=())
def _linear_dot_op(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return _linear_dot(a, b, u)


@custom_op("projgrad::linear_combine", mutates_args=())
def _linear_combine_op(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    out = a.new_zeros((c.shape[0], b.shape[2], a.shape[2]), dtype=_multiplied(a, b))
    for part, weights in zip(out, c, strict=True):
        _linear_combine_(part, a, b, weights)
    return out.to(_rounded(a, b))


@custom_op("projgrad::linear_moments", mutates_args=())
def _linear_moments_op(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total, squares = _linear_moments(a, b)
    return total.to(_rounded(a, b)), squares.to(_rounded(a, b))


# Shapes.


@_linear_gram_op.register_fake
def _(a, b, a2, b2):
    return a.new_empty((a.shape[0], (a if a2 is None else a2).shape[0]), dtype=torch.float64)


@_linear_dot_op.register_fake
def _(a, b, u):
    return a.new_empty((a.shape[0], u.shape[0]), dtype=torch.float64)


@_linear_combine_op.register_fake
def _(a, b, c):
    return a.new_empty((c.shape[0], b.shape[2], a.shape[2]), dtype=_rounded(a, b))


@_linear_moments_op.register_fake
def _(a, b):
    return tuple(a.new_empty((b.shape[2], a.shape[2]), dtype=_rounded(a, b)) for _ in range(2))


# Gradients: those of dot and combine are each other, those of gram and moments form the per-sample gradients [n, o, i].
# All in float64, rounded at the end.


def _through(dg: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """da and db from dg [n, o, i], the derivative by the per-sample gradients."""
    return (b.double() @ dg).to(a.dtype), (a.double() @ dg.mT).to(b.dtype)


def _explicit(a: Tensor, b: Tensor) -> Tensor:
    return b.double().mT @ a.double()


def _linear_gram_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_gram_backward(ctx, dK):
    def towards(dK: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
        g2 = _explicit(a2, b2)  # [n2, o, i]
        return _through(_product(dK, g2.flatten(1)).unflatten(1, g2.shape[1:]), a, b)

    a, b, a2, b2 = ctx.saved_tensors
    if a2 is None:
        return *towards(dK + dK.mT, a, b, a, b), None, None
    return *towards(dK, a, b, a2, b2), *towards(dK.mT, a2, b2, a, b)


def _weighted(a: Tensor, b: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """da and db of Σ_jm c_jm <g_j, u_m>."""
    c, u = c.double(), u.double()
    da = torch.einsum("nm,mnti->nti", c, (b.double().flatten(0, 1) @ u).unflatten(1, b.shape[:2]))
    db = torch.einsum("nm,mnto->nto", c, (a.double().flatten(0, 1) @ u.mT).unflatten(1, a.shape[:2]))
    return da.to(a.dtype), db.to(b.dtype)


def _linear_dot_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_dot_backward(ctx, dv):
    a, b, u = ctx.saved_tensors
    return *_weighted(a, b, dv, u), _linear_combine_op(a, b, dv.mT).to(u.dtype)


def _linear_combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_combine_backward(ctx, dout):
    a, b, c = ctx.saved_tensors
    return *_weighted(a, b, c.mT, dout), _linear_dot_op(a, b, dout).mT.to(c.dtype)


def _linear_moments_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)


def _linear_moments_backward(ctx, dtotal, dsquares):
    a, b = ctx.saved_tensors
    return _through(dtotal.double() + 2 * dsquares.double() * _explicit(a, b), a, b)


_linear_gram_op.register_autograd(_linear_gram_backward, setup_context=_linear_gram_setup)
_linear_dot_op.register_autograd(_linear_dot_backward, setup_context=_linear_dot_setup)
_linear_combine_op.register_autograd(_linear_combine_backward, setup_context=_linear_combine_setup)
_linear_moments_op.register_autograd(_linear_moments_backward, setup_context=_linear_moments_setup)


# vmap: every layer once per element.


def _vmap_one(op: Any) -> Any:
    rule = _vmap_loop(lambda *args: (op(*args),))

    def single(info, in_dims, *args):
        (out,), (dim,) = rule(info, in_dims, *args)
        return out, dim

    return single


for _op in (_linear_gram_op, _linear_dot_op, _linear_combine_op):
    _op.register_vmap(_vmap_one(_op))
_linear_moments_op.register_vmap(_vmap_loop(_linear_moments_op))


# The public functions.


def _tokens(op: str, a: Tensor, b: Tensor, x: str = "a", y: str = "b") -> tuple[Tensor, Tensor]:
    """a (n, t, i) and b (n, t, o), checked; t = 1 where they have no t."""
    if a.ndim not in (2, 3) or a.ndim != b.ndim or a.shape[:-1] != b.shape[:-1]:
        raise ValueError(
            f"{op}: {x} and {y} must be (n, t, i) and (n, t, o), or (n, i) and (n, o); "
            f"got {x} {tuple(a.shape)} and {y} {tuple(b.shape)}"
        )
    for name, z in ((x, a), (y, b)):
        if z.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16; got {z.dtype}")
    if a.device != b.device:
        raise ValueError(f"{op}: {x} and {y} must be on one device; got {x} on {a.device} and {y} on {b.device}")
    _check_reverse_mode(op, a, b)
    return (a, b) if a.ndim == 3 else (a[:, None], b[:, None])


def _check_other(op: str, name: str, other: Tensor, a: Tensor) -> None:
    """`other`, u or c, beside the factors of a layer."""
    if other.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16; got {other.dtype}")
    if other.device != a.device:
        raise ValueError(f"{op}: {name} and a must be on one device; got {name} on {other.device} and a on {a.device}")
    _check_reverse_mode(op, other)


def linear_gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """Gram matrix of the per-sample gradients of a linear layer, from its factors.

    K_jk = <g_j, g2_k> = Σ_tt' (a_jt · a2_kt') (b_jt · b2_kt'),  g_j = Σ_t b_jt a_jtᵀ

    From products of tokens or from chunks of per-sample gradients, whichever is faster (`projgrad.cost.linear_route`).
    Neither the n per-sample gradients nor the (n t)² token product is ever held whole.

    Args:
        a: (n, t, i) or (n, i), inputs of the layer y = x Wᵀ; float32, float64, bfloat16 or float16; any strides.
        b: (n, t, o) or (n, o), gradients at its output; its dtype may differ from that of a.
        a2, b2: optional, (n2, t2, i) and (n2, t2, o): a second group of samples, dtypes and device of a and b.

    Returns:
        K (n, n) or (n, n2), float64 whatever the dtype of the factors, as `gram` does. Differentiable twice; the
        derivative forms the per-sample gradients of the layer.

    Raises:
        ValueError: shapes that do not match, one of a2 and b2 without the other, two devices.
        TypeError: a dtype that is not supported, or another one in the second group.

    Source: Goodfellow, Efficient per-example gradient computations, arXiv 1510.01799 (norms, t = 1).

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
        >>> projgrad.linear_gram(a, b).tolist()
        [[5.0, 6.0], [6.0, 9.0]]
    """
    a, b = _tokens("linear_gram", a, b)
    if a2 is None and b2 is None:
        return _linear_gram_op(a, b, None, None)
    if a2 is None or b2 is None:
        raise ValueError("linear_gram: a2 and b2 belong together; got only one of them")
    a2, b2 = _tokens("linear_gram", a2, b2, "a2", "b2")
    if a2.shape[2] != a.shape[2] or b2.shape[2] != b.shape[2]:
        raise ValueError(
            "linear_gram: a2 (n2, t2, i) and b2 (n2, t2, o) must have the i of a and the o of b; "
            f"got a {tuple(a.shape)}, b {tuple(b.shape)}, a2 {tuple(a2.shape)} and b2 {tuple(b2.shape)}"
        )
    if (a2.dtype, b2.dtype) != (a.dtype, b.dtype):
        raise TypeError(
            "linear_gram: a2 and b2 must have the dtypes of a and b; "
            f"got a {a.dtype}, b {b.dtype}, a2 {a2.dtype} and b2 {b2.dtype}"
        )
    if a2.device != a.device:
        raise ValueError(f"linear_gram: a2 must be on the device of a; got a on {a.device} and a2 on {a2.device}")
    return _linear_gram_op(a, b, a2, b2)


def linear_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Inner products of the per-sample gradients of a linear layer with a direction, from its factors.

    v_j = <g_j, u> = Σ_t b_jtᵀ u a_jt

    Args:
        a: (n, t, i) or (n, i), inputs of the layer; float32, float64, bfloat16 or float16; any strides.
        b: (n, t, o) or (n, o), gradients at its output; its dtype may differ from that of a.
        u: (o, i) or (m, o, i), one direction or several, like the weight; any of these dtypes.

    Returns:
        (n,), or (m, n) for several directions, float64. Differentiable twice.

    Raises:
        ValueError: shapes that do not match, or two devices.
        TypeError: a dtype that is not supported.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
        >>> projgrad.linear_dot(a, b, torch.tensor([[1.0, 1.0]])).tolist()
        [3.0, 3.0]
    """
    a, b = _tokens("linear_dot", a, b)
    if u.ndim not in (2, 3) or u.shape[-2:] != (b.shape[2], a.shape[2]):
        raise ValueError(
            "linear_dot: u must be (o, i) or (m, o, i) with the i of a and the o of b; "
            f"got u {tuple(u.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)}"
        )
    _check_other("linear_dot", "u", u, a)
    return _linear_dot_op(a, b, u).mT if u.ndim == 3 else _linear_dot_op(a, b, u[None])[:, 0]


def linear_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Weighted sum of the per-sample gradients of a linear layer, from its factors.

    Σ_j c_j g_j = Σ_jt c_j b_jt a_jtᵀ

    Args:
        a: (n, t, i) or (n, i), inputs of the layer; float32, float64, bfloat16 or float16; any strides.
        b: (n, t, o) or (n, o), gradients at its output; its dtype may differ from that of a.
        c: (n,) or (m, n), one set of weights or several; any of these dtypes (float64 from the other ops is welcome).

    Returns:
        (o, i) or (m, o, i), of the wider dtype of a and b; products are formed in float32 or better. Differentiable
        twice.

    Raises:
        ValueError: shapes that do not match, or two devices.
        TypeError: a dtype that is not supported.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
        >>> projgrad.linear_combine(a, b, torch.tensor([1.0, -1.0])).tolist()
        [[1.0, -1.0]]
    """
    a, b = _tokens("linear_combine", a, b)
    if c.ndim not in (1, 2) or c.shape[-1] != a.shape[0]:
        raise ValueError(
            f"linear_combine: c must be (n,) or (m, n) with the n of a; got c {tuple(c.shape)} and a {tuple(a.shape)}"
        )
    _check_other("linear_combine", "c", c, a)
    return _linear_combine_op(a, b, c) if c.ndim == 2 else _linear_combine_op(a, b, c[None])[0]


def linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the per-sample gradients of a linear layer and of their squares, element by element, from its factors.

    Σ_j g_j,  Σ_j g_j²

    Args:
        a: (n, t, i) or (n, i), inputs of the layer; float32, float64, bfloat16 or float16; any strides.
        b: (n, t, o) or (n, o), gradients at its output; its dtype may differ from that of a.

    Returns:
        Two tensors (o, i), of the wider dtype of a and b. Differentiable twice; the derivative forms the per-sample
        gradients of the layer.

    Raises:
        ValueError: shapes that do not match, or two devices.
        TypeError: a dtype that is not supported.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
        >>> [x.tolist() for x in projgrad.linear_moments(a, b)]
        [[[1.0, 5.0]], [[1.0, 13.0]]]
    """
    return _linear_moments_op(*_tokens("linear_moments", a, b))
