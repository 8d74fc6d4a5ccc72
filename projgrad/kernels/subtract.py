"""subtract on CUDA: out = u - cᵀ G and r = G outᵀ, one read of G for n ≤ 512.

All arithmetic is in float64: out may be a millionth of u, and r decides whether the projection is good enough.

NARROW is the first look at 16-bit input, which float64 arithmetic held at half the speed of memory (4.23 of 2.19 ms for
64 x 50 million on an H100): products, the sum over rows and sums of 8 columns of r are in float32, all else in float64.
r is that of the `out` written, before its last rounding, to 4 x 2⁻²⁴ of ‖g_j‖ ‖out‖: what float32 lost shows in r, and
is computed again in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .partial_sums import add_partial_sums

LARGEST = 512  # rows whose block stays in registers between its two uses


@triton.jit
def subtract_kernel(
    u, G, c, out, part, todo, n, m, p, per_split, size, u_row, u_column, g_row, g_column,
    N: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr, PREDICATED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Compute one split of the columns of one direction.

    Grid: (m, splits). part [splits, size]: r [n, m], squares [2, m].
    ONCE: the N rows of a block are all there are.
    """
    d, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if PREDICATED and tl.load(todo) == 0:
        return
    VECTOR: tl.constexpr = min(BLOCK, 128 // G.dtype.element_ty.primitive_bitwidth)  # what a lane reads at once
    WORK: tl.constexpr = tl.float32 if NARROW else tl.float64
    part += split * size
    row = tl.arange(0, N).to(tl.int64)
    before = tl.zeros((BLOCK,), tl.float64)
    after = tl.zeros((BLOCK,), tl.float64)
    begin, last = split * per_split, tl.minimum((split + 1) * per_split, p)
    if ONCE:
        weight = tl.load(c + row * m + d, row < n, 0.0).to(WORK)  # out of range: out is Inf or NaN
        r = tl.zeros((N, BLOCK // VECTOR), tl.float64)  # summed over lanes at the end only
    for start in tl.range(begin, last, BLOCK, num_stages=3):
        t = start + tl.arange(0, BLOCK)
        exact = tl.load(u + d * u_row + t * u_column, t < last, 0.0).to(tl.float64)
        before += exact * exact
        if ONCE:
            mask = (row[:, None] < n) & (t[None, :] < last)
            g = tl.load(G + row[:, None] * g_row + t[None, :] * g_column, mask, 0.0).to(WORK)
            exact -= tl.sum(weight[:, None] * g, 0).to(tl.float64)
        else:
            for first in range(0, n, N):
                mask = (first + row[:, None] < n) & (t[None, :] < last)
                g = tl.load(G + (first + row[:, None]) * g_row + t[None, :] * g_column, mask, 0.0).to(WORK)
                weight = tl.load(c + (first + row) * m + d, first + row < n, 0.0).to(WORK)
                exact -= tl.sum(weight[:, None] * g, 0).to(tl.float64)
        if out.dtype.element_ty == tl.float64:
            tl.store(out + d * p + t, exact, t < last)
        else:  # to half types by way of float32, as the C++ kernel does
            tl.store(out + d * p + t, exact.to(tl.float32).to(out.dtype.element_ty), t < last)
        result = exact.to(WORK)
        after += exact * exact
        if ONCE:
            r += tl.sum(tl.reshape(g * result[None, :], (N, BLOCK // VECTOR, VECTOR)), 2).to(tl.float64)
        else:
            for first in range(0, n, N):  # the same rows again, from L2
                mask = (first + row[:, None] < n) & (t[None, :] < last)
                g = tl.load(G + (first + row[:, None]) * g_row + t[None, :] * g_column, mask, 0.0).to(WORK)
                few = tl.sum(tl.reshape(g * result[None, :], (N, BLOCK // VECTOR, VECTOR)), 2)
                here = part + (first + row) * m + d
                earlier = tl.load(here, (first + row < n) & (row * 0 + start > begin), 0.0)
                tl.store(here, earlier + tl.sum(few.to(tl.float64), 1), first + row < n)
            tl.debug_barrier()  # other threads read them in the next block
    if ONCE:
        tl.store(part + row * m + d, tl.sum(r, 1), row < n)
    tl.store(part + n * m + d, tl.sum(before, 0))
    tl.store(part + n * m + m + d, tl.sum(after, 0))


def tile(n: int, itemsize: int) -> tuple[int, int, int]:
    """Return rows and columns of a block, and warps: 128 bytes a lane, three blocks of which two are on their way."""
    N = triton.next_power_of_2(max(1, n)) if n <= LARGEST else 64
    warps = 4 if N <= 128 else 8
    return N, min(256 if N >= 16 else 512, warps * 4096 // (N * itemsize)), warps


def views(total: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return r [n, m] and squares [2, m] in the memory that subtract_ fills."""
    return total[: n * m].view(n, m), total[n * m :].view(2, m)


def subtract_(
    out: Tensor, total: Tensor, u: Tensor, G: Tensor, c: Tensor, todo: Tensor | None = None, narrow: bool = False
) -> None:
    """Fill out [m, p] and total [(n + 2) m], in float32 arithmetic if `narrow`.

    todo: a flag on the device; where it is 0, both stay as they are.
    """
    (m, p), n = u.shape, len(G)
    N, block, warps = tile(n, G.element_size())
    splits = max(1, min(triton.cdiv(p, 4 * block), 4096, 2**21 // len(total)))
    per_split = triton.cdiv(triton.cdiv(p, block), splits) * block
    splits = triton.cdiv(p, per_split)
    part = total.new_empty((splits, len(total)))
    subtract_kernel[(m, splits)](
        u, G, c.contiguous(), out, part, todo, n, m, p, per_split, len(total), *u.stride(), *G.stride(),
        N=N, BLOCK=block, ONCE=n <= N, PREDICATED=todo is not None, NARROW=narrow, num_warps=warps,
    )  # fmt: skip
    add_partial_sums(part, total, todo=todo)


def subtract(u: Tensor, G: Tensor, c: Tensor, narrow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [m, p], r [n, m] and squares [2, m], in float32 arithmetic if `narrow`."""
    (m, p), n = u.shape, len(G)
    out = torch.empty((m, p), dtype=u.dtype, device=u.device)
    total = c.new_zeros((n + 2) * m)
    if m and p:
        subtract_(out, total, u, G, c, narrow=narrow)
    r, squares = views(total, n, m)
    return out, r, squares.clone()  # outputs of an op must not share memory
