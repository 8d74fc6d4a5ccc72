"""Decides between the passes of project_out, in one launch, whether the result must be refined."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def check_residual_kernel(
    K, r, squares, c, rank, b, todo, worst, n, m, damping: tl.float64, limit: tl.float64, noise: tl.float64,
    smallest: tl.float64, BLOCK: tl.constexpr, CHOSEN: tl.constexpr, COUNTED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Write what the next solve needs, and whether it is needed.

    b = r - damping diag(K) c [n, m]: its right-hand side. worst: the largest cosine of r (`refinement.cosines`).
    todo: whether a cosine of b is above limit or, where COUNTED, a row that is not zero was left out.
    CHOSEN: rows with c = 0 were dropped on purpose.
    NARROW: r was measured in float32, which cannot judge what overflowed, nor ‖g_j‖ ‖out‖ of `smallest` or less. What
    overflowed is 0 in b: c stays, and the next pass measures it in float64.
    """
    above = 0
    nonzero = 0
    largest = tl.zeros((BLOCK,), tl.float64)
    lost = tl.zeros((BLOCK,), tl.int32)  # NaN is larger than everything here, as for torch, but not above the limit
    for d in range(m):
        size = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, n, BLOCK):
            j = (first + tl.arange(0, BLOCK)).to(tl.int64)
            square = tl.load(K + j * n + j, j < n, 0.0)
            size += tl.abs(tl.load(c + j * m + d, j < n, 0.0)) * tl.sqrt(square)
        before, after = tl.sqrt(tl.load(squares + d)), tl.sqrt(tl.load(squares + m + d))
        norm = tl.where(after > noise * (before + tl.sum(size, 0)), after, before)
        for first in range(0, n, BLOCK):
            j = (first + tl.arange(0, BLOCK)).to(tl.int64)
            square = tl.load(K + j * n + j, j < n, 0.0)
            product = tl.load(r + j * m + d, j < n, 0.0)
            weight = tl.load(c + j * m + d, j < n, 0.0)
            remaining = product - damping * square * weight
            length = tl.where(square > 0, tl.sqrt(square), 1.0) * tl.where(norm > 0, norm, 1.0)
            cosine = tl.abs(product) / length
            cosine += tl.where(j < n, norm - norm, 0.0)  # NaN where the norm is infinite
            lost |= (cosine != cosine).to(tl.int32)
            largest = tl.maximum(largest, tl.where(cosine == cosine, cosine, 0.0))
            cosine = tl.abs(remaining) / length
            if CHOSEN:
                cosine = tl.where(weight != 0, cosine, 0.0)
            above += tl.sum((cosine > limit).to(tl.int32), 0)
            if NARROW:
                unseen = tl.where(length > smallest, cosine != cosine, True)
                above += tl.sum(tl.where(square * norm > 0, unseen, False).to(tl.int32), 0)
                remaining = tl.where(remaining - remaining == 0, remaining, 0.0)
            tl.store(b + j * m + d, remaining, j < n)
            nonzero += tl.sum(tl.where(d == 0, square > 0, False).to(tl.int32), 0)
    if COUNTED:
        above += (tl.load(rank) < nonzero).to(tl.int32)
    tl.store(todo, above > 0)
    tl.store(worst, tl.where(tl.max(lost, 0) > 0, float("nan"), tl.max(largest, 0)))


def check_residual(
    K: Tensor, r: Tensor, squares: Tensor, c: Tensor, rank: Tensor, damping: float, limit: float, noise: float,
    chosen: bool, counted: bool, smallest: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return b [n, m], the flag todo, and the largest cosine; K [n, n] and r [n, m] must be contiguous.

    smallest: given where r was measured in float32; products of lengths up to it do not count as seen.
    """
    (n, m), b = r.shape, torch.empty_like(r)
    todo, worst = torch.empty((), dtype=torch.bool, device=r.device), r.new_empty(())
    check_residual_kernel[(1,)](
        K, r, squares, c.contiguous(), rank, b, todo, worst, n, m, damping, limit, noise, smallest or 0.0,
        BLOCK=BLOCK, CHOSEN=chosen, COUNTED=counted, NARROW=smallest is not None, num_warps=4,
    )  # fmt: skip
    return b, todo, worst
