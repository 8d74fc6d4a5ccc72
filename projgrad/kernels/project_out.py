"""project_out from its kernels: gram, gram_solve, subtract.

The reference always multiplies in float64. Here float32 input is multiplied in float32 first, and the residual that
subtract measures on G decides whether that was enough. On CUDA, subtract of 16-bit input is first in float32 too.
"""

import torch
from torch import Tensor

from ..ops import refinement
from ..ops.gram import gram_pass
from ..ops.gram_solve import gram_solve_op
from ..ops.numerics import default_rtol, in_range
from ..ops.project_out import subtract_op

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def on_host(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """Project; the host looks at the residual and decides whether to refine."""
    return refinement.project_refined(
        len(G),
        len(u),
        lambda float64: gram_pass(G, u, float64),
        lambda c: subtract_op(u, G, c),
        gram_solve_op,
        u.dtype,
        damping,
        rtol,
    )


def on_device(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """Project with the same decisions but without asking the host, so that a CUDA graph can capture all of it.

    The refinement is always launched, and returns at once where a flag in device memory says that it is not needed.
    """
    from .gram import launch_gram
    from .residual import check_residual
    from .subtract import subtract, subtract_, views

    (m, p), n = u.shape, len(G)
    float64 = refinement.starts_in_float64(n, G.dtype, rtol) or (not m and rtol is None)
    limit = refinement.rounding_limit(G.dtype)
    noise = default_rtol(n, torch.float64)
    K, b = launch_gram(G, u, float64)
    step, rank, *_ = gram_solve_op(K[None], in_range(K, b)[None], damping, refinement.rank_tolerance(n, float64, rtol))
    c = step[0]
    if not (m and n and p):
        out, r, squares = subtract(u, G, c)
        return out, c, rank[0], refinement.largest(refinement.cosines(K, r, squares, c)), squares
    out, total = torch.empty((m, p), dtype=u.dtype, device=u.device), c.new_empty((n + 2) * m)
    r, squares = views(total, n, m)
    narrow = G.element_size() == 2
    subtract_(out, total, u, G, c, narrow=narrow)
    for attempt in range(refinement.DEVICE_PASSES):
        counted = not float64 and rtol is None and attempt == 0  # a row that looks dependent in float32 may not be
        unseen = p * 2.0**-126 if narrow and attempt == 0 else None  # products below 2⁻¹²⁶ are off by up to 2⁻¹⁵⁰
        b, todo, _ = check_residual(K, r, squares, c, rank, damping, limit, noise, rtol is not None, counted, unseen)
        if not float64 and attempt == 0:
            launch_gram(G, u[:0], True, todo, K.view(-1))
            if damping:
                b = (r - damping * K.diagonal()[:, None] * c).where(r.isfinite() | (not narrow), 0.0)
        step, again, *_ = gram_solve_op(K[None], b[None], damping, refinement.rank_tolerance(n, True, rtol))
        c, rank = torch.where(todo, c + step[0], c), torch.where(todo, again, rank)
        subtract_(out, total, u, G, c, todo)
    worst = check_residual(K, r, squares, c, rank, damping, limit, noise, False, False)[2]
    return out, c, rank[0], worst, squares
