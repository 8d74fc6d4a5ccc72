"""What every op computes, in plain PyTorch: the truth that kernels are tested against, and each op's default kernel.

Sizes, here and in the whole project: n samples, p parameters, m directions, l independent systems.
Everything is computed in float64 whatever the dtype of the input; only `out` is rounded back.
"""

import torch
from torch import Tensor

CHUNK = 1 << 19  # elements of G in one float64 chunk: 4 MiB


def _columns(n: int) -> int:
    return max(1, CHUNK // max(1, n))


def gram(G: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """K = G Gᵀ [n, n] and v = G uᵀ [n, m], for G [n, p] and u [m, p]."""
    n, m = G.shape[0], u.shape[0]
    K = G.new_zeros((n, n), dtype=torch.float64)
    v = G.new_zeros((n, m), dtype=torch.float64)
    width = _columns(n + m)
    for g, w in zip(G.split(width, 1), u.split(width, 1), strict=True):
        g = g.double()  # [n, chunk]
        K.addmm_(g, g.mT)
        v.addmm_(g, w.double().mT)
    return K.tril() + K.tril(-1).mT, v  # a matrix product need not be symmetric to the last bit


def subtract(u: Tensor, G: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out = u - cᵀ G [m, p], r = G outᵀ [n, m] and the squared norms of u and out [2, m].

    r and the norms are those of `out` before it is rounded to the dtype of u.
    """
    out = torch.empty_like(u)
    r = torch.zeros_like(c)
    squares = c.new_zeros((2, u.shape[0]))
    width = _columns(G.shape[0] + u.shape[0])
    for o, w, g in zip(out.split(width, 1), u.split(width, 1), G.split(width, 1), strict=True):
        w, g = w.double(), g.double()
        exact = w - c.mT @ g  # [m, chunk]
        o.copy_(exact)
        r.addmm_(g, exact.mT)
        squares[0] += w.square().sum(1)
        squares[1] += exact.square().sum(1)
    return out, r, squares


def default_rtol(n: int, dtype: torch.dtype) -> float:
    """Rank tolerance for n rows whose products were accumulated in `dtype`: 8 n eps."""
    return 8 * max(n, 1) * torch.finfo(dtype).eps


def gram_solve(K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor]:
    """x with K x = b [l, n, m], and the rank of each system [l], by pivoted Cholesky of C = D⁻¹ K D⁻¹ + damping I."""
    n = K.shape[-1]
    if rtol is None:
        rtol = default_rtol(n, K.dtype)
    dtype, K, b = b.dtype, K.double(), b.double()
    finite = K.isfinite().flatten(1).all(1)  # [l]
    square = K.diagonal(dim1=-2, dim2=-1)  # ‖g_j‖² [l, n]
    scale = torch.where(square > 0, square, 1).rsqrt()
    left = (square > 0).double() * (1 + damping)  # what the pivots have not explained yet [l, n]
    w = b * scale[..., None]  # right-hand side, reduced as the factor grows [l, n, m]
    x = torch.zeros_like(w)
    rank = torch.zeros(K.shape[0], dtype=torch.int64, device=K.device)
    factor, pivots, ys = [], [], []
    for _ in range(n):
        pivot = left.argmax(1, keepdim=True)  # [l, 1]
        value = left.gather(1, pivot)
        keep = (value > rtol) & finite[:, None]
        root = torch.where(keep, value, 1).sqrt()
        column = K.gather(2, pivot[:, None].expand(-1, n, -1))[..., 0] * scale * scale.gather(1, pivot)
        for row in factor:
            column = column - row * row.gather(1, pivot)
        row = torch.where(keep & left.isfinite(), column / root, 0)  # used rows carry left = -inf [l, n]
        row = row.scatter(1, pivot, torch.where(keep, root, 0))
        y = torch.where(keep, w.gather(1, pivot[..., None].expand(-1, -1, w.shape[2]))[:, 0] / root, 0)  # [l, m]
        w = w - row[..., None] * y[:, None]
        left = (left - row.square()).scatter(1, pivot, float("-inf"))
        rank += keep[:, 0]
        factor.append(row)
        pivots.append(pivot)
        ys.append(y)
    for row, pivot, y in zip(reversed(factor), reversed(pivots), reversed(ys), strict=True):
        root = row.gather(1, pivot)  # [l, 1]
        value = torch.where(root > 0, (y - (row[..., None] * x).sum(1)) / torch.where(root > 0, root, 1), 0)
        x = x.scatter(1, pivot[..., None].expand(-1, -1, x.shape[2]), value[:, None])
    finite = finite[:, None, None] & b.isfinite().all(1, keepdim=True)  # [l, 1, m]
    x = torch.where(finite, x * scale[..., None], torch.nan)
    return x.to(dtype), rank


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The precision a kernel multiplies in: float64 for float64, float32 for float32 and everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cosines(K: Tensor, r: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """|cos(g_j, out)| [n, m] from r = G outᵀ; a zero row is orthogonal to everything.

    An `out` of norm below 8 n eps ‖u‖ is rounding noise without a direction (u lies in the span): measured against ‖u‖.
    """
    square = K.diagonal()
    before, after = squares.sqrt()
    norm = torch.where(after > default_rtol(len(K), accumulation(dtype)) * before, after, before)
    return r.abs() / (torch.where(square > 0, square, 1).sqrt()[:, None] * torch.where(norm > 0, norm, 1))


def in_range(K: Tensor, b: Tensor) -> Tensor:
    """b [n, m], NaN where a float64 row is so small that its square vanished: loud, where dropping it would be silent."""
    return b.masked_fill((K.diagonal() < 1e-290)[:, None] & (b != 0), torch.nan)


def project_out(
    u: Tensor, G: Tensor, damping: float, rtol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out = u - Gᵀ c with (K + damping diag K) c = G uᵀ, c [n, m], rank, max |cos(g_j, out)|, squared norms [2, m].

    Two rounds: the second solves for what the first left over, measured on G itself.
    """
    K, b = gram(G, u)
    b = in_range(K, b)
    c = torch.zeros_like(b)
    for _ in range(2):
        step, rank = gram_solve(K[None], b[None], damping, rtol)
        c = c + step[0]
        out, r, squares = subtract(u, G, c)
        b = r - damping * K.diagonal()[:, None] * c
    worst = cosines(K, r, squares, u.dtype)
    return out, c, rank[0], worst.amax() if worst.numel() else squares.new_zeros(()), squares
