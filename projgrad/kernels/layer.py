"""The leaves of `projgrad.ops.linear_impl` on CUDA: which have kernels of their own, and where not.

Library products stay for float64, which has no kernel here; for one position, where the Gram matrices of a and of b
are two calls of `gram`, which splits the columns over the GPU, while a kernel over tiles of n tokens would have few
programs; for the weighted sum of float32 factors, which is one product; for products between two groups of rows; and
for the per-sample gradients of a chunk, which are a batched product into a buffer. None of these choices has been
measured on a GPU yet: `bench/gpu.sh layers` times both sides.
"""

import torch
from torch import Tensor

from ..ops.linear_impl import _exponents, composed

COLUMNS = 1 << 16  # whose products float32 sums before float64 does


def _double(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)


def token_gram(a: Tensor, b: Tensor, float64: bool, samples: int) -> Tensor:
    if float64 or _double(a, b) or a.shape[1] == 1:
        return composed["token_gram"](a, b, float64, samples)
    from .linear_gram import linear_gram

    return linear_gram(a, b)


def token_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, samples: int) -> Tensor:
    if _double(a, b) or a.shape[1] == a2.shape[1] == 1:
        return composed["token_gram_across"](a, b, a2, b2, samples)
    from .linear_gram import linear_gram

    return linear_gram(a, b, a2, b2)


def layer_dot(a: Tensor, b: Tensor, u: Tensor, float64: bool) -> Tensor:
    if float64 or _double(a, b, u):
        return composed["layer_dot"](a, b, u, float64)
    from .linear_dot import linear_dot

    return linear_dot(a, b, u)


def layer_combine_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    if _double(out, a, b) or a.dtype == b.dtype == torch.float32:
        return composed["layer_combine_"](out, a, b, c)
    from .linear_combine import linear_combine_

    linear_combine_(out, a, b, c.double())


def layer_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if _double(a, b) or a.shape[1] == 1:
        return composed["layer_moments"](a, b)
    from .linear_moments import linear_moments

    return linear_moments(a, b)


def sample_products_(g: Tensor, b: Tensor, a: Tensor) -> None:
    if g.dtype == torch.float32 and a.dtype == b.dtype and a.dtype.itemsize == 2:
        torch.bmm(b.mT, a, out_dtype=torch.float32, out=g)  # 16-bit products, summed and kept in float32
    else:
        composed["sample_products_"](g, b, a)


def cross_gram(G: Tensor, G2: Tensor, float64: bool) -> Tensor:
    """`gram` is made for few directions: here they are as many as the rows, which are brought near 1 first."""
    if float64 or _double(G, G2):
        return G.double() @ G2.double().mT
    K = G.new_zeros((len(G), len(G2)), dtype=torch.float64)
    shifts = _exponents(G), _exponents(G2)
    units = [torch.ldexp(torch.ones_like(e, dtype=torch.float32), -e)[:, None] for e in shifts]
    for x, y in zip(G.split(COLUMNS, 1), G2.split(COLUMNS, 1), strict=True):
        K += (x * units[0]) @ (y * units[1]).mT
    return torch.ldexp(K, shifts[0][:, None] + shifts[1])


LEAVES = (cross_gram, token_gram, token_gram_across, layer_dot, layer_combine_, layer_moments, sample_products_)
