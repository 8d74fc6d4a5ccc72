"""subtract on CUDA: out = u - cᵀ G and r = G outᵀ, one read of G for n ≤ 64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK, WARPS = 64, 64, 8  # the tile stays in registers between its two uses, without spills


@triton.jit
def subtract_kernel(
    u, G, c, out, r, squares, todo, n, m, p, per_split, u_row, u_column, g_row, g_column,
    N: tl.constexpr, BLOCK: tl.constexpr, PREDICATED: tl.constexpr,
):  # fmt: skip
    """One split of the columns of one direction. Grid: (splits, m); r [splits, n, m], squares [splits, 2, m]."""
    split, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if PREDICATED and tl.load(todo) == 0:
        return
    before = tl.zeros((BLOCK,), tl.float64)
    after = tl.zeros((BLOCK,), tl.float64)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, p), BLOCK):
        t = (start + tl.arange(0, BLOCK)).to(tl.int64)
        exact = tl.load(u + d * u_row + t * u_column, t < p, 0.0).to(tl.float64)
        before += exact * exact
        for first in range(0, n, N):
            row = (first + tl.arange(0, N)).to(tl.int64)
            mask = (row[:, None] < n) & (t[None, :] < p)
            g = tl.load(G + row[:, None] * g_row + t[None, :] * g_column, mask, 0.0).to(tl.float64)
            weight = tl.load(c + row * m + d, row < n, 0.0)
            exact -= tl.sum(weight[:, None] * g, 0)
        if out.dtype.element_ty == tl.float64:
            tl.store(out + d * p + t, exact, t < p)
        else:  # to half types by way of float32, as the C++ kernel does
            tl.store(out + d * p + t, exact.to(tl.float32).to(out.dtype.element_ty), t < p)
        after += exact * exact
        for first in range(0, n, N):  # the same tile again: from registers for n ≤ N, from L2 above
            row = (first + tl.arange(0, N)).to(tl.int64)
            mask = (row[:, None] < n) & (t[None, :] < p)
            g = tl.load(G + row[:, None] * g_row + t[None, :] * g_column, mask, 0.0).to(tl.float64)
            sums = r + split * n * m + row * m + d
            tl.store(sums, tl.load(sums, row < n, 0.0) + tl.sum(g * exact[None, :], 1), row < n)
    tl.store(squares + (split * 2) * m + d, tl.sum(before, 0))
    tl.store(squares + (split * 2 + 1) * m + d, tl.sum(after, 0))


def subtract(
    u: Tensor,
    G: Tensor,
    c: Tensor,
    todo: Tensor | None = None,
    previous: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [m, p], r [n, m], squares [2, m]; with `todo`, a device flag, `previous` is kept where it is 0."""
    (m, p), n = u.shape, len(G)
    out = previous[0] if previous else u.new_empty((m, p))
    splits = max(1, min(triton.cdiv(p, 8 * BLOCK), 1024, 2**21 // max(1, n * m)))
    per_split = triton.cdiv(triton.cdiv(p, BLOCK), splits) * BLOCK
    r = c.new_zeros((splits, n, m))
    squares = c.new_zeros((splits, 2, m))
    if m and p:
        N = min(ROWS, max(1, triton.next_power_of_2(max(1, n))))
        subtract_kernel[(splits, m)](
            u, G, c.contiguous(), out, r, squares, todo, n, m, p, per_split, *u.stride(), *G.stride(),
            N=N, BLOCK=BLOCK, PREDICATED=todo is not None, num_warps=WARPS,
        )  # fmt: skip
    r, squares = r.sum(0), squares.sum(0)
    if previous:
        r, squares = torch.where(todo, r, previous[1]), torch.where(todo, squares, previous[2])
    return out, r, squares
