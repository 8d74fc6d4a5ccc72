"""How the products of layers of equal shape are computed on CUDA: by products of the library, in float32.

a [l, n, t, i] and b [l, n, t, o] are the factors of l layers; none of them is float64. 16-bit factors are multiplied as
they are. On an H100, in bfloat16, plain products were faster than Triton kernels at every size of
bench/results/layers_h100.csv; what scales and parts add to them was not measured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import foreach_add_
from .cost import GramRoute, chunk_bytes
from .gram import gram_few, gram_of_each, gram_pass, suits_gram_few

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Tensor cores cut where others round. Added to one number, k / 16 products lose up to k / 16 x 2^-25 of it: for 8192
# terms 1.5e-5, and 2e-3 for a million, as measured. Longer sums are added up outside, from pieces.
PIECE = 8192
BITS = {BF16: (torch.int16, 0x7F80), F16: (torch.int16, 0x7C00), F32: (torch.int32, 0x7F800000)}  # of exponents


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y [l, r, c] in float32 for x [l, r, k] and y [l, k, c]."""
    if {x.dtype, y.dtype} == {F32, BF16}:  # three products of 16 bits take less than one of float32
        xs, ys = (parts(z, BF16) if z.dtype == F32 else [z] for z in (x, y))
        return _sum(product(p, q) for p in xs for q in ys)
    if x.dtype != y.dtype or x.dtype == F32:
        return _bmm(x.float(), y.float())
    if x.shape[2] <= PIECE:
        return _bmm(x, y)
    return _sum(_bmm(p, q) for p, q in zip(x.split(PIECE, 2), y.split(PIECE, 1), strict=True))


def _bmm(x: Tensor, y: Tensor, dtype: torch.dtype = F32) -> Tensor:
    out = x.new_empty((x.shape[0], x.shape[1], y.shape[2]), dtype=dtype)  # autocast leaves products with `out` alone
    return torch.bmm(x, y, out=out) if x.dtype == dtype else torch.bmm(x, y, out_dtype=dtype, out=out)


def _sum(terms) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total


def parts(x: Tensor, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Return 16-bit tensors with the sum x; three of 8 bits hold all of a float32 number, two 16 bits of it."""
    found = [x.to(dtype)]
    while len(found) < count - 1:
        x = x - found[-1]
        found.append(x.to(dtype))
    return [*found, torch.sub(x, found[-1], out=torch.empty_like(x, dtype=dtype))]  # subtracted in float32, in one pass


def powers(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the powers of two in the largest elements along `dims`, which stay as 1; the smallest one for zeros."""
    integer, mask = BITS[x.dtype]
    size = torch.linalg.vector_norm(x, torch.inf, dims, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
    return size.view(integer).bitwise_and_(mask).view(x.dtype)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [l, n, t, k] with the largest element of every sample in [1, 2), exactly, and the powers [l, n]."""
    p = powers(x, (2, 3))
    return x / p, p[:, :, 0, 0].double()


def token_gram(a: Tensor, b: Tensor, samples: int) -> Tensor:
    """Return K [l, n, n], from tiles of `samples` samples with themselves and the samples after them."""
    l, n, t, _ = a.shape
    if l == t == 1:  # the kernel scales by itself
        return (gram_pass(a[0, :, 0], a[0, :0, 0], False)[0] * gram_pass(b[0, :, 0], b[0, :0, 0], False)[0])[None]
    (a, p), (b, q) = _scaled(a), _scaled(b)
    K = a.new_empty((l, n, n), dtype=torch.float64)
    for s in range(0, n, samples):
        e = min(n, s + samples)
        K[:, s:e, s:] = _pairs(a[:, s:e], b[:, s:e], a[:, s:], b[:, s:])
        K[:, e:, s:e] = K[:, s:e, e:].mT
    weight = p * q
    return (K + K.mT).mul_(0.5).mul_(weight[:, None]).mul_(weight[..., None])  # sums of tokens round differently


def token_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, samples: int) -> Tensor:
    """Return K [l, n, n2] between two groups of samples."""
    (a, p), (b, q), (a2, p2), (b2, q2) = (_scaled(x) for x in (a, b, a2, b2))
    tiles = [_pairs(x, y, a2, b2) for x, y in zip(a.split(samples, 1), b.split(samples, 1), strict=True)]
    return torch.cat(tiles, 1) * (p * q)[..., None] * (p2 * q2)[:, None]


def _pairs(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """Return Σ_tt' (a_jt · a2_kt') (b_jt · b2_kt') [l, n, n2]."""
    (l, n, t, _), (n2, t2) = a.shape, a2.shape[1:3]
    x, y = (product(z.flatten(1, 2), z2.flatten(1, 2).mT) for z, z2 in ((a, a2), (b, b2)))
    return x.mul_(y).view(l, n * t, n2, t2).sum(3, dtype=torch.float64).view(l, n, t, n2).sum(2)


def linear_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Return v = <g_j, u> [l, n] in float64 for u [l, o, i]: u times the longer of a_jt and b_jt, times the other.

    u is brought near 1 first, so that products with a g_j in range are in range, whatever the size of u.
    """
    l, n, t, _ = a.shape
    x, y, w = (a, b, u.mT) if b.shape[3] <= a.shape[3] else (b, a, u)  # w [l, k, r]
    high = 2.0**14 if x.dtype == F16 != w.dtype else 1.0  # room for the parts of float32 in float16
    p = powers(w, (1, 2))
    v = a.new_empty((l, n), dtype=torch.float64)
    samples = max(1, chunk_bytes("cuda") // (4 * l * t * w.shape[2]))
    for s in range(0, n, samples):
        some = x[:, s : s + samples].flatten(1, 2)
        xw = _sum(_by_direction(z, d / p, high) for z, d in zip(some.split(PIECE, 2), w.split(PIECE, 1), strict=True))
        rows = xw.view(l, -1, t, w.shape[2]).mul_(y[:, s : s + samples])
        v[:, s : s + samples] = rows.sum((2, 3), dtype=torch.float64)
    return v * (p[:, 0].double() / high)


def _by_direction(x: Tensor, w: Tensor, high: float) -> Tensor:
    if high == 1.0:
        return product(x, w)
    return _sum(product(x, part) for part in parts(w * high, F16))


def gradients(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return per-sample gradients [n, o, i] of a [n, t, i] and b [n, t, o], in float32, or in bfloat16 as theirs."""
    return _bmm(b.mT, a, dtype) if dtype == a.dtype == b.dtype == BF16 else product(b.mT, a)


def narrow_chunks(a: Tensor, b: Tensor, u: Tensor | None) -> bool:
    """Return whether chunks of per-sample gradients are kept in bfloat16.

    As autograd would keep them; and only where u, which is to be projected, is as coarse. float16 could overflow.
    """
    return u is not None and a.dtype == b.dtype == u.dtype == BF16 and a.shape[-2] <= PIECE


def aligned(x: Tensor) -> bool:
    """Return whether rows begin at multiples of 16 bytes. A GPT-2 head without took 3 to 5 times as long (50257)."""
    return x.stride(-1) != 1 or x.stride(-2) * x.element_size() % 16 == 0


def _aligned(x: Tensor) -> Tensor:
    return x if aligned(x) else x.contiguous()


def gram_of_chunks(a: Tensor, b: Tensor, u: Tensor | None, route: GramRoute) -> tuple[Tensor, Tensor]:
    """Return K [l, n, n] and v [l, n, 1], or [l, n, 0], from one pass over the per-sample gradients."""
    (l, n, _, i), o, dtype = a.shape, b.shape[3], BF16 if narrow_chunks(a, b, u) else F32
    total = None
    for r in range(0, o, route.rows):
        for c in range(0, i, route.columns):
            rows, columns = slice(r, r + route.rows), slice(c, c + route.columns)
            x, y = (_aligned(z).flatten(0, 1) for z in (a[..., columns], b[..., rows]))
            g = gradients(x, y, dtype).view(l, n, -1)
            w = g[:, :0] if u is None else u[:, rows, columns].to(dtype).reshape(l, 1, -1)
            part = (gram_few if suits_gram_few(g, w) else gram_of_each)(g, w)
            total = part if total is None else tuple(map(torch.add, total, part))
            del g, w  # before the next one is made
    return total


def linear_combine_(outs: Sequence[Tensor], a: Tensor, b: Tensor, c: Tensor) -> None:
    """Add Σ_j c_j g_j to each of l tensors [o, i], of any strides, for c [n] or [l, n] float64.

    The smaller factor is multiplied by c and split into 16-bit parts: two where the outs have 16 bits themselves, else
    three. c of tiny gradients leaves float32, the products c b do not.
    """
    (l, n, t, i), o = a.shape, b.shape[3]
    c = c.expand(l, n)[..., None, None]
    by_a = i <= o if a.dtype == b.dtype else a.dtype == F32  # of two dtypes the one that has to be split anyway
    count = 2 if all(out.dtype.itemsize == 2 for out in outs) else 3
    straight = {a.dtype, b.dtype, *(out.dtype for out in outs)} == {BF16} and n * t <= PIECE
    samples = max(1, chunk_bytes("cuda") // (8 * l * t * min(i, o)))
    rows = max(1, chunk_bytes("cuda") // (4 * l * i))
    if not aligned(b):  # blocks of it are copied
        rows = min(rows, max(16, chunk_bytes("cuda") // (2 * l * n * t) // 16 * 16))
    for s in range(0, n, samples):
        part = slice(s, s + samples)
        scaled, other = (a[:, part], b[:, part]) if by_a else (b[:, part], a[:, part])
        scaled = torch.mul(scaled, c[:, part], out=scaled.new_empty(scaled.shape, dtype=F32))
        pieces, up = _split(scaled.flatten(1, 2), other.dtype, count)
        other = other.flatten(1, 2)
        if straight:  # rounded twice, but in 8 bytes an element of memory traffic, not 28
            for x in pieces:
                for out, left, right in zip(outs, *((other, x) if by_a else (x, other)), strict=True):
                    out.addmm_(left.mT, right)
            continue
        for r in range(0, o, rows):
            some = slice(r, r + rows)
            block = _aligned(other[..., some]).mT if by_a else None
            terms = (product(block, z) if by_a else product(z[..., some].mT, other) for z in pieces)
            total = _sum(terms)
            total = total if up is None else total.mul_(up)
            if l == 1:
                outs[0][some].add_(total[0])
            else:
                foreach_add_([out[some] for out in outs], total.unbind())


def _split(x: Tensor, dtype: torch.dtype, count: int) -> tuple[list[Tensor], Tensor | None]:
    """Return x [l, r, k], float32, as parts of a dtype, and what their sum is to be multiplied by [l, 1, 1]."""
    if dtype == F32:
        return [x], None
    if dtype == BF16:
        return parts(x, BF16, count), None
    p = powers(x, (1, 2)) * 2.0**-10  # float16 holds a smaller range than float32, and no parts of small numbers
    return parts(x.div_(p), F16, count), p
