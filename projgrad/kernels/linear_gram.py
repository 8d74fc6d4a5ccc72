"""linear_gram from factors on CUDA: K_jk = Σ_tt' (a_jt · a_kt') (b_jt · b_kt'), no product of all tokens in memory.

A program takes one tile of tokens against another, T x T: the products over i, those over o, and the sum of what they
make together over the tokens of each pair of samples. What it stores is one number per pair of segments: a segment is
what a tile holds of a sample, so that at most (n + n t / T)² numbers are stored, whatever t is. A second kernel sums
the segments of each pair of samples in float64.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factor_scales import largest, scales
from .gram import corner
from .tile_products import dot, precision, product

PAIRS = 16  # samples on a side of one program of the second kernel


@triton.jit
def _products(
    x, y, rows, columns, size, x_step, y_step, x_scale, y_scale,
    T: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x yᵀ [T, T] over `size` columns of the rows that start at the offsets `rows` and `columns`."""
    acc = tl.zeros((T, T), tl.float32)
    if SCALED:
        x_scale, y_scale = tl.load(x_scale), tl.load(y_scale)
    for start in range(0, size, BLOCK):
        k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        left = tl.load(x + rows[:, None] + k[None, :] * x_step, (k < size)[None, :], 0.0)
        right = tl.load(y + columns[:, None] + k[None, :] * y_step, (k < size)[None, :], 0.0)
        if SCALED:
            left = (left.to(tl.float32) * x_scale[:, None]).to(x.dtype.element_ty)
            right = (right.to(tl.float32) * y_scale[:, None]).to(y.dtype.element_ty)
        acc = product(left, tl.trans(right), acc, PRECISION)
    return acc


@triton.jit
def _segment(x, t, period, T: tl.constexpr):
    """Return which segment token x is in: they begin at multiples of t and of T; period = lcm(t, T)."""
    return x // t + x // T - x // period


@triton.jit
def _sums(p, mine, theirs, T: tl.constexpr, S: tl.constexpr):
    """Return mine p theirs [S, S] for mine [S, T] and theirs [T, S] of zeros and ones, which are exact in bfloat16.

    In float32, the parts of p one after the other.
    """
    q = tl.zeros((T, S), tl.float32)
    for _ in tl.static_range(3):
        h = p.to(tl.bfloat16)
        p -= h.to(tl.float32)
        q = dot(h, theirs, q)
    k = tl.zeros((S, S), tl.float32)
    for _ in tl.static_range(3):
        h = q.to(tl.bfloat16)
        q -= h.to(tl.float32)
        k = dot(mine, h, k)
    return k


@triton.jit
def linear_gram_kernel(
    a, b, a2, b2, scale, scale2, weight, weight2, far, out, n, n2, samples, t, t2, i, o, period, period2, width,
    a_n, a_t, a_i, b_n, b_t, b_o, a2_n, a2_t, a2_i, b2_n, b2_t, b2_o,
    T: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, SYMMETRIC: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply one tile of tokens with another; out [segments, width].

    Grid: tile pairs, with SYMMETRIC the lower triangle.
    samples: the row length of scale. S: room for the segments of a tile. SYMMETRIC: the diagonal tiles are
    halved, so that K = out + outᵀ. Two variants are launched, and `far` says which of them has to work.
    """
    if tl.load(far) != SCALED:
        return
    program = tl.program_id(0)
    if SYMMETRIC:
        r, c = corner(program)
    else:
        tiles = tl.cdiv(n2 * t2, T)
        r, c = program // tiles, program % tiles
    row, column = r * T + tl.arange(0, T), c * T + tl.arange(0, T)  # tokens
    x, y = tl.minimum(row, n * t - 1), tl.minimum(column, n2 * t2 - 1)  # those behind the end are cut off below
    j, k = x // t, y // t2  # their samples
    at, at2 = (x % t).to(tl.int64), (y % t2).to(tl.int64)
    a_rows, b_rows = j.to(tl.int64) * a_n + at * a_t, j.to(tl.int64) * b_n + at * b_t
    a_columns, b_columns = k.to(tl.int64) * a2_n + at2 * a2_t, k.to(tl.int64) * b2_n + at2 * b2_t
    p = _products(a, a2, a_rows, a_columns, i, a_i, a2_i, scale + j, scale2 + k, T, BLOCK, SCALED, PRECISION)
    scale += samples
    scale2 += samples
    p *= _products(b, b2, b_rows, b_columns, o, b_o, b2_o, scale + j, scale2 + k, T, BLOCK, SCALED, PRECISION)
    w, w2 = tl.load(weight + j), tl.load(weight2 + k)  # NaN for samples that hold NaN or Inf: they stay alone
    p = tl.where(((row < n * t) & (w == w))[:, None] & ((column < n2 * t2) & (w2 == w2))[None, :], p, 0.0)
    s = tl.arange(0, S)
    top, left = _segment(r * T, t, period, T), _segment(c * T, t2, period2, T)
    mine = (_segment(row, t, period, T) - top)[None, :] == s[:, None]  # [S, T]
    theirs = (_segment(column, t2, period2, T) - left)[:, None] == s[None, :]  # [T, S]
    k = _sums(p, mine.to(tl.float32).to(tl.bfloat16), theirs.to(tl.float32).to(tl.bfloat16), T, S)
    if SYMMETRIC and r == c:
        k *= 0.5
    rows = _segment(tl.minimum(r * T + T, n * t) - 1, t, period, T) - top  # the last one
    columns = _segment(tl.minimum(c * T + T, n2 * t2) - 1, t2, period2, T) - left
    out += top.to(tl.int64) * width + left
    tl.store(out + s[:, None] * width + s[None, :], k, (s <= rows)[:, None] & (s <= columns)[None, :])


@triton.jit
def pairs_kernel(
    out, weight, weight2, K, n, n2, t, t2, period, period2, width, most, most2,
    T: tl.constexpr, PAIRS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Sum the segments of sample j against those of sample k into K_jk and bring it back to scale.

    Grid: blocks of PAIRS x PAIRS of K. most, most2: segments that a sample has at most.
    """
    j, k = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS), tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    first, last = _segment(j * t, t, period, T), _segment(j * t + t - 1, t, period, T)
    first2, last2 = _segment(k * t2, t2, period2, T), _segment(k * t2 + t2 - 1, t2, period2, T)
    inside = (j < n)[:, None] & (k < n2)[None, :]
    total = tl.zeros((PAIRS, PAIRS), tl.float64)
    for s in range(most):
        for s2 in range(most2):
            row, column = (first + s)[:, None].to(tl.int64), (first2 + s2)[None, :].to(tl.int64)
            here = inside & (first + s <= last)[:, None] & (first2 + s2 <= last2)[None, :]
            total += tl.load(out + row * width + column, here, 0.0).to(tl.float64)
            if SYMMETRIC:
                total += tl.load(out + column * width + row, here, 0.0).to(tl.float64)
    scale = tl.load(weight + j, j < n, 0.0)[:, None] * tl.load(weight2 + k, k < n2, 0.0)[None, :]
    tl.store(K + j[:, None].to(tl.int64) * n2 + k[None, :], total * scale, inside)


def tile(n: int, t: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Return T, room for segments, columns of a block, stages and warps.

    Two float32 accumulators of T x T are 128 registers a thread for T = 128 and 8 warps, and twice that would not fit;
    that is 64 flops for a byte read from L2, whose latency the stages hide. Half of that side for fewer tokens, so that
    there are enough programs, for many segments in a tile, and for float32, whose parts need registers too.
    """
    large = itemsize == 2 and n * t > 2048 and t > 8
    T = 128 if large else 64
    room = 16 if 2 + (T - 2) // t <= 16 else 64
    return T, room, 64 if itemsize == 2 else 32, 3, 4 if itemsize == 2 and not large and room == 16 else 8


def linear_gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """Return K [n, n2] in float64 for a [n, t, i], b [n, t, o], a2 [n2, t2, i], b2 [n2, t2, o]; no float64 factors."""
    symmetric = a2 is None or b2 is None
    if symmetric:
        a2, b2 = a, b
    (n, t, i), (n2, t2, _), o = a.shape, a2.shape, b.shape[2]
    if 0 in (n, t, i, o, n2, t2):
        return a.new_zeros((n, n2), dtype=torch.float64)
    groups = [(a, a2), (b, b2)]
    extremes = torch.stack([torch.cat([largest(x) for x in (pair[:1] if symmetric else pair)]) for pair in groups])
    scale, weight, far = scales(extremes, 2.0**-50, 2.0**40)  # K_jj is at most the square times t² i o
    scale2, weight2 = (scale, weight) if symmetric else (scale[:, n:], weight[n:])
    itemsize = max(a.dtype.itemsize, b.dtype.itemsize)
    side, room, block, stages, warps = tile(max(n, n2), min(t, t2), itemsize)
    period, period2 = math.lcm(t, side), math.lcm(t2, side)
    tiles, tiles2 = triton.cdiv(n * t, side), triton.cdiv(n2 * t2, side)
    segments, width = _segments(n, t, period, side), _segments(n2, t2, period2, side)
    out = (a.new_zeros if symmetric else a.new_empty)((segments, width), dtype=torch.float32)
    for scaled in (False, True):
        linear_gram_kernel[(tiles * (tiles + 1) // 2 if symmetric else tiles * tiles2,)](
            a, b, a2, b2, scale, scale2, weight, weight2, far, out,
            n, n2, len(weight), t, t2, i, o, period, period2, width,
            *a.stride(), *b.stride(), *a2.stride(), *b2.stride(),
            T=side, BLOCK=block, S=room, SYMMETRIC=symmetric, SCALED=scaled, PRECISION=precision(),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    K = a.new_empty((n, n2), dtype=torch.float64)
    pairs_kernel[(triton.cdiv(n, PAIRS), triton.cdiv(n2, PAIRS))](
        out, weight, weight2, K, n, n2, t, t2, period, period2, width, 2 + (t - 1) // side, 2 + (t2 - 1) // side,
        T=side, PAIRS=PAIRS, SYMMETRIC=symmetric,
    )  # fmt: skip
    return K


def _segments(n: int, t: int, period: int, side: int) -> int:
    """Return the number of segments of n t tokens, as `_segment` counts them."""
    last = n * t - 1
    return last // t + last // side - last // period + 1
