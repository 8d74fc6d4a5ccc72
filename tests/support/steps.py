"""A model and its losses through the tape, and what one backward pass per loss says of them."""

import oracle
import torch
from oracle import trained
from torch import nn

import projgrad

ERROR = 1e-8  # of the largest entry, or of the norm
MODES = {
    "kept": {"keep_output_gradients": True},
    "two_passes": {"keep_output_gradients": False},
    "per_tensor": {"scope": "per_tensor"},
}


def truth(model, losses):
    """g_j of every trainable parameter (n, *shape) in float64, one backward pass of a graph per loss."""
    params = trained(model)
    rows = [
        torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return {name: torch.stack(g).double() for name, g in zip(params, zip(*rows, strict=True), strict=True)}


def record(model, closure):
    with projgrad.per_sample(model) as tape:
        losses = closure()
    return tape, losses


def project(model, closure, u=None, **mode):
    """The projection of u, and the record of it."""
    params = trained(model)
    u = {name: torch.randn_like(p) for name, p in params.items()} if u is None else u
    tape, losses = record(model, closure)
    for name, p in params.items():
        p.grad = u[name].clone()
    try:
        done = tape.project_(losses, **mode)
        return u, {name: p.grad for name, p in params.items()}, done
    finally:
        for p in params.values():
            p.grad = None


def close(found, expected, error=ERROR):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= error * expected.abs().max()


def check(model, closure):
    """Everything the tape computes against one backward pass per loss."""
    G = truth(model, closure())
    n = len(next(iter(G.values())))
    tape, losses = record(model, closure)
    close(tape.gram(losses), oracle.gram(G))
    first, second = tape.moments(losses)
    for name, g in G.items():
        assert (first[name] - g.sum(0)).abs().max() <= ERROR * n * g.abs().max()
        assert (second[name] - g.square().sum(0)).abs().max() <= ERROR * n * g.square().max()
    for mode in MODES.values():
        u, found, _ = project(model, closure, **mode)
        expected = oracle.project(u, G, mode.get("scope", "global"))
        for name in G:
            assert (found[name] - expected[name]).abs().max() <= ERROR * u[name].norm(), (name, mode)


def mlp(*between):
    return nn.Sequential(nn.Linear(8, 6), *(between or [nn.Tanh()]), nn.Linear(6, 3))


def mixed(n=4):
    """A model of many kinds of layers, and its losses for ids (n, 12)."""
    model = nn.Sequential(
        nn.Embedding(9, 4),
        nn.LayerNorm(4),
        nn.Unflatten(1, (3, 4)),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return model, torch.randint(9, (n, 12))


def wide():
    """Layers whose factors are much smaller than their gradients."""
    return nn.Sequential(nn.Linear(128, 160), nn.Tanh(), nn.Linear(160, 96)), torch.randn(4, 128)
