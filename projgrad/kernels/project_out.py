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
    """Two passes over G where the first projection is at rounding level.

    Else refine, first with the Gram matrix at hand, then with one multiplied in float64, which also tells gradients
    apart that float32 products cannot.
    """
    n, multiply = len(G), reference.accumulation(G.dtype)
    limit = {torch.float32: 4, torch.float64: 64}[multiply] * torch.finfo(multiply).eps
    wide = multiply == torch.float64 or (rtol is not None and rtol < reference.default_rtol(n, torch.float32))
    K, b = _gram(G, u, wide)
    b = reference.in_range(K, b)
    ridge = damping * K.diagonal()[:, None]
    c, before = torch.zeros_like(b), float("inf")
    for attempt in range(4):
        cut = reference.default_rtol(n, torch.float64 if wide else torch.float32) if rtol is None else rtol
        step, rank = _gram_solve(K[None], b[None], damping, cut)
        c = c + step[0]
        out, r, squares = _subtract(u, G, c)
        b = r - ridge * c
        left = reference.cosines(K, b, squares, u.dtype)
        if rtol is not None:
            left = left.where(c != 0, 0)  # the rows that the caller's tolerance dropped stay as they are
        worst = float(left.amax()) if left.numel() else 0.0
        if not worst > limit or (wide and worst > before / 2):  # done, NaN, or at the floor
            break
        if attempt == 1 and not wide:
            (K, _), wide, worst = _gram(G, u[:0], True), True, float("inf")
            ridge = damping * K.diagonal()[:, None]
        before = worst
    return out, c, rank[0], _largest(reference.cosines(K, r, squares, u.dtype)), squares


def _largest(cosines: Tensor) -> Tensor:
    return cosines.amax() if cosines.numel() else cosines.new_zeros(())


def on_device(u: Tensor, G: Tensor, damping: float, rtol: float | None) -> Result:
    """The same decisions without asking the host, so that the whole projection can be captured in a CUDA graph.

    The refinement is always launched, and returns at once where a flag in device memory says that it is not needed.
    """
    from .gram import gram
    from .gram_solve import gram_solve
    from .subtract import subtract

    n, multiply = len(G), reference.accumulation(G.dtype)
    limit = {torch.float32: 4, torch.float64: 64}[multiply] * torch.finfo(multiply).eps
    wide = multiply == torch.float64 or (rtol is not None and rtol < reference.default_rtol(n, torch.float32))
    K, b = gram(G, u, wide)
    b = reference.in_range(K, b)
    cut = reference.default_rtol(n, torch.float64 if wide else torch.float32) if rtol is None else rtol
    step, rank = gram_solve(K[None], b[None], damping, cut)
    c = step[0]
    out, r, squares = subtract(u, G, c)
    left = reference.cosines(K, r - damping * K.diagonal()[:, None] * c, squares, u.dtype)
    if rtol is not None:
        left = left.where(c != 0, 0)
    todo = _largest(left) > limit
    exact = K if wide else torch.where(todo, gram(G, u[:0], True, todo)[0], K)
    cut = reference.default_rtol(n, torch.float64) if rtol is None else rtol
    step, again = gram_solve(exact[None], (r - damping * exact.diagonal()[:, None] * c)[None], damping, cut)
    c, rank = torch.where(todo, c + step[0], c), torch.where(todo, again, rank)
    out, r, squares = subtract(u, G, c, todo, (out, r, squares))
    return out, c, rank[0], _largest(reference.cosines(exact, r, squares, u.dtype)), squares
