"""basis_project: removes from a gradient what lies in a basis of its layer's inputs."""

from typing import Any

import torch
from torch import Tensor

from .. import _options
from .checks import check_dtype, check_one_device
from .cost import chunk_bytes
from .numerics import product_dtype
from .registration import call, check_reverse_mode, define_op

# Inside the op D is always [l, o, i] and M [l, i, k].


def project_in_pieces(D: Tensor, M: Tensor, budget: int | None = None) -> Tensor:
    """Return D - (D M) Mᵀ by products of some rows of D at a time and, where M must be converted, some columns of M."""
    (l, _, i), k, dtype = D.shape, M.shape[2], product_dtype(D.dtype, M.dtype)
    elements = (budget or chunk_bytes(D.device.type)) // dtype.itemsize
    columns = max(1, k if M.dtype == dtype else elements // max(1, l * i))
    rows = max(1, elements // max(1, l * (2 * i + min(k, columns))))
    out = D.new_empty(D.shape)
    with torch.autocast(D.device.type, enabled=False):
        for d, to in zip(D.split(rows, 1), out.split(rows, 1), strict=True):
            d = d.to(dtype)
            rest = d.clone()
            for m in M.split(columns, 2):
                m = m.to(dtype)
                rest.baddbmm_(d @ m, m.mT, alpha=-1)
            to.copy_(rest)
    return out


def _default(D: Tensor, M: Tensor) -> Tensor:
    return project_in_pieces(D, M)


def _shapes(D: Tensor, M: Tensor) -> Tensor:
    return D.new_empty(D.shape)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return dD = dout - (dout M) Mᵀ and dM = -Dᵀ (dout M) - doutᵀ (D M), in float64 and rounded at the end."""
    D, M = ctx.saved_tensors
    dM = None
    if ctx.needs_input_grad[1]:
        d, m, e = D.double(), M.double(), dout.double()
        dM = -(d.mT @ (e @ m) + e.mT @ (d @ m)).to(M.dtype)
    return call(basis_project_op, dout, M), dM


def _vmap(info: Any, in_dims: tuple, D: Tensor, M: Tensor) -> tuple[Tensor, int]:
    size = info.batch_size
    if in_dims[1] is None:  # one basis for all: more rows of D
        D = D.movedim(in_dims[0], 1)  # [l, size, o, i]
        return call(basis_project_op, D.flatten(1, 2), M).unflatten(1, D.shape[1:3]), 1
    D, M = (x.expand(size, *x.shape) if d is None else x.movedim(d, 0) for x, d in zip((D, M), in_dims, strict=True))
    return call(basis_project_op, D.flatten(0, 1), M.flatten(0, 1)).unflatten(0, D.shape[:2]), 0


basis_project_op = define_op("basis_project", _default, shapes=_shapes, backward=_backward, vmap=_vmap)


def basis_project(D: Tensor, M: Tensor) -> Tensor:
    """Remove from the rows of D their components along the columns of M.

    D - (D M) Mᵀ

    The orthogonal projection onto the complement of span(M) where M has orthonormal columns; any other M is applied as
    the equation says. M Mᵀ (i, i) is never formed: 4 o i k flops, and memory for some rows at a time.

    Args:
        D: (..., o, i), the gradient of a weight, one row per output.
        M: (i, k), one basis for all rows, or (..., i, k) with the leading dimensions of D. The dtypes of D and M may
            differ: float32, float64, bfloat16 or float16; any strides.

    Returns:
        Like D; products are formed in float32 or better and rounded once. Differentiable twice in D and M.

    Raises:
        ValueError: shapes that do not match, or two devices.
        TypeError: a dtype that is not supported.

    Source: PGU, arXiv 2312.04095, with M the leading eigenvectors of the second moment of a layer's inputs.

    Example:
        >>> projgrad.basis_project(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])).tolist()
        [[0.0, 4.0]]
    """
    _options.check_tensors("basis_project", D=D, M=M)
    if D.ndim < 2 or M.ndim < 2 or D.shape[-1] != M.shape[-2] or (M.ndim > 2 and M.shape[:-2] != D.shape[:-2]):
        raise ValueError(
            "basis_project: D must be (..., o, i) and M (i, k), or (..., i, k) with the leading dimensions of D; "
            f"got D {tuple(D.shape)} and M {tuple(M.shape)}"
        )
    for name, x in (("D", D), ("M", M)):
        check_dtype("basis_project", name, x)
    check_one_device("basis_project", D=D, M=M)
    check_reverse_mode("basis_project", D, M)
    l, (i, k) = M.shape[:-2].numel(), M.shape[-2:]  # l = 1 for one basis
    rows = D.shape[:-1].numel() if M.ndim == 2 else D.shape[-2]
    return call(basis_project_op, D.reshape(l, rows, i), M.reshape(l, i, k)).reshape(D.shape)
