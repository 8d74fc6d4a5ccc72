"""Adds up, in one launch, the partial sums that the programs of a kernel leave behind."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_partial_sums_kernel(
    part, total, todo, splits, size, n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, MIRROR: tl.constexpr, PREDICATED: tl.constexpr,
):  # fmt: skip
    """Add up part [splits, size] into total [size], whose first n² entries are a symmetric matrix.

    MIRROR completes it: "lower" from its lower triangle, "mean" as the mean of itself and its transpose.
    """
    if PREDICATED and tl.load(todo) == 0:
        return
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i, j = entry // tl.maximum(n, 1), entry % tl.maximum(n, 1)
    turned = tl.where(entry < n * n, j * n + i, entry)
    entries = entry
    if MIRROR == "lower":
        entries = tl.where(j > i, turned, entry)
    above = tl.zeros((BLOCK,), tl.float64)
    below = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, splits, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row[:, None] < splits) & (entry[None, :] < size)
        above += tl.sum(tl.load(part + row[:, None] * size + entries[None, :], mask, 0.0), 0)
        if MIRROR == "mean":
            below += tl.sum(tl.load(part + row[:, None] * size + turned[None, :], mask, 0.0), 0)
    if MIRROR == "mean":
        above = (above + below) / 2
    tl.store(total + entry, above, entry < size)


def shape(splits: int) -> tuple[int, int]:
    """Return rows and columns of a step: 4096 numbers on their way in every program."""
    rows = min(512, triton.next_power_of_2(splits))
    return rows, max(8, min(64, 4096 // rows))


def add_partial_sums(
    part: Tensor, total: Tensor, n: int = 0, mirror: str = "lower", todo: Tensor | None = None
) -> None:
    """Add up part [splits, size] into total [size]. todo: a flag on the device; where it is 0, total stays as it is."""
    splits, size = part.shape
    rows, block = shape(splits)
    add_partial_sums_kernel[(triton.cdiv(size, block),)](
        part, total, todo, splits, size, n,
        ROWS=rows, BLOCK=block, MIRROR=mirror, PREDICATED=todo is not None, num_warps=8,
    )  # fmt: skip
