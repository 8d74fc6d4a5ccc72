"""The ops of layers as CUDA computes them, on a pretend GPU: exact in float32, and the host never waits."""

import contextlib
import copy

import pytest
import torch
from cases import FACTORS, FLOAT_ONLY
from factors import check, check_gram, layer, products, truth
from pretend import DEVICE, Gpu, Pretend, values

from projgrad.ops import cost, linear_cuda, linear_impl, reference
from projgrad.rules.convolution import Convolution
from projgrad.rules.lookup import Lookup
from projgrad.rules.product import Grouped, Product
from projgrad.rules.rule import Sum

pytestmark = pytest.mark.same_without_extension

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32), (F16, BF16), (F64, F32)]
INPUTS = [(name, pair) for name in FACTORS for pair in DTYPES if name not in FLOAT_ONLY or {BF16, F16}.isdisjoint(pair)]
ROUTES = ["factors", "chunks"]


@contextlib.contextmanager
def gpu():
    """A GPU for which no op may wait."""
    with Gpu() as active:
        yield
    assert not active.waited


def run(function, *tensors):
    with gpu():
        return values(function(*(Pretend(x) if isinstance(x, torch.Tensor) else x for x in tensors)))


def force(monkeypatch, name, budget=None):
    """This route to the Gram matrix, and chunks of `budget` bytes."""
    route = cost.linear_route
    monkeypatch.setattr(linear_impl, "linear_route", lambda *a, **k: route(*a, **k | {"only": name, "budget": budget}))
    if budget is not None:
        monkeypatch.setattr(linear_cuda, "chunk_bytes", lambda _: budget)


@pytest.mark.parametrize("budget", [1 << 10, None])
@pytest.mark.parametrize("only", ROUTES)
@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_gram_and_dot_equal_the_loop_over_positions(name, dtypes, only, budget, monkeypatch):
    force(monkeypatch, only, budget)
    a, b = layer(name, dtypes)
    u = torch.randn(2, b.shape[2], a.shape[2])
    K, v = run(linear_impl.gram_of_layer, a, b, u)
    assert torch.equal(K, K.mT) or only == "chunks"
    check_gram(K, a, b, products(a, b))
    g, w = truth(a, b).flatten(1), u.double().flatten(1)
    lengths = (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1)[:, None] * w.norm(dim=1)
    assert ((v - g @ w.mT).abs() <= 4 * torch.finfo(F32).eps * lengths).all()


@pytest.mark.parametrize("budget", [1 << 10, None])
@pytest.mark.parametrize(
    "name, dtypes, target",
    [(*one, target) for one in INPUTS for target in (F32, BF16, F16) if target != F16 or one[0] not in FLOAT_ONLY],
    ids=str,
)
def test_combine_equals_the_loop_over_positions(name, dtypes, target, budget, monkeypatch):
    """Rounded once, into any strides."""
    force(monkeypatch, None, budget)
    a, b = layer(name, dtypes)
    c = torch.randn(len(a), dtype=F64)
    before = torch.randn(a.shape[2], b.shape[2]).to(target).mT
    out = before.clone(memory_format=torch.preserve_format)
    run(linear_impl.combine_of_layer_, out, a, b, c)
    g = truth(a, b)
    size = truth(a.abs(), b.abs())
    expected = before.double() + torch.einsum("n,noi->oi", c, g)
    scale = before.double().abs() + torch.einsum("n,noi->oi", c.abs(), size)
    plain = before.float() + torch.einsum("n,noi->oi", c.float(), g.float())
    check(out, expected, scale, plain.to(target), target)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("direction", [F32, BF16, F16])
def test_directions_of_any_type_and_size(dtype, direction):
    a, b = layer("random", (dtype, dtype))
    for size in (1e-30, 1e-3, 1, 1e25):
        u = (size * torch.randn(1, b.shape[2], a.shape[2])).to(direction)
        if not (u.isfinite().all() and u.abs().max() > 1e-3 * size):
            continue  # outside of its type
        v = run(linear_impl.dot_of_layer, a, b, u)
        expected = reference.linear_dot(a, b, u)
        lengths = (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1) * u.double().norm()
        assert ((v - expected)[:, 0].abs() <= 4 * torch.finfo(F32).eps * lengths).all()


def test_tiny_rows_and_directions_keep_their_digits():
    a, b = layer("tiny_and_huge")
    u = torch.randn(3, b.shape[2], a.shape[2]) * torch.tensor([1e-25, 1e20, 0.0])[:, None, None]
    expected = reference.linear_dot(a, b, u)
    torch.testing.assert_close(run(linear_impl.dot_of_layer, a, b, u), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(run(linear_impl.dot_of_layer, b, a, u.mT), expected, rtol=1e-4, atol=0)
    for x, y in ((a, b), (b, a), (1e-10 * a, b), (a.bfloat16(), b.bfloat16())):
        K = run(lambda x, y: linear_impl.linear_cuda.token_gram(x[None], y[None], 2), x, y)[0]
        torch.testing.assert_close(K, reference.linear_gram(x, y), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_combine_with_weights_outside_float32(dtype):
    """The coefficients of a projection on tiny gradients: c is 1e45, c g is not."""
    a, b = layer("random", (dtype, dtype))
    b, c = b * 1e-25, torch.full((6,), -1e45, dtype=F64)
    c[1], c[2] = 1e45, 0
    out = torch.zeros(17, 33)
    run(linear_impl.combine_of_layer_, out, a, b, c)
    expected = reference.linear_combine(a.double(), b.double(), c[None])[0]
    scale = reference.linear_combine(a.abs().double(), b.abs().double(), c.abs()[None])[0]
    check(out, expected, scale, expected, F32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("only", ROUTES)
def test_bad_values_stay_with_their_sample(only, bad, monkeypatch):
    force(monkeypatch, only)
    a, b = layer("many_samples")
    u = torch.ones(1, 23, 19)
    clean, v = run(linear_impl.gram_of_layer, a, b, u)
    b[3, 1, 4] = bad
    K, w = run(linear_impl.gram_of_layer, a, b, u)
    others = torch.arange(len(K)) != 3
    assert not K[3].isfinite().any() and not K[:, 3].isfinite().any() and not w[3].isfinite().any()
    torch.testing.assert_close(K[others][:, others], clean[others][:, others], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(w[others], v[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("only", ROUTES)
@pytest.mark.parametrize("t2", [1, 5])
def test_gram_of_two_groups_is_a_block_of_all(t2, only, monkeypatch):
    force(monkeypatch, only, 1 << 10)
    (a, b), (a2, b2) = layer("random", (BF16, BF16)), (torch.randn(4, t2, 33).to(BF16), torch.randn(4, t2, 17).to(BF16))
    K = run(linear_impl.linear_gram_across, a, b, a2, b2)
    torch.testing.assert_close(K, reference.linear_gram(a, b, a2, b2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("only", ROUTES)
@pytest.mark.parametrize(
    "size", [(4, 5, 6, 7), (1, 3, 4, 2), (3, 1, 4, 9), (2, 0, 3, 4), (2, 3, 0, 4), (0, 2, 3, 4)], ids=str
)
def test_layers_together_are_layers_one_by_one(size, only, dtypes, monkeypatch):
    force(monkeypatch, only)
    n, t, i, o = size
    a, b = torch.randn(3, n, t, i).to(dtypes[0]), torch.randn(3, n, t, o).to(dtypes[1])
    u, c, before = torch.randn(3, o, i), torch.randn(3, n, dtype=F64), torch.randn(3, o, i)
    K, v = run(linear_impl.linear_gram, a, b, u)
    dots = run(linear_impl.linear_dot, a, b, u)
    outs = before.clone()
    run(lambda outs, *rest: linear_impl.linear_combine_(list(outs), *rest), outs, a, b, c)
    exact = {"rtol": 1e-5, "atol": 1e-5}
    for k in range(3):
        torch.testing.assert_close(K[k], reference.linear_gram(a[k], b[k]), **exact)
        expected = reference.linear_dot(a[k], b[k], u[k][None])[:, 0]
        torch.testing.assert_close(v[k], expected, **exact)
        torch.testing.assert_close(dots[k], expected, **exact)
        sums = before[k] + reference.linear_combine(a[k].double(), b[k].double(), c[k][None])[0]
        torch.testing.assert_close(outs[k].double(), sums, **exact)


@pytest.mark.parametrize("only", ROUTES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_changes_nothing(dtype, only, monkeypatch):
    force(monkeypatch, only)
    a, b = layer("long", (dtype, dtype))
    u, c = torch.randn(1, b.shape[2], a.shape[2]), torch.randn(len(a), dtype=F64)

    def call():
        out = torch.zeros(u.shape[1:])
        run(linear_impl.combine_of_layer_, out, a, b, c)
        return *run(linear_impl.gram_of_layer, a, b, u), run(linear_impl.dot_of_layer, a, b, u), out

    expected = call()
    with torch.autocast("cpu", F16):
        assert all(map(torch.equal, call(), expected))


def test_chunks_have_16_bits_only_where_all_that_meets_has():
    a, b, u = (torch.ones(1, 1, 1, 1, dtype=BF16) for _ in range(3))
    assert linear_cuda.narrow_chunks(a, b, u)
    for factors in ((a, b, None), (a, b, u.float()), (a.float(), b, u), (a.half(), b.half(), u.half())):
        assert not linear_cuda.narrow_chunks(*factors)
    assert not linear_cuda.narrow_chunks(*(x.expand(1, 1, 1 << 14, 1) for x in (a, b)), u)


def half_rules():
    torch.manual_seed(0)
    p, q = torch.randn(4, 5, 7).to(BF16), torch.randn(4, 5, 6).to(BF16)
    ids, images = torch.randint(7, (4, 3)), torch.randn(4, 1, 3, 6, 6).to(BF16)
    head, table = Product(p, q, (7,), (6,), (0, 1)), Lookup(ids, torch.randn(4, 3, 6).to(BF16), torch.Size((7, 6)))
    yield head, [head]
    yield Sum([table, head]), [table, head]
    grouped = Grouped(p.view(4, 5, 7, 1), q.repeat(1, 1, 7).view(4, 5, 7, 6), [7], [1], [6], [0, 1, 2])
    yield grouped, [grouped]
    convolution = Convolution(images, torch.randn(4, 1, 5, 4, 4).to(BF16), (3, 3), (1, 1), (1, 1), [(0, 0)] * 2, 1)
    yield convolution, [convolution]


def on_gpu(rule):
    """The same rule with its tensors on a GPU."""
    rule = copy.copy(rule)
    for name, value in vars(rule).items():
        if isinstance(value, torch.Tensor):
            setattr(rule, name, Pretend(value))
        elif name == "rules":
            rule.rules = [on_gpu(r) for r in value]
    if isinstance(rule, Convolution):
        rule.factor = BF16
    elif isinstance(rule, Lookup):
        rule = Lookup(rule.ids, rule.b, rule.shape)
    rule.device = DEVICE
    return rule


@pytest.mark.parametrize("rule, uses", list(half_rules()), ids=["product", "tied", "grouped", "convolution"])
def test_half_factors_never_meet_the_units_of_float32(rule, uses, monkeypatch):
    g = sum(r.chunk(slice(0, r.rows), True) for r in uses).flatten(1)
    u, c, bmm = torch.randn(1, *rule.shape), torch.randn(4, dtype=F64), torch.bmm

    def halves(x, y, *, out_dtype, out):
        assert x.dtype == y.dtype == BF16 and out_dtype == F32
        return bmm(x, y, out_dtype=out_dtype, out=out)

    with Gpu():
        rule = on_gpu(rule)
        out = torch.zeros(rule.shape, device=DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bmm", halves)
            K, v = rule.gram(Pretend(u))
            rule.combine_(out, Pretend(c))
    torch.testing.assert_close(values(K), g @ g.mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values(v), g @ u.double().flatten(1).mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values(out).double().flatten(), c @ g, rtol=1e-5, atol=1e-2 if len(uses) > 1 else 1e-4)


def test_chunks_in_16_bits_keep_the_digits_that_bfloat16_has(monkeypatch):
    force(monkeypatch, "chunks", 1 << 12)
    a, b = torch.randn(3, 4, 9, 40).to(BF16), torch.randn(3, 4, 9, 50).to(BF16)
    b[:, 1] *= 1e-20
    b[:, 2] *= 1e15
    u = torch.randn(3, 50, 40).to(BF16)
    K, v = run(linear_impl.linear_gram, a, b, u)
    for k in range(3):
        exact, dots = reference.linear_gram(a[k], b[k]), reference.linear_dot(a[k], b[k], u[k][None])[:, 0]
        lengths = exact.diagonal().sqrt()
        assert ((K[k] - exact).abs() <= 2**-10 * lengths * lengths[:, None]).all()
        assert ((v[k] - dots).abs() <= 2**-10 * lengths * u[k].double().norm()).all()


class Cut:
    """Products as a tensor core forms them: 16 at a time are added to a sum that is cut to 24 bits, not rounded."""

    def __call__(self, x, y, out_dtype=F32, out=None):
        total = torch.zeros(*x.shape[:2], y.shape[2])
        for p, q in zip(x.double().split(16, 2), y.double().split(16, 1), strict=True):
            exact = total.double() + p @ q
            rounded = exact.float()
            over = rounded.double().abs() > exact.abs()
            total = torch.where(over, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
        return total


def test_long_sums_are_added_up_in_pieces(monkeypatch):
    """A sum over 2^17 positions that is cut 8192 times loses 5e-5, in pieces less than 1.5e-5."""
    t = 1 << 17
    a, b = torch.ones(1, 1, t).to(BF16), (1 + torch.rand(1, t, 1)).to(BF16)
    exact = float((a.double() @ b.double()).squeeze())
    monkeypatch.setattr(torch, "bmm", Cut())
    assert abs(float(torch.bmm(a, b).squeeze()) / exact - 1) > 4e-5
    assert abs(float(linear_cuda.product(a, b).squeeze()) / exact - 1) < 512 * 2**-25
