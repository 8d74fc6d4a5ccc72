"""Whole OrthoGrad steps on a GPU against those on the CPU, and what a step leaves behind when memory runs out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import projgrad

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.qkv, self.out = nn.Embedding(11, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.token(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).transpose(1, -2).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))


def convolutional():
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(72, 4))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)), lambda: torch.randn(7, 12)),
    "convolutional": (convolutional, lambda: torch.randn(7, 3, 8, 8)),
    "transformer": (Attention, lambda: torch.randint(11, (7, 6))),
}
MODES = {
    "global": {},
    "two_passes": {"keep_output_gradients": False},
    "per_tensor": {"scope": "per_tensor"},
}


def data(name, dtype):
    """A model and two batches, on the CPU."""
    build, inputs = MODELS[name]
    model = build().to(dtype)
    batches = [(inputs(), torch.randint(4, (7,))) for _ in range(2)]
    return model, [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batches]


def stepped(model, batches, device, steps=2, autocast=None, **mode):
    """The model after some steps on a device, and the last record."""
    model = copy.deepcopy(model).to(device)
    (xf, yf), (x, y) = [(x.to(device), y.to(device)) for x, y in batches]

    def losses(x, y, reduction):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return F.cross_entropy(model(x).float() if autocast else model(x), y, reduction=reduction)

    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, **mode)
    for _ in range(steps):
        done = unlearner.step(lambda: losses(xf, yf, "mean"), lambda: losses(x, y, "none"))
    return model, done


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_cpu(name, mode, device):
    model, batches = data(name, F64)
    expected, about = stepped(model, batches, "cpu", **MODES[mode])
    found, done = stepped(model, batches, device, **MODES[mode])
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-8, atol=1e-10)
    assert done.rank == about.rank and done.residual <= 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_float32(name, mode, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions have it by default
    model, batches = data(name, F32)
    _, done = stepped(model, batches, device, **MODES[mode])
    assert done.residual <= 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_step_under_autocast_leaves_rounding_and_no_more(mode, device):
    model, batches = data("mlp", F32)
    found, done = stepped(model, batches, device, steps=1, autocast=BF16, **MODES[mode])
    assert done.residual <= 2 * torch.finfo(BF16).eps
    for p, before in zip(found.parameters(), model.parameters(), strict=True):
        assert p.isfinite().all() and not torch.equal(p.cpu(), before)


def test_a_step_repeats_its_bits(device):
    model, batches = data("mlp", F32)
    first, _ = stepped(model, batches, device)
    second, _ = stepped(model, batches, device)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def exhausted(device):
    """Ask for more memory than there is."""
    if device == "cpu":
        raise torch.OutOfMemoryError("a pretended one")
    return torch.empty(torch.cuda.get_device_properties(0).total_memory + (1 << 30), dtype=torch.int8, device=device)


@pytest.mark.parametrize("where", ["forget", "retain"])
def test_a_step_out_of_memory_changes_nothing(where, device):
    model, ((xf, yf), (x, y)) = data("mlp", F32)
    model.to(device)
    xf, yf, x, y = (z.to(device) for z in (xf, yf, x, y))
    before = copy.deepcopy(model.state_dict())
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1))
    retain = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    forget = lambda: F.cross_entropy(model(xf), yf)  # noqa: E731
    unlearner.step(forget, retain)
    model.load_state_dict(before)
    full = lambda: forget() + exhausted(device).sum() if where == "forget" else retain() + exhausted(device)[0]  # noqa: E731
    with pytest.raises(torch.OutOfMemoryError):
        unlearner.step(*((full, retain) if where == "forget" else (forget, full)))
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert unlearner.step(forget, retain).residual <= 1e-6
