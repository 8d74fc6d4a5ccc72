"""basis_project on CUDA: C = D M in float32, then D - C Mᵀ, by one kernel for both products.

A program with all of a row block of D would read D once where it fits in L2, but there are only o / 128 such blocks:
too few programs, and together they still stream through all of D before one of them comes back to its first tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.basis_project import project_in_pieces
from .tile_products import precision, product
from .weight_tiles import GROUP, PARTIAL_BYTES, load_rows, matrix_units, splits_of, tile_of


@triton.jit
def basis_project_kernel(
    out, base, x, y, rows, columns, depth, tiles, per_split, out_split, out_l, out_row, out_column,
    base_l, base_row, base_column, x_l, x_row, x_k, y_l, y_k, y_column,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_K: tl.constexpr,
    SUBTRACT: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of x y [l, rows, columns] over one split of the depth, or of base - x y.

    Grid: (l tiles, splits).
    """
    l, split = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    r, s = tile_of(tl.program_id(0) % tiles, tl.cdiv(rows, BLOCK_ROW), tl.cdiv(columns, BLOCK_COLUMN), GROUP)
    row, column = r * BLOCK_ROW + tl.arange(0, BLOCK_ROW), s * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    long_row, k = row.to(tl.int64), tl.arange(0, BLOCK_K)  # rows times a stride leave 32 bits
    total = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), tl.float32)
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(depth, BLOCK_K))):
        inner = step * BLOCK_K + k
        left = load_rows(x + l * x_l, long_row * x_row, row < rows, inner, depth, x_k)
        right = load_rows(y + l * y_l, inner.to(tl.int64) * y_k, inner < depth, column, columns, y_column)
        total = product(left, right, total, PRECISION)
    at = out + split.to(tl.int64) * out_split + l * out_l
    at += long_row[:, None] * out_row + column.to(tl.int64)[None, :] * out_column
    if SUBTRACT:
        total = load_rows(base + l * base_l, long_row * base_row, row < rows, column, columns, base_column) - total
    tl.store(at, total.to(out.dtype.element_ty), (row[:, None] < rows) & (column[None, :] < columns))


def tile(rows: int, columns: int, raw: bool) -> dict[str, int]:
    """Return blocks, warps and stages: 128 x 128 reads least; half types as they are (`raw`) take 64 of the sum a step.

    Parts of float32 take as many as fit: sm_80 holds those of both sides in registers and spills with more.
    """
    block, depth = (128, 16) if min(rows, columns) > 64 else (64, 32)
    return {
        "BLOCK_ROW": block, "BLOCK_COLUMN": block, "BLOCK_K": 64 if raw else depth, "num_warps": 8, "num_stages": 3
    }  # fmt: skip


def _launch(out: Tensor, base: Tensor | None, x: Tensor, y: Tensor, launch: dict[str, int], splits: int = 1) -> Tensor:
    """Write x y [l, rows, columns] as partial sums in out [splits, l, rows, columns], or base - x y in one split."""
    (l, rows, depth), columns = x.shape, y.shape[2]
    tiles = triton.cdiv(rows, launch["BLOCK_ROW"]) * triton.cdiv(columns, launch["BLOCK_COLUMN"])
    per_split = triton.cdiv(triton.cdiv(depth, launch["BLOCK_K"]), splits)
    basis_project_kernel[(l * tiles, splits)](
        out, base, x, y, rows, columns, depth, tiles, per_split, *out.stride(),
        *((0, 0, 0) if base is None else base.stride()), *x.stride(), *y.stride(),
        SUBTRACT=base is not None, PRECISION=precision(), GROUP=GROUP, **launch,
    )  # fmt: skip
    return out


def _coefficients(D: Tensor, M: Tensor) -> Tensor:
    """Return C = D M [l, rows, k] in float32; the sum over i is split where there are few tiles."""
    (l, rows, i), k = D.shape, M.shape[2]
    launch = tile(rows, k, matrix_units(D, M))
    tiles = l * triton.cdiv(rows, launch["BLOCK_ROW"]) * triton.cdiv(k, launch["BLOCK_COLUMN"])
    splits = splits_of(tiles, triton.cdiv(i, launch["BLOCK_K"]), l * rows * k, least=8)
    C = _launch(D.new_empty((splits, l, rows, k), dtype=torch.float32), None, D, M, launch, splits)
    return C[0] if splits == 1 else C.sum(0)


def basis_project(D: Tensor, M: Tensor) -> Tensor:
    """Return D - (D M) Mᵀ [l, o, i] for D [l, o, i] and M [l, i, k], any strides; float64 by library products.

    C is as large as D where k is near i: rows are taken so many at a time that it stays within PARTIAL_BYTES.
    """
    if torch.float64 in (D.dtype, M.dtype):
        return project_in_pieces(D, M)
    (l, _, i), k = D.shape, M.shape[2]
    if D.numel() == 0 or k == 0:
        return D.clone(memory_format=torch.contiguous_format)
    out = D.new_empty(D.shape)
    rows = max(128, PARTIAL_BYTES // (4 * l * k) // 128 * 128)
    for d, to in zip(D.split(rows, 1), out.split(rows, 1), strict=True):
        _launch(to[None], d, _coefficients(d, M), M.mT, tile(d.shape[1], i, False))
    return out
