"""linear_combine on CUDA: out += Σ_j c_j g_j, one pass over the factors, which stay in their dtype.

Where the factors are of one half type and t is long, the weights never touch the operands of the tensor cores: a tile
of g_j is summed over t from exact products and scaled in registers. Otherwise one operand is scaled in float32 and
split into parts, with tokens of several samples in one step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_products import precision, product
from .weight_tiles import GROUP, block_t, load_rows, load_transposed, matrix_units, splits_of, tile_of

SHORT = 16  # positions; a step of one sample would be mostly padding below, and three products for parts cost less


@triton.jit
def _halves(c):
    """Return c as a product: a power of two near its root, and the rest. c of tiny gradients leaves float32."""
    e = (((c.to(tl.int64, bitcast=True) >> 52) & 2047) - 1023) >> 1
    rest = c * ((1023 - e) << 52).to(tl.float64, bitcast=True)
    return rest.to(tl.float32), ((1023 + e) << 52).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def linear_combine_kernel(
    out, a, b, c, n, t, i, o, per_split, out_split, out_o, out_i, a_n, a_t, a_i, b_n, b_t, b_o, c_n,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
    SCALED: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum one tile of W over one split of the steps. Grid: (tiles, splits).

    A step is BLOCK_T positions of one sample or, if SCALED, BLOCK_T tokens of any samples.
    PARTIAL: out [splits, o, i] is overwritten; else out [o, i] is added to, rounded once.
    """
    r, s = tile_of(tl.program_id(0), tl.cdiv(o, BLOCK_O), tl.cdiv(i, BLOCK_I), GROUP)
    row, column = r * BLOCK_O + tl.arange(0, BLOCK_O), s * BLOCK_I + tl.arange(0, BLOCK_I)
    split, k = tl.program_id(1), tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if SCALED:
        for step in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(n * t, BLOCK_T))):
            token = step * BLOCK_T + k
            j, position = (token // t).to(tl.int64), (token % t).to(tl.int64)
            inside = token < n * t
            first, second = _halves(tl.load(c + j * c_n, inside, 0.0))
            x = load_rows(a, j * a_n + position * a_t, inside, column, i, a_i)
            y = load_transposed(b, j * b_n + position * b_t, inside, row, o, b_o, b.dtype.element_ty != tl.float16)
            x = x.to(tl.float32) * first[:, None]
            if b.dtype.element_ty == tl.float16:  # cannot be so tiny, and would leave its own range
                x *= second[:, None]
            else:
                y = (y * second[None, :]).to(b.dtype.element_ty)  # exact
            total = product(y, x, total, PRECISION)
    else:
        steps = tl.cdiv(t, BLOCK_T)
        part = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        last = tl.minimum((split + 1) * per_split, n * steps)
        for step in range(split * per_split, last):  # one loop over samples and positions keeps the loads in flight
            j, position = (step // steps).to(tl.int64), (step % steps * BLOCK_T + k).to(tl.int64)
            weight = tl.load(c + j * c_n)
            x = load_rows(a, j * a_n + position * a_t, position < t, column, i, a_i)
            y = load_transposed(b, j * b_n + position * b_t, position < t, row, o, b_o, False)
            part = product(y, x, part, PRECISION)
            if ((step + 1) % steps == 0) | (step + 1 == last):
                first, second = _halves(weight)
                total += part * first * second
                part = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    inside = (row[:, None] < o) & (column[None, :] < i)
    at = out + split.to(tl.int64) * out_split
    at += row.to(tl.int64)[:, None] * out_o + column.to(tl.int64)[None, :] * out_i
    if not PARTIAL:
        total += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), inside)


def tile(o: int, i: int, t: int, raw: bool) -> dict[str, int]:
    """Return blocks, warps and stages: 128 x 128 reads least; two accumulators of 64 registers a thread on 8 warps.

    Parts are made 16 tokens at a time: they fit in 128 registers on sm_90, so that two programs share a processor and
    one makes parts while the other multiplies, and without spills on sm_80, where operands are held in registers.
    """
    large = min(o, i) > 64
    size = {"BLOCK_O": 128, "BLOCK_I": 128, "num_warps": 8} if large else {"BLOCK_O": 64, "BLOCK_I": 64, "num_warps": 4}
    return size | {"BLOCK_T": block_t(t) if raw else 16, "num_stages": 3}


def linear_combine_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Add Σ_j c_j g_j to out [o, i] for a [n, t, i], b [n, t, o] and c [n] float64; no float64 factors, any strides."""
    (n, t, i), o = a.shape, b.shape[2]
    if n * t * o * i == 0:
        return
    if b.dtype == torch.float32 != a.dtype:  # the tile that becomes parts is the right one, which is not transposed
        return linear_combine_(out.mT, b, a, c)
    if n > 1 and n * t >= 1 << 30:  # tokens are counted in 32 bits
        for part in zip(a.split(n // 2), b.split(n // 2), c.split(n // 2), strict=True):
            linear_combine_(out, *part)
        return
    raw = matrix_units(a, b) and t >= SHORT
    launch = tile(o, i, t, raw)
    steps = n * triton.cdiv(t, launch["BLOCK_T"]) if raw else triton.cdiv(n * t, launch["BLOCK_T"])
    tiles = triton.cdiv(o, launch["BLOCK_O"]) * triton.cdiv(i, launch["BLOCK_I"])
    splits = splits_of(tiles, steps, o * i, least=8)
    per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, per_split)
    to = out.new_empty((splits, o, i), dtype=torch.float32) if splits > 1 else out[None]
    linear_combine_kernel[(tiles, splits)](
        to, a, b, c, n, t, i, o, per_split, *to.stride(), *a.stride(), *b.stride(), *c.stride(),
        SCALED=not raw, PARTIAL=splits > 1, PRECISION=precision(), GROUP=GROUP, **launch,
    )  # fmt: skip
    if splits > 1:
        out.add_(to.sum(0))
