"""What every op computes, in plain PyTorch: the truth that kernels are tested against, and each op's default kernel.

Sizes, here and in the whole project: n samples, p parameters, m directions, l independent systems; t positions,
i inputs and o outputs of a layer.
Everything is computed in float64 whatever the dtype of the input; only `out` is rounded back.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .numerics import default_rtol
from .refinement import project_refined

CHUNK = 1 << 19  # elements of G in one float64 chunk: 4 MiB


def _columns(n: int) -> int:
    return max(1, CHUNK // max(1, n))


def gram(G: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return K = G Gᵀ [n, n] and v = G uᵀ [n, m], for G [n, p] and u [m, p]."""
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
    """Return out = u - cᵀ G [m, p], r = G outᵀ [n, m] and the squared norms of u and out [2, m].

    r and the norms are those of `out` before it is rounded to the dtype of u.
    """
    out = u.new_empty(u.shape)
    r = c.new_zeros(c.shape)
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


def gram_solve(K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return x with K x = b [l, n, m], and rank and smallest pivot of each system [l], by pivoted Cholesky.

    A pivot of C = D⁻¹ K D⁻¹ + damping I is the squared sine of the angle between a row and the span of those before it,
    plus the damping. The smallest is 1 + damping where no pivot was used. The host never waits for the device: a row
    that counts as dependent stays in the loop with zeros.
    """
    n = K.shape[-1]
    if rtol is None:
        rtol = default_rtol(n, K.dtype)
    dtype, K, b = b.dtype, K.double(), b.double()
    finite = K.isfinite().flatten(1).all(1)  # [l]
    square = K.diagonal(dim1=-2, dim2=-1)  # ‖g_j‖² [l, n]
    scale = torch.where(square > 0, square, 1).rsqrt()
    unexplained = (square > 0).double() * (1 + damping)  # by the pivots so far [l, n]
    w = b * scale[..., None]  # right-hand side, reduced as the factor grows [l, n, m]
    x = torch.zeros_like(w)
    rank = torch.zeros(K.shape[0], dtype=torch.int64, device=K.device)
    smallest = torch.full_like(rank, 1 + damping, dtype=torch.float64)
    factor = torch.zeros_like(K)  # one row a step [l, n, n]
    pivots, ys = [], []
    for step in range(n):
        pivot = unexplained.argmax(1, keepdim=True)  # [l, 1]
        value = unexplained.gather(1, pivot)
        keep = value > rtol
        root = torch.where(keep, value, 1).sqrt()
        across = pivot[:, None]  # [l, 1, 1]
        column = K.gather(1, across.expand(-1, -1, n))[:, 0] * scale * scale.gather(1, pivot)
        column = column - (factor.gather(2, across.expand(-1, n, -1)).mT @ factor)[:, 0]
        row = torch.where(keep & unexplained.isfinite(), column / root, 0)  # used rows carry -inf [l, n]
        row = row.scatter(1, pivot, torch.where(keep, root, 0))
        y = torch.where(keep, w.gather(1, across.expand(-1, -1, w.shape[2]))[:, 0] / root, 0)  # [l, m]
        w = w - row[..., None] * y[:, None]
        unexplained = (unexplained - row.square()).scatter(1, pivot, float("-inf"))
        rank += keep[:, 0]
        smallest = torch.where(keep[:, 0], torch.minimum(smallest, value[:, 0]), smallest)
        factor[:, step] = row
        pivots.append(pivot)
        ys.append(y)
    for step in reversed(range(n)):
        row, pivot, y = factor[:, step], pivots[step], ys[step]
        root = row.gather(1, pivot)  # [l, 1]
        value = torch.where(root > 0, (y - (row[..., None] * x).sum(1)) / torch.where(root > 0, root, 1), 0)
        x = x.scatter(1, pivot[..., None].expand(-1, -1, x.shape[2]), value[:, None])
    rank, smallest = torch.where(finite, rank, 0), torch.where(finite, smallest, 1 + damping)
    finite = finite[:, None, None] & b.isfinite().all(1, keepdim=True)  # [l, 1, m]
    x = torch.where(finite, x * scale[..., None], torch.nan)
    return x.to(dtype), rank, smallest


def project_out(
    u: Tensor, G: Tensor, damping: float, rtol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out = u - Gᵀ c with (K + damping diag K) c = G uᵀ, c [n, m], rank, max |cos(g_j, out)| and the squared
    norms of u and out [2, m]."""
    return project_refined(
        len(G), lambda _: gram(G, u), lambda c: subtract(u, G, c), gram_solve, torch.float64, damping, rtol
    )


# From the factors of a linear layer y = x Wᵀ: its inputs a [n, t, i] and the gradients at its output b [n, t, o] give
# the per-sample gradients g_j = Σ_t b_jt a_jtᵀ [o, i].


def _per_sample(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few samples at a time: which ones, and their per-sample gradients [samples, o * i] in float64."""
    count = max(1, CHUNK // max(1, a.shape[2] * b.shape[2]))
    for start in range(0, a.shape[0], count):
        part = slice(start, start + count)
        yield part, (b[part].double().mT @ a[part].double()).flatten(1)


def linear_gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """Return K_jk = <g_j, g2_k> [n, n2]; without a2 and b2 the second group is the first."""
    if a2 is None or b2 is None:
        a2, b2 = a, b
    K = a.new_zeros((a.shape[0], a2.shape[0]), dtype=torch.float64)
    for j, g in _per_sample(a, b):
        for k, g2 in _per_sample(a2, b2):
            K[j, k] = g @ g2.mT
    return K


def linear_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Return v_jm = <g_j, u_m> [n, m] for u [m, o, i]."""
    v = a.new_zeros((a.shape[0], u.shape[0]), dtype=torch.float64)
    for j, g in _per_sample(a, b):
        v[j] = g @ u.double().flatten(1).mT
    return v


def linear_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return Σ_j c_mj g_j [m, o, i] for c [m, n]."""
    out = a.new_zeros((c.shape[0], b.shape[2] * a.shape[2]), dtype=torch.float64)
    for j, g in _per_sample(a, b):
        out += c[:, j].double() @ g
    return out.unflatten(1, (b.shape[2], a.shape[2])).to(torch.promote_types(a.dtype, b.dtype))


def linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_j g_j and Σ_j g_j² [o, i]."""
    sums = a.new_zeros((2, b.shape[2] * a.shape[2]), dtype=torch.float64)
    for _, g in _per_sample(a, b):
        sums += torch.stack([g.sum(0), g.square().sum(0)])
    total, squares = sums.unflatten(1, (b.shape[2], a.shape[2])).to(torch.promote_types(a.dtype, b.dtype))
    return total, squares


def basis_project(D: Tensor, M: Tensor) -> Tensor:
    """Return D - (D M) Mᵀ [l, o, i] for D [l, o, i] and M [l, i, k]."""
    d, m = D.double(), M.double()
    return (d - (d @ m) @ m.mT).to(D.dtype)


def feasible(
    d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int, bound: float, slack: float, floor: float
) -> tuple[Tensor, Tensor]:
    """Return d [p] where it is feasible and 0 elsewhere, and six sums [6]: the number of coordinates with d ≠ 0, the
    number of those that are kept, ‖d‖², ‖out‖², ⟨out, u⟩ and ⟨out, total⟩.

    With r = total / √n, V = max(squares - r², 0) + slack squares + floor, which is (n - 1) s² and more, a coordinate is
    kept iff sign(d) u ≤ 0 and -sign(d) r |r| ≥ bound V; the floor counts only where a sample has a gradient.
    """
    out, sums = d.new_empty(d.shape), d.new_zeros(6, dtype=torch.float64)
    for o, *parts in zip(*(x.split(CHUNK) for x in (out, d, u, total, squares)), strict=True):
        x, w, T, S = (part.double() for part in parts)
        r = T * n**-0.5
        V = (S - r.square()).clamp_min(0) + slack * S + floor * ((T != 0) | (S != 0))
        keep = (x != 0) & (x.sign() * w <= 0) & (-x.sign() * r * r.abs() >= bound * V)
        finite = x.isfinite() & w.isfinite() & T.isfinite() & S.isfinite()
        kept = torch.where(finite, torch.where(keep, x, 0), torch.nan)
        o.copy_(kept)
        sums += torch.stack([(x != 0).sum(), keep.sum(), x @ x, kept @ kept, kept @ w, kept @ T])
    return out, sums
