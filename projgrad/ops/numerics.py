"""Precision and tolerances: the dtype in which products are formed, and which digits of a result count."""

import functools

import torch
from torch import Tensor

finfo = functools.cache(torch.finfo)  # which makes an object every time


def product_dtype(*dtypes: torch.dtype, float64: bool = False) -> torch.dtype:
    """Return the dtype in which operands are multiplied: float64 if one has it or `float64` is set, else float32."""
    return torch.float64 if float64 or torch.float64 in dtypes else torch.float32


def default_rtol(n: int, dtype: torch.dtype) -> float:
    """Return the rank tolerance for n rows whose products were summed in `dtype`: 8 n eps."""
    return 8 * max(n, 1) * torch.finfo(dtype).eps


def multiply_in_float64(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in the dtype of b, for a float64 `a`: coefficients of tiny rows leave float32 and float16."""
    return (a @ b.double()).to(b.dtype)


def in_range(K: Tensor, b: Tensor) -> Tensor:
    """Return b [..., n, m], NaN where the square of a float64 row vanished: to drop it would be silent."""
    return b.masked_fill((K.diagonal(dim1=-2, dim2=-1) < 1e-290)[..., None] & (b != 0), torch.nan)


def exponents(x: Tensor) -> Tensor:
    """Return the e [n] for which 2⁻ᵉ brings the largest element of x_j near 1, within what float32 holds.

    Products of tiny gradients with tiny directions leave float32 where neither of them does.
    """
    if x[:1].numel() == 0:
        return x.new_zeros(x.shape[0], dtype=torch.int32)
    x = x.flatten(1)
    return torch.frexp(torch.maximum(x.amax(1), -x.amin(1)).double()).exponent.clamp(-120, 120)
