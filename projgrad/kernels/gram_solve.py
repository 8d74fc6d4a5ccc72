"""gram_solve on CUDA where the extension was built without it: one program a system, the matrix in registers, n ≤ 64.

Larger systems run the reference, which does not wait for the device either.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import reference

LARGEST, WARPS = 64, 8  # the largest matrix that stays in registers


@triton.jit
def gram_solve_kernel(
    K, b, x, rank, smallest, factor, y, n, m, damping: tl.float64, rtol: tl.float64, N: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Right-looking pivoted Cholesky of C = D⁻¹ K D⁻¹ + damping I. factor [l, n, N] and y [l, n, M] are scratch."""
    system = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, N), tl.arange(0, M)
    K += system * n * n
    b += system * n * m
    x += system * n * m
    factor += system * n * N
    y += system * n * M
    square = tl.load(K + i * n + i, i < n, 0.0).to(tl.float64)
    a = tl.load(K + i[:, None] * n + i[None, :], (i[:, None] < n) & (i[None, :] < n), 0.0).to(tl.float64)
    finite = tl.min(tl.min((a - a == 0).to(tl.int32), 1), 0)
    scale = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    a = a * scale[:, None] * scale[None, :]
    left = tl.where(square > 0, tl.full((N,), damping, tl.float64) + 1.0, 0.0)
    cut = tl.full((), rtol, tl.float64)
    least = tl.full((), damping, tl.float64) + 1.0
    w = tl.load(b + i[:, None] * m + d[None, :], (i[:, None] < n) & (d[None, :] < m), 0.0).to(tl.float64)
    usable = tl.min((w - w == 0).to(tl.int32), 0)  # [M]
    w *= scale[:, None]
    used = tl.zeros((N,), tl.int32)
    pivots = tl.zeros((N,), tl.int32)
    count = 0
    for step in range(n):
        masked = tl.where((used == 0) & (i < n), left, -1.0)
        pivot = tl.argmax(masked, 0)
        value = tl.max(masked, 0)
        if (value > cut) & (finite == 1):
            root = tl.sqrt(value)
            row = tl.sum(tl.where(i[:, None] == pivot, a, 0.0), 0)
            row = tl.where(i == pivot, root, tl.where(used == 1, 0.0, row / root))
            top = tl.sum(tl.where(i[:, None] == pivot, w, 0.0), 0) / root
            a -= row[:, None] * row[None, :]
            left -= row * row
            w -= row[:, None] * top[None, :]
            tl.store(factor + step * N + i, row)
            tl.store(y + step * M + d, top)
            used = tl.where(i == pivot, 1, used)
            pivots = tl.where(i == step, pivot, pivots)
            count += 1
            least = tl.minimum(least, value)
    tl.debug_barrier()  # the rows below were written by other threads
    z = tl.zeros((N, M), tl.float64)
    for back in range(count):
        step = count - 1 - back
        row = tl.load(factor + step * N + i)
        top = tl.load(y + step * M + d)
        pivot = tl.sum(tl.where(i == step, pivots, 0), 0)
        root = tl.sum(tl.where(i == pivot, row, 0.0), 0)
        value = (top - tl.sum(row[:, None] * z, 0)) / root
        z = tl.where(i[:, None] == pivot, value[None, :], z)
    z = tl.where((finite * usable)[None, :] == 1, z * scale[:, None], float("nan"))
    tl.store(x + i[:, None] * m + d[None, :], z.to(x.dtype.element_ty), (i[:, None] < n) & (d[None, :] < m))
    tl.store(rank + system, count.to(tl.int64))
    tl.store(smallest + system, least)


def gram_solve(K: Tensor, b: Tensor, damping: float, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [l, n, m], rank [l] and smallest pivot [l] for K [l, n, n] and b [l, n, m]."""
    systems, n, m = b.shape
    if n > LARGEST or not b.numel():
        return reference.gram_solve(K, b, damping, rtol)
    if rtol is None:
        rtol = reference.default_rtol(n, K.dtype)
    x = torch.empty_like(b, memory_format=torch.contiguous_format)
    rank = torch.empty(systems, dtype=torch.int64, device=b.device)
    smallest = torch.empty(systems, dtype=torch.float64, device=b.device)
    N, M = max(16, triton.next_power_of_2(n)), triton.next_power_of_2(m)
    scratch = b.new_empty((systems, n, N + M), dtype=torch.float64)
    factor, y = scratch.flatten().split([systems * n * N, systems * n * M])
    gram_solve_kernel[(systems,)](
        K.contiguous(), b.contiguous(), x, rank, smallest, factor, y, n, m, damping, rtol, N=N, M=M, num_warps=WARPS
    )
    return x, rank, smallest
