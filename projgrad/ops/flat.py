"""The ops on an explicit gradient matrix G [n, p]: schema, docstring, shape rule and gradient; nothing else."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from .. import _options
from . import reference
from .registration import call, one_by_one, refuse_forward_mode, register

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ProjectionInfo(NamedTuple):
    """What a projection did: the numbers to look at before trusting an unlearning run.

    coefficients: c with result = u - Gᵀ c, float64, (n,) or (n, m) like the directions.
    rank: number of independent rows of G that were used, int64 scalar.
    residual: max over j of |cos(g_j, result)|, measured on G with the result before its last rounding; float64 scalar.
        A result that is nothing but the rounding of its sum has no direction: it is measured relative to ‖u‖.
    preserved_norm: ‖result‖ / ‖u‖, float64, () or (m,).
    """

    coefficients: Tensor
    rank: Tensor
    residual: Tensor
    preserved_norm: Tensor


# The schemas. Inside them u is always [m, p], K [l, n, n] and b [l, n, m]; K, v and c are float64.


@custom_op("projgrad::gram", mutates_args=())
def _gram(G: Tensor, u: Tensor, float64: bool) -> tuple[Tensor, Tensor]:
    """`float64`: multiply in float64 even where G is narrower. The reference always does."""
    return reference.gram(G, u)


@custom_op("projgrad::subtract", mutates_args=())
def _subtract(u: Tensor, G: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.subtract(u, G, c)


@custom_op("projgrad::gram_solve", mutates_args=())
def _gram_solve(K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [l, n, m]; the rank, and the smallest pivot that was used (1 + damping if none) [l]."""
    return reference.gram_solve(K, b, damping, rtol)


@custom_op("projgrad::project_out", mutates_args=())
def _project_out(
    u: Tensor, G: Tensor, damping: float, rtol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.project_out(u, G, damping, rtol)


# Shapes.


@_gram.register_fake
def _(G, u, float64):
    n, m = G.shape[0], u.shape[0]
    return G.new_empty((n, n), dtype=torch.float64), G.new_empty((n, m), dtype=torch.float64)


@_subtract.register_fake
def _(u, G, c):
    return u.new_empty(u.shape), c.new_empty(c.shape), c.new_empty((2, u.shape[0]))


@_gram_solve.register_fake
def _(K, b, damping, rtol):
    systems = K.shape[:1]
    return b.new_empty(b.shape), K.new_empty(systems, dtype=torch.int64), K.new_empty(systems, dtype=torch.float64)


@_project_out.register_fake
def _(u, G, damping, rtol):
    def double(*shape):
        return u.new_empty(shape, dtype=torch.float64)

    m, n = u.shape[0], G.shape[0]
    return u.new_empty(u.shape), double(n, m), u.new_empty((), dtype=torch.int64), double(), double(2, m)


# Gradients, written with the same ops, so that they can be differentiated again.


def _gram_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


def _gram_backward(ctx, dK, dv):
    G, u = ctx.saved_tensors
    dG, du = torch.zeros_like(G), torch.zeros_like(u)
    if dK is not None and ctx.needs_input_grad[0]:
        dG = _product(dK + dK.mT, G)
    if dv is not None:
        dG, du = dG + _product(dv, u), _product(dv.mT, G)
    return dG, du, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float64, rounded to b's dtype: coefficients of tiny rows leave float32 and float16."""
    return (a @ b.double()).to(b.dtype)


def _subtract_backward(ctx, *_):
    raise RuntimeError("projgrad::subtract is private and not differentiable: differentiate project_out")


def _gram_solve_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    K, _, ctx.damping, ctx.rtol = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(K, output[0])


def _gram_solve_backward(ctx, dx, *_):
    """db = S dx and dK = -(db xᵀ + x dbᵀ) / 2 - damping diag(db ∘ x), with S = (K + damping diag K)⁺."""
    if dx is None:
        return None, None, None, None
    K, x = ctx.saved_tensors
    db, *_ = call(_gram_solve, K, dx, ctx.damping, ctx.rtol)
    dK = -(db @ x.mT)
    dK = (dK + dK.mT) / 2 - ctx.damping * torch.diag_embed((db * x).sum(-1))
    return dK, db, None, None


def _project_out_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, G, ctx.damping, ctx.rtol = inputs
    out, c, *_ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, G, out, c)


def _project_out_backward(ctx, dout, dc, *_):
    """With S = (K + damping diag K)⁺, c = S G uᵀ and f = S (G doutᵀ - dc):

    du = dout - fᵀ G    and    dG = -c du - f out + 2 damping diag(Σ_m c f) G.
    """
    u, G, out, c = ctx.saved_tensors
    du, f = torch.zeros_like(u), torch.zeros_like(c)
    if dout is not None:
        du, f, *_ = call(_project_out, dout, G, ctx.damping, ctx.rtol)
    if dc is not None:
        K, _ = call(_gram, G, u[:0], True)
        e = call(_gram_solve, K[None], dc[None], ctx.damping, ctx.rtol)[0][0]
        du, f = du + _product(e.mT, G), f - e
    dG = None
    if ctx.needs_input_grad[1]:
        dG = -_product(torch.cat([c, f], 1), torch.cat([du, out]))
        if ctx.damping:
            dG = dG + (2 * ctx.damping * (c * f).sum(1, keepdim=True) * G).to(G.dtype)
    return du, dG, None, None


# vmap: gram_solve is batched already; the others, which read all of G, run once per element.


def _gram_solve_vmap(info, in_dims, K, b, damping, rtol):
    def fold(t: Tensor, d: int | None) -> Tensor:
        t = t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        return t.flatten(0, 1)

    systems = K.shape[0 if in_dims[0] != 0 else 1]
    results = call(_gram_solve, fold(K, in_dims[0]), fold(b, in_dims[1]), damping, rtol)
    return tuple(t.unflatten(0, (info.batch_size, systems)) for t in results), (0, 0, 0)


register(_gram, _gram_setup, _gram_backward, one_by_one(_gram))
register(_gram_solve, _gram_solve_setup, _gram_solve_backward, _gram_solve_vmap)
register(_project_out, _project_out_setup, _project_out_backward, one_by_one(_project_out))
_subtract.register_autograd(_subtract_backward)
_subtract.register_vmap(one_by_one(_subtract))


# The public functions.


def _check_flat(op: str, u: Tensor | None, G: Tensor) -> None:
    _options.check_tensors(op, G=G, **({} if u is None else {"u": u}))
    if G.ndim != 2:
        raise ValueError(f"{op}: G must be (n, p), one gradient per row; got shape {tuple(G.shape)}")
    if G.dtype not in DTYPES:
        raise TypeError(f"{op}: G must be float32, float64, bfloat16 or float16; got {G.dtype}")
    if u is None:
        return _check_reverse_mode(op, G)
    if u.ndim not in (1, 2) or u.shape[-1] != G.shape[1]:
        raise ValueError(
            f"{op}: u must be (p,) or (m, p) with the p of G (n, p); got u {tuple(u.shape)} and G {tuple(G.shape)}"
        )
    if u.dtype != G.dtype:
        raise TypeError(f"{op}: u and G must have one dtype; got u {u.dtype} and G {G.dtype}: convert one of them")
    if u.device != G.device:
        raise ValueError(f"{op}: u and G must be on one device; got u on {u.device} and G on {G.device}")
    _check_reverse_mode(op, u, G)


def _check_reverse_mode(op: str, *tensors: Tensor) -> None:
    """Custom operators have no forward-mode rule, and torch takes a missing one for zero: refuse instead."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        refuse_forward_mode(op)


def gram(G: Tensor, u: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Gram matrix of the rows of G and, in the same pass over G, their products with u.

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
    _check_flat("gram", u, G)
    if u is None:
        return call(_gram, G, G[:0], False)[0]
    K, v = call(_gram, G, u if u.ndim == 2 else u[None], False)
    return K, (v if u.ndim == 2 else v[:, 0])


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
    vector = b.ndim == K.ndim - 1
    if b.shape[: K.ndim - 1] != K.shape[:-1] or b.ndim > K.ndim:
        raise ValueError(
            "gram_solve: b must be (..., n) or (..., n, m) with the dimensions of K (..., n, n); "
            f"got b {tuple(b.shape)} and K {tuple(K.shape)}"
        )
    if K.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gram_solve: K must be float32 or float64; got {K.dtype}")
    if b.dtype != K.dtype:
        raise TypeError(f"gram_solve: K and b must have one dtype; got K {K.dtype} and b {b.dtype}")
    if b.device != K.device:
        raise ValueError(f"gram_solve: K and b must be on one device; got K on {K.device} and b on {b.device}")
    damping, rtol = _options.check_solver("gram_solve: ", damping, rtol)
    _check_reverse_mode("gram_solve", K, b)
    n, batch = K.shape[-1], K.shape[:-2]
    columns = b[..., None] if vector else b
    count = batch.numel()
    systems = K.reshape(count, n, n), columns.reshape(count, n, columns.shape[-1])
    x, *_ = call(_gram_solve, *systems, damping, rtol)
    return x.reshape(b.shape)


def project_out(
    u: Tensor, G: Tensor, *, damping: float = 0.0, rtol: float | None = None, return_info: bool = False
) -> Tensor | tuple[Tensor, ProjectionInfo]:
    """Remove from u its component in the span of the rows of G.

    u_perp = u - Gᵀ (G Gᵀ)⁺ G u

    Equivalent to ``Q = torch.linalg.qr(G.mT).Q; u - Q @ (Q.mT @ u)``, and right where that is not: on duplicated, zero
    and dependent rows, rows of very different length, and n > p. G is read twice; where the residual measured in the
    second pass is above rounding level the projection is refined with a Gram matrix accumulated in float64.

    Args:
        u: (p,) or (m, p), the direction or directions.
        G: (n, p), one gradient per row; dtype and device of u: float32, float64, bfloat16 or float16; any strides.
        damping: at least 0, dimensionless (see `gram_solve`). 0 projects exactly.
        rtol: a row whose squared sine to the span of the others is not above it counts as dependent. Default: 8 n eps
            of float64, resolved in float64 where float32 products are not enough to decide, so that gradients at an
            angle of 1e-6 are still told apart.
        return_info: also return a `ProjectionInfo` (coefficients, rank, residual, preserved norm).

    Returns:
        Like u. NaN or Inf in G gives NaN, and so it does in a direction for that direction. Differentiable twice in u
        and G in reverse mode, at fixed rank.

    Raises:
        ValueError: shapes that do not match, two devices, damping outside [0, inf), rtol outside [0, 1).
        TypeError: a dtype that is not supported, or two dtypes; damping or rtol is not a number.

    Source: OrthoGrad, arXiv 2503.02312, section 3.

    Example:
        >>> projgrad.project_out(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()
        [0.0, 4.0]
    """
    _options.check_tensors("project_out", u=u)
    _check_flat("project_out", u, G)
    damping, rtol = _options.check_solver("project_out: ", damping, rtol)
    out, c, rank, worst, squares = call(_project_out, u if u.ndim == 2 else u[None], G, damping, rtol)
    norms = squares.detach().sqrt()
    preserved = torch.where(norms[0] > 0, norms[1] / norms[0], 1)
    if u.ndim == 1:
        out, c, preserved = out[0], c[:, 0], preserved[0]
    return (out, ProjectionInfo(c, rank, worst.detach(), preserved)) if return_info else out
