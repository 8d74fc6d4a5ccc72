"""Gram matrices in a weighted metric, K = G diag(d) Gᵀ, and sums in float64, of every kind of rule."""

import pytest
import torch
from test_parcels import CASES, rules
from zoo import ZOO

import projgrad.rules.convolution as convolution
import projgrad.rules.rule as rule_module
from projgrad.ops import linear_impl
from projgrad.rules.product import Product

MORE = ["conv1d_depthwise", "conv2d_stride_dilation", "conv_transpose2d", "conv3d"]
NAMES = [*CASES, *(name for name in MORE if name in ZOO)]


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("name", NAMES)
def test_weighted_gram_is_that_of_explicit_gradients(name, chunk, monkeypatch):
    pytest.importorskip("transformers")
    for module in (convolution, rule_module):
        monkeypatch.setattr(module, "chunk_bytes", lambda _: chunk)
    case = ZOO[name]()
    for parameter, pieces in rules(case, range(case.n)).items():
        for rule in pieces:
            G = rule.dense().double().flatten(1)
            d, u = torch.rand(rule.shape, dtype=rule.dtype), torch.randn(rule.shape, dtype=rule.dtype)
            d = d * (torch.rand(rule.shape) < 0.9) if d.numel() > 1 else d
            u = u * (d > 0)
            K, v = rule.weighted_gram(d, u)
            bound = 1e-9 if rule.dtype == torch.float64 else 1e-4
            for found, wanted in ((K, G * d.double().flatten() @ G.T), (v, G @ u.double().flatten())):
                assert (found - wanted).norm() <= bound * (wanted.norm() + 1e-30), parameter


@pytest.mark.parametrize("name", ["conv2d_same", "conv2d_groups", "einsum_per_head"])
def test_chunks_are_made_once(name, monkeypatch):
    """However small they are: chunks that are cut out of all gradients would be made again and again."""
    case, made = ZOO[name](), []
    gradients = linear_impl.gradients

    def counted(*args, **options):
        out = gradients(*args, **options)
        made.append(out.numel())
        return out

    for module in (convolution, rule_module):
        monkeypatch.setattr(module, "chunk_bytes", lambda _: 1)
    for module in (linear_impl, convolution):
        monkeypatch.setattr(module, "gradients", counted)
    for pieces in rules(case, range(case.n)).values():
        for rule in pieces:
            made.clear()
            rule.weighted_gram(torch.ones(rule.shape, dtype=rule.dtype), torch.ones(rule.shape, dtype=rule.dtype))
            assert sum(made) <= rule.n * rule.shape.numel()
            made.clear()
            rule.combine_(torch.zeros(rule.shape, dtype=torch.float64), torch.ones(rule.n, dtype=torch.float64), True)
            assert sum(made) <= rule.n * rule.shape.numel()


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_those_of_explicit_gradients(name, float64):
    pytest.importorskip("transformers")
    case = ZOO[name]()
    for parameter, pieces in rules(case, range(case.n)).items():
        for rule in pieces:
            G, c = rule.dense().double(), torch.randn(rule.n, dtype=torch.float64)
            out = torch.zeros(rule.shape, dtype=torch.float64 if float64 else rule.dtype)
            rule.combine_(out, c, float64)
            wanted = torch.tensordot(c, G, 1)
            bound = 1e-4 if rule.dtype != torch.float64 and not float64 else 1e-6
            assert (out - wanted).norm() <= bound * (wanted.norm() + 1e-30), parameter


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("name", NAMES)
def test_squares_are_those_of_explicit_gradients(name, chunk, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(linear_impl, "chunk_bytes", lambda _: chunk)
    case = ZOO[name]()
    for parameter, pieces in rules(case, range(case.n)).items():
        for rule in pieces:
            wanted, found = rule.dense().double().flatten(1).square().sum(1), rule.squares()
            bound = 1e-9 if rule.dtype == torch.float64 else 1e-5
            assert found.dtype == torch.float64 and (found - wanted).norm() <= bound * (wanted.norm() + 1e-30), (
                parameter
            )


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-20, 1e-8), (1e-30, 1.0), (1e15, 1e8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squares_of_tiny_and_huge_gradients_of_wide_layers(dtype, scales):
    """From products of tokens, for which a parameter has to be wider than a sample is long."""
    p, q = ((torch.randn(5, 6, m) * scale).to(dtype) for m, scale in zip((40, 50), scales, strict=True))
    p[2] = 0
    wanted = torch.einsum("nto,nti->noi", p.double(), q.double()).square().sum((1, 2))
    found = Product(p, q, (40,), (50,), (0, 1)).squares()
    torch.testing.assert_close(found, wanted, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
