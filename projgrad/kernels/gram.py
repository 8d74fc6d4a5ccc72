"""gram on CUDA: K = G Gᵀ and v = G uᵀ, one read of G for n ≤ 64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DIRECTIONS = 8  # directions a pass, kept in registers


@triton.jit
def _rows(G, row, t, n, p, g_row, g_column):
    """A tile of G whose rows are scaled by powers of two, and the scales in float64.

    The largest element of a row is brought into [1, 2), so that float32 squares stay in range; float64 stays as it is.
    """
    x = tl.load(G + row[:, None] * g_row + t[None, :] * g_column, (row[:, None] < n) & (t[None, :] < p), 0.0)
    if x.dtype == tl.float64:
        up = tl.full((row.shape[0],), 1.0, tl.float64)
    else:
        x = x.to(tl.float32)
        bits = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
        e = tl.minimum(tl.maximum(bits >> 23, 1), 253)
        x *= ((254 - e) << 23).to(tl.float32, bitcast=True)[:, None]
        up = (e << 23).to(tl.float32, bitcast=True).to(tl.float64)
    return x, up


@triton.jit
def gram_kernel(
    G, u, K, v, todo, n, m, p, per_split, g_row, g_column, u_row, u_column,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, DIAGONAL: tl.constexpr,
    WITH_K: tl.constexpr, PREDICATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of one tile of K and its rows of v over one split of the columns.

    Grid: (row tiles, column tiles, splits); tiles above the diagonal return at once.
    K [splits, n, n], v [splits, n, m].
    """
    i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j > i:
        return
    if PREDICATED and tl.load(todo) == 0:
        return
    row = (i * N + tl.arange(0, N)).to(tl.int64)
    column = (j * N + tl.arange(0, N)).to(tl.int64)
    d = tl.arange(0, M)
    k = tl.zeros((N, N), tl.float64)
    b = tl.zeros((N, M), tl.float64)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, p), BLOCK):
        t = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x, x_up = _rows(G, row, t, n, p, g_row, g_column)
        if WITH_K:
            if WIDE and G.dtype.element_ty.primitive_bitwidth == 16:
                for s in range(BLOCK):  # column by column: triton 3.6 has no float64 product of tiles of a half type
                    inside = row * 0 + start + s < p
                    left = tl.load(G + row * g_row + (start + s) * g_column, (row < n) & inside, 0.0)
                    right = tl.load(G + column * g_row + (start + s) * g_column, (column < n) & inside, 0.0)
                    k += left.to(tl.float64)[:, None] * right.to(tl.float64)[None, :]
            else:
                if DIAGONAL:
                    y, y_up = x, x_up
                else:
                    y, y_up = _rows(G, column, t, n, p, g_row, g_column)
                if WIDE:
                    products = tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), out_dtype=tl.float64)
                else:
                    products = tl.dot(x, tl.trans(y), input_precision=PRECISION).to(tl.float64)
                k += products * x_up[:, None] * y_up[None, :]
        if j == 0:
            for q in tl.static_range(M):
                if q < m:
                    w = tl.load(u + q * u_row + t * u_column, t < p, 0.0).to(tl.float64)
                    dots = tl.sum(x.to(tl.float64) * w[None, :], 1) * x_up
                    b += tl.where(d[None, :] == q, dots[:, None], 0.0)
    if WITH_K:
        tl.store(K + split * n * n + row[:, None] * n + column[None, :], k, (row[:, None] < n) & (column[None, :] < n))
    if j == 0:
        tl.store(v + split * n * m + row[:, None] * m + d[None, :], b, (row[:, None] < n) & (d[None, :] < m))


def tile(n: int, wide: bool) -> tuple[int, int, bool, int]:
    """Rows and columns of a tile, whether one tile holds all n rows, and warps: what keeps the tile in registers."""
    if n > (32 if wide else 64):
        return 32, 16, False, 8  # two different tiles a program
    N = max(16, triton.next_power_of_2(n))
    return N, 32, True, 4 if N < 64 else 8


def gram(G: Tensor, u: Tensor, wide: bool, todo: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """K [n, n] and v [n, m]; `todo`: a device flag, where it is 0 nothing is computed and the values mean nothing."""
    (n, p), m = G.shape, len(u)
    if n == 0 or p == 0:
        return G.new_zeros((n, n), dtype=torch.float64), G.new_zeros((n, m), dtype=torch.float64)
    wide = wide or G.dtype == torch.float64
    N, block, diagonal, warps = tile(n, wide)
    tiles = triton.cdiv(n, N)
    # Enough programs for the largest GPUs, whatever the one at hand, since the split fixes the order of the sums;
    # 16 MiB of them at most.
    splits = max(1, min(triton.cdiv(p, 8 * block), 1024 // tiles**2, 2**21 // (n * n)))
    per_split = triton.cdiv(triton.cdiv(p, block), splits) * block
    splits = triton.cdiv(p, per_split)
    K = G.new_empty((splits, n, n), dtype=torch.float64)
    v = G.new_empty((n, m), dtype=torch.float64)
    for first in range(0, max(1, m), DIRECTIONS):
        some = u[first : first + DIRECTIONS]
        part = G.new_zeros((splits, n, len(some)), dtype=torch.float64)
        gram_kernel[(tiles, tiles, splits)](
            G, some if len(some) else G, K, part, todo, n, len(some), p, per_split, *G.stride(),
            *(some.stride() if len(some) else (0, 0)),
            N=N, M=triton.next_power_of_2(max(1, len(some))), BLOCK=block, WIDE=wide,
            DIAGONAL=diagonal, WITH_K=first == 0, PREDICATED=todo is not None, PRECISION=precision(), num_warps=warps,
        )  # fmt: skip
        v[:, first : first + DIRECTIONS] = part.sum(0)
    K = K.sum(0).tril()
    return K + K.tril(-1).mT, v


def precision() -> str:
    """How float32 tiles are multiplied: as the user told torch to."""
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
