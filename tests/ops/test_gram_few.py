"""gram_few: Gram matrices of few 16-bit rows, the op and the CUDA code in an emulator."""

import emulator
import pytest
import torch
from cases import implementations
from pretend import Gpu, Pretend, values

from projgrad.ops import linear_cuda, reference
from projgrad.ops.gram import gram_few, suits_gram_few

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
BLOCK = 256 * 8  # columns that a block reads in one round; a slice has at least two
IMPLEMENTATIONS = {"op": gram_few}
if emulator.AVAILABLE:  # g++ on Linux
    IMPLEMENTATIONS["cuda, emulated"] = emulator.gram_few
every = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
dtypes = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
directions = pytest.mark.parametrize("m", [0, 1])


def exact(g, u):
    """K and v in float64; NaN and infinity as in products of pairs."""
    g, u = g.double(), u.double()
    return tuple((g[:, :, None] * x[:, None]).sum(3) for x in (g, u))


def check(found, g, u, tolerance=2e-6):
    """Each product of two rows to `tolerance` of their lengths."""
    (K, v), (exact_K, exact_v) = found, exact(g, u)
    assert K.dtype == v.dtype == F64 and K.shape == exact_K.shape and v.shape == exact_v.shape
    assert torch.equal(K, K.mT)
    lengths, directions = (x.double().norm(dim=2) for x in (g, u))
    assert ((K - exact_K).abs() <= tolerance * lengths[:, :, None] * lengths[:, None]).all()
    assert ((v - exact_v).abs() <= tolerance * lengths[:, :, None] * directions[:, None]).all()


def rows(l, n, p, m, dtype, device="cpu"):
    return torch.randn(l, n, p, device=device).to(dtype), torch.randn(l, m, p, device=device).to(dtype)


@every
@dtypes
@directions
@pytest.mark.parametrize("n", range(1, 9))
def test_products_of_rows(n, m, dtype, implementation, device):
    g, u = rows(2, n, BLOCK + 8 * 13, m, dtype, device)
    check(IMPLEMENTATIONS[implementation](g, u), g, u)


@every
@directions
@pytest.mark.parametrize("l, p", [(1, 8), (3, 264), (2, BLOCK - 8), (1, 2 * BLOCK), (3, 2 * BLOCK + 8), (1, 7 * BLOCK)])
def test_any_number_of_columns_and_matrices(l, p, m, implementation, device):
    g, u = rows(l, 3, p, m, BF16, device)
    check(IMPLEMENTATIONS[implementation](g, u), g, u)


@every
def test_nothing_to_add_is_zero(implementation, device):
    K, v = IMPLEMENTATIONS[implementation](*rows(2, 3, 0, 1, BF16, device))
    assert K.shape == (2, 3, 3) and v.shape == (2, 3, 1) and not K.any() and not v.any()


@every
@dtypes
def test_small_integers_are_exact(dtype, implementation, device):
    g = torch.randint(-4, 5, (2, 4, 3 * BLOCK), device=device).to(dtype)
    u = torch.randint(-4, 5, (2, 1, 3 * BLOCK), device=device).to(dtype)
    assert all(map(torch.equal, IMPLEMENTATIONS[implementation](g, u), exact(g, u)))


@every
@pytest.mark.parametrize("of_u", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("size", [1e-38, 1e-22, 1e-20, 1e-15, 1e15, 1e20, 1e35])
def test_tiny_and_huge_rows_keep_their_digits(size, of_u, implementation, device):
    """Products of tiny rows leave float32 to zero, those of huge ones to infinity; zeros are neither."""
    g, u = rows(2, 4, 3 * BLOCK, 1, BF16, device)
    g[0, 1] *= size
    g[0, 2] = -0.0
    g[1, 3, BLOCK:] *= size
    g[1, 3, :BLOCK] = 0
    u *= of_u
    check(IMPLEMENTATIONS[implementation](g, u), g, u)


@every
@pytest.mark.parametrize("dtype, tiny", [(BF16, 1e-39), (F16, 1e-7)], ids=str)
def test_rows_of_denormal_numbers(dtype, tiny, implementation, device):
    g, u = rows(1, 3, 520, 1, dtype, device)
    g[0, 1] = g[0, 1].double() * tiny
    assert 0 < g[0, 1].abs().max() < 4 * torch.finfo(dtype).tiny
    check(IMPLEMENTATIONS[implementation](g, u), g, u)


@every
def test_a_single_tiny_number_counts_wherever_it_is(implementation, device):
    """In each half of a word, in any lane, warp or slice."""
    places = [0, 1, 42, 77, 1001, 2050, 4101]
    g, u = rows(len(places), 3, 2 * BLOCK + 8, 1, BF16, device)
    g[:, 2] = 0
    for k, place in enumerate(places):
        g[k, 2, place] = -1e-30
    check(IMPLEMENTATIONS[implementation](g, u), g, u)


@every
@pytest.mark.parametrize("of_g, of_u", [(1e-15, 1e-27), (1e10, 1e30)])
def test_a_direction_out_of_range_of_rows_in_range(of_g, of_u, implementation, device):
    """Squares of the rows are in range, products with u are not."""
    g, u = rows(2, 3, 2 * BLOCK, 1, BF16, device)
    g, u = g * of_g, u * of_u
    check(IMPLEMENTATIONS[implementation](g, u), g, u)


@every
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_rows_do_not_make_the_others_be_summed_again(zero, implementation, device):
    """Sums in float64 would have other bits."""
    g, u = rows(2, 4, 2 * BLOCK, 1, BF16, device)
    K, v = IMPLEMENTATIONS[implementation](g, u)
    g[:, 3] = zero
    found = IMPLEMENTATIONS[implementation](g, u)
    assert torch.equal(found[0][:, :3, :3], K[:, :3, :3]) and torch.equal(found[1][:, :3], v[:, :3])
    assert not found[0][:, 3].any() and not found[1][:, 3].any()


@every
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_stay_with_their_row(bad, dtype, implementation, device):
    g, u = rows(2, 4, 2 * BLOCK + 8, 1, dtype, device)
    clean = IMPLEMENTATIONS[implementation](g, u)
    g[1, 2, BLOCK + 5] = bad
    K, v = IMPLEMENTATIONS[implementation](g, u)
    for x, expected in zip((K, v), exact(g, u), strict=True):
        assert torch.equal(x.isnan(), expected.isnan())
        assert torch.equal(x[x.isinf()], expected[expected.isinf()])
        assert not x[1, 2].isfinite().any()
    for x, y in zip((K, v), clean, strict=True):
        assert torch.equal(x[0], y[0])
    rest = torch.tensor([0, 1, 3], device=device)
    torch.testing.assert_close(K[1][rest][:, rest], clean[0][1][rest][:, rest], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("m", [0, 1])
def test_rows_anywhere_in_memory(m, device):
    """Not at 16 bytes, apart from one another, of all strides, or one for all matrices."""
    g, u = rows(2, 3, 528, m, BF16, device)
    wide = [torch.cat([x[..., :1], x, x[..., :7]], 2)[..., 1:-7] for x in (g, u)]
    turned = [x.mT.contiguous().mT for x in (g, u)]
    for x, w in (wide, turned, (g[:, :, :520], u[:, :, :520]), (g[:1].expand(2, -1, -1), u[:1].expand(2, -1, -1))):
        check(gram_few(x, w), x, w)
        check(gram_few(x[1:], w[1:]), x[1:], w[1:])


@every
def test_same_bits_every_time(implementation, device):
    g, u = rows(3, 5, 5 * BLOCK, 1, BF16, device)
    first = IMPLEMENTATIONS[implementation](g, u)
    assert all(map(torch.equal, IMPLEMENTATIONS[implementation](g, u), first))


def test_what_suits_the_kernel():
    def suits(n=4, p=64, m=1, dtype=BF16):
        return suits_gram_few(torch.ones(2, n, p, dtype=dtype), torch.ones(2, m, p, dtype=dtype))

    assert suits() and suits(dtype=F16) and suits(n=1, m=0) and suits(n=8, p=8)
    assert not any((suits(n=9), suits(n=0), suits(p=63), suits(m=2), suits(dtype=torch.float32), suits(dtype=F64)))


@pytest.mark.parametrize("n, i, calls", [(4, 24, 1), (9, 24, 0), (4, 23, 0)])
def test_chunks_of_all_layers_are_one_call(n, i, calls, monkeypatch):
    """Where they are in 16 bits, of few rows, with columns in eights."""
    made = []
    monkeypatch.setattr(linear_cuda, "gram_few", lambda g, u: made.append(g.shape) or gram_few(g, u))
    a, b = torch.randn(3, n, 5, i).to(BF16), torch.randn(3, n, 5, 17).to(BF16)
    u = torch.randn(3, 17, i).to(BF16)
    route = linear_cuda.GramRoute("chunks", 17, i, 0, 0)
    with Gpu() as gpu:
        K, v = values(linear_cuda.gram_of_chunks(*map(Pretend, (a, b, u)), route))
    assert len(made) == calls and not gpu.waited
    for k in range(3):
        expected = reference.linear_gram(a[k], b[k])
        lengths = expected.diagonal().sqrt()
        assert ((K[k] - expected).abs() <= 2**-7 * lengths * lengths[:, None]).all()
        dots = reference.linear_dot(a[k], b[k], u[k][None])[:, 0]
        assert ((v[k, :, 0] - dots).abs() <= 2**-7 * lengths * u[k].double().norm()).all()
