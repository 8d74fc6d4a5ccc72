"""Which device ops of `projgrad.ops.linear_impl` have a kernel on CUDA, and in which cases library products stay.

| case | choice | reason |
|---|---|---|
| float64 | library products | no kernel here multiplies it |
| one position, Gram matrix | two calls of `gram` | it splits the columns; tiles of n tokens are few programs |
| one position, moments | two library products | g² = (b²)ᵀ a² |
| weighted sum of float32 factors | library product | it is one product |
| two groups of rows | library product | `gram` is made for few directions |
| per-sample gradients of a chunk | batched library product | they are one, into a buffer |
| everything else | Triton | |
"""

import torch
from torch import Tensor

from ..ops.numerics import exponents
from ..ops.registration import FALLBACKS
from .linear_combine import linear_combine_
from .linear_dot import linear_dot
from .linear_gram import linear_gram
from .linear_moments import linear_moments

COLUMNS = 1 << 16  # whose products float32 sums before float64 does


def _has_float64(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)


def token_gram(a: Tensor, b: Tensor, float64: bool, samples: int) -> Tensor:
    if float64 or _has_float64(a, b) or a.shape[1] == 1:
        return FALLBACKS["token_gram"](a, b, float64, samples)
    return linear_gram(a, b)


def token_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, samples: int) -> Tensor:
    if _has_float64(a, b) or a.shape[1] == a2.shape[1] == 1:
        return FALLBACKS["token_gram_across"](a, b, a2, b2, samples)
    return linear_gram(a, b, a2, b2)


def linear_dot_pass(a: Tensor, b: Tensor, u: Tensor, float64: bool) -> Tensor:
    if float64 or _has_float64(a, b, u):
        return FALLBACKS["linear_dot_pass"](a, b, u, float64)
    return linear_dot(a, b, u)


def linear_combine_pass_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    if _has_float64(out, a, b) or a.dtype == b.dtype == torch.float32:
        return FALLBACKS["linear_combine_pass_"](out, a, b, c)
    linear_combine_(out, a, b, c.double())


def linear_moments_pass(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if _has_float64(a, b) or a.shape[1] == 1:
        return FALLBACKS["linear_moments_pass"](a, b)
    return linear_moments(a, b)


def sample_products_(g: Tensor, b: Tensor, a: Tensor) -> None:
    if g.dtype == torch.float32 and a.dtype == b.dtype and a.dtype.itemsize == 2:
        torch.bmm(b.mT, a, out_dtype=torch.float32, out=g)  # 16-bit products, summed and kept in float32
    else:
        FALLBACKS["sample_products_"](g, b, a)


def cross_gram(G: Tensor, G2: Tensor, float64: bool) -> Tensor:
    """Return G G2ᵀ [n, n2] in float64, of rows that are brought near 1 first."""
    if float64 or _has_float64(G, G2):
        return G.double() @ G2.double().mT
    K = G.new_zeros((len(G), len(G2)), dtype=torch.float64)
    shifts = exponents(G), exponents(G2)
    units = [torch.ldexp(torch.ones_like(e, dtype=torch.float32), -e)[:, None] for e in shifts]
    for x, y in zip(G.split(COLUMNS, 1), G2.split(COLUMNS, 1), strict=True):
        K += (x * units[0]) @ (y * units[1]).mT
    return torch.ldexp(K, shifts[0][:, None] + shifts[1])
