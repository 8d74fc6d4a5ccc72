"""Layers of equal shape together, in the ops and in the rules, against one by one in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from projgrad.ops import linear_impl, reference
from projgrad.ops.cost import group_bytes, layers_at_once
from projgrad.rules.product import Product
from projgrad.rules.rule import Rows

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (F64, F64)]
SIZES = [(4, 5, 6, 7), (1, 3, 4, 2), (3, 1, 9, 4), (3, 1, 4, 9), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 2, 3, 4)]


def layers(l, n, t, i, o, dtypes=(F32, F32)):
    torch.manual_seed(0)
    a, b = torch.randn(l, n, t, i).to(dtypes[0]), torch.randn(l, n, t, o).to(dtypes[1])
    return a, b, torch.randn(l, o, i).to(dtypes[1]), torch.randn(l, n, dtype=F64)


def close(found, expected, scale, dtype):
    """Products of unit normal numbers: relative to the lengths of what is multiplied."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    assert (error <= 16 * torch.finfo(dtype).eps * scale).all(), (error / scale).max()


def check_group(a, b, u, c, K, v, outs, before):
    """Results of l layers; the outs were `before`, in their own dtype."""
    exact = F64 if F64 in (a.dtype, b.dtype) else F32
    g = b.double().mT @ a.double()  # [l, n, o, i]
    size = (a.double().norm(dim=3) * b.double().norm(dim=3)).sum(2)  # [l, n]
    close(K, g.flatten(2) @ g.flatten(2).mT, size[:, :, None] * size[:, None], exact)
    close(v, (g * u.double()[:, None]).sum((2, 3)), size * u.double().flatten(1).norm(dim=1)[:, None], exact)
    expected, sizes = torch.einsum("ln,lnoi->loi", c, g), torch.einsum("ln,ln->l", c.abs(), size)
    for out, start, change, s in zip(outs, before, expected, sizes, strict=True):
        close(out, start.double() + change, s + start.double().abs(), out.dtype if out.dtype != F64 else exact)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("l", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layers_together_are_layers_one_by_one(size, l, dtypes):
    a, b, u, c = layers(l, *size, dtypes)
    K, v = linear_impl.linear_gram(a, b, u)
    assert K.dtype == v.dtype == F64
    torch.testing.assert_close(linear_impl.linear_dot(a, b, u), v, rtol=1e-4, atol=1e-4)
    alone, none = linear_impl.linear_gram(a, b)
    assert none is None
    torch.testing.assert_close(alone, K, rtol=1e-4, atol=1e-4)  # another route, perhaps
    before = torch.randn(l, *u.shape[1:])
    outs = list(before.clone())
    linear_impl.linear_combine_(outs, a, b, c)
    check_group(a, b, u, c, K, v, outs, before)
    outs = list(before.clone())
    linear_impl.linear_combine_(outs, a, b, c[0])
    again = list(before.clone())
    linear_impl.linear_combine_(again, a, b, c[:1].expand(l, -1))
    assert all(map(torch.equal, outs, again))


def test_factors_with_any_strides_and_gradients_in_a_half_type():
    a, b, u, c = layers(3, 4, 5, 12, 14)
    a, b, u = a.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2], b[..., ::2], u.mT.contiguous().mT[:, ::2, ::2]
    before = torch.randn(3, 6, 7).mT.to(BF16)
    outs = list(before.clone(memory_format=torch.preserve_format))
    linear_impl.linear_combine_(outs, a, b, c)
    check_group(a, b, u, c, *linear_impl.linear_gram(a, b, u), outs, before)


def test_tiny_and_huge_samples_and_directions():
    a, b, u, _ = layers(3, 4, 2, 6, 7)
    b *= torch.tensor([1e-20, 1, 1e15, 0.0])[:, None, None]
    u *= torch.tensor([1e-25, 1, 1e20])[:, None, None]
    K, v = linear_impl.linear_gram(a, b, u)
    for layer in range(3):
        torch.testing.assert_close(K[layer], reference.linear_gram(a[layer], b[layer]), rtol=1e-6, atol=0)
        expected = reference.linear_dot(a[layer], b[layer], u[layer][None])[:, 0]
        torch.testing.assert_close(v[layer], expected, rtol=1e-6, atol=0)


def rules_of(kind, l=5):
    """l rules of one kind, their explicit per-sample gradients [l, n, *shape] in float64."""
    a, b, *_ = layers(l, 4, 3, 6, 7)
    if kind == "product":
        return [Product(y, x, (7,), (6,), (0, 1)) for x, y in zip(a, b, strict=True)], b.double().mT @ a.double()
    if kind == "transposed":
        return [Product(y, x, (7,), (6,), (1, 0)) for x, y in zip(a, b, strict=True)], a.double().mT @ b.double()
    g = {"rows": torch.randn(l, 4, 6), "numbers": torch.randn(l, 4), "no_entries": torch.randn(l, 4, 0, 3)}[kind]
    return [Rows(x) for x in g], g.double()


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("kind", ["product", "transposed", "rows", "numbers", "no_entries"])
def test_rules_together_are_rules_one_by_one(kind, float64, most, monkeypatch):
    """Also more of them than may be stacked."""
    monkeypatch.setattr("projgrad.rules.product.layers_at_once", lambda *_: most)
    monkeypatch.setattr("projgrad.rules.rule.group_bytes", lambda _: 8 * 4 * 6 * most)
    rules, g = rules_of(kind)
    us, c = [torch.randn(rules[0].shape) for _ in rules], torch.randn(4, dtype=F64)
    expected = g.flatten(2) if g.ndim > 2 else g[..., None]
    assert len({rule.group_key for rule in rules}) == 1
    K, v = type(rules[0]).gram_of_group(rules, us, float64)
    torch.testing.assert_close(K, expected @ expected.mT, rtol=1e-5, atol=1e-5)
    v2 = torch.stack([x @ u.double().flatten() for x, u in zip(expected, us, strict=True)])
    torch.testing.assert_close(v, v2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(type(rules[0]).dot_of_group(rules, us, float64), v2, rtol=1e-5, atol=1e-5)
    alone, none = type(rules[0]).gram_of_group(rules, [None] * len(rules), float64)
    assert none is None
    torch.testing.assert_close(alone, K, rtol=1e-5, atol=1e-5)
    for weights in (c, torch.randn(len(rules), 4, dtype=F64)):
        outs = [torch.ones(rules[0].shape) for _ in rules]
        type(rules[0]).combine_group_(rules, outs, weights, float64)
        sums = 1 + torch.einsum("ln,lnk->lk", weights.expand(len(rules), -1), expected).view(g.shape[0], *g.shape[2:])
        torch.testing.assert_close(torch.stack(outs).double(), sums, rtol=1e-5, atol=1e-5)


def test_what_may_be_stacked():
    rules, _ = rules_of("product")
    others = [
        *rules_of("transposed", 1)[0],
        *rules_of("rows", 1)[0],
        Product(rules[0].p.double(), rules[0].q, (7,), (6,), (0, 1)),
    ]
    assert len({rule.group_key for rule in (*rules, *others)}) == 4
    assert Product(torch.ones(4, 3, 7), torch.ones(4, 3, 2, 3), (7,), (2, 3), (0, 1, 2)).group_key is None
    assert Rows(torch.empty(4, 1 << 17)).group_key is None
    assert Rows(torch.empty(4, 5)).group_key != Rows(torch.empty(4, 5, dtype=BF16)).group_key


def test_only_small_layers_are_stacked_on_a_cpu():
    assert layers_at_once(4, 16, 64, 64) >= 4
    assert layers_at_once(4, 512, 2048, 2048) == layers_at_once(64, 1, 784, 1024) == 1
    assert layers_at_once(0, 0, 0, 0) >= 1
    for size in [(4, 16, 64, 64), (8, 1, 64, 64), (1, 100, 16, 3)]:
        n, t, i, o = size
        assert layers_at_once(*size) * 8 * n * t * (i + o) <= group_bytes("cpu")
    assert layers_at_once(4, 512, 2048, 512, 2, "cuda") >= 1


@pytest.mark.parametrize("t", [1, 5])
def test_a_group_takes_as_many_calls_as_a_layer(t):
    """Its time is that of calls: about ten, however many layers there are."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += not func.is_view
            return func(*args, **(kwargs or {}))

    def calls(l):
        a, b, u, c = layers(l, 4, t, 6, 7)
        outs, found = list(torch.zeros_like(u)), []
        for call in (lambda: linear_impl.linear_gram(a, b, u), lambda: linear_impl.linear_combine_(outs, a, b, c)):
            with Count() as count:
                count.calls = 0
                call()
            found.append(count.calls)
        return found

    assert calls(3) == calls(9) and max(calls(9)) <= 12
