"""Every public op on inputs of any shape, layout, type and value, against 80 and 64 bit truth."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from any_input import (
    BF16,
    DTYPES,
    F32,
    F64,
    LAYOUTS,
    MANY,
    SCALES,
    SMALLEST,
    exact,
    examples,
    factors,
    flat,
    lay_out,
    rounded,
    rows,
    seeds,
    span,
)
from factors import products, truth
from hypothesis import given
from hypothesis import strategies as st
from numerics import ERROR, RESIDUAL

import projgrad
from projgrad.ops.t_test import quantile

BAD = st.sampled_from((float("nan"), float("inf"), -float("inf")))
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def lengths(X):
    return np.sqrt((X * X).sum(-1))


def same_bits(a, b):
    """Equal, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# gram


@examples(125)
@given(flat())
def test_gram(given):
    """Relative to the lengths of the two rows: float32 sums of a chunk are rounded, float64 ones hardly."""
    u, G = given
    K, v = projgrad.gram(G, u)
    assert K.dtype == v.dtype == F64 and torch.equal(K, K.mT) and torch.equal(projgrad.gram(G), K)
    X, U = exact(G), exact(u)
    size, other = lengths(X), lengths(U)
    assert (np.abs(exact(K) - X @ X.T) <= rounding(G, G) * np.outer(size, size)).all()
    assert (np.abs(exact(v) - X @ U.T) <= rounding(G, u) * np.outer(size, other)).all()


def rounding(G, u):
    """What a product of two rows may be off by, relative. Where few products differ roundings add up: of a chunk of
    2048 columns in four sums that are 512 times half an eps."""
    if G.dtype == F64:
        return 1e-13
    alike = [np.array([len(row.unique()) <= max(16, G.shape[1] // 4) for row in X], dtype=bool) for X in (G, u)]
    return np.where(np.logical_and.outer(*alike), 4 + min(2048, G.shape[1]) / 8, 4) * EPS[F32]


@examples(30)
@given(flat(), st.data())
def test_gram_with_a_number_that_is_none(given, data):
    u, G = given
    if not G.numel():
        return
    G = G.clone(memory_format=torch.contiguous_format)
    j, k = data.draw(st.integers(0, len(G) - 1)), data.draw(st.integers(0, G.shape[1] - 1))
    G[j, k] = data.draw(BAD)
    K, v = projgrad.gram(G, u)
    fine = torch.ones(len(G), dtype=torch.bool)
    fine[j] = False
    assert torch.equal(K.isfinite(), fine[:, None] & fine) and torch.equal(v.isfinite(), fine[:, None].expand_as(v))


# project_out


def check_projection(u, G, out, info):
    """What docs/exactness.md promises, as far as the numbers say which rows are independent."""
    basis, least, most = span(G)
    if least < 1e-4 or most > 1e-15:  # whether a row counts is a question of rounding
        return
    dtype, n = G.dtype, len(G)
    half = EPS[dtype] if dtype not in RESIDUAL else 0.0
    residual, error = RESIDUAL.get(dtype, RESIDUAL[F32]), ERROR.get(dtype, ERROR[F32])
    U, O, X = exact(u), exact(out), exact(G)
    assert int(info.rank) == len(basis) or not len(u)  # without a direction nothing is looked at twice
    expected = U - (U @ basis.T) @ basis
    expected = expected - (expected @ basis.T) @ basis
    if (np.abs(expected) > torch.finfo(dtype).max / 2).any():  # a single number may be larger than any of u
        return
    before, after, found = lengths(U), lengths(expected), lengths(O)
    tiny = torch.finfo(dtype).tiny * math.sqrt(max(1, G.shape[1]))  # below it a type has fewer digits
    slack = residual * math.sqrt(max(1, n)) / least * 2 + half
    inside = after <= max(error, slack) * before  # nothing is left: its noise has no direction
    size = np.where(inside, before, after)
    assert (lengths(O - expected) <= max(error, slack) * size + tiny).all()
    unit = X / np.maximum(lengths(X), SMALLEST)[:, None]
    cosines = np.abs(O @ unit.T)
    assert (cosines[~inside] <= (residual + half) * np.maximum(found, after)[~inside, None] + tiny).all()
    if (after > 1e-9 * before).all():  # of less, sums in float64 have fewer digits than that
        assert float(info.residual) <= residual
    c = exact(info.coefficients)
    rebuilt = U - c.T @ X
    rounding = 1e-13 * (before + (np.abs(c).T * lengths(X)).sum(1)) + EPS[dtype] * lengths(rebuilt) + tiny
    assert (lengths(rebuilt - O) <= rounding).all()
    kept = exact(info.preserved_norm)
    expected_share = np.where(before > 0, lengths(rebuilt) / np.maximum(before, SMALLEST), 1)
    assert (np.abs(kept - expected_share) <= 1e-9 * (1 + expected_share)).all()


@examples(175)
@given(flat())
def test_project_out(given):
    u, G = given
    before = u.clone(), G.clone()
    out, info = projgrad.project_out(u, G, return_info=True)
    assert out.shape == u.shape and out.dtype == u.dtype
    assert torch.equal(u, before[0]) and torch.equal(G, before[1])
    assert same_bits(projgrad.project_out(u, G), out)
    check_projection(u, G, out, info)


@examples(40)
@given(flat(), st.data())
def test_project_out_with_a_number_that_is_none(given, data):
    """In G: all is NaN. In a direction: that direction is, and the others are what they would be."""
    u, G = (x.clone(memory_format=torch.contiguous_format) for x in given)
    if not (G.numel() and u.numel()):
        return
    where = u if data.draw(st.booleans()) else G
    j, k = data.draw(st.integers(0, len(where) - 1)), data.draw(st.integers(0, G.shape[1] - 1))
    where[j, k] = data.draw(BAD)
    out, info = projgrad.project_out(u, G, return_info=True)
    if where is G:
        assert out.isnan().all() and info.rank == 0 and info.residual.isnan()
        return
    assert out[j].isnan().all() and info.residual.isnan()
    others = [d for d in range(len(u)) if d != j]
    alone, info = projgrad.project_out(u[others], G, return_info=True)
    check_projection(u[others], G, out[others], info._replace(coefficients=info.coefficients, residual=info.residual))
    assert out[others].isfinite().all() == alone.isfinite().all()


# gram_solve


@examples(75)
@given(st.data())
def test_gram_solve(data):
    """K x = b for b in the range of K, relative to the lengths of the rows that K is of."""
    dtype, n, m = data.draw(st.sampled_from((F32, F64))), data.draw(st.sampled_from(MANY)), data.draw(st.integers(0, 3))
    l, r = data.draw(st.sampled_from((1, 2, 5, 0))), data.draw(st.sampled_from((1, 2, 3, 8, 17, 40)))
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    X = torch.stack([data.draw(rows(n, r, F32, generator)) for _ in range(l)]) if l else torch.zeros(0, n, r)
    limit = 1e-12 if dtype == F32 else 1e-90  # K and b are numbers of the type
    X = X.double()
    X = torch.where(X.abs().amax(2, keepdim=True) < limit, 0, X).clamp(-1e15, 1e15)
    K = (X @ X.mT).to(dtype)
    K = torch.tril(K) + torch.tril(K, -1).mT
    w = (
        torch.randn(l, n, m, dtype=F64, generator=generator)
        / K.double().diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-30)[..., None]
    )
    b = (K.double() @ w).to(dtype)
    layout = data.draw(st.sampled_from(("contiguous", "transposed", "every_other", "offset", "negated")))
    K, b = lay_out(K, layout), lay_out(b, layout)
    x = projgrad.gram_solve(K, b)
    assert x.shape == b.shape and x.dtype == dtype
    size = K.double().diagonal(dim1=1, dim2=2).sqrt()[..., None]
    left = (K.double() @ x.double() - b.double()).abs()
    largest = (w.abs() * size).sum(1, keepdim=True) + (x.double().abs() * size).sum(1, keepdim=True)
    cut = math.sqrt(8 * max(1, n) * EPS[dtype])  # the sine below which a row adds nothing
    assert (left <= 4 * cut * size * largest + torch.finfo(dtype).tiny).all()
    assert (x[(size == 0).expand_as(x)] == 0).all()


@examples(30)
@given(st.data())
def test_gram_solve_with_a_number_that_is_none(data):
    n, m, l = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from((F32, F64)))
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    X = torch.randn(l, n, 2 * n, dtype=dtype, generator=generator)
    K, b = X @ X.mT, torch.randn(l, n, m, dtype=dtype, generator=generator)
    clean, s, j, d = projgrad.gram_solve(K, b), *(data.draw(st.integers(0, k - 1)) for k in (l, n, m))
    expected = clean.clone()
    if data.draw(st.booleans()):
        K[s, j, data.draw(st.integers(0, n - 1))] = data.draw(BAD)
        expected[s] = torch.nan
    else:
        b[s, j, d] = data.draw(BAD)
        expected[s, :, d] = torch.nan
    assert same_bits(projgrad.gram_solve(K, b), expected)


# The ops on factors of a layer. Sums of k terms: their rounding grows like √k.


def layers(draw, **options):
    """a and b, sometimes without positions."""
    a, b = draw(factors(**options))
    if a.shape[1] == 1 and draw(st.booleans()):
        return (a[:, 0], b[:, 0]), (a, b)
    return (a, b), (a, b)


def gradients(a, b):
    """The per-sample gradients [n, o * i], in 80 bits."""
    return np.array([(y.T @ x).ravel() for x, y in zip(exact(a), exact(b), strict=True)]).reshape(
        len(a), a.shape[2] * b.shape[2]
    )


def check_gram(K, a, b, a2, b2):
    """Relative to Σ_t ‖a_t‖ ‖b_t‖ of both samples."""
    g, g2 = gradients(a, b), gradients(a2, b2)
    size, size2 = ((x.double().norm(dim=2) * y.double().norm(dim=2)).sum(1) for x, y in ((a, b), (a2, b2)))
    terms = 8 + 2 * math.isqrt(a.shape[1])
    assert K.dtype == F64 and K.shape == (len(a), len(a2))
    assert (np.abs(exact(K) - g @ g2.T) <= terms * EPS[products(a, b)] * exact(size[:, None] * size2)).all()


@examples(100)
@given(st.data())
def test_linear_gram(data):
    given, (a, b) = layers(data.draw)
    K = projgrad.linear_gram(*given)
    assert K.dtype == F64 and torch.equal(K, K.mT) and torch.equal(projgrad.linear_gram(*given), K)
    check_gram(K, a, b, a, b)


@examples(30)
@given(st.data())
def test_linear_gram_of_two_groups(data):
    a, b = data.draw(factors())
    i, o = a.shape[2], b.shape[2]
    a2, b2 = data.draw(factors(widths=(i, o)))
    a2, b2 = rounded(a2.double(), a.dtype), rounded(b2.double(), b.dtype)
    K = projgrad.linear_gram(a, b, a2, b2)
    check_gram(K, a, b, a2, b2)


@examples(75)
@given(st.data())
def test_linear_dot(data):
    given, (a, b) = layers(data.draw)
    dtype, m = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    u = torch.randn(m, b.shape[2], a.shape[2], dtype=F64, generator=generator)
    u = rounded(u * data.draw(st.sampled_from(SCALES[dtype][:4])), dtype)
    u = lay_out(u, data.draw(st.sampled_from(LAYOUTS)))
    v = projgrad.linear_dot(*given, u)
    g, w = truth(a, b).flatten(1), u.double().flatten(1)
    scale = truth(a.abs(), b.abs()).flatten(1) @ w.abs().mT
    assert v.dtype == F64 and v.shape == (m, len(a))
    wide = F64 if F64 in (a.dtype, b.dtype, dtype) else F32
    terms = sum(1 + math.isqrt(size) for size in (a.shape[1], a.shape[2], b.shape[2]))
    assert ((v.mT - g @ w.mT).abs() <= terms * EPS[wide] * scale + 1e-300).all()


@examples(75)
@given(st.data())
def test_linear_combine(data):
    given, (a, b) = layers(data.draw)
    dtype, m = data.draw(st.sampled_from((F64, F32, BF16))), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    c = torch.randn(m, len(a), dtype=F64, generator=generator)
    c = rounded(c * 10.0 ** torch.randint(-15, 16, (1, len(a)), generator=generator), dtype)
    out = projgrad.linear_combine(*given, c)
    g, size = truth(a, b).flatten(1), truth(a.abs(), b.abs()).flatten(1)
    expected, scale = (c.double() @ g).view_as(out), (c.double().abs() @ size).view_as(out)
    kept, wide = torch.promote_types(a.dtype, b.dtype), products(a, b)
    assert out.dtype == kept and out.shape == (m, b.shape[2], a.shape[2])
    terms = 4 + 2 * math.isqrt(len(a) * a.shape[1])
    info = torch.finfo(kept)
    bound = (terms * EPS[wide] + EPS[kept]) * scale + info.tiny
    fits = scale < info.max / 4
    assert ((out.double() - expected).abs() <= bound)[fits].all()


@examples(60)
@given(st.data())
def test_linear_moments(data):
    given, (a, b) = layers(data.draw)
    total, squares = projgrad.linear_moments(*given)
    kept, wide = torch.promote_types(a.dtype, b.dtype), products(a, b)
    assert total.dtype == squares.dtype == kept and total.shape == squares.shape == (b.shape[2], a.shape[2])
    g, size = truth(a, b), truth(a.abs(), b.abs())
    info, terms = torch.finfo(kept), 4 + 2 * math.isqrt(len(a) * a.shape[1])
    for found, expected, scale in ((total, g.sum(0), size.sum(0)), (squares, g.square().sum(0), size.square().sum(0))):
        bound = (terms * EPS[wide] + EPS[kept]) * scale + info.tiny
        fits = scale < min(info.max, torch.finfo(wide).max) / 4
        assert ((found.double() - expected).abs() <= bound)[fits].all()


# basis_project


@examples(75)
@given(st.data())
def test_basis_project(data):
    sizes = (1, 2, 3, 8, 17, 40, 0)
    o, i, k, l = (data.draw(st.sampled_from(s)) for s in (sizes, sizes, sizes, (1, 2, 3, 0)))
    types = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    D = torch.randn(l, o, i, dtype=F64, generator=generator) * data.draw(st.sampled_from(SCALES[types[0]][:5]))
    M = torch.randn(l, i, k, dtype=F64, generator=generator)
    if data.draw(st.booleans()):
        M = torch.linalg.qr(M).Q
    D, M = (lay_out(rounded(x, t), data.draw(st.sampled_from(LAYOUTS))) for x, t in zip((D, M), types, strict=True))
    out = projgrad.basis_project(D, M)
    d, m = D.double(), M.double()
    expected, scale = d - (d @ m) @ m.mT, d.abs() + (d.abs() @ m.abs()) @ m.abs().mT
    wide = F64 if F64 in types else F32
    info, terms = torch.finfo(types[0]), 4 + 2 * (math.isqrt(i) + math.isqrt(M.shape[2]))
    assert out.shape == D.shape and out.dtype == types[0]
    bound = (terms * EPS[wide] + EPS[types[0]]) * scale + info.tiny * (1 + i * M.shape[2])
    fits = scale < info.max / 4
    assert ((out.double() - expected).abs() <= bound)[fits].all()


# feasible


@examples(75)
@given(st.data())
def test_feasible(data):
    """What is kept is d and was to be kept; what is not was not, but for a margin around the border."""
    n, p = (
        data.draw(st.sampled_from((2, 3, 8, 64, 1000))),
        data.draw(st.sampled_from((1, 7, 8, 17, 1023, 1025, 4097, 0))),
    )
    kept, summed = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((F32, F64, BF16)))
    delta = data.draw(st.sampled_from((0.05, 0.5, 1e-3, 1e-9)))
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    n = min(n, 64) if p > 1025 else n
    d, u = (rounded(torch.randn(p, dtype=F64, generator=generator), kept) for _ in range(2))
    scale = 10.0 ** torch.randint(-12, 13, (p,), dtype=F64, generator=generator)
    g = torch.randn(n, p, dtype=F64, generator=generator) - d.double().sign() * torch.rand(
        p, dtype=F64, generator=generator
    )
    g = g * scale * (torch.rand(p, generator=generator) < 0.9)
    d[torch.rand(p, generator=generator) < 0.1] = 0
    total, squares = (x.to(summed) for x in (g.sum(0), g.square().sum(0)))
    tensors = [
        lay_out(x, data.draw(st.sampled_from(("contiguous", "every_other", "offset", "negated"))))
        for x in (d, u, total, squares)
    ]
    out = projgrad.feasible(*tensors, n, delta=delta)
    mean, s = g.mean(0), g.std(0)
    q = quantile(delta, n - 1)
    wanted = (
        (d.double() * u.double() <= 0) & (d.double() * mean + q * d.double().abs() * s / math.sqrt(n) <= 0) & (d != 0)
    )
    e = (n + 4) * EPS[F32 if summed != F64 else F64] + 8 * EPS[summed]
    margin = 4 * math.sqrt(e) * (mean.abs() + s) * (1 + q / math.sqrt(n))
    clear = wanted & (d.double().sign() * mean + q * s / math.sqrt(n) < -margin)
    assert out.dtype == kept and torch.equal(out, torch.where(out != 0, d, 0))
    assert (wanted | (out == 0)).all() and (out != 0)[clear].all()


@examples(30)
@given(st.data())
def test_feasible_with_a_number_that_is_none(data):
    """NaN there, and nowhere else."""
    p, kept, summed = (
        data.draw(st.integers(1, 40)),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from((F32, F64))),
    )
    generator = torch.Generator().manual_seed(data.draw(seeds()))
    d, u, g = (torch.randn(*shape, generator=generator) for shape in ((p,), (p,), (5, p)))
    tensors = [d.to(kept), u.to(kept), g.sum(0).to(summed), g.square().sum(0).to(summed)]
    clean = projgrad.feasible(*tensors, 5)
    k = data.draw(st.integers(0, p - 1))
    tensors[data.draw(st.integers(0, 3))][k] = data.draw(BAD)
    clean[k] = torch.nan
    assert same_bits(projgrad.feasible(*tensors, 5), clean)


# Tensors that are not dense


CALLS = {
    "gram G": lambda x, v: projgrad.gram(x),
    "gram u": lambda x, v: projgrad.gram(v, x),
    "project_out u": lambda x, v: projgrad.project_out(x, v),
    "project_out G": lambda x, v: projgrad.project_out(v, x),
    "gram_solve b": lambda x, v: projgrad.gram_solve(torch.eye(3), x),
    "linear_gram a": lambda x, v: projgrad.linear_gram(x, v),
    "linear_dot b": lambda x, v: projgrad.linear_dot(v, x, torch.ones(4, 4)),
    "linear_dot u": lambda x, v: projgrad.linear_dot(v, v, x),
    "linear_combine c": lambda x, v: projgrad.linear_combine(v, v, x),
    "linear_moments b": lambda x, v: projgrad.linear_moments(v, x),
    "basis_project D": lambda x, v: projgrad.basis_project(x, torch.ones(4, 2)),
    "feasible total": lambda x, v: projgrad.feasible(v, v, x, v, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_tensors_that_are_not_dense_are_named(call):
    x, (op, name) = torch.randn(3, 4), call.split()
    nested = torch.nested.nested_tensor([x[0], x[1]])
    for other in (x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn(), nested):
        with pytest.raises(TypeError, match=rf"{op}: {name} must be a dense tensor; got "):
            CALLS[call](other, x)
