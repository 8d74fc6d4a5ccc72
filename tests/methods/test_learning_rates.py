"""OrthoGrad with parameter groups of different learning rates: what the optimizer applies is orthogonal."""

import copy

import pytest
import torch
from torch import nn
from unlearners import classifier, flat_parameters

import projgrad
from projgrad import projectors


def _groups(model, rates, **options):
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, rates, strict=True)]
    return torch.optim.SGD(groups, lr=1.0, **options)


def _applied(model, unlearner, forget, retain):
    """max_j |cos(g_j, update)|, the update, and the record of one step."""
    params = list(model.parameters())
    G = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(l, params, retain_graph=True)]) for l in retain()]
    )
    before = flat_parameters(model)
    record = unlearner.step(forget, retain)
    moved = flat_parameters(model) - before
    return float((G @ moved / G.norm(dim=1) / moved.norm()).abs().max()), moved, record


RATES = {
    "body_and_head": (1e-3, 1e-2),
    "far_apart": (1.0, 1e-4),
    "tensors": (torch.tensor(1e-2), torch.tensor(1e-1, dtype=torch.float64)),
    "frozen_by_its_rate": (0.1, 0.0),
    "mixed_types": (1, torch.tensor(0.5)),
    "equal": (0.1, 0.1),
}
WAYS = {
    "kept": {},
    "two_passes": {"keep_output_gradients": False},
    "per_tensor": {"scope": "per_tensor"},
    "qr": {"projector": projectors.qr},
    "qr_per_tensor": {"projector": projectors.qr, "scope": "per_tensor"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RATES)
def test_the_applied_update_is_orthogonal_with_different_learning_rates(name, way):
    """In every step, also after a scheduler changed the rate of one group."""
    model, forget, retain = classifier()
    optimizer = _groups(model, RATES[name])
    factors = [lambda step: 1.0, lambda step: 0.3**step]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    unlearner = projgrad.OrthoGrad(model, optimizer, alpha=0.0, **WAYS[way])
    for _ in range(3):
        cosine, moved, record = _applied(model, unlearner, forget, retain)
        # The update is a difference of parameters of size 1, known to 1e-16, but no better.
        assert cosine <= 1e-10 + 1e-15 * len(moved) ** 0.5 / moved.norm() and moved.norm() > 0
        assert record.residual <= 1e-12 and 0 < record.preserved_norm <= 1
        if name == "frozen_by_its_rate":
            assert not moved[-24:].any() and moved[:42].any()
        scheduler.step()


def test_the_update_with_learning_rates_is_the_weighted_formula():
    """The projection in the inner product weighted by the rates, and the mean retain gradient beside it."""
    model, forget, retain = classifier()
    params, rates = list(model.parameters()), torch.tensor([1e-2, 1e-2, 3e-1, 3e-1], dtype=torch.float64)
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    u = flat(torch.autograd.grad(forget(), params))
    G = torch.stack([flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in retain()])
    root = flat([torch.full_like(p, float(rate)) for p, rate in zip(params, rates, strict=True)]).sqrt()
    u_perp = projectors.lstsq(root * u, root * G) / root
    expected = flat_parameters(model) - root.square() * (0.3 * G.mean(0) - 0.7 * u_perp)
    record = projgrad.OrthoGrad(model, _groups(model, (1e-2, 3e-1)), alpha=0.3).step(forget, retain)
    torch.testing.assert_close(flat_parameters(model), expected, rtol=1e-10, atol=1e-12)
    assert record.preserved_norm == pytest.approx(float((root * u_perp).norm() / (root * u).norm()), rel=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_equal_rates_in_several_groups_change_no_bit(way):
    model, forget, retain = classifier(torch.float32)
    state, results = copy.deepcopy(model.state_dict()), []
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        _groups(model, (0.1, torch.tensor(0.1, dtype=torch.float64))),
    ):
        model.load_state_dict(state)
        record = projgrad.OrthoGrad(model, optimizer, **WAYS[way]).step(forget, retain)
        results.append((flat_parameters(model), record.residual, record.preserved_norm))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


@pytest.mark.parametrize("way", ["per_tensor", "qr_per_tensor"])
def test_rates_scale_the_update_of_every_tensor_alone(way):
    """Every tensor is orthogonal by itself: its projection is that without groups."""
    model, forget, retain = classifier()
    state, gradients = copy.deepcopy(model.state_dict()), []
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), _groups(model, (0.7, 1e-3))):
        model.load_state_dict(state)
        projgrad.OrthoGrad(model, optimizer, **WAYS[way]).step(forget, retain)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", ["kept", "two_passes"])
def test_the_residual_is_that_of_what_is_applied(way):
    """In float32, where most of u lies in the span: the record says how much is left of it after the rates."""
    model, forget, retain = classifier(torch.float32)
    unlearner = projgrad.OrthoGrad(model, _groups(model, (1.0, 1e-3)), alpha=0.0, **WAYS[way])
    for _ in range(3):
        params = list(model.parameters())
        G = torch.stack(
            [
                torch.cat([g.double().flatten() for g in torch.autograd.grad(l, params, retain_graph=True)])
                for l in retain()
            ]
        )
        root = (
            torch.cat([torch.full((p.numel(),), r) for p, r in zip(params, (1.0, 1.0, 1e-3, 1e-3), strict=True)])
            .double()
            .sqrt()
        )
        record = unlearner.step(lambda: retain().mean() + 1e-3 * forget(), retain)
        update = root * torch.cat([p.grad.double().flatten() for p in params])
        G = G * root
        true = float((G @ update / G.norm(dim=1) / update.norm()).abs().max())
        assert true <= record.residual + 1e-7 and record.residual <= 1e-6
