"""What csrc/recording.cpp does is what Python does in its place; without a compiler the Python is tested alone."""

import pytest
import torch
from torch import nn

from projgrad.recording import fixed, graph, interception
from projgrad.recording.compiled import compiled
from projgrad.recording.interception import Interception
from projgrad.recording.recording import Recording

N, D = 4, 8
IN_PYTHON = interception.in_python
VERSIONS = [None] if compiled is None else [None, compiled]


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


GRAPHS = {
    "plain": lambda x, w, v: x @ w,
    "other parameter": lambda x, w, v: x @ v,
    "both": lambda x, w, v: x @ w + x @ v,
    "both, turned around": lambda x, w, v: x @ v + x @ w,
    "twice the same": lambda x, w, v: (x @ w) + (x @ w),
    "other order": lambda x, w, v: (x @ w) @ v.T,
    "rolled by -1": lambda x, w, v: (x @ w).roll(-1, 1),
    "rolled by -2": lambda x, w, v: (x @ w).roll(-2, 1),
    "rolled by 7": lambda x, w, v: (x @ w).roll(7, 1),  # torch keeps -1 as 2^64 - 1, whose hash in Python is 7
    "rolled along samples": lambda x, w, v: (x @ w).roll(-1, 0),
    "summed at the end": lambda x, w, v: (x @ w).sum(-1, keepdim=True),
    "summed before": lambda x, w, v: (x @ w).sum(-2, keepdim=True).expand(N, D),
    "narrower": lambda x, w, v: (x @ w)[:, 1:],
    "narrower elsewhere": lambda x, w, v: (x @ w)[:, :-1],
    "float32 inside": lambda x, w, v: (x.float() @ w.float()).double(),
    "more positions": lambda x, w, v: (x[:, None].expand(N, 3, D) @ w).sum(1),
    "a function of one's own": lambda x, w, v: Twice.apply(x @ w),
}


def hashes(version, monkeypatch):
    """The fingerprint of every graph, made of new tensors each time."""
    monkeypatch.setattr(graph, "compiled", version)
    found = {}
    for name, function in GRAPHS.items():
        for _ in range(2):
            x = torch.randn(N, D, dtype=torch.float64)
            w, v = (torch.randn(D, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
            losses = function(x, w, v).square().sum(-1)
            found.setdefault(name, []).append(graph.fingerprint(Recording({"w": w, "v": v}), losses))
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_equal_graphs_have_equal_hashes_and_no_others(version, monkeypatch):
    found = hashes(version, monkeypatch)
    assert all(first == second for first, second in found.values())
    assert len({first for first, _ in found.values()}) == len(GRAPHS)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_refused_is_refused_by_both(version, monkeypatch):
    monkeypatch.setattr(graph, "compiled", version)
    w = torch.randn(D, requires_grad=True)
    with pytest.raises(ValueError, match="do not depend on any parameter"):
        graph.fingerprint(Recording({"w": torch.randn(D, requires_grad=True)}), w * 2)
    with pytest.raises(ValueError, match="do not depend on any parameter"):
        graph.fingerprint(Recording({"w": w}), torch.ones(N))


class Model(nn.Module):
    """Constants of all kinds: buffers, tables, factories, and what is made of them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.norm = nn.Embedding(5, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.positions = nn.Parameter(torch.randn(6, D))
        self.register_buffer("scale", torch.rand(D))
        self.table, self.tables = torch.arange(6), {"first": torch.arange(3), "not one": torch.rand(3)}

    def forward(self, ids):
        rows = self.positions[self.table + torch.zeros_like(self.table)][: ids.shape[1]]
        x = self.embedding(ids) + rows * (self.scale * 2).exp()
        x.mul_(torch.cat([torch.ones(D // 2), torch.full((D // 2,), 2.0)]))
        return self.norm(torch.stack([self.linear(input=x), x]).sum(dim=0)).square().sum((1, 2))


def recorded(method, monkeypatch):
    monkeypatch.setattr(Interception, "__torch_function__", method)
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(5, (N, 6))
    recording = Recording(dict(model.named_parameters()), fixed.fixed_tensors(model, model.parameters()))
    with Interception(recording):
        losses = model(ids)
    sources = [(sorted(s.names), s.window, s.rows is None) for s in recording.sources.values()]
    return [site.key for site in recording.sites], sources, recording.unknown, losses.tolist()


@pytest.mark.skipif(compiled is None, reason="the extension is not built for this torch")
def test_both_versions_record_the_same(monkeypatch):
    assert recorded(IN_PYTHON, monkeypatch) == recorded(compiled.torch_function, monkeypatch)


@pytest.mark.skipif(compiled is None, reason="the extension is not built for this torch")
def test_errors_pass_through():
    linear = nn.Linear(D, D)
    with Interception(Recording(dict(linear.named_parameters()))):
        with pytest.raises(RuntimeError, match="must match the size"):
            torch.ones(2) + torch.ones(3)
        with pytest.raises(TypeError, match="argument"):
            torch.add(torch.ones(2), "x")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.ones(2, 3))


@pytest.mark.parametrize("version", VERSIONS)
def test_tables_of_modules_are_found(version, monkeypatch):
    if version is not None:
        monkeypatch.setattr(fixed, "attributes_of", version.attributes)
    else:
        monkeypatch.setattr(fixed, "attributes_of", fixed.attributes_in_python)
    model = nn.Sequential(Model(), nn.Linear(3, 3).requires_grad_(False))
    found = {id(t) for t in fixed.fixed_tensors(model, [])}
    inner, frozen = model
    assert found == {id(t) for t in (inner.scale, inner.table, inner.tables["first"], frozen.weight, frozen.bias)}
