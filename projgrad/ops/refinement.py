"""When a projection is repeated: the policy, and the loop where the host can look between the passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .numerics import default_rtol, in_range, product_dtype

HOST_PASSES = 8  # only a bound: the host stops as soon as a pass does not help
TAPE_PASSES = 4  # of a tape, after the first: each takes a backward pass or a read of all factors
DEVICE_PASSES = 3  # always launched, for nobody looks in between; each returns at once where nothing is left to do


def starts_in_float64(n: int, dtype: torch.dtype, rtol: float | None) -> bool:
    """Return whether the first Gram matrix must be multiplied in float64 already: for input of float64, or if the
    caller's tolerance is finer than products in float32."""
    return dtype == torch.float64 or (rtol is not None and rtol < default_rtol(n, torch.float32))


def rounding_limit(dtype: torch.dtype) -> float:
    """Return the cosine |cos(g_j, out)| up to which the result counts as orthogonal to a row of `dtype`."""
    narrow = product_dtype(dtype) == torch.float32
    return 4 * torch.finfo(torch.float32).eps if narrow else 64 * torch.finfo(torch.float64).eps


def rank_tolerance(n: int, float64: bool, rtol: float | None) -> float:
    """Return the pivot at which a row counts as dependent: the caller's, else that of the Gram matrix's precision."""
    return default_rtol(n, product_dtype(float64=float64)) if rtol is None else rtol


def cosines(K: Tensor, r: Tensor, squares: Tensor, c: Tensor) -> Tensor:
    """Return |cos(g_j, out)| [n, m] from r = G outᵀ; a zero row is orthogonal to everything.

    `out` is what is left of u and of the n terms c_j g_j after summing them in float64. Below the rounding of that sum
    it is noise without a direction (u lies in the span): what it has in common with a row is measured against ‖u‖.
    """
    lengths = K.diagonal().sqrt()[:, None]
    before, after = squares.sqrt()
    noise = default_rtol(len(K), torch.float64) * (before + (c.abs() * lengths).sum(0))
    norm = torch.where(after > noise, after, before)
    cosine = r.abs() / torch.where(lengths > 0, lengths, 1) / torch.where(norm > 0, norm, 1)
    return cosine.masked_fill(norm.isinf(), torch.nan)


def largest(t: Tensor) -> Tensor:
    """Return the largest element, 0 if there is none."""
    return t.amax() if t.numel() else t.new_zeros(())


def project_refined(
    n: int,
    m: int,
    products: Callable[[bool], tuple[Tensor, Tensor]],
    apply: Callable[[Tensor], tuple[Any, Tensor, Tensor]],
    solve: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dtype: torch.dtype,
    damping: float,
    rtol: float | None,
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Project by passes over G that the caller makes, until the cosine to every row is at rounding level.

    One pass of each kind is all that well-conditioned input needs. Otherwise solve again for the products that remain:
    first with the Gram matrix at hand, then with a float64 one, which tells rows apart that float32 cannot.

    Args:
        n, m: rows of G, and directions.
        products: products(float64) returns K and b = G uᵀ, multiplied in float64 if that is set.
        apply: apply(c) returns out = u - cᵀ G, r = G outᵀ and the squared norms of u and out.
        solve: the op `gram_solve`, or its reference.

    Returns:
        out, c [n, m], rank, the largest cosine, and the squared norms of u and out [2, m].
    """
    # Without a direction there is no residual that would ask for the rank in float64.
    float64 = starts_in_float64(n, dtype, rtol) or (not m and rtol is None)
    limit = rounding_limit(dtype)
    K, b = products(float64)
    b = in_range(K, b)
    c, before, norms = torch.zeros_like(b), float("inf"), float("inf")
    for attempt in range(HOST_PASSES):
        step, rank, _ = solve(K[None], b[None], damping, rank_tolerance(n, float64, rtol))
        c = c + step[0]
        out, r, squares = apply(c)
        b = r - damping * K.diagonal()[:, None] * c
        cosine = cosines(K, b, squares, c)
        if rtol is not None:
            cosine = cosine.where(c != 0, 0)  # the rows that the caller's tolerance dropped stay as they are
        pending = (cosine > limit).any(0)  # [m]; not where it is NaN, which no refinement mends
        if not float64 and rtol is None:  # a row that looks dependent in float32 may not be: float64 decides
            pending |= rank[0] < (K.diagonal() > 0).sum()
        if not pending.any():
            break
        size = (b.abs() * K.diagonal()[:, None].clamp_min(1e-290).rsqrt()).amax(0)  # [m]
        if not float64 and (attempt or rank[0] < n):
            float64, size = True, float("inf")
            K, _ = products(True)
        elif float64 and not ((size < before / 2) | (squares[1] < norms / 4))[pending].any():  # as good as it gets
            break
        before, norms = size, squares[1]
    return out, c, rank[0], largest(cosines(K, r, squares, c)), squares
