"""What the package remembers of a model: no tensor that is not used again, little of a graph, a bounded number."""

import gc
import sys
import weakref

import pytest
import torch
from steps import MODES
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.functional import Uses

import projgrad
from projgrad.recording import structure
from projgrad.tape import tape as tapes

pytestmark = pytest.mark.same_without_extension

EACH = 4096  # bytes of one graph: a dictionary entry, two small dataclasses, lists of a few dozen layouts


def reachable(root):
    """Everything that is kept alive by `root`, classes and modules left out."""
    seen, waiting = {}, [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, type(sys), torch.dtype)) or callable(value):
            continue
        seen[id(value)] = value
        waiting += gc.get_referents(value)
    return list(seen.values())


def kept(model):
    """Of all graphs of a model: how many, their bytes, and the tensors among them."""
    known = tapes._known[model]
    everything = reachable(known)
    return len(known), sum(map(sys.getsizeof, everything)), [t for t in everything if isinstance(t, Tensor)]


def check(model, most=structure.KNOWN):
    count, size, tensors = kept(model)
    assert 0 < count <= most
    assert not tensors
    assert size <= EACH * (count + 16)


def routed(model, x):
    """Every token goes to one of four experts, which one its numbers say."""
    expert, out = (x.detach()[:, 0] * 37).sin().mul(4).floor().long() % 4, torch.zeros_like(x)
    for k in range(4):
        chosen = (expert == k).nonzero()[:, 0]
        out = out.index_add(0, chosen, torch.tanh(x[chosen] @ model.w[k]))
    return x + out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no rule covers", "ignore:the . losses are mixed")
def test_a_routed_model_over_many_steps():
    model = Uses(None, w=(4, 8, 8))
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    graphs = []
    for step in range(200):
        x = torch.randn(24, 8)
        retain = lambda x=x: routed(model, x).view(4, -1).square().mean(1)  # noqa: E731
        unlearner.step(lambda x=x: routed(model, -x).square().mean(), retain)
        if step % 50 == 49:
            check(model)
            graphs.append(kept(model)[0])
    assert graphs[-1] > 20  # it was another graph in many steps


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11)

    def forward(self, ids):
        return self.out(self.mix(self.embedding(ids)).tanh())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_many_lengths_of_sequences(mode):
    model = Recurrent()
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1e-4), **MODES[mode])
    for t in range(1, 201):
        ids = torch.randint(11, (3, t))
        retain = lambda ids=ids: F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)  # noqa: E731
        unlearner.step(lambda ids=ids: F.cross_entropy(model(ids.flip(0)).mT, ids), retain)
    check(model)
    assert kept(model)[0] >= 200  # all of them were other graphs


@pytest.mark.filterwarnings("ignore:no rule covers", "ignore:the . losses are mixed")
@pytest.mark.parametrize("use", ["gram", "moments"])
def test_graphs_found_anew_each_time_leave_no_indices(use):
    """Rows in no order: where they are is of use in this step only."""
    model = nn.Linear(8, 5)
    for _ in range(20):
        x, owner = torch.randn(32, 8), torch.randint(4, (32,))
        with projgrad.per_sample(model) as tape:
            losses = torch.zeros(4).index_add(0, owner, model(x).tanh().square().sum(1))
        getattr(tape, use)(losses)
        assert tape.passes.structure(losses).layouts[0].rows is not None
        del tape, losses
        check(model)


def test_the_number_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr(structure, "KNOWN", 7)
    model = Recurrent()
    for t in (*range(1, 20), *range(1, 20)):
        ids = torch.randint(11, (3, t))
        with projgrad.per_sample(model) as tape:
            losses = F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)
        tape.gram(losses)
        check(model, 7)


def test_what_is_remembered_goes_with_the_model():
    model = Recurrent()
    ids = torch.randint(11, (3, 4))
    with projgrad.per_sample(model) as tape:
        losses = F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)
    tape.gram(losses)
    assert model in tapes._known
    alive = weakref.ref(model)
    del model, tape, losses
    gc.collect()
    assert alive() is None  # and with it its entry


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", ["well", "refused"])
def test_nothing_of_a_forward_pass_outlives_the_step(ends, mode):
    """Activations, losses and graphs of both closures, without help of the garbage collector."""
    model, alive = Recurrent(), []
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1e-4), **MODES[mode])
    ids = torch.randint(11, (3, 6))

    def watched(reduction):
        h = model.mix(model.embedding(ids)).tanh()
        loss = F.cross_entropy(model.out(h).mT, ids, reduction="none").mean(1)
        loss = loss.mean() if reduction else loss
        alive.extend(weakref.ref(t) for t in (h, loss))
        if ends == "refused" and not reduction and len(alive) > 8:
            loss = loss + loss.mean()
        return loss

    gc.collect()
    gc.disable()
    try:
        for step in range(3):
            if ends == "refused" and step == 2:
                with pytest.raises(ValueError, match="share terms"):
                    unlearner.step(lambda: watched(True), lambda: watched(False))
            else:
                unlearner.step(lambda: watched(True), lambda: watched(False))
            assert len(alive) == 4 * (step + 1)
            if ends == "refused":
                gc.collect()  # the error's traceback holds the frames
            assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
