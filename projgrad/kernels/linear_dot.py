"""linear_dot on CUDA: v_j = Σ_t b_jtᵀ u a_jt, the product a uᵀ never leaves the chip."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factor_scales import largest, scales
from .tile_products import precision, product

# By the bytes of an element: a float32 accumulator of 128 x 128 is 64 registers a thread with 8 warps; the parts of
# float32 need registers too. Stages as in linear_gram.
T, WARPS, STAGES = 128, 8, 3
O, BLOCK = {2: 128, 4: 64}, {2: 64, 4: 32}


@triton.jit
def linear_dot_kernel(
    a, b, u, scale, far, out, n, t, i, o, a_n, a_t, a_i, b_n, b_t, b_o, u_o, u_i,
    T: tl.constexpr, O: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out [o tiles, n t] = Σ over a tile of o of b ∘ (a uᵀ). Grid: (token tiles, o tiles).

    scale [3, n]: of a, b and u. Two variants are launched, and `far` says which of them has to work.
    """
    if tl.load(far) != SCALED:
        return
    token = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.program_id(1) * O + tl.arange(0, O)
    x = tl.minimum(token, n * t - 1)
    j, at = (x // t).to(tl.int64), (x % t).to(tl.int64)
    row = tl.minimum(column, o - 1).to(tl.int64) * u_o  # the products with those behind the end meet a zero of b
    acc = tl.zeros((T, O), tl.float32)
    if SCALED:
        a_scale, u_scale = tl.load(scale + j), tl.load(scale + 2 * n)
    for start in range(0, i, BLOCK):
        k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        left = tl.load(a + (j * a_n + at * a_t)[:, None] + k[None, :] * a_i, (k < i)[None, :], 0.0)
        right = tl.load(u + row[:, None] + k[None, :] * u_i, (k < i)[None, :], 0.0)
        if SCALED:
            left = (left.to(tl.float32) * a_scale[:, None]).to(a.dtype.element_ty)
            right = (right.to(tl.float32) * u_scale).to(u.dtype.element_ty)
        acc = product(left, tl.trans(right), acc, PRECISION)
    inside = (token < n * t)[:, None] & (column < o)[None, :]
    offset = (j * b_n + at * b_t)[:, None] + column[None, :].to(tl.int64) * b_o
    y = tl.load(b + offset, inside, 0.0).to(tl.float32)
    if SCALED:
        y *= tl.load(scale + n + j)[:, None]
    acc = tl.where(inside, acc * y, 0.0)
    tl.store(out + tl.program_id(1).to(tl.int64) * n * t + token, tl.sum(acc, 1), token < n * t)


def linear_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Return v [n, m] in float64 for a [n, t, i], b [n, t, o] and u [m, o, i]; no float64 input."""
    if a.shape[2] < b.shape[2]:  # sum over the longer side inside, the shorter one outside
        a, b, u = b, a, u.mT
    (n, t, i), (m, o) = a.shape, u.shape[:2]
    v = a.new_zeros((n, m), dtype=torch.float64)
    if 0 in (n, t, i, o):
        return v
    itemsize = max(a.dtype.itemsize, u.dtype.itemsize)
    tiles = triton.cdiv(o, O[itemsize])
    lengths = [largest(a), largest(b)]
    for k, direction in enumerate(u.unbind()):
        scale, weight, far = scales(torch.stack([*lengths, largest(direction[None]).expand(n)]), 2.0**-90, 2.0**90)
        out = a.new_empty((tiles, n, t), dtype=torch.float32)
        for scaled in (False, True):
            linear_dot_kernel[(triton.cdiv(n * t, T), tiles)](
                a, b, direction, scale, far, out, n, t, i, o, *a.stride(), *b.stride(), *direction.stride(),
                T=T, O=O[itemsize], BLOCK=BLOCK[itemsize], SCALED=scaled, PRECISION=precision(),
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
        v[:, k] = out.sum((0, 2), dtype=torch.float64) * weight
    return v
