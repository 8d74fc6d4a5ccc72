"""linear_moments on CUDA: Σ_j g_j and Σ_j g_j², the per-sample tile in registers, one pass over the factors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.registration import FALLBACKS
from .tile_products import precision, product
from .weight_tiles import GROUP, block_t, load_rows, load_transposed, matrix_units, splits_of, tile_of

RUN = 64  # samples summed in registers before they are added to the sums in memory: the error grows with RUN + n / RUN


@triton.jit
def linear_moments_kernel(
    sums, a, b, n, t, i, o, per_split, a_n, a_t, a_i, b_n, b_t, b_o,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Add one tile of W over one split of the samples to sums [splits, 2, o, i]. Grid: (tiles, splits)."""
    r, s = tile_of(tl.program_id(0), tl.cdiv(o, BLOCK_O), tl.cdiv(i, BLOCK_I), GROUP)
    row, column = r * BLOCK_O + tl.arange(0, BLOCK_O), s * BLOCK_I + tl.arange(0, BLOCK_I)
    split, k, steps = tl.program_id(1), tl.arange(0, BLOCK_T), tl.cdiv(t, BLOCK_T)
    last = tl.minimum((split + 1) * per_split, n)
    for start in range(split * per_split, last, RUN):
        total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        part = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for step in range(start * steps, tl.minimum(start + RUN, last) * steps):  # loads of the next sample in flight
            j, position = (step // steps).to(tl.int64), (step % steps * BLOCK_T + k).to(tl.int64)
            x = load_rows(a, j * a_n + position * a_t, position < t, column, i, a_i)
            y = load_transposed(
                b, j * b_n + position * b_t, position < t, row, o, b_o, b.dtype.element_ty == tl.float32
            )
            part = product(y, x, part, PRECISION)
            if (step + 1) % steps == 0:
                total += part
                squares += part * part
                part = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        inside = (row[:, None] < o) & (column[None, :] < i)
        first = 2 * split.to(tl.int64) * o + row.to(tl.int64)[:, None]
        at = sums + first * i + column[None, :]
        tl.store(at, tl.load(at, inside, 0.0) + total, inside)
        at = sums + (first + o) * i + column[None, :]
        tl.store(at, tl.load(at, inside, 0.0) + squares, inside)


def tile(o: int, i: int, t: int, raw: bool) -> dict[str, int]:
    """Return blocks, warps and stages: three accumulators of 32 registers a thread; 64 more would spill.

    A step of 16 positions is too small for 256 threads to load 16 bytes each (parts, of float32, are not); one of 64
    spills on 128 threads of sm_80.
    """
    large, step = o > 64 and (t > 16 or not raw), block_t(t) if raw else 16
    if large:
        return {"BLOCK_O": 128, "BLOCK_I": 64, "BLOCK_T": step, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": min(32, step), "num_warps": 4, "num_stages": 3}


def linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_j g_j and Σ_j g_j² [o, i], float32, for a [n, t, i] and b [n, t, o]; no float64, any strides.

    Single positions are right here too but cheaper as two products, (b²)ᵀ a² and bᵀ a: a step is then mostly padding.
    """
    (n, t, i), o = a.shape, b.shape[2]
    if b.dtype == torch.float32 != a.dtype:
        total, squares = linear_moments(b, a)
        return total.mT, squares.mT
    launch = tile(o, i, t, matrix_units(a, b))
    steps = triton.cdiv(t, launch["BLOCK_T"])
    tiles = triton.cdiv(o, launch["BLOCK_O"]) * triton.cdiv(i, launch["BLOCK_I"])
    splits = splits_of(tiles, n, 2 * o * i, least=triton.cdiv(8, max(1, steps)))
    per_split = max(1, triton.cdiv(n, splits))
    splits = max(1, triton.cdiv(n, per_split))
    sums = a.new_zeros((splits, 2, o, i), dtype=torch.float32)
    if n * t * o * i:
        linear_moments_kernel[(tiles, splits)](
            sums, a, b, n, t, i, o, per_split, *a.stride(), *b.stride(),
            PRECISION=precision(), GROUP=GROUP, RUN=RUN, **launch,
        )  # fmt: skip
    total, squares = sums[0] if splits == 1 else sums.sum(0)
    return total, squares.clone()  # outputs of an op must not share memory


def on_device(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same in library products where they are the better way: of float64, and of single positions."""
    if a.shape[1] == 1 or torch.float64 in (a.dtype, b.dtype):
        return FALLBACKS["linear_moments_pass"](a, b)
    return linear_moments(a, b)
