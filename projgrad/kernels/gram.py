"""gram on CUDA: K = G Gᵀ and v = G uᵀ, one read of G for n ≤ 64.

Narrow products run on tensor cores in float16 (bfloat16 for bfloat16), on rows scaled by powers of two block by block,
and are summed in float32 within a block of 64 or 128 columns, in float64 across blocks. A float32 element is the sum
h + l of two float16 numbers to within its last bit once its row is in range (Ootomo and Yokota, IJHPCA 2022), so that

    G Gᵀ = h hᵀ + h lᵀ + l hᵀ + l lᵀ,  of which  h hᵀ + 2 h lᵀ + l lᵀ  is the symmetric part:

three products for the precision "highest"; "high" drops l lᵀ, at most 2⁻²² of the lengths, as tf32x3 does; "medium"
keeps h hᵀ, the 11 bits of tf32. Blocks are short because tensor cores cut where others round: a sum of positive
products loses about 0.2 eps for every 16 columns.

A float32 sum ends with its block, so that its error does not grow with p.

For n = 64 two programs of four warps fit on an SM, with 64 KiB on their way from memory. An H100 took 7.40 ms for
64 x 50 million in float32, 57 % of what memory allows. Blocks of 128 columns would halve the float64 additions and
barriers, but spill on sm_80 and sm_100 (40 and 136 bytes) where three products are added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .partial_sums import add_partial_sums
from .tile_products import dot, precision

DIRECTIONS = 4  # of one pass without K, kept in registers; a pass with K has one


@triton.jit
def corner(tile):
    """Return row and column of a tile of the lower triangle, tiles counted row by row."""
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    return i, tile - i * (i + 1) // 2


@triton.jit
def _power(e):
    """Return 2^e in float64, without a conversion."""
    return ((e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _down(x, TARGET: tl.constexpr):
    """Return 2^-e and e of every row of x [C, R, 8 W, 16 S]: 2^-e brings its largest element near 2^TARGET."""
    bits = tl.max(tl.max(tl.abs(x), 0), 2).to(tl.int32, bitcast=True)
    e = tl.minimum(tl.maximum(bits >> 23, max(1, TARGET + 1)), min(254, 253 + TARGET))
    return ((254 + TARGET - e) << 23).to(tl.float32, bitcast=True)[None, :, :, None], e - 127 - TARGET


@triton.jit
def _matrix(x):
    """Return [N, columns] of [C, R, 8 W, 16 S]. The order of columns moves nothing between lanes: any is right."""
    C: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2] // 8
    S: tl.constexpr = x.shape[3] // 16
    x = tl.permute(tl.reshape(x, (C, R, W, 8, 4, S, 2, 2)), (2, 1, 3, 0, 5, 6, 4, 7))
    return tl.reshape(x, (W * R * 8, C * S * 16))


@triton.jit
def _vector(x):
    """Return [N] of [R, 8 W], in the order of the rows of `_matrix`."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // 8
    return tl.reshape(tl.permute(tl.reshape(x, (R, W, 8)), (1, 0, 2)), (W * R * 8,))


@triton.jit
def _products(x, y, PARTS: tl.constexpr, SAME: tl.constexpr, OPERAND: tl.constexpr):
    """Return x yᵀ in float32; if y is x (SAME), only the symmetric part of the result is right."""
    narrow = x.to(OPERAND)
    h = _matrix(narrow)
    acc = tl.zeros((h.shape[0], h.shape[0]), tl.float32)
    if PARTS == 1:
        acc = dot(h, tl.trans(h if SAME else _matrix(y.to(OPERAND))), acc)
    else:
        l = _matrix((x - narrow.to(tl.float32)).to(OPERAND))
        if SAME:
            acc = dot(h + h, tl.trans(l), acc)
            if PARTS == 3:
                acc = dot(l, tl.trans(l), acc)
            acc = dot(h, tl.trans(h), acc)
        else:
            narrow = y.to(OPERAND)
            h2, l2 = _matrix(narrow), _matrix((y - narrow.to(tl.float32)).to(OPERAND))
            if PARTS == 3:
                acc = dot(l, tl.trans(l2), acc)
            acc = dot(h, tl.trans(l2), dot(l, tl.trans(h2), acc))
            acc = dot(h, tl.trans(h2), acc)
    return acc


@triton.jit
def gram_kernel(
    G, u, part, n, m, p, per_split, size, at, g_row, g_column, u_row, u_column,
    W: tl.constexpr, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, SAME: tl.constexpr, WITH_K: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Sum one tile of K, N = 16 W rows and columns, and of its rows of v over one split of the columns.

    Grid: (tiles of the lower triangle, or of the rows without K; splits). part [splits, size]: K [n, n] and, at `at`,
    M columns of v [n, m]. A block has C times 64 bytes of every row.
    Memory is read in rows of 64 bytes, four lanes a row and eight rows a warp, which is how tensor cores hold a tile.
    """
    BF16: tl.constexpr = G.dtype.element_ty == tl.bfloat16
    OPERAND: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    TARGET: tl.constexpr = -8 if BF16 else 13  # float16: as far up as 2 h goes; bfloat16: no product with u overflows
    SCALED_U: tl.constexpr = G.dtype.element_ty == tl.float32
    COLUMNS: tl.constexpr = 16 if G.dtype.element_ty == tl.float32 else 32
    N: tl.constexpr = 16 * W
    tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if WITH_K and not SAME:
        i, j = corner(tile)
    else:
        i, j = tile, tile * 0
    a = tl.arange(0, C * N)[:, None]
    inner = a % (8 * W) // 8 * 16 + a % N // (8 * W) * 8 + a % 8
    left, right = (i * N + inner).to(tl.int64), (j * N + inner).to(tl.int64)
    columns = a // N * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for_u = tl.arange(0, C * 8 * W)[:, None] // (8 * W) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    d = tl.arange(0, D)
    k = tl.zeros((N, N), tl.float64)
    b = tl.zeros((N, D), tl.float64)
    G += split * per_split * g_column
    u += split * per_split * u_column
    last = tl.minimum(per_split, p - split * per_split).to(tl.int32)  # counted from here, columns fit in 32 bits
    for start in range(0, last, C * COLUMNS):
        t = start + columns
        x = tl.load(G + left * g_row + t.to(tl.int64) * g_column, (left < n) & (t < last), 0.0).to(tl.float32)
        x = tl.reshape(x, (C, 2, 8 * W, COLUMNS))
        x_down, e = _down(x, TARGET)
        x *= x_down
        x_up = _power(_vector(e))
        for q in tl.static_range(M):
            s = start + for_u
            w = tl.load(u + q * u_row + s.to(tl.int64) * u_column, s < last, 0.0).to(tl.float32)
            w = tl.reshape(w, (C, 1, 8 * W, COLUMNS))  # every row of lanes has the whole block
            if SCALED_U:
                w_down, f = _down(w, 0)
                dots = tl.sum(tl.sum(x * (w * w_down), 0), 2).to(tl.float64) * _power(f)
            else:
                dots = tl.sum(tl.sum(x * w, 0), 2).to(tl.float64)
            b += tl.where(d[None, :] == q, (_vector(dots) * x_up)[:, None], 0.0)
        if WITH_K:
            if SAME:
                k += _products(x, x, PARTS, True, OPERAND).to(tl.float64) * x_up[:, None] * x_up[None, :]
            else:
                y = tl.load(G + right * g_row + t.to(tl.int64) * g_column, (right < n) & (t < last), 0.0).to(tl.float32)
                y = tl.reshape(y, (C, 2, 8 * W, COLUMNS))
                y_down, e2 = _down(y, TARGET)
                y_up = _power(_vector(e2))
                k += _products(x, y * y_down, PARTS, False, OPERAND).to(tl.float64) * x_up[:, None] * y_up[None, :]
    row, column = i * N + tl.arange(0, N), j * N + tl.arange(0, N)
    part += split * size
    if WITH_K:
        tl.store(part + row[:, None].to(tl.int64) * n + column[None, :], k, (row[:, None] < n) & (column[None, :] < n))
    if M:
        tl.store(part + at + row[:, None] * m + d[None, :], b, (row[:, None] < n) & (d[None, :] < M))


@triton.jit
def gram_wide_kernel(
    G, u, part, todo, n, m, p, per_split, size, at, g_row, g_column, u_row, u_column,
    N: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, D: tl.constexpr, SAME: tl.constexpr, WITH_K: tl.constexpr,
    PREDICATED: tl.constexpr,
):  # fmt: skip
    """Sum the same in float64; where PREDICATED and the flag `todo` is 0, do nothing."""
    tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PREDICATED and tl.load(todo) == 0:
        return
    if WITH_K and not SAME:
        i, j = corner(tile)
    else:
        i, j = tile, tile * 0
    row, column = (i * N + tl.arange(0, N)).to(tl.int64), (j * N + tl.arange(0, N)).to(tl.int64)
    d = tl.arange(0, D)
    k = tl.zeros((N, N), tl.float64)
    b = tl.zeros((N, D), tl.float64)
    last = tl.minimum((split + 1) * per_split, p)
    for start in range(split * per_split, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        x = tl.load(G + row[:, None] * g_row + t[None, :] * g_column, (row[:, None] < n) & (t[None, :] < last), 0.0)
        if WITH_K:
            if G.dtype.element_ty.primitive_bitwidth == 16:
                for s in range(BLOCK):  # column by column: triton 3.6 has no float64 product of tiles of a half type
                    inside = row * 0 + start + s < last
                    one = tl.load(G + row * g_row + (start + s) * g_column, (row < n) & inside, 0.0)
                    other = tl.load(G + column * g_row + (start + s) * g_column, (column < n) & inside, 0.0)
                    k += one.to(tl.float64)[:, None] * other.to(tl.float64)[None, :]
            else:
                if SAME:
                    y = x
                else:
                    mask = (column[:, None] < n) & (t[None, :] < last)
                    y = tl.load(G + column[:, None] * g_row + t[None, :] * g_column, mask, 0.0)
                k += tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), out_dtype=tl.float64)
        for q in tl.static_range(M):
            w = tl.load(u + q * u_row + t * u_column, t < last, 0.0).to(tl.float64)
            b += tl.where(d[None, :] == q, tl.sum(x.to(tl.float64) * w[None, :], 1)[:, None], 0.0)
    part += split * size
    if WITH_K:
        tl.store(part + row[:, None].to(tl.int64) * n + column[None, :], k, (row[:, None] < n) & (column[None, :] < n))
    if M:
        tl.store(part + at + row[:, None] * m + d[None, :], b, (row[:, None] < n) & (d[None, :] < M))


def tile(n: int, float64: bool, itemsize: int) -> tuple[int, int, int]:
    """Return rows of a tile, columns of a block and warps: what stays in registers, for N = 64 twice on an SM.

    Narrow blocks have 256 bytes a row, of which three are in flight; half as much where two tiles of a half type meet.
    """
    if float64:
        return (max(16, triton.next_power_of_2(n)), 16 if itemsize == 8 else 32, 4) if n <= 32 else (32, 16, 8)
    N = min(64, max(16, triton.next_power_of_2(n)))
    return N, (256 if n <= N or itemsize == 4 else 128) // itemsize, N // 16


def gram(G: Tensor, u: Tensor, float64: bool) -> tuple[Tensor, Tensor]:
    """Return K [n, n] and v [n, m]."""
    K, v = launch_gram(G, u, float64)
    return K, v.clone()  # outputs of an op must not share memory


def launch_gram(
    G: Tensor, u: Tensor, float64: bool, todo: Tensor | None = None, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return K [n, n] and v [n, m] in one memory, that of `previous` where it is given.

    todo: a flag on the device; where it is 0, `previous` stays as it is.
    The splits, and so the order of the sums, depend on the problem only: up to 4096 programs, for the largest GPUs,
    and partial sums of 16 MiB at most.
    """
    (n, p), m = G.shape, len(u)
    if n == 0 or p == 0:
        return G.new_zeros((n, n), dtype=torch.float64), G.new_zeros((n, m), dtype=torch.float64)
    float64 = float64 or G.dtype == torch.float64
    N, block, warps = tile(n, float64, G.element_size())
    rows = triton.cdiv(n, N)
    tiles, size = rows * (rows + 1) // 2, n * (n + m)
    splits = max(1, min(triton.cdiv(p, 4 * block), triton.cdiv(4096, tiles), 2**21 // size))
    per_split = triton.cdiv(triton.cdiv(p, block), splits) * block
    splits = triton.cdiv(p, per_split)
    part = G.new_empty((splits, size), dtype=torch.float64)
    parts = {"parts": 3, "tf32x3": 2, "tf32": 1}[precision()] if G.dtype == torch.float32 else 1

    def launch(with_k: bool, first: int, M: int) -> None:
        directions = u[first : first + M] if M else G  # nothing is read where there are none
        grid = tiles if with_k else rows, splits
        arguments = n, m, p, per_split, size, n * n + first, *G.stride(), *directions.stride()
        constants = {"M": M, "D": triton.next_power_of_2(max(1, M)), "SAME": rows == 1, "WITH_K": with_k}
        if float64:
            constants |= {"N": N, "BLOCK": block, "PREDICATED": todo is not None}
            gram_wide_kernel[grid](G, directions, part, todo, *arguments, **constants, num_warps=warps)
        else:
            constants |= {"W": warps, "C": block * G.element_size() // 64, "PARTS": parts}
            gram_kernel[grid](G, directions, part, *arguments, **constants, num_warps=warps)

    first = min(m, 1) if rows == 1 else 0  # more rows: v apart, so that registers are left for two tiles
    launch(True, 0, first)
    for at in range(first, m, DIRECTIONS):
        launch(False, at, min(DIRECTIONS, m - at))
    total = G.new_empty(size, dtype=torch.float64) if previous is None else previous
    add_partial_sums(part, total, n, "mean" if rows == 1 and not float64 else "lower", todo)
    return total[: n * n].view(n, n), total[n * n :].view(n, m)
