"""Samples whose tokens nearly cancel: products of pairs of tokens lose digits that the gradients still have."""

import pytest
import torch
from torch import nn

import projgrad
from projgrad.tape import factors

SIZE, T = 256, 4
VARIATIONS = [1.0, 1e-1, 1e-2, 1e-3, 1e-5]


def tokens(n, variation):
    """Inputs nearly the same at every position, output gradients that sum to zero: g is what differs."""
    x = torch.ones(SIZE) + variation * (torch.randn(n, 1, SIZE) + torch.randn(n, T, SIZE))
    s = torch.randn(n, T, SIZE) + 3 * torch.linspace(-1, 1, SIZE) * torch.randn(n, T, 1)
    return x, s - s.mean(1, keepdim=True)


@pytest.mark.same_without_extension
@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_result_is_as_orthogonal_as_the_record_says(variation, scope, metric, monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(SIZE, SIZE, bias=False)
    model.weight.detach().zero_()  # they round nothing away
    (x, s), (xf, sf) = tokens(3, variation), tokens(2, 0.3)
    G = (s.double().mT @ x.double()).flatten(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    unlearner = projgrad.OrthoGrad(model, optimizer, 0.0, scope=scope, metric=metric)
    used = []
    dot = factors.FactoredGradient.dot
    monkeypatch.setattr(factors.FactoredGradient, "dot", lambda *given: used.append(1) or dot(*given))
    for lr in (0.0, 1e-2):  # the second step knows the factors of the forget gradient
        optimizer.param_groups[0]["lr"] = lr
        before = model.weight.detach().clone()
        record = unlearner.step(lambda: (model(xf) * sf).mean(), lambda: (model(x) * s).mean((1, 2)))
    assert bool(used) == (metric == "gradient")
    result = model.weight.grad if metric == "gradient" else model.weight.detach() - before
    result = result.double().flatten()
    cosine = (G @ result / G.norm(dim=1) / result.norm()).abs().max()
    left = (G.norm(dim=1) / (x.double().norm(dim=2) * s.double().norm(dim=2)).sum(1)).min()
    assert record.preserved_norm < 0.999
    assert cosine <= record.residual + torch.finfo(torch.float32).eps / left  # no gradient has more digits


def test_what_is_told_of_a_layer_is_that_of_explicit_gradients():
    torch.manual_seed(0)
    model = nn.Linear(SIZE, SIZE, bias=False)
    x, s = (torch.cat(parts) for parts in zip(*(tokens(2, variation) for variation in VARIATIONS), strict=True))
    with projgrad.per_sample(model) as tape:
        losses = (model(x) * s).sum((1, 2))
    G = (s.double().mT @ x.double()).flatten(1)
    error = (tape.gram(losses) - G @ G.mT) / G.norm(dim=1) / G.norm(dim=1)[:, None]
    assert error.abs().max() <= 1e-5
