"""project_out: removes from u [m, p] its components in the span of the rows of G [n, p]; subtract: one pass of it."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _options
from . import reference
from .checks import check_flat
from .gram import gram_op
from .gram_solve import gram_solve_op
from .numerics import multiply_in_float64
from .registration import call, define_op

# Inside the ops u is always [m, p]; c and the squared norms are float64.


def _subtract_shapes(u: Tensor, G: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), c.new_empty(c.shape), c.new_empty((2, u.shape[0]))


def _subtract_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("projgrad::subtract is private and not differentiable: differentiate project_out")


subtract_op = define_op("subtract", reference.subtract, shapes=_subtract_shapes, backward=_subtract_backward)


def _shapes(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def double(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float64)

    m, n = u.shape[0], G.shape[0]
    return u.new_empty(u.shape), double(n, m), u.new_empty((), dtype=torch.int64), double(), double(2, m)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, G, ctx.damping, ctx.rtol = inputs
    out, c, *_ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, G, out, c)


def _backward(ctx: Any, dout: Tensor | None, dc: Tensor | None, *_: Any) -> tuple:
    """Return du and dG. With S = (K + damping diag K)⁺, c = S G uᵀ and f = S (G doutᵀ - dc):

    du = dout - fᵀ G    and    dG = -c du - f out + 2 damping diag(Σ_m c f) G.
    """
    u, G, out, c = ctx.saved_tensors
    du, f = torch.zeros_like(u), torch.zeros_like(c)
    if dout is not None:
        du, f, *_ = call(project_out_op, dout, G, ctx.damping, ctx.rtol)
    if dc is not None:
        K, _ = call(gram_op, G, u[:0], True)
        e = call(gram_solve_op, K[None], dc[None], ctx.damping, ctx.rtol)[0][0]
        du, f = du + multiply_in_float64(e.mT, G), f - e
    dG = None
    if ctx.needs_input_grad[1]:
        dG = -multiply_in_float64(torch.cat([c, f], 1), torch.cat([du, out]))
        if ctx.damping:
            dG = dG + (2 * ctx.damping * (c * f).sum(1, keepdim=True) * G).to(G.dtype)
    return du, dG, None, None


project_out_op = define_op("project_out", reference.project_out, shapes=_shapes, setup=_setup, backward=_backward)


class ProjectionInfo(NamedTuple):
    """What a projection did: the numbers to look at before trusting an unlearning run.

    coefficients: c with result = u - Gᵀ c, float64, (n,) or (n, m) like the directions.
    rank: number of independent rows of G that were used, int64 scalar.
    residual: max over j of |cos(g_j, result)|, measured on G with the result before its last rounding; float64 scalar.
        A result that is nothing but the rounding of its sum has no direction: it is measured relative to ‖u‖.
    preserved_norm: ‖result‖ / ‖u‖, float64, () or (m,).

    The last two are NaN for a float64 direction whose square leaves float64; the result is right.
    """

    coefficients: Tensor
    rank: Tensor
    residual: Tensor
    preserved_norm: Tensor


@overload
def project_out(
    u: Tensor, G: Tensor, *, damping: float = ..., rtol: float | None = ..., return_info: Literal[False] = ...
) -> Tensor: ...
@overload
def project_out(
    u: Tensor, G: Tensor, *, damping: float = ..., rtol: float | None = ..., return_info: Literal[True]
) -> tuple[Tensor, ProjectionInfo]: ...
@overload
def project_out(
    u: Tensor, G: Tensor, *, damping: float = ..., rtol: float | None = ..., return_info: bool
) -> Tensor | tuple[Tensor, ProjectionInfo]: ...
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
    check_flat("project_out", u, G)
    damping, rtol = _options.check_solver("project_out: ", damping, rtol)
    out, c, rank, worst, squares = call(project_out_op, u if u.ndim == 2 else u[None], G, damping, rtol)
    norms = squares.detach().sqrt()
    preserved = torch.where(norms[0] > 0, norms[1] / norms[0], 1)
    vanished = (squares.detach()[0] < 1e-290) & (c.detach() != 0).any(0)  # the square of a float64 direction
    preserved, worst = preserved.masked_fill(vanished, torch.nan), worst.detach().masked_fill(vanished.any(), torch.nan)
    if u.ndim == 1:
        out, c, preserved = out[0], c[:, 0], preserved[0]
    return (out, ProjectionInfo(c, rank, worst, preserved)) if return_info else out
