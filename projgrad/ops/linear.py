"""The ops on the factors of one linear layer y = x Wᵀ, whose per-sample gradient is g_j = Σ_t b_jt a_jtᵀ [o, i].

a [n, t, i] are the inputs of the layer and b [n, t, o] the gradients at its output. `linear_impl.py` says how the ops
are computed: none of them holds more than one chunk of per-sample gradients.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _options
from . import linear_impl
from .checks import check_dtype, check_one_device
from .numerics import multiply_in_float64, product_dtype
from .registration import call, check_reverse_mode, define_op

# Inside the ops a is always [n, t, i], b [n, t, o], u [m, o, i] and c [m, n].
# Gradients: those of dot and combine are each other, those of gram and moments form the per-sample gradients [n, o, i].
# All are computed in float64 and rounded at the end.


def _explicit(a: Tensor, b: Tensor) -> Tensor:
    """Return the per-sample gradients [n, o, i] in float64."""
    return b.double().mT @ a.double()


def _through(dg: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return da and db from dg [n, o, i], the derivative by the per-sample gradients."""
    return (b.double() @ dg).to(a.dtype), (a.double() @ dg.mT).to(b.dtype)


def _weighted(a: Tensor, b: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return da and db of Σ_jm c_jm <g_j, u_m>."""
    c, u = c.double(), u.double()
    da = torch.einsum("nm,mnti->nti", c, (b.double().flatten(0, 1) @ u).unflatten(1, b.shape[:2]))
    db = torch.einsum("nm,mnto->nto", c, (a.double().flatten(0, 1) @ u.mT).unflatten(1, a.shape[:2]))
    return da.to(a.dtype), db.to(b.dtype)


# linear_gram


def _gram_default(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> Tensor:
    if a2 is None or b2 is None:
        return linear_impl.gram_of_layer(a, b, a.new_empty(0, b.shape[2], a.shape[2]))[0]
    return linear_impl.linear_gram_across(a, b, a2, b2)


def _gram_shapes(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> Tensor:
    return a.new_empty((a.shape[0], (a if a2 is None else a2).shape[0]), dtype=torch.float64)


def _gram_backward(ctx: Any, dK: Tensor) -> tuple:
    def towards(dK: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
        g2 = _explicit(a2, b2)  # [n2, o, i]
        return _through(multiply_in_float64(dK, g2.flatten(1)).unflatten(1, g2.shape[1:]), a, b)

    a, b, a2, b2 = ctx.saved_tensors
    if a2 is None:
        return *towards(dK + dK.mT, a, b, a, b), None, None
    return *towards(dK, a, b, a2, b2), *towards(dK.mT, a2, b2, a, b)


linear_gram_op = define_op("linear_gram", _gram_default, shapes=_gram_shapes, backward=_gram_backward)


# linear_dot


def _dot_default(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return linear_impl.dot_of_layer(a, b, u)


def _dot_shapes(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], u.shape[0]), dtype=torch.float64)


def _dot_backward(ctx: Any, dv: Tensor) -> tuple:
    a, b, u = ctx.saved_tensors
    return *_weighted(a, b, dv, u), call(linear_combine_op, a, b, dv.mT).to(u.dtype)


linear_dot_op = define_op("linear_dot", _dot_default, shapes=_dot_shapes, backward=_dot_backward)


# linear_combine


def _combine_default(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    out = a.new_zeros((c.shape[0], b.shape[2], a.shape[2]), dtype=product_dtype(a.dtype, b.dtype))
    for part, weights in zip(out, c, strict=True):
        linear_impl.combine_of_layer_(part, a, b, weights)
    return out.to(torch.promote_types(a.dtype, b.dtype))


def _combine_shapes(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a.new_empty((c.shape[0], b.shape[2], a.shape[2]), dtype=torch.promote_types(a.dtype, b.dtype))


def _combine_backward(ctx: Any, dout: Tensor) -> tuple:
    a, b, c = ctx.saved_tensors
    return *_weighted(a, b, c.mT, dout), call(linear_dot_op, a, b, dout).mT.to(c.dtype)


linear_combine_op = define_op("linear_combine", _combine_default, shapes=_combine_shapes, backward=_combine_backward)


# linear_moments


def _moments_default(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total, squares = linear_impl.linear_moments(a, b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return total.to(dtype), squares.to(dtype)


def _moments_shapes(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return tuple(a.new_empty((b.shape[2], a.shape[2]), dtype=dtype) for _ in range(2))


def _moments_backward(ctx: Any, dtotal: Tensor, dsquares: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _through(dtotal.double() + 2 * dsquares.double() * _explicit(a, b), a, b)


linear_moments_op = define_op("linear_moments", _moments_default, shapes=_moments_shapes, backward=_moments_backward)


# The public functions.


def _check_factors(op: str, a: Tensor, b: Tensor, x: str = "a", y: str = "b") -> tuple[Tensor, Tensor]:
    """Check a and b; return them as (n, t, i) and (n, t, o), with t = 1 where they have no t."""
    _options.check_tensors(op, **{x: a, y: b})
    if a.ndim not in (2, 3) or a.ndim != b.ndim or a.shape[:-1] != b.shape[:-1]:
        raise ValueError(
            f"{op}: {x} and {y} must be (n, t, i) and (n, t, o), or (n, i) and (n, o); "
            f"got {x} {tuple(a.shape)} and {y} {tuple(b.shape)}"
        )
    for name, z in ((x, a), (y, b)):
        check_dtype(op, name, z)
    check_one_device(op, **{x: a, y: b})
    check_reverse_mode(op, a, b)
    return (a, b) if a.ndim == 3 else (a[:, None], b[:, None])


def _check_other(op: str, name: str, other: Tensor, a: Tensor) -> None:
    """Check `other`, which is u or c, beside the factors of a layer."""
    check_dtype(op, name, other)
    check_one_device(op, **{name: other, "a": a})
    check_reverse_mode(op, other)


def linear_gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """Compute the Gram matrix of the per-sample gradients of a linear layer, from its factors.

    K_jk = <g_j, g2_k> = Σ_tt' (a_jt · a2_kt') (b_jt · b2_kt'),  g_j = Σ_t b_jt a_jtᵀ

    From products of tokens or from chunks of per-sample gradients, whichever `ops.cost.linear_route` says is faster.
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
    a, b = _check_factors("linear_gram", a, b)
    if a2 is None and b2 is None:
        return call(linear_gram_op, a, b, None, None)
    if a2 is None or b2 is None:
        raise ValueError("linear_gram: a2 and b2 belong together; got only one of them")
    a2, b2 = _check_factors("linear_gram", a2, b2, "a2", "b2")
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
    return call(linear_gram_op, a, b, a2, b2)


def linear_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Compute the inner products of the per-sample gradients of a linear layer with a direction, from its factors.

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
    a, b = _check_factors("linear_dot", a, b)
    _options.check_tensors("linear_dot", u=u)
    if u.ndim not in (2, 3) or u.shape[-2:] != (b.shape[2], a.shape[2]):
        raise ValueError(
            "linear_dot: u must be (o, i) or (m, o, i) with the i of a and the o of b; "
            f"got u {tuple(u.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)}"
        )
    _check_other("linear_dot", "u", u, a)
    return call(linear_dot_op, a, b, u).mT if u.ndim == 3 else call(linear_dot_op, a, b, u[None])[:, 0]


def linear_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute a weighted sum of the per-sample gradients of a linear layer, from its factors.

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
    a, b = _check_factors("linear_combine", a, b)
    _options.check_tensors("linear_combine", c=c)
    if c.ndim not in (1, 2) or c.shape[-1] != a.shape[0]:
        raise ValueError(
            f"linear_combine: c must be (n,) or (m, n) with the n of a; got c {tuple(c.shape)} and a {tuple(a.shape)}"
        )
    _check_other("linear_combine", "c", c, a)
    return call(linear_combine_op, a, b, c) if c.ndim == 2 else call(linear_combine_op, a, b, c[None])[0]


def linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the per-sample gradients of a linear layer and their squares, element by element, from its factors.

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
    return call(linear_moments_op, *_check_factors("linear_moments", a, b))
