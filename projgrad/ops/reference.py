"""What every op computes, in plain PyTorch: the truth that kernels are tested against, and each op's default kernel.

Sizes, here and in the whole project: n samples, p parameters, m directions, l independent systems; t positions,
i inputs and o outputs of a layer.
Everything is computed in float64 whatever the dtype of the input; only `out` is rounded back.
"""

from collections.abc import Callable, Iterator
from typing import Any

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


def default_rtol(n: int, dtype: torch.dtype) -> float:
    """Rank tolerance for n rows whose products were accumulated in `dtype`: 8 n eps."""
    return 8 * max(n, 1) * torch.finfo(dtype).eps


def gram_solve(K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """x with K x = b [l, n, m], and rank and smallest pivot of each system [l], by pivoted Cholesky.

    A pivot of C = D⁻¹ K D⁻¹ + damping I is the squared sine of the angle between a row and the span of those before it,
    plus the damping. 1 + damping, the largest there is, where no pivot was used.
    """
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
    smallest = torch.full_like(rank, 1 + damping, dtype=torch.float64)
    factor = torch.zeros_like(K)  # one row a step [l, n, n]
    pivots, ys = [], []
    for step in range(n):
        pivot = left.argmax(1, keepdim=True)  # [l, 1]
        value = left.gather(1, pivot)
        keep = value > rtol
        root = torch.where(keep, value, 1).sqrt()
        across = pivot[:, None]  # [l, 1, 1]
        column = K.gather(1, across.expand(-1, -1, n))[:, 0] * scale * scale.gather(1, pivot)
        column = column - (factor.gather(2, across.expand(-1, n, -1)).mT @ factor)[:, 0]
        row = torch.where(keep & left.isfinite(), column / root, 0)  # used rows carry left = -inf [l, n]
        row = row.scatter(1, pivot, torch.where(keep, root, 0))
        y = torch.where(keep, w.gather(1, across.expand(-1, -1, w.shape[2]))[:, 0] / root, 0)  # [l, m]
        w = w - row[..., None] * y[:, None]
        left = (left - row.square()).scatter(1, pivot, float("-inf"))
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


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The precision a kernel multiplies in: float64 for float64, float32 for float32 and everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cosines(K: Tensor, r: Tensor, squares: Tensor, c: Tensor) -> Tensor:
    """|cos(g_j, out)| [n, m] from r = G outᵀ; a zero row is orthogonal to everything.

    `out` is what is left of u and of the n terms c_j g_j after summing them in float64. Below the rounding of that sum
    it is noise without a direction (u lies in the span): what it has in common with a row is measured against ‖u‖.
    """
    lengths = K.diagonal().sqrt()[:, None]
    before, after = squares.sqrt()
    noise = default_rtol(len(K), torch.float64) * (before + (c.abs() * lengths).sum(0))
    norm = torch.where(after > noise, after, before)
    cosine = r.abs() / torch.where(lengths > 0, lengths, 1) / torch.where(norm > 0, norm, 1)
    return cosine.masked_fill(norm.isinf(), torch.nan)


def in_range(K: Tensor, b: Tensor) -> Tensor:
    """b [n, m], NaN where a float64 row is so small that its square vanished: loud, as dropping it would be silent."""
    return b.masked_fill((K.diagonal() < 1e-290)[:, None] & (b != 0), torch.nan)


def first_pass(n: int, dtype: torch.dtype, rtol: float | None) -> tuple[bool, float]:
    """Whether the first Gram matrix must be multiplied in float64 already, and the cosine that counts as rounding."""
    narrow = accumulation(dtype) == torch.float32
    limit = 4 * torch.finfo(torch.float32).eps if narrow else 64 * torch.finfo(torch.float64).eps
    return not narrow or (rtol is not None and rtol < default_rtol(n, torch.float32)), limit


Products = Callable[[bool], tuple[Tensor, Tensor]]
Apply = Callable[[Tensor], tuple[Any, Tensor, Tensor]]


def refined(
    n: int,
    products: Products,
    apply: Apply,
    dtype: torch.dtype,
    damping: float,
    rtol: float | None,
    solve: Callable[..., tuple[Tensor, Tensor, Tensor]] = gram_solve,
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """The projection from passes over G that the caller makes, until what is left of every row is at rounding level.

    products(float64) returns K and b = G uᵀ, multiplied in float64 if that is set; apply(c) returns out = u - cᵀ G,
    r = G outᵀ and the squared norms of u and out. One of each is all that well-conditioned input needs. Else refine:
    solve for what is left, first with the Gram matrix at hand, then with a float64 one, which also tells rows apart
    that products in float32 cannot.
    """
    float64, limit = first_pass(n, dtype, rtol)
    K, b = products(float64)
    b = in_range(K, b)
    c, before, norms = torch.zeros_like(b), float("inf"), float("inf")
    for attempt in range(8):
        cut = default_rtol(n, torch.float64 if float64 else torch.float32) if rtol is None else rtol
        step, rank, _ = solve(K[None], b[None], damping, cut)
        c = c + step[0]
        out, r, squares = apply(c)
        b = r - damping * K.diagonal()[:, None] * c
        left = cosines(K, b, squares, c)
        if rtol is not None:
            left = left.where(c != 0, 0)  # the rows that the caller's tolerance dropped stay as they are
        pending = (left > limit).any(0)  # [m]; not where it is NaN, which no refinement mends
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


def largest(t: Tensor) -> Tensor:
    return t.amax() if t.numel() else t.new_zeros(())


def project_out(
    u: Tensor, G: Tensor, damping: float, rtol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out = u - Gᵀ c with (K + damping diag K) c = G uᵀ, c [n, m], rank, max |cos(g_j, out)|, squared norms [2, m]."""
    return refined(len(G), lambda float64: gram(G, u), lambda c: subtract(u, G, c), torch.float64, damping, rtol)


# From the factors of a linear layer y = x Wᵀ: its inputs a [n, t, i] and the gradients at its output b [n, t, o] give
# the per-sample gradients g_j = Σ_t b_jt a_jtᵀ [o, i].


def _per_sample(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The per-sample gradients [samples, o * i] in float64, a few samples at a time, and which ones they are."""
    count = max(1, CHUNK // max(1, a.shape[2] * b.shape[2]))
    for start in range(0, a.shape[0], count):
        part = slice(start, start + count)
        yield part, (b[part].double().mT @ a[part].double()).flatten(1)


def linear_gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """K_jk = <g_j, g2_k> [n, n2]; without a2 and b2 the second group is the first."""
    if a2 is None or b2 is None:
        a2, b2 = a, b
    K = a.new_zeros((a.shape[0], a2.shape[0]), dtype=torch.float64)
    for j, g in _per_sample(a, b):
        for k, g2 in _per_sample(a2, b2):
            K[j, k] = g @ g2.mT
    return K


def linear_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """v_jm = <g_j, u_m> [n, m] for u [m, o, i]."""
    v = a.new_zeros((a.shape[0], u.shape[0]), dtype=torch.float64)
    for j, g in _per_sample(a, b):
        v[j] = g @ u.double().flatten(1).mT
    return v


def linear_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Σ_j c_mj g_j [m, o, i] for c [m, n]."""
    out = a.new_zeros((c.shape[0], b.shape[2] * a.shape[2]), dtype=torch.float64)
    for j, g in _per_sample(a, b):
        out += c[:, j].double() @ g
    return out.unflatten(1, (b.shape[2], a.shape[2])).to(torch.promote_types(a.dtype, b.dtype))


def linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j g_j and Σ_j g_j² [o, i]."""
    sums = a.new_zeros((2, b.shape[2] * a.shape[2]), dtype=torch.float64)
    for _, g in _per_sample(a, b):
        sums += torch.stack([g.sum(0), g.square().sum(0)])
    total, squares = sums.unflatten(1, (b.shape[2], a.shape[2])).to(torch.promote_types(a.dtype, b.dtype))
    return total, squares


def basis_project(D: Tensor, M: Tensor) -> Tensor:
    """D - (D M) Mᵀ [l, o, i] for D [l, o, i] and M [l, i, k]."""
    d, m = D.double(), M.double()
    return (d - (d @ m) @ m.mT).to(D.dtype)


def feasible(
    d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int, bound: float, slack: float, floor: float
) -> tuple[Tensor, Tensor]:
    """d [p] where it is feasible and 0 elsewhere, and six sums [6]: coordinates with d ≠ 0 and those of them that are
    kept, ‖d‖², ‖out‖², ⟨out, u⟩, ⟨out, total⟩.

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
