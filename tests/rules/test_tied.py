"""Lookups, and tables that are multiplied with too, as a GPU computes them: exact, and the host never waits."""

import pytest
import torch
from pretend import Gpu, Pretend, values

from projgrad.ops.cost import rates
from projgrad.rules import lookup
from projgrad.rules.lookup import Lookup
from projgrad.rules.product import Product, joined
from projgrad.rules.rule import Sum
from projgrad.rules.tied import Tied, across

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (F64,) * 3, (BF16, BF16, F32), (F32, F16, BF16), (BF16, F64, F32)]
D = 6


def draw(name, n=5, t=7, V=30):
    """ids [n, t] of a table with V rows."""
    if name == "different":
        return torch.randperm(n * t).view(n, t), n * t
    if name == "one sample":
        return torch.randint(4, (1, t)), V
    if name == "small":
        return torch.randint(5, (n, t)), 5
    if name == "large":
        return torch.randint(9, (n, t)) * 1000, 9_000
    if name == "one token":
        return torch.randint(3, (n, 1)), V
    if name == "repeated":
        return torch.full((n, t), 3), V
    ids = torch.randint(V, (n, t))
    ids[0], ids[1, 2], ids[2:, -1] = -1, -500, -1
    return ids, V


NAMES = ["different", "one sample", "small", "large", "one token", "repeated", "padding"]


def factors(ids, V, dtypes=(F32,) * 3, positions=4):
    """b [n, t, d], p [n, s, V], q [n, s, d]."""
    shapes = (*ids.shape, D), (len(ids), positions, V), (len(ids), positions, D)
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def looked_up(ids, V, b):
    """Explicit gradients [n, V, d] of a lookup."""
    g = torch.zeros(len(ids), V, b.shape[2], dtype=F64)
    for j, tokens in enumerate(ids.tolist()):
        for t, row in enumerate(tokens):
            if row >= 0:
                g[j, row] += b[j, t].double()
    return g


def truth(ids, V, b, p=None, q=None):
    """Explicit gradients [n, V, d], and the sums of the lengths of their terms [n]."""
    g, lengths = looked_up(ids, V, b), b.masked_fill((ids < 0)[..., None], 0).double().norm(dim=2).sum(1)
    if p is not None:
        g = g + p.double().mT @ q.double()
        lengths = lengths + (p.double().norm(dim=2) * q.double().norm(dim=2)).sum(1)
    return g, lengths


def rule_of(ids, V, b, p=None, q=None, transposed=False):
    ids, b, p, q = (None if x is None else Pretend(x) for x in (ids, b, p, q))
    table = Lookup(ids, b, torch.Size((V, b.shape[2])))
    if p is None:
        return table
    head = Product(q, p, (q.shape[2],), (V,), (1, 0)) if transposed else Product(p, q, (V,), (q.shape[2],), (0, 1))
    return joined([head, table])


def run(function, *given, **options):
    """What a rule on a GPU computes without a wait."""
    with Gpu() as gpu:
        found = values(function(rule_of(*given, **options)))
    assert not gpu.waited
    return found


def check(K, v, g, lengths, u, eps):
    g, u = g.flatten(1), u.double().flatten(1)
    assert K.dtype == v.dtype == F64
    assert ((K - g @ g.mT).abs() <= 4 * eps * lengths * lengths[:, None]).all()
    assert ((v - g @ u.mT).abs() <= 4 * eps * lengths[:, None] * u.norm(dim=1)).all()


@pytest.fixture
def route(request, monkeypatch):
    """Pairs of tokens or chunks, whatever they cost."""
    element = {"factors": float("inf"), "chunks": 0.0}[request.param]
    monkeypatch.setattr(lookup, "rates", lambda *given: rates(*given)._replace(element=element))
    return request.param


pairs = pytest.mark.parametrize("route", ["factors"], indirect=True)


@pytest.mark.parametrize("budget", [1 << 10, None])
@pytest.mark.parametrize("route", ["factors", "chunks"], indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gram_and_dot_are_those_of_explicit_gradients(name, dtypes, route, budget, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(lookup, "chunk_bytes", lambda _: budget)
    torch.manual_seed(0)
    ids, V = draw(name)
    b, p, q = factors(ids, V, dtypes)
    u = torch.randn(2, V, D)
    for given, options in (((b,), {}), ((b, p, q), {}), ((b, p, q), {"transposed": True})):
        g, lengths = truth(ids, V, *given)
        used = {x.dtype for x in given}
        # Sums of thousands of terms, which a plain product of float64 adds one after the other.
        eps = 64 * torch.finfo(F64).eps if used == {F64} else torch.finfo(F32).eps
        K, v = run(lambda rule: rule.gram(Pretend(u)), ids, V, *given, **options)
        assert route == "chunks" or len(given) > 1 or torch.equal(K, K.mT)
        check(K, v, g, lengths, u, eps)
        check(K, run(lambda rule: rule.dot(Pretend(u)), ids, V, *given, **options), g, lengths, u, eps)
        K, v = run(lambda rule: rule.gram(None), ids, V, *given, **options)
        assert v.shape == (len(ids), 0)
        check(K, torch.zeros(len(ids), 2, dtype=F64), g, lengths, 0 * u, eps)


@pairs
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_products_in_float64(dtypes, route):
    torch.manual_seed(0)
    ids, V = draw("padding")
    given = factors(ids, V, dtypes)
    u = torch.randn(1, V, D)
    for some in (given[:1], given):
        K, v = run(lambda rule: rule.gram(Pretend(u), True), ids, V, *some)
        check(K, v, *truth(ids, V, *some), u, 4 * torch.finfo(F64).eps)


@pairs
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tiny_and_huge_gradients_keep_their_digits(dtype, route):
    """Of samples, and of all: the squares of either leave float32."""
    torch.manual_seed(0)
    ids, V = draw("small")
    b, p, q = (x.abs() for x in factors(ids, V))  # no cancellation: every digit counts
    sizes = torch.tensor([1.0, 1e-20, 1e15, 1e-12, 1e18])[:, None, None]
    u = torch.rand(2, V, D) * torch.tensor([1e-25, 1e20])[:, None, None]
    exact = {"rtol": 1e-6, "atol": 0}
    for given in (
        (1e-25 * b,),
        (1e25 * b,),
        (b * sizes,),
        (b * sizes, p * sizes, q),
        (b * sizes, p, q * sizes),
        (1e-25 * b, 1e18 * p, 1e18 * q),
    ):
        given = [x.to(dtype) for x in given]
        K, v = run(lambda rule: rule.gram(Pretend(u)), ids, V, *given)
        g = truth(ids, V, *given)[0].flatten(1)
        torch.testing.assert_close(K, g @ g.mT, **exact)
        torch.testing.assert_close(v, g @ u.double().flatten(1).mT, **exact)


@pairs
def test_what_two_uses_have_in_common_keeps_its_digits(route):
    """Of factors whose products leave float32."""
    torch.manual_seed(0)
    ids, V = draw("small")
    b, p, q = (x.abs() for x in factors(ids, V))
    expected = torch.einsum("jvd,kvd->jk", looked_up(ids, V, b), p.double().mT @ q.double())
    for x, y, z in (
        (1e-20, 1e-20, 1e-20),
        (1e-20, 3e37, 1e-20),
        (1e15, 1e15, 1e15),
        (1e-30, 1e30, 1.0),
        (1.0, 1e30, 1e-35),
        (1e30, 1.0, 1e30),
    ):
        with Gpu() as gpu:
            C = values(across(*map(Pretend, (ids, x * b, y * p, z * q))))
        assert not gpu.waited
        torch.testing.assert_close(C, expected * x * y * z, rtol=2e-6, atol=0)


def test_what_meets_float64_is_multiplied_in_float64():
    torch.manual_seed(0)
    ids, V = draw("small")
    b, p, q = factors(ids, V, (F32, F64, F32))
    expected = torch.einsum("jvd,kvd->jk", looked_up(ids, V, b), p.mT @ q.double())
    with Gpu():
        torch.testing.assert_close(values(across(*map(Pretend, (ids, b, p, q)))), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("route", ["factors", "chunks"], indirect=True)
def test_tokens_that_read_nothing_may_hold_anything(route):
    torch.manual_seed(0)
    ids, V = draw("padding")
    b, p, q = factors(ids, V)
    u = torch.randn(1, V, D)
    for head in ((), (p, q)):
        expected = run(lambda rule: rule.gram(Pretend(u)), ids, V, b, *head)
        for bad in (1e30, torch.inf, torch.nan):
            other = b.masked_fill((ids < 0)[..., None], bad)
            found = run(lambda rule: rule.gram(Pretend(u)), ids, V, other, *head)
            assert all(map(torch.equal, found, expected))


@pairs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_stay_with_their_sample(bad, route):
    torch.manual_seed(0)
    ids, V = draw("small")
    given = factors(ids, V)
    u, others = torch.ones(1, V, D), torch.arange(len(ids)) != 3
    clean, v = run(lambda rule: rule.gram(Pretend(u)), ids, V, *given)
    for x in given:
        spoiled = [y.clone() for y in given]
        spoiled[[x is y for y in given].index(True)][3, 1] = bad
        K, w = run(lambda rule: rule.gram(Pretend(u)), ids, V, *spoiled)
        assert not K[3].isfinite().any() and not K[:, 3].isfinite().any() and not w[3].isfinite().any()
        torch.testing.assert_close(K[others][:, others], clean[others][:, others], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(w[others], v[others], rtol=1e-6, atol=1e-6)


@pairs
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_products_are_small_and_half_factors_stay_halves(dtype, route, monkeypatch):
    """No product is as large as the table, or larger than a third of a chunk; autocast changes nothing."""
    budget, bmm, sizes = 1 << 16, torch.bmm, []
    monkeypatch.setattr(lookup, "chunk_bytes", lambda _: budget)
    torch.manual_seed(0)
    ids, V = draw("large", n=4, t=64)
    b, p, q = factors(ids, V, (dtype,) * 3, positions=64)
    expected = run(lambda rule: rule.rules[1].gram(None), ids, V, b, p, q)[0]

    def watched(x, y, out_dtype=None, *, out):
        assert x.dtype == y.dtype == dtype
        sizes.append(out.numel())
        return bmm(x, y, out=out) if out_dtype is None else bmm(x, y, out_dtype=out_dtype, out=out)

    monkeypatch.setattr(Product, "gram", lambda self, u, float64: (Pretend(expected), Pretend(torch.zeros(4, 0))))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", watched)
        K = run(lambda rule: rule.gram(None), ids, V, b, p, q)[0]
        with torch.autocast("cpu", F16):
            assert torch.equal(run(lambda rule: rule.gram(None), ids, V, b, p, q)[0], K)
    assert len(sizes) > 4 and max(sizes) <= budget // 12
    g = truth(ids, V, b, p, q)[0].flatten(1)
    torch.testing.assert_close(K, g @ g.mT, rtol=1e-5, atol=1e-4 * float(g.square().sum()))


def test_chunks_moments_and_sums_on_a_gpu():
    torch.manual_seed(0)
    ids, V = draw("padding")
    b = factors(ids, V)[0]
    g, c = looked_up(ids, V, b), torch.randn(len(ids), dtype=F64)

    def all_of_it(rule):
        first, second, out = (torch.zeros(V, D, device="cuda") for _ in range(3))
        rule.moments_(first, second)
        rule.combine_(out, Pretend(c))
        return rule.chunk(slice(7, 12)), rule.chunk(slice(0, V), True), first, second, out

    part, whole, first, second, out = run(all_of_it, ids, V, b)
    exact = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(part.double(), g[:, 7:12], **exact)
    torch.testing.assert_close(whole, g, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(first.double(), g.sum(0), **exact)
    torch.testing.assert_close(second.double(), g.square().sum(0), **exact)
    torch.testing.assert_close(out.double(), torch.einsum("n,nvd->vd", c, g), **exact)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0), (2, 3, 0, 5)], ids=str)
def test_nothing_to_multiply(size):
    n, t, positions, d = size
    ids, b = torch.zeros(n, t, dtype=torch.long), torch.ones(n, t, d)
    p, q, u = torch.ones(n, positions, 8), torch.ones(n, positions, d), torch.ones(1, 8, d)
    for head in ((), (p, q)):
        K, v = run(lambda rule: rule.gram(Pretend(u)), ids, 8, b, *head)
        g = truth(ids, 8, b, *head)[0].flatten(1)
        assert torch.equal(K, g @ g.mT) and torch.equal(v, g @ u.double().flatten(1).mT)


@pytest.mark.parametrize(
    "n, t, V, d, name",
    [
        (4, 512, 128_256, 2048, "factors"),
        (32, 512, 50_257, 768, "factors"),
        (32, 8192, 50_257, 768, "chunks"),
        (4, 1024, 1024, 768, "chunks"),  # positions
        (64, 2401, 169, 4, "chunks"),  # relative positions in windows
    ],
)
def test_long_sequences_and_small_tables_take_chunks(n, t, V, d, name):
    ids, b, p = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=BF16), torch.zeros(1, 1, 1, dtype=BF16)
    given = ids.expand(n, t), V, b.expand(n, t, d), p.expand(n, t, V), p.expand(n, t, d)
    for some in (given[:3], given):
        cost = run(lambda rule: rule.cost(), *some)
        assert cost.name == name and cost.bytes <= 2 << 27


def test_which_uses_are_joined():
    torch.manual_seed(0)
    ids, V = draw("small")
    b, p, q = factors(ids, V)
    table, head = Lookup(ids, b, torch.Size((V, D))), Product(p, q, (V,), (D,), (0, 1))
    for uses in ([table, head], [head, table]):
        assert type(joined(uses)) is Tied
    assert type(joined([table, head, table])) is Sum
    g = looked_up(ids, V, b) + p.double().mT @ q.double()
    for rule in (Sum([table, head]), Tied(table, head)):
        torch.testing.assert_close(rule.gram(None)[0], g.flatten(1) @ g.flatten(1).mT, rtol=1e-5, atol=1e-3)
