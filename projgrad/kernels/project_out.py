"""project_out from its leaf kernels: gram, gram_solve, subtract.

The reference always multiplies in float64. Here float32 input is multiplied in float32 first, and the residual that
subtract measures on G decides whether that was enough.
"""

import torch
from torch import Tensor

from ..ops import reference
from ..ops.flat import _gram, _gram_solve, _subtract

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def on_host(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """Two passes over G where the first projection is at rounding level, which the host looks at."""
    return reference.refined(
        len(G), lambda float64: _gram(G, u, float64), lambda c: _subtract(u, G, c), u.dtype, damping, rtol, _gram_solve
    )


def on_device(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """The same decisions without asking the host, so that the whole projection can be captured in a CUDA graph.

    The refinement is always launched, and returns at once where a flag in device memory says that it is not needed.
    """
    from .gram import gram
    from .pending import pending
    from .subtract import subtract, subtract_, views

    (m, p), n = u.shape, len(G)
    float64, limit = reference.first_pass(n, G.dtype, rtol)
    noise = exact = reference.default_rtol(n, torch.float64)
    cut = reference.default_rtol(n, torch.float32) if rtol is None and not float64 else exact if rtol is None else rtol
    K, b = gram(G, u, float64)
    step, rank, *_ = _gram_solve(K[None], reference.in_range(K, b)[None], damping, cut)
    c = step[0]
    if not (m and n and p):
        out, r, squares = subtract(u, G, c)
        return out, c, rank[0], reference.largest(reference.cosines(K, r, squares, c)), squares
    out, total = torch.empty((m, p), dtype=u.dtype, device=u.device), c.new_empty((n + 2) * m)
    r, squares = views(total, n, m)
    subtract_(out, total, u, G, c)
    for attempt in range(3):
        counted = not float64 and rtol is None and attempt == 0  # a row that looks dependent in float32 may not be
        b, todo, _ = pending(K, r, squares, c, rank, damping, limit, noise, rtol is not None, counted)
        if not float64 and attempt == 0:
            gram(G, u[:0], True, todo, K.view(-1))
            if damping:
                b = r - damping * K.diagonal()[:, None] * c
        step, again, *_ = _gram_solve(K[None], b[None], damping, exact if rtol is None else rtol)
        c, rank = torch.where(todo, c + step[0], c), torch.where(todo, again, rank)
        subtract_(out, total, u, G, c, todo)
    worst = pending(K, r, squares, c, rank, damping, limit, noise, False, False)[2]
    return out, c, rank[0], worst, squares
