"""gram: the Gram matrix of an explicit gradient matrix G [n, p], and its products with directions in the same pass."""

from typing import Any, overload

import torch
from torch import Tensor

from . import reference
from .checks import check_flat
from .numerics import multiply_in_float64
from .registration import call, define_op, device_op

# Inside the op u is always [m, p]; K and v are float64.


@device_op("gram_pass(Tensor G, Tensor u, bool float64) -> (Tensor, Tensor)")
def gram_pass(G: Tensor, u: Tensor, float64: bool) -> tuple[Tensor, Tensor]:
    """Compute K and v; float64: multiply in float64 even where G is narrower, as the reference always does."""
    return reference.gram(G, u)


@device_op("gram_few(Tensor g, Tensor u) -> (Tensor, Tensor)")
def gram_few(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Compute K [l, n, n] and v [l, n, m], float64, for g [l, n, p] and u [l, m, p] that `suits_gram_few` accepts."""
    return gram_of_each(g, u)


def suits_gram_few(g: Tensor, u: Tensor) -> bool:
    """Return whether `gram_few` takes these: up to 8 rows of 16-bit numbers, at most one u, columns in eights."""
    n, p = g.shape[1:]
    return g.dtype.itemsize == 2 and 1 <= n <= 8 and u.shape[1] <= 1 and p % 8 == 0


def gram_of_each(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return K [l, n, n] and v [l, n, m], one matrix after another."""
    parts = [gram_pass(x, d, False) for x, d in zip(g, u, strict=True)]
    K, v = (x[0][None] if len(g) == 1 else torch.stack(x) for x in zip(*parts, strict=True))
    return K, v


def _default(G: Tensor, u: Tensor, float64: bool) -> tuple[Tensor, Tensor]:
    return gram_pass(G, u, float64)


def _shapes(G: Tensor, u: Tensor, float64: bool) -> tuple[Tensor, Tensor]:
    n, m = G.shape[0], u.shape[0]
    return G.new_empty((n, n), dtype=torch.float64), G.new_empty((n, m), dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dK: Tensor | None, dv: Tensor | None) -> tuple:
    G, u = ctx.saved_tensors
    dG, du = torch.zeros_like(G), torch.zeros_like(u)
    if dK is not None and ctx.needs_input_grad[0]:
        dG = multiply_in_float64(dK + dK.mT, G)
    if dv is not None:
        dG, du = dG + multiply_in_float64(dv, u), multiply_in_float64(dv.mT, G)
    return dG, du, None


gram_op = define_op("gram", _default, shapes=_shapes, setup=_setup, backward=_backward)


@overload
def gram(G: Tensor, u: None = None) -> Tensor: ...
@overload
def gram(G: Tensor, u: Tensor) -> tuple[Tensor, Tensor]: ...
def gram(G: Tensor, u: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the Gram matrix of the rows of G and, in the same pass over G, their products with u.

    K = G Gᵀ,  v = G u

    Args:
        G: (n, p) one gradient per row; float32, float64, bfloat16 or float16; any strides.
        u: optional, (p,) or (m, p), dtype and device of G.

    Returns:
        K (n, n), and with u also v, (n,) or (n, m). Both float64 whatever the dtype of G: n² numbers cost nothing,
        and rounding them loses the digits that a solve with K needs. Rows of tiny (1e-20) and huge (1e+15) norm keep
        full relative precision. Differentiable twice.

    Raises:
        ValueError: G is not a matrix, u does not match it, or they are on two devices.
        TypeError: a dtype that is not supported, or two dtypes.

    Example:
        >>> K, v = projgrad.gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0]))
        >>> K.tolist(), v.tolist()
        ([[5.0, 2.0], [2.0, 1.0]], [3.0, 1.0])
    """
    check_flat("gram", u, G)
    if u is None:
        return call(gram_op, G, G[:0], False)[0]
    K, v = call(gram_op, G, u if u.ndim == 2 else u[None], False)
    return K, (v if u.ndim == 2 else v[:, 0])
