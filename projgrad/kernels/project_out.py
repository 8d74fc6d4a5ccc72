"""project_out from its leaf kernels: gram, gram_solve, subtract.

The reference always multiplies in float64. Here float32 input is multiplied in float32 first, and the residual that
subtract measures on G decides whether that was enough.
"""

import torch
from torch import Tensor

from .. import reference
from ..ops.flat import _gram, _gram_solve, _subtract

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def on_host(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """Two passes over G where the first projection is at rounding level, which the host looks at."""
    return reference.refined(
        len(G), lambda wide: _gram(G, u, wide), lambda c: _subtract(u, G, c), u.dtype, damping, rtol, _gram_solve
    )


def on_device(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """The same decisions without asking the host, so that the whole projection can be captured in a CUDA graph.

    The refinement is always launched, and returns at once where a flag in device memory says that it is not needed.
    """
    from .gram import gram
    from .gram_solve import gram_solve
    from .subtract import subtract

    wide, limit = reference.first_pass(len(G), G.dtype, rtol)
    exact = reference.default_rtol(len(G), torch.float64) if rtol is None else rtol
    cut = reference.default_rtol(len(G), torch.float32) if rtol is None and not wide else exact
    K, b = gram(G, u, wide)
    step, rank = gram_solve(K[None], reference.in_range(K, b)[None], damping, cut)
    c = step[0]
    out, r, squares = subtract(u, G, c)
    for attempt in range(3):
        b = r - damping * K.diagonal()[:, None] * c
        left = reference.cosines(K, b, squares, c)
        if rtol is not None:
            left = left.where(c != 0, 0)
        todo = (left > limit).any()
        if not wide and rtol is None and attempt == 0:  # a row that looks dependent in float32 may not be
            todo |= rank[0] < (K.diagonal() > 0).sum()
        if not wide and attempt == 0:
            K = torch.where(todo, gram(G, u[:0], True, todo)[0], K)
            b = r - damping * K.diagonal()[:, None] * c
        step, again = gram_solve(K[None], b[None], damping, exact)
        c, rank = torch.where(todo, c + step[0], c), torch.where(todo, again, rank)
        out, r, squares = subtract(u, G, c, todo, (out, r, squares))
    return out, c, rank[0], reference.largest(reference.cosines(K, r, squares, c)), squares
