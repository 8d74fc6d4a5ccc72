"""Finds, on the device, the powers of two that keep products of tiny and huge factors inside float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _power(x):
    """Return 2⁻ᵉ for the exponent e of x > 0, and 1 for x = 0: brings x into [1, 2) exactly."""
    e = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 1), 253)
    return tl.where(x > 0, ((254 - e) << 23).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def scales_kernel(
    largest, scale, weight, far, n, low: tl.float64, high: tl.float64, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write scale [F, n] and weight [n] = 1 / Π_f scale_f from largest [F, n]. One program.

    far: whether a factor is beyond 2^±50, or the product of all outside [low, high]. Without it weights are 1.
    Weights are NaN where a factor is NaN or Inf.
    """
    outside = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        product, nonzero = tl.full((BLOCK,), 1.0, tl.float64), j < n
        beyond = tl.zeros((BLOCK,), tl.int32)
        for f in tl.static_range(F):
            x = tl.load(largest + f * n + j, j < n, 0.0)
            nonzero &= x > 0
            beyond |= ((x < 2.0**-50) | (x > 2.0**50)).to(tl.int32)
            product *= x.to(tl.float64)
        beyond |= ((product < low) | (product > high)).to(tl.int32)
        outside |= tl.where(nonzero, beyond, 0)
    outside = tl.max(outside, 0)
    tl.store(far, outside)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inverse, finite = tl.full((BLOCK,), 1.0, tl.float64), j >= 0
        for f in tl.static_range(F):
            x = tl.load(largest + f * n + j, j < n, 0.0)
            s = _power(x)
            tl.store(scale + f * n + j, s, j < n)
            inverse /= s.to(tl.float64)
            finite &= x - x == 0
        tl.store(weight + j, tl.where(finite, tl.where(outside == 1, inverse, 1.0), float("nan")), j < n)


def scales(largest: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales [F, n] that bring the largest elements [F, n] of factors of n samples into [1, 2), the weights
    [n] that undo them, and a flag on the device: whether scales are needed at all. Where not, the weights are 1.

    low, high: what the product of a sample's largest elements may be without them.
    """
    count, n = largest.shape
    scale, weight = torch.empty_like(largest), largest.new_empty(n, dtype=torch.float64)
    far = torch.empty((), dtype=torch.int32, device=largest.device)
    scales_kernel[(1,)](largest, scale, weight, far, n, low, high, F=count, BLOCK=1024)
    return scale, weight, far


def largest(x: Tensor) -> Tensor:
    """Return max |x_j| [n] in float32."""
    return torch.linalg.vector_norm(x, float("inf"), tuple(range(1, x.ndim))).float()
