"""Helpers of the kernels that sum over the tokens of a layer into tiles of its weight [o, i]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # enough for the largest GPUs, whatever the one at hand: the split fixes the order of the sums
PARTIAL_BYTES = 16 << 20  # partial sums of the splits
GROUP = 8  # rows of tiles that are visited together


@triton.jit
def tile_of(index, rows, columns, GROUP: tl.constexpr):
    """Return row and column of a tile. The order is down GROUP rows, then the next column: neighbours share L2."""
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = index % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def load_rows(x, start, inside, column, columns, x_column):
    """Load the columns of x from the rows that begin at the offsets `start`; zero outside."""
    at = start[:, None] + column.to(tl.int64)[None, :] * x_column
    return tl.load(x + at, inside[:, None] & (column < columns)[None, :], 0.0)


@triton.jit
def load_transposed(x, start, inside, column, columns, x_column, STAY: tl.constexpr):
    """Load what load_rows loads, transposed, as the left side of a product.

    STAY: the tile keeps the order in which it was loaded until it is multiplied, for work on it in float32. Otherwise
    the compiler would turn it on its way into shared memory, one number at a time. A sum, here of single numbers,
    stops it.
    """
    at = column.to(tl.int64)[:, None] * x_column + start[None, :]
    tile = tl.load(x + at, (column < columns)[:, None] & inside[None, :], 0.0)
    if STAY:
        tile = tl.sum(tile.to(tl.float32)[:, :, None], 2)
    return tile


def matrix_units(a: Tensor, b: Tensor) -> bool:
    """Return whether tensor cores take the factors as they are: one half type. Else `product` splits them."""
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def block_t(t: int) -> int:
    """Return the positions of a step: 64 keep the tensor cores busy; fewer where 64 would be a quarter padding."""
    if t <= 16:
        return 16
    return 64 if 4 * triton.cdiv(t, 64) * 64 <= 5 * triton.cdiv(t, 32) * 32 else 32


def splits_of(tiles: int, steps: int, floats: int, least: int = 1) -> int:
    """Return over how many programs the steps of a tile are split: `floats` partial sums, `least` steps each."""
    return max(1, min(PROGRAMS // max(1, tiles), steps // least, PARTIAL_BYTES // (4 * max(1, floats))))
