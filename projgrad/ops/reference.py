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
    that counts as dependent stays in the loop with zeros. A row takes a dozen launches.
    """
    n, most = K.shape[-1], 1 + damping
    if rtol is None:
        rtol = default_rtol(n, K.dtype)
    dtype, K, b = b.dtype, K.double(), b.double()
    square = K.diagonal(dim1=-2, dim2=-1)  # ‖g_j‖² [l, n]
    scale = torch.where(square > 0, square, 1).rsqrt()
    C = K * scale[:, None] * scale[..., None]  # what the pivots so far leave unexplained
    unexplained = C.diagonal(dim1=-2, dim2=-1).copy_((square > 0).double() * most)  # [l, n]
    factor, values = torch.zeros_like(C), torch.zeros_like(square)  # one row, one pivot a step
    order = torch.zeros_like(square, dtype=torch.int64)
    for step in range(n):
        value, pivot = unexplained.max(1, keepdim=True)  # [l, 1]
        row = C.gather(1, pivot[..., None].expand(-1, -1, n))[:, 0] / value.sqrt()
        row = torch.where(unexplained > rtol, row, 0)  # neither pivots, which are -inf, nor dependent rows [l, n]
        values[:, step : step + 1], order[:, step : step + 1], factor[:, step] = value, pivot, row
        C.baddbmm_(row[..., None], row[:, None], alpha=-1)
        unexplained.scatter_(1, pivot, float("-inf"))
    used = values > rtol  # the first so many steps
    R = factor.gather(2, order[:, None].expand(-1, n, -1))  # upper triangular
    R.diagonal(dim1=-2, dim2=-1).masked_fill_(~used, 1)
    columns = order[..., None].expand(b.shape)
    y = torch.linalg.solve_triangular(R.mT, (b * scale[..., None]).gather(1, columns), upper=False)
    x = torch.linalg.solve_triangular(R, torch.where(used[..., None], y, 0), upper=True)
    x = torch.zeros_like(x).scatter(1, columns, x) * scale[..., None]
    finite = K.isfinite().flatten(1).all(1)  # [l]
    rank = torch.where(finite, used.sum(1), 0)
    values = torch.where(used & finite[:, None], values, most)
    smallest = values.amin(1) if n else values.new_full(rank.shape, most)
    x = torch.where(finite[:, None, None] & b.isfinite().all(1, keepdim=True), x, torch.nan)
    return x.to(dtype), rank, smallest


def project_out(
    u: Tensor, G: Tensor, damping: float, rtol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out = u - Gᵀ c with (K + damping diag K) c = G uᵀ, c [n, m], rank, max |cos(g_j, out)| and the squared
    norms of u and out [2, m]."""
    return project_refined(
        len(G), len(u), lambda _: gram(G, u), lambda c: subtract(u, G, c), gram_solve, torch.float64, damping, rtol
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
