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


def graphed(name, dtype, scope, device, dropout=0.0, **options):
    """A model, its graphed step with batches for it, and a copy of the model with a plain unlearner."""
    model, batches = data(name, dtype)
    model = nn.Sequential(model, nn.Dropout(dropout)).to(device)
    (xf, yf), (x, y) = [(x.to(device), y.to(device)) for x, y in batches]
    other = copy.deepcopy(model)
    unlearners = [
        projgrad.OrthoGrad(m, torch.optim.AdamW(m.parameters(), lr=0.01), scope=scope) for m in (model, other)
    ]
    forget, retain = (lambda b, m=model, r=r: F.cross_entropy(m(b[0]), b[1], reduction=r) for r in ("mean", "none"))
    step = unlearners[0].graphed(forget, retain, (xf, yf), (x, y))
    return unlearners, step, ((xf, yf), (x, y))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_graphed_step_is_a_step(name, scope, dtype, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":
        pytest.skip("a graph needs a GPU; tests/methods/test_graphed.py has the host's part")
    (mine, theirs), step, ((xf, yf), (x, y)) = graphed(name, dtype, scope, device)
    assert step.reason == ""
    model, replays = theirs.model, torch.cuda.CUDAGraph.replay
    counted, alone, without = [], [], type(step)._without
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (counted.append(1), replays(graph))[1])
    monkeypatch.setattr(type(step), "_without", lambda self, b: (alone.append(1), without(self, b))[1])
    for shift in range(4):
        xf, x = xf.roll(shift, 0), x.roll(shift, 0)
        done = step((xf, yf), (x, y))
        wanted = theirs.step(
            lambda xf=xf: F.cross_entropy(model(xf), yf), lambda x=x: F.cross_entropy(model(x), y, reduction="none")
        )
        assert done.rank == wanted.rank
        assert done.forget_loss == pytest.approx(wanted.forget_loss, rel=1e-2 if dtype == BF16 else 1e-4)
    for p, q in zip(mine.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.05 if dtype == BF16 else 1e-3)
    assert len(counted) == 4 and not alone


def test_a_graphed_step_that_is_refused_changes_nothing(device):
    if device == "cpu":
        pytest.skip("a graph needs a GPU")
    (mine, _), step, ((xf, yf), (x, y)) = graphed("mlp", F32, "global", device)
    step((xf, yf), (x, y))
    before = copy.deepcopy(mine.model.state_dict())
    with pytest.raises(FloatingPointError):
        step((xf, yf), (x * float("nan"), y))
    torch.testing.assert_close(mine.model.state_dict(), before, rtol=0, atol=0)
    assert step((xf, yf), (x, y)).residual <= 1e-6


def test_dropout_of_a_graphed_step_draws_anew(device):
    if device == "cpu":
        pytest.skip("a graph needs a GPU")
    (mine, _), step, batches = graphed("mlp", F32, "global", device, dropout=0.5)
    for group in mine.optimizer.param_groups:
        group["lr"] = 0.0
    assert len({step(*batches).forget_loss for _ in range(5)}) > 1


def test_why_there_is_no_graph(device):
    if device == "cpu":
        pytest.skip("a graph needs a GPU")
    (mine, _), _, batches = graphed("mlp", F32, "global", device)
    retain = lambda b: F.cross_entropy(mine.model(b[0]), b[1], reduction="none")  # noqa: E731
    with pytest.warns(UserWarning, match="waits for the device"):
        step = mine.graphed(lambda b: retain(b).mean() * (1 + 0 * b[0].sum().item()), retain, *batches)
    assert step(*batches).residual <= 1e-6
    torch.testing.assert_close(torch.randn(3, device=device).isfinite().all(), torch.tensor(True, device=device))


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
