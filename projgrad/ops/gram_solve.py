"""gram_solve: many Gram systems at once, singular ones included."""

from typing import Any

import torch
from torch import Tensor

from .. import _options
from . import reference
from .checks import check_one_device
from .registration import call, check_reverse_mode, define_op

# Inside the op K is always [l, n, n] and b [l, n, m]. It returns x [l, n, m], the rank and the smallest pivot that was
# used, 1 + damping if none [l].


def _shapes(K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    systems = K.shape[:1]
    return b.new_empty(b.shape), K.new_empty(systems, dtype=torch.int64), K.new_empty(systems, dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    K, _, ctx.damping, ctx.rtol = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(K, output[0])


def _backward(ctx: Any, dx: Tensor | None, *_: Any) -> tuple:
    """Return db = S dx and dK = -(db xᵀ + x dbᵀ) / 2 - damping diag(db ∘ x), with S = (K + damping diag K)⁺."""
    if dx is None:
        return None, None, None, None
    K, x = ctx.saved_tensors
    db, *_ = call(gram_solve_op, K, dx, ctx.damping, ctx.rtol)
    dK = -(db @ x.mT)
    dK = (dK + dK.mT) / 2 - ctx.damping * torch.diag_embed((db * x).sum(-1))
    return dK, db, None, None


def _vmap(info: Any, in_dims: tuple, K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple:
    """Solve the systems of all elements together: the op is batched already."""

    def fold(t: Tensor, d: int | None) -> Tensor:
        t = t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        return t.flatten(0, 1)

    systems = K.shape[0 if in_dims[0] != 0 else 1]
    results = call(gram_solve_op, fold(K, in_dims[0]), fold(b, in_dims[1]), damping, rtol)
    return tuple(t.unflatten(0, (info.batch_size, systems)) for t in results), (0, 0, 0)


gram_solve_op = define_op(
    "gram_solve", reference.gram_solve, shapes=_shapes, setup=_setup, backward=_backward, vmap=_vmap
)


def gram_solve(K: Tensor, b: Tensor, *, damping: float = 0.0, rtol: float | None = None) -> Tensor:
    """Solve Gram systems that may be singular: duplicated, dependent and zero gradients are expected here.

    (K + damping diag K) x = b, after scaling K to the unit diagonal C = D⁻¹ K D⁻¹, D² = diag K

    by Cholesky with diagonal pivoting, in float64. A pivot of C is the squared sine of the angle between a gradient and
    the span of those before it; where it is not above `rtol` the gradient adds nothing and its x is 0. So a singular
    system gets the solution supported on independent rows (not the one of minimal norm), and K x = b holds whenever b
    is in the range of K, as G u always is.

    Args:
        K: (..., n, n) symmetric positive semi-definite, float32 or float64; symmetry is not checked.
        b: (..., n) or (..., n, m), the dtype, device and batch dimensions of K.
        damping: at least 0, dimensionless: added to the unit diagonal of C, so large and small gradients count alike.
        rtol: rank tolerance on the pivots of C, in [0, 1). Default 8 n eps of the dtype of K.

    Returns:
        x like b; NaN for a system that holds a NaN or an Inf, and for a column of b that does. Differentiable twice
        (at fixed rank).

    Raises:
        ValueError: shapes that do not match, two devices, damping outside [0, inf), rtol outside [0, 1).
        TypeError: a dtype other than float32 or float64, or two dtypes; damping or rtol is not a number.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 10.3 (complete pivoting); the equilibration
    is van der Sluis' (1969).

    Example:
        >>> K = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # one gradient, twice
        >>> projgrad.gram_solve(K, torch.tensor([2.0, 2.0])).tolist()
        [2.0, 0.0]
    """
    _options.check_tensors("gram_solve", K=K, b=b)
    if K.ndim < 2 or K.shape[-1] != K.shape[-2]:
        raise ValueError(f"gram_solve: K must be (..., n, n); got shape {tuple(K.shape)}")
    if b.shape[: K.ndim - 1] != K.shape[:-1] or b.ndim > K.ndim:
        raise ValueError(
            "gram_solve: b must be (..., n) or (..., n, m) with the dimensions of K (..., n, n); "
            f"got b {tuple(b.shape)} and K {tuple(K.shape)}"
        )
    if K.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gram_solve: K must be float32 or float64; got {K.dtype}")
    if b.dtype != K.dtype:
        raise TypeError(f"gram_solve: K and b must have one dtype; got K {K.dtype} and b {b.dtype}")
    check_one_device("gram_solve", K=K, b=b)
    damping, rtol = _options.check_solver("gram_solve: ", damping, rtol)
    check_reverse_mode("gram_solve", K, b)
    n, systems = K.shape[-1], K.shape[:-2].numel()
    columns = b.reshape(systems, n, 1 if b.ndim < K.ndim else b.shape[-1])
    x, *_ = call(gram_solve_op, K.reshape(systems, n, n), columns, damping, rtol)
    return x.reshape(b.shape)
