"""feasible on CUDA: mean, variance, test and mask in one pass, which waits for memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .partial_sums import add_partial_sums

WARPS, STEPS = 4, 8  # blocks of one program: enough that the six sums are few, and programs many


@triton.jit
def feasible_kernel(
    d, u, total, squares, out, part, p, root: tl.float64, bound: tl.float64, slack: tl.float64, floor: tl.float64,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mask STEPS blocks of the coordinates; the sums of each program go to part [programs, 6]. root = 1 / √n."""
    LANES: tl.constexpr = BLOCK // VECTOR
    moved = tl.zeros((LANES,), tl.int32)
    kept = tl.zeros((LANES,), tl.int32)
    before = tl.zeros((LANES,), tl.float64)
    after = tl.zeros((LANES,), tl.float64)
    along = tl.zeros((LANES,), tl.float64)
    across = tl.zeros((LANES,), tl.float64)
    first = tl.program_id(0).to(tl.int64) * STEPS * BLOCK
    nan = tl.full((BLOCK,), float("nan"), tl.float32).to(out.dtype.element_ty)  # triton 3.6 interprets no bfloat16 NaN
    for step in range(STEPS):
        k = first + step * BLOCK + tl.arange(0, BLOCK)
        raw = tl.load(d + k, k < p, 0.0)
        x, w = raw.to(tl.float64), tl.load(u + k, k < p, 0.0).to(tl.float64)
        T, S = tl.load(total + k, k < p, 0.0).to(tl.float64), tl.load(squares + k, k < p, 0.0).to(tl.float64)
        r = T * root
        V = tl.maximum(S - r * r, 0.0) + slack * S + tl.where((T != 0) | (S != 0), floor, 0.0)
        gain = tl.where(x > 0, -r, r) * tl.abs(r)
        keep = (x != 0) & (tl.where(x > 0, w, -w) <= 0) & (gain >= bound * V)
        finite = (x - x) + (w - w) + (T - T) + (S - S) == 0
        tl.store(out + k, tl.where(finite, tl.where(keep, raw, 0.0), nan), k < p)
        y = tl.where(finite, tl.where(keep, x, 0.0), float("nan"))
        moved += tl.sum(tl.reshape((x != 0).to(tl.int32), (LANES, VECTOR)), 1)
        kept += tl.sum(tl.reshape(keep.to(tl.int32), (LANES, VECTOR)), 1)
        before += tl.sum(tl.reshape(x * x, (LANES, VECTOR)), 1)
        after += tl.sum(tl.reshape(y * y, (LANES, VECTOR)), 1)
        along += tl.sum(tl.reshape(y * w, (LANES, VECTOR)), 1)
        across += tl.sum(tl.reshape(y * T, (LANES, VECTOR)), 1)
    part += tl.program_id(0).to(tl.int64) * 6
    tl.store(part, tl.sum(moved, 0).to(tl.float64))
    tl.store(part + 1, tl.sum(kept, 0).to(tl.float64))
    tl.store(part + 2, tl.sum(before, 0))
    tl.store(part + 3, tl.sum(after, 0))
    tl.store(part + 4, tl.sum(along, 0))
    tl.store(part + 5, tl.sum(across, 0))


def tile(*itemsizes: int) -> dict[str, int]:
    """Return the constants of a launch: 16 bytes a lane of the widest tensor."""
    vector = 16 // max(itemsizes)
    return {"BLOCK": WARPS * 32 * vector, "VECTOR": vector, "STEPS": STEPS}


def feasible(
    d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int, bound: float, slack: float, floor: float
) -> tuple[Tensor, Tensor]:
    """Return the kept part of d [p] and the six sums of `reference.feasible` [6]."""
    p, launch = len(d), tile(d.element_size(), total.element_size())
    out, added = d.new_empty(p), d.new_zeros(6, dtype=torch.float64)
    if p:
        d, u, total, squares = (x.contiguous() for x in (d, u, total, squares))
        programs = triton.cdiv(p, launch["BLOCK"] * STEPS)
        part = added.new_empty((programs, 6))
        feasible_kernel[(programs,)](
            d, u, total, squares, out, part, p, n**-0.5, bound, slack, floor, **launch, num_warps=WARPS
        )
        add_partial_sums(part, added)
    return out, added
