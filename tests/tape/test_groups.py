"""Layers of equal shape are computed together, tensors are projected side by side: each must stay what it is alone."""

import gc
import weakref

import oracle
import pytest
import torch
import torch.nn.functional as F
from steps import MODES, check, close, project, record, truth
from torch import nn

import projgrad

N, D = 4, 6


class Twins(nn.Module):
    """Layers of equal shape that are used in different ways."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(8))
        self.scales = nn.ParameterList(nn.Parameter(1 + 0.1 * torch.randn(D)) for _ in range(8))
        self.unused = nn.Linear(D, D)
        self.layers[1].weight.requires_grad_(False)
        self.layers[2].bias.requires_grad_(False)
        self.layers[5].weight = self.layers[4].weight  # tied
        self.to(dtype)

    def forward(self, x):
        for k, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            y = F.linear(x, layer.weight.t(), layer.bias) if k == 3 else layer(x)  # transposed
            x = torch.tanh(layer(y) if k == 6 else y) * scale  # used twice
        return x


def losses_of(model, x):
    return model(x).square().sum((1, 2))


@pytest.mark.parametrize("t", [1, 3])
def test_equal_shapes_in_unequal_roles(t):
    torch.manual_seed(0)
    model, x = Twins(), torch.randn(N, t, D, dtype=torch.float64)
    check(model, lambda: losses_of(model, x))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_missing(mode):
    """A parameter of a group may have no gradient to project: it counts as zero, and gets its share of the others."""
    torch.manual_seed(0)
    model, x = Twins(), torch.randn(N, 3, D, dtype=torch.float64)
    G = truth(model, losses_of(model, x))
    params = oracle.trained(model)
    u = {name: torch.randn_like(p) for name, p in params.items()}
    missing = {"layers.0.weight", "layers.7.bias", "scales.3"}
    tape, losses = record(model, lambda: losses_of(model, x))
    for name, p in params.items():
        p.grad = None if name in missing else u[name].clone()
    tape.project_(losses, **MODES[mode])
    expected = oracle.project(
        {name: torch.zeros_like(g) if name in missing else g for name, g in u.items()},
        G,
        MODES[mode].get("scope", "global"),
    )
    for name, p in params.items():
        found = torch.zeros_like(p) if p.grad is None else p.grad
        assert (found - expected[name]).abs().max() <= 1e-8 * u[name].norm(), name


@pytest.mark.parametrize("mode", MODES)
def test_one_tensor_of_many_is_refined(mode):
    """Nearly parallel gradients at one layer of a group: the others are done after the first pass."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
    x = torch.randn(4, N, 16)
    x[2] = torch.randn(1, 16) + 1e-3 * torch.randn(N, 16)
    closure = lambda: sum(layer(z).square().mean(1) for layer, z in zip(layers, x, strict=True))  # noqa: E731
    u, found, done = project(layers, closure, **MODES[mode])
    expected = oracle.project(
        u, {name: g.double() for name, g in truth(layers, closure()).items()}, MODES[mode].get("scope", "global")
    )
    assert done.residual <= 1e-6
    for name, g in found.items():
        assert (g - expected[name]).norm() <= 1e-4 * u[name].norm()
    if mode == "per_tensor":
        refined = [tensor.refinements for tensor in done.tensors.values()]
        assert refined[2] > 0 and sum(refined) < 4 * refined[2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "direction"])
def test_one_bad_number_in_a_group(mode, value, where):
    torch.manual_seed(0)
    model, x = Twins(), torch.randn(N, 3, D, dtype=torch.float64)
    with torch.no_grad():
        if where == "gradient":
            x[2, 1, 3] = value
    tape, losses = record(model, lambda: losses_of(model, x))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if where == "direction":
        model.layers[6].weight.grad[1, 1] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        tape.project_(losses, **MODES[mode])
    assert len({p.grad is None for p in oracle.trained(model).values()}) == 1  # left, or set to None, all alike
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rates_of_layers_in_one_group():
    """With learning rates that differ, each layer of a group counts by its own."""
    torch.manual_seed(0)
    model, x = Twins(), torch.randn(N, 3, D, dtype=torch.float64)
    params = oracle.trained(model)
    rates = {name: 0.5 + 0.5 * (k % 3) for k, name in enumerate(params)}
    G = truth(model, losses_of(model, x))
    tape, losses = record(model, lambda: losses_of(model, x))
    u = {name: torch.randn_like(p) for name, p in params.items()}
    for name, p in params.items():
        p.grad = u[name].clone()
    tape.project_(losses, rates=rates)
    left = sum(rates[name] * G[name].flatten(1) @ p.grad.flatten() for name, p in params.items())
    lengths = sum(rates[name] * G[name].flatten(1).square().sum(1) for name in params).sqrt()
    assert (left.abs() / lengths).max() <= 1e-8 * sum(g.norm() ** 2 for g in u.values()) ** 0.5


def test_nothing_of_the_forward_pass_is_held_after_a_projection():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, D))
    x = torch.randn(N, D, requires_grad=True)
    seen = []
    model[1].register_forward_hook(lambda _, args, out: seen.extend((weakref.ref(args[0]), weakref.ref(out))))
    for mode in ("kept", "per_tensor"):
        seen.clear()
        tape, losses = record(model, lambda: model(x).square().sum(1))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        tape.project_(losses, **MODES[mode])
        del losses
        assert all(site.saved.tensors is None for site in tape.recording.sites)
        del tape
        gc.collect()
        assert [ref() for ref in seen] == [None, None]


def test_a_tensor_that_was_changed_after_its_use_is_named():
    """Autograd would refuse it for the weight's gradient; here no weight gradient is made."""
    torch.manual_seed(0)
    layer, x = nn.Linear(D, D), torch.randn(N, D)
    tape, losses = record(layer, lambda: layer(x).square().sum(1))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tape.gram(losses)


class Doubled(nn.Module):
    """A layer whose output's node has a hook of the user that changes what comes."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        y = self.inner(x)
        y.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
        return self.outer(torch.tanh(y))


def test_hooks_on_nodes_change_what_comes_to_a_site():
    torch.manual_seed(0)
    model, x = Doubled().double(), torch.randn(N, D, dtype=torch.float64)
    G = truth(model, model(x).square().sum(1))
    for _ in range(2):
        tape, losses = record(model, lambda: model(x).square().sum(1))
        close(tape.gram(losses), oracle.gram(G))
        u, found, _ = project(model, lambda: model(x).square().sum(1))
        expected = oracle.project(u, G, "global")
        for name, g in found.items():
            assert (g - expected[name]).abs().max() <= 1e-8 * u[name].norm()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N, D), (N, 3, D)])
def test_outputs_changed_in_place_after_a_layer(shape, bias):
    """With positions and a bias a layer's output is a view: what is done to it in place belongs to its base."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(D, D, bias) for _ in range(4)).double()
    x = torch.randn(shape, dtype=torch.float64)

    def closure():
        y = model[0](x).mul_(2)
        y += x
        z = model[1](F.relu_(y))
        z[..., :2].mul_(3)
        w = model[2](z)
        w.view(N, -1)[:, 1:].add_(1)
        left, right = model[3](torch.tanh(w)).chunk(2, -1)
        return (left.square() + right).flatten(1).sum(1)

    check(model, closure)


def test_a_residual_added_in_place_to_a_view():
    """Three layers whose outputs change in place, the second by the first: the first had to stay in the graph."""
    torch.manual_seed(0)
    model, x = nn.ModuleList(nn.Linear(D, D) for _ in range(3)).double(), torch.randn(N, 3, D, dtype=torch.float64)

    def closure():
        y = model[0](x)
        y[..., ::2] *= 2
        z = model[1](torch.tanh(y))
        z += y
        w = model[2](z)
        w.copy_(w * 2)
        return w.sum((1, 2))

    check(model, closure)


def test_tapes_side_by_side():
    """Two tapes follow parts of one forward pass, and neither sees the sites of the other."""
    torch.manual_seed(0)
    first, second = nn.Linear(D, D).double(), nn.Linear(D, D).double()
    x = torch.randn(N, D, dtype=torch.float64)
    with projgrad.per_sample(first) as one, projgrad.per_sample(second) as other:
        losses = second(torch.tanh(first(x))).square().sum(1)
    for tape, layer in ((one, first), (other, second)):
        G = truth(layer, losses)
        close(tape.gram(losses), oracle.gram(G))
