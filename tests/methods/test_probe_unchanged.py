"""The probe changes nothing: of a model that has all that a forward pass may change, also after errors."""

import random

import pytest
import torch
from probing import quick
from torch import nn
from torch.nn import functional as F

from projgrad.methods.probe.unchanged import Unchanged

pytestmark = pytest.mark.same_without_extension


class Restless(nn.Module):
    """Has all that a forward pass may change: dropout, batch norm, a counter, a buffer that is replaced."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 4))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("wide", torch.zeros(1).expand(3))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.layers[0].weight.data *= 1.0
        return self.layers(self.frozen(x))


def state_of(model, optimizer):
    """All bits that a probe may not change."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {
        "bits": {
            name: t.detach().clone().contiguous().view(torch.uint8).tolist() for name, t in tensors.items() if t.ndim
        },
        "objects": {name: id(t) for name, t in tensors.items()},
        "calls": int(model.calls),
        "grads": {name: None if g is None else (id(g), g.tolist()) for name, g in grads.items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "optimizer": str(optimizer.state_dict()),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "modes of torch": (torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
    }


def restless():
    model = Restless()
    model.layers[1].eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = torch.randn(16, 6), torch.arange(16) % 4
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return model, optimizer, x, y


ERRORS = KeyboardInterrupt, ValueError("a reason"), torch.OutOfMemoryError


@pytest.mark.parametrize(
    "fails_at, error", [(None, None), *((call, error) for error in ERRORS for call in (1, 2, 5, 11, 17))]
)
def test_nothing_changes_also_after_an_error(fails_at, error):
    model, optimizer, x, y = restless()
    before, calls = state_of(model, optimizer), []
    held = F.cross_entropy(model(x), y)  # a graph made before
    before["calls"] += 1

    def called():
        calls.append(random.random())
        if len(calls) == fails_at:
            model.train()
            raise error

    def forget():
        called()
        return F.cross_entropy(model(-x), y)

    def retain(n):
        called()
        return F.cross_entropy(model(x[:n]), y[:n], reduction="none")

    before = state_of(model, optimizer)
    if fails_at is None:
        probed = quick(model, forget, retain, sizes=(2, 8), optimizer=optimizer)
        assert len(set(calls)) == 1 and all(row.residual < 1e-5 for row in probed.rows)
    else:
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            quick(model, forget, retain, sizes=(2, 8), optimizer=optimizer)
    assert state_of(model, optimizer) == before
    held.backward()


def test_an_interrupted_restoration_is_finished():
    model, optimizer, _, _ = restless()
    before, times = state_of(model, optimizer), []
    with pytest.raises(KeyboardInterrupt), Unchanged(model, dict(model.layers.named_parameters())) as unchanged:
        nn.init.zeros_(model.layers[0].weight)
        put_back = unchanged.states.put_back

        def interrupted():
            times.append(0)
            if len(times) < 3:
                raise KeyboardInterrupt
            put_back()

        unchanged.states.put_back = interrupted
    assert state_of(model, optimizer) == before and len(times) == 3


@pytest.mark.parametrize("by_data", [False, True])
def test_a_frozen_parameter_that_a_closure_changes_is_named(by_data):
    model, _, x, y = restless()

    def forget():
        (model.frozen.bias.data if by_data else model.frozen.bias).add_(1e-3)
        return F.cross_entropy(model(-x), y)

    retain = lambda n: F.cross_entropy(model(x[:n]), y[:n], reduction="none")  # noqa: E731
    with pytest.warns(UserWarning, match=r"changed frozen.bias in place, which is frozen and not put back"):
        quick(model, forget, retain, sizes=[2], scopes=["global"])
