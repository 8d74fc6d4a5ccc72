"""How the products of one linear layer are computed: two routes to its Gram matrix, and single matrix products.

a [n, t, i] are the inputs of the layer and b [n, t, o] the gradients at its output; g_j = Σ_t b_jt a_jtᵀ [o, i].
No function holds more than one chunk of per-sample gradients; `cost.py` picks the route and sizes the chunk.
What is not float64 is computed by `linear_cuda.py` on CUDA.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._torch_private import foreach_add_
from . import linear_cuda
from .cost import GramRoute, chunk_bytes, linear_route
from .gram import gram_pass
from .numerics import exponents, product_dtype
from .registration import device_op

# Chunks: blocks of the per-sample gradients of all samples. Products have `out`, which autocast leaves alone.


def _blocks(a: Tensor, b: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[tuple, Tensor]]:
    """Yield every rows x columns block of W and its per-sample gradients [n, r, c]; on a CPU all share one buffer."""
    n, i, o, on_cuda = len(a), a.shape[2], b.shape[2], dtype == torch.float32 and _on_cuda(a, b)
    buffer = a.new_empty(0 if on_cuda else n * rows * columns, dtype=dtype)
    for r in range(0, o, rows):
        for c in range(0, i, columns):
            y, x = b[:, :, r : r + rows], a[:, :, c : c + columns]
            block = slice(r, r + rows), slice(c, c + columns)
            if on_cuda:
                yield block, linear_cuda.gradients(x, y, dtype)
                continue
            g = buffer[: n * y.shape[2] * x.shape[2]].view(n, y.shape[2], x.shape[2])
            _sample_products_(g, y, x)
            yield block, g


def _sample_products_(g: Tensor, b: Tensor, a: Tensor) -> None:
    """Write g_j [n, o, i] = b_jᵀ a_j, multiplied in the precision of g."""
    t, (_, rows, columns) = a.shape[1], g.shape
    converts = a.dtype != g.dtype or b.dtype != g.dtype
    step = max(64, rows * columns // (rows + columns)) if converts else max(1, t)  # copies no larger than the chunk
    for s in range(0, max(1, t), step):
        part = slice(s, s + step)
        torch.baddbmm(g, b[:, part].to(g.dtype).mT, a[:, part].to(g.dtype), beta=min(s, 1), out=g)


def gram_of_chunks(a: Tensor, b: Tensor, u: Tensor, float64: bool, route: GramRoute) -> tuple[Tensor, Tensor]:
    """Return K [n, n] and v [n, m] from one pass over the per-sample gradients."""
    dtype, parts = product_dtype(a.dtype, b.dtype, float64=float64), None
    for (r, c), g in _blocks(a, b, route.rows, route.columns, dtype):
        one = gram_pass(g.flatten(1), u[:, r, c].to(dtype).flatten(1), float64)
        parts = one if parts is None else tuple(map(torch.add, parts, one))
    return parts or tuple(a.new_zeros((len(a), k), dtype=torch.float64) for k in (len(a), len(u)))


def _gram_of_chunks_in_float64(a: Tensor, b: Tensor) -> Tensor:
    route = gram_route(a, b, float64=True, only="chunks")
    return gram_of_chunks(a, b, a.new_empty(0, b.shape[2], a.shape[2]), True, route)[0]


def gram_of_chunks_across(
    a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, route: GramRoute, float64: bool = False
) -> Tensor:
    """Return K [n, n2] between two groups of samples, block by block."""
    K = a.new_zeros((a.shape[0], a2.shape[0]), dtype=torch.float64)
    dtype = product_dtype(a.dtype, b.dtype, float64=float64)
    blocks = (_blocks(*factors, route.rows, route.columns, dtype) for factors in ((a, b), (a2, b2)))
    for (_, g), (_, g2) in zip(*blocks, strict=True):
        K += gram_pass(g.flatten(1), g2.flatten(1), dtype == torch.float64)[1]
    return K


# Factors: <b aᵀ, b' a'ᵀ> = (a · a') (b · b') for every pair of tokens, in tiles of some samples against the others.
# Where the tokens of a sample cancel so do the products of its pairs, quadratically: they lose digits that g_j has.


def _cancelled(squares: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where ‖g_j‖² is too small beside (Σ_t ‖a_t‖ ‖b_t‖)² for products of pairs in `dtype`.

    lengths: Σ_t ‖a_t‖ ‖b_t‖. The bound leaves K 4 digits of float32 at worst, 6 as a rule, and 7 of float64 at worst.
    """
    spared = 2**14 if dtype == torch.float32 else 2**24
    return squares < spared * torch.finfo(dtype).eps * lengths.square()


def _pair_sums(a: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    """Sum a ∘ b [n t, m t2] over the tokens of each pair of samples [n, m]; overwrites a."""
    if a.shape == (n, m):
        return a.mul_(b)
    if a.numel() == 0:
        return a.new_zeros((n, m))
    return a.mul_(b).view(n, -1, a.shape[1]).sum(1).view(n, m, -1).sum(2)


def token_gram(a: Tensor, b: Tensor, float64: bool, samples: int) -> Tensor:
    """Return K [n, n], from tiles of `samples` samples with themselves and the samples after them.

    Where tokens cancel it is computed again: in float64, and from chunks if that is not enough.
    """
    n, t = a.shape[:2]
    A, B = a.flatten(0, 1), b.flatten(0, 1)
    K, lengths = (a.new_empty(shape, dtype=torch.float64) for shape in ((n, n), n))
    for s in range(0, n, samples):
        e = min(n, s + samples)
        (own_a, rest_a), (own_b, rest_b) = (gram_pass(x[s * t : e * t], x[e * t :], float64) for x in (A, B))
        lengths[s:e] = (own_a.diagonal() * own_b.diagonal()).sqrt().view(e - s, t).sum(1)
        own = _pair_sums(own_a, own_b, e - s, e - s)
        K[s:e, s:e] = own if t == 1 else (own + own.mT) / 2  # sums of tokens round differently
        if e < n:
            rest = _pair_sums(rest_a, rest_b, e - s, n - e)
            K[s:e, e:], K[e:, s:e] = rest, rest.mT
    # Of a GPU the host does not ask.
    dtype = product_dtype(float64=float64)
    if t > 1 and not a.is_cuda and _cancelled(K.diagonal(), lengths, dtype).any():
        return _gram_of_chunks_in_float64(a, b) if float64 else token_gram(a, b, True, samples)
    return K


def token_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, samples: int) -> Tensor:
    """Return K [n, n2] between two groups of samples."""
    (n, t), (n2, _) = a.shape[:2], a2.shape[:2]
    float64, K = torch.float64 in (a.dtype, b.dtype), a.new_empty((n, n2), dtype=torch.float64)
    A, B, A2, B2 = (x.flatten(0, 1) for x in (a, b, a2, b2))
    for s in range(0, n, samples):
        e = min(n, s + samples)
        tokens = slice(s * t, e * t)
        K[s:e] = _pair_sums(*(gram_pass(x[tokens], y, float64)[1] for x, y in ((A, A2), (B, B2))), e - s, n2)
    return K


# One layer.


@torch.no_grad()
def gradients(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return per-sample gradients [n, o, i] in a dtype; on CUDA 16-bit factors are not converted for float32."""
    if dtype == torch.float32 and _on_cuda(a, b) and 0 not in (*a.shape, *b.shape):
        return linear_cuda.gradients(a, b, dtype)
    g = a.new_empty((len(a), b.shape[2], a.shape[2]), dtype=dtype)
    return torch.bmm(b.to(dtype).mT, a.to(dtype), out=g)


def _on_cuda(*tensors: Tensor, float64: bool = False) -> bool:
    return tensors[0].is_cuda and not float64 and all(x.dtype != torch.float64 for x in tensors)


@torch.no_grad()
def gram_of_layer(
    a: Tensor, b: Tensor, u: Tensor, float64: bool = False, budget: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return K [n, n] and v = <g_j, u_m> [n, m] for u [m, o, i] in float64; multiplied in float64 too if `float64`."""
    if _on_cuda(a, b, u, float64=float64):
        K, v = linear_gram(a[None], b[None], u[:1] if len(u) else None)
        v = a.new_empty((len(a), 0), dtype=torch.float64) if v is None else v.mT
        return K[0], v if len(u) < 2 else torch.cat([v, dot_of_layer(a, b, u[1:])], 1)
    route = gram_route(a, b, m=len(u), float64=float64, budget=budget)
    float64 = product_dtype(a.dtype, b.dtype, float64=float64) == torch.float64
    if route.name == "chunks":
        return gram_of_chunks(a, b, u, float64, route)
    return token_gram(a, b, float64, route.rows), dot_of_layer(a, b, u, float64)


@torch.no_grad()
def squares_of_layer(a: Tensor, b: Tensor, float64: bool = False) -> Tensor:
    """Return ‖g_j‖² [n] in float64 from the products of every sample's tokens with one another.

    Where tokens cancel it is computed again, as in `token_gram`.
    """
    dtype = product_dtype(a.dtype, b.dtype, float64=float64)
    squares, cancelled = _squares_of_pairs(a, b, dtype)
    if cancelled.any():
        a, b = a[cancelled], b[cancelled]
        exact = dtype == torch.float64
        squares[cancelled] = _gram_of_chunks_in_float64(a, b).diagonal() if exact else squares_of_layer(a, b, True)
    return squares


def _squares_of_pairs(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ‖g_j‖² [n] in float64, multiplied in `dtype`, and where tokens cancel."""
    step = max(1, chunk_bytes(a.device.type) // (2 * max(1, a.shape[1] ** 2) * dtype.itemsize))
    squares, cancelled = [a.new_empty(0, dtype=torch.float64)], [a.new_empty(0, dtype=torch.bool)]
    for x, y in zip(a.split(step), b.split(step), strict=True):
        e, f = exponents(x), exponents(y)
        A, B = (z.to(dtype) * _power_of_two(-k, dtype)[:, None, None] for z, k in ((x, e), (y, f)))
        pairs = torch.bmm(A, A.mT).mul_(torch.bmm(B, B.mT))
        lengths = pairs.diagonal(dim1=1, dim2=2).double().sqrt().sum(1)
        total = pairs.sum((1, 2), dtype=torch.float64)
        squares.append(torch.ldexp(total, 2 * (e + f)))
        cancelled.append(_cancelled(total, lengths, dtype))
    return torch.cat(squares), torch.cat(cancelled)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2 to integers, exactly; `torch.ldexp` of a large tensor would make such a power for each element."""
    return torch.ldexp(torch.ones(exponent.shape, dtype=dtype, device=exponent.device), exponent)


@torch.no_grad()
def linear_gram_across(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """Return K [n, n2] between two groups of samples."""
    route = gram_route(a, b, a2)
    if route.name == "chunks":
        return gram_of_chunks_across(a, b, a2, b2, route)
    if _on_cuda(a, b) and 0 not in (*a.shape, *b.shape, *a2.shape):
        return linear_cuda.token_gram_across(a[None], b[None], a2[None], b2[None], route.rows)[0]
    dtype = product_dtype(a.dtype, b.dtype)
    if not a.is_cuda and any(_squares_of_pairs(*factors, dtype)[1].any() for factors in ((a, b), (a2, b2))):
        return gram_of_chunks_across(a, b, a2, b2, gram_route(a, b, a2, float64=True, only="chunks"), True)
    return token_gram_across(a, b, a2, b2, route.rows)


def gram_route(a: Tensor, b: Tensor, *others: Tensor, float64: bool = False, **options) -> GramRoute:
    """Return the route that `cost.linear_route` chooses for these factors."""
    n, t = sum(x.shape[0] for x in (a, *others)), max(x.shape[1] for x in (a, *others))
    itemsize = 8 if float64 else max(a.dtype.itemsize, b.dtype.itemsize)
    return linear_route(n, t, a.shape[2], b.shape[2], itemsize=itemsize, device=a.device.type, **options)


@torch.no_grad()
def dot_of_layer(a: Tensor, b: Tensor, u: Tensor, float64: bool = False) -> Tensor:
    """Return v_jm = Σ_t b_jtᵀ u_m a_jt [n, m] in float64 for u [m, o, i]."""
    if 0 in (*a.shape, *u.shape):
        return a.new_zeros((a.shape[0], u.shape[0]), dtype=torch.float64)
    if _on_cuda(a, b, u, float64=float64):
        return torch.cat([linear_cuda.linear_dot(a[None], b[None], one[None]) for one in u]).mT
    return _dot_pass(a, b, u, float64)


def _dot_pass(a: Tensor, b: Tensor, u: Tensor, float64: bool) -> Tensor:
    """Multiply u with the longer of a_jt and b_jt first: that leaves less."""
    (n, t, i), (m, o) = a.shape, u.shape[:2]
    dtype = product_dtype(a.dtype, b.dtype, u.dtype, float64=float64)
    v = a.new_zeros((n, m), dtype=torch.float64)
    x, y, w = (a, b, u.mT) if o <= i else (b, a, u)
    samples = max(1, min(n, chunk_bytes(a.device.type) // (dtype.itemsize * t * (i + o))))
    buffer = a.new_empty(samples * t, w.shape[2], dtype=dtype)
    shift = exponents(u)
    units = _power_of_two(-shift, dtype)
    for s in range(0, n, samples):
        part, other = (z[s : s + samples].to(dtype) for z in (x, y))
        own = exponents(part)
        part = (part * _power_of_two(-own, dtype)[:, None, None]).flatten(0, 1)  # [samples t, i or o]
        for k in range(m):
            xw = torch.mm(part, w[k].to(dtype), out=buffer[: part.shape[0]])
            xw.mul_(units[k]).mul_(other.flatten(0, 1))
            v[s : s + samples, k] = torch.ldexp(xw.sum(1).view(-1, t).sum(1, dtype=torch.float64), own + shift[k])
    return v


@torch.no_grad()
def combine_of_layer_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Add Σ_j c_j g_j to out [o, i], which may have any strides, for c [n]."""
    if 0 in (*a.shape, *b.shape):
        return
    if _on_cuda(out, a, b):
        linear_cuda.linear_combine_([out], a[None], b[None], c.double())
    else:
        _combine_pass_(out, a, b, c)


def _combine_pass_(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Add one matrix product, with the smaller factor scaled by c."""
    budget = chunk_bytes(a.device.type)
    (n, t, i), o = a.shape, b.shape[2]
    dtype = product_dtype(out.dtype, a.dtype, b.dtype)
    if out.dtype != dtype:  # a gradient in a half type is rounded once, not once per product
        rows = max(1, budget // (dtype.itemsize * i))
        for part, y in zip(out.split(rows), b.split(rows, 2), strict=True):
            exact = part.to(dtype)
            _combine_pass_(exact, a, y, c)
            part.copy_(exact)
        return
    root = c.double().abs().sqrt()  # twice √c: c of tiny gradients leaves float32, the products c b do not
    scales = [r.to(dtype)[:, None, None] for r in (root, root * c.sign())]
    samples = max(1, budget // (dtype.itemsize * t * (i + o)))
    for s in range(0, n, samples):
        x, y, first, second = (z[s : s + samples].to(dtype) for z in (a, b, *scales))
        if i <= o:
            x = (x * first).mul_(second)
        else:
            y = (y * first).mul_(second)
        out.addmm_(y.flatten(0, 1).mT, x.flatten(0, 1))


@device_op("linear_moments_pass(Tensor a, Tensor b) -> (Tensor, Tensor)")
def linear_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_j g_j and Σ_j g_j² [o, i]. Of single positions both are products: g² = (b²)ᵀ a²."""
    (n, t, i), o, dtype = a.shape, b.shape[2], product_dtype(a.dtype, b.dtype)
    total, squares = (a.new_zeros((o, i), dtype=dtype) for _ in range(2))
    if t == 1:
        combine_of_layer_(total, a, b, a.new_ones(n))
        x = a[:, 0].double().square()  # squares of float32 leave its range
        rows = max(1, chunk_bytes(a.device.type) // (8 * max(1, n, i)))
        for part, y in zip(squares.split(rows), b[:, 0].split(rows, 1), strict=True):
            part.copy_(torch.mm(y.double().square().mT, x))
        return total, squares
    route = gram_route(a, b, only="chunks")
    for block, g in _blocks(a, b, route.rows, route.columns, dtype):
        total[block] = g.sum(0)
        squares[block] = g.square_().sum(0)
    return total, squares


# Layers of equal shape: a [l, n, t, i], b [l, n, t, o]; `cost.layers_at_once` says how many. The time of small ones is
# that of calls: these are few, and in float64, which leaves nothing to scale.


@torch.no_grad()
def linear_gram(a: Tensor, b: Tensor, u: Tensor | None = None, float64: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return K [l, n, n] and v = <g_j, u> [l, n] in float64 for u [l, o, i]; no v without u."""
    l, n, t, i = a.shape
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros((l, n, n), dtype=torch.float64), u if u is None else a.new_zeros((l, n), dtype=torch.float64)
    if _on_cuda(a, b, b if u is None else u, float64=float64):
        route = gram_route(a[0], b[0], m=int(u is not None), narrow=linear_cuda.narrow_chunks(a, b, u))
        if route.name == "factors":
            return linear_cuda.token_gram(a, b, route.rows), None if u is None else linear_dot(a, b, u)
        K, v = linear_cuda.gram_of_chunks(a, b, u, route)
        return K, None if u is None else v[..., 0]
    if l == 1 or a.is_cuda:
        none = b.new_empty(0, b.shape[3], i)
        pairs = [gram_of_layer(a[k], b[k], none if u is None else u[k : k + 1], float64) for k in range(l)]
        return torch.stack([K for K, _ in pairs]), None if u is None else torch.cat([v for _, v in pairs], 1).mT
    a, b = a.double(), b.double()
    if t == 1:
        one, other = (torch.bmm(x[:, :, 0], x[:, :, 0].mT) for x in (a, b))
        return one.mul_(other), None if u is None else linear_dot(a, b, u)
    g = (b.mT @ a).flatten(2)  # [l, n, o i]
    return torch.bmm(g, g.mT), None if u is None else torch.bmm(g, u.double().flatten(1)[..., None])[..., 0]


@torch.no_grad()
def linear_dot(a: Tensor, b: Tensor, u: Tensor, float64: bool = False) -> Tensor:
    """Return v = <g_j, u> [l, n] in float64 for u [l, o, i]."""
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros(a.shape[:2], dtype=torch.float64)
    if _on_cuda(a, b, u, float64=float64):
        return linear_cuda.linear_dot(a, b, u)
    if len(a) == 1 or a.is_cuda:
        return torch.cat([dot_of_layer(*layer, float64) for layer in zip(a, b, u.split(1), strict=True)], 1).mT
    shape = *a.shape[:2], -1
    a, b, u = a.double().flatten(1, 2), b.double().flatten(1, 2), u.double()
    pairs = torch.bmm(a, u.mT).mul_(b) if u.shape[1] <= u.shape[2] else torch.bmm(b, u).mul_(a)
    return pairs.view(shape).sum(2)


@torch.no_grad()
def linear_combine_(outs: Sequence[Tensor], a: Tensor, b: Tensor, c: Tensor) -> None:
    """Add Σ_j c_j g_j to each of l tensors [o, i], which may have any strides, for c [n] or [l, n] float64."""
    if 0 in (*a.shape, *b.shape):
        return
    if _on_cuda(*outs, a, b):
        linear_cuda.linear_combine_(outs, a, b, c)
    elif len(a) == 1 or a.is_cuda:
        for out, x, y, weights in zip(outs, a, b, c.expand(a.shape[:2]), strict=True):
            combine_of_layer_(out, x, y, weights)
    else:
        a, b, c = a.double(), b.double(), c[..., None, None]
        a, b = (a * c, b) if a.shape[3] <= b.shape[3] else (a, b * c)
        foreach_add_(outs, torch.bmm(b.flatten(1, 2).mT, a.flatten(1, 2)).unbind())
