"""What the package remembers of a model: no tensor that is not used again, little of a graph, a bounded number."""

import gc
import sys
import weakref

import pytest
import torch
from steps import MODES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo.functional import Uses

import projgrad
from projgrad.ops import cost
from projgrad.recording import codes, structure
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


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made while active and still alive, those in a graph too, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in given | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out

    def of(self, step):
        self.peak = 0
        with self:
            step()
        return self.peak


class Foreign(torch.autograd.Function):
    """Cross-entropy of every row, of which the tape knows nothing."""

    @staticmethod
    def forward(ctx, logits, y):
        ctx.save_for_backward(p := logits.softmax(-1), y)
        return -p.gather(-1, y[..., None])[..., 0].float().log()

    @staticmethod
    def backward(ctx, weights):
        p, y = ctx.saved_tensors
        return p.scatter_add(-1, y[..., None], -torch.ones_like(p[..., :1])).mul_(weights[..., None]), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["known", "foreign"])
def test_no_step_takes_more_memory_than_plain_training(loss, dtype, monkeypatch):
    """Not the first one either, which inspects the graph. The logits are nearly all that there is.

    What is held for a moment is of a fixed size: here as small beside these 8 MB as it is usually beside gigabytes.
    """
    monkeypatch.setattr(codes, "PIECE", 1 << 16)
    monkeypatch.setattr(cost, "CPU", cost.CPU._replace(chunk=1 << 17))
    n, t, words, d = 8, 64, 8192, 32
    head = nn.Linear(d, words, bias=False)
    model = nn.Sequential(nn.Embedding(words, d), nn.Linear(d, d), nn.Tanh(), head).to(dtype)
    forget, retain = torch.randint(words, (2, n, t)).unbind()

    def losses(ids):
        logits = model(ids)
        if loss == "foreign":
            return Foreign.apply(logits, ids).mean(1)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(n, t).mean(1)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def plain():
        optimizer.zero_grad()
        losses(forget).mean().neg().backward()
        losses(retain).mean().backward()
        optimizer.step()

    live = Live()
    most = live.of(plain)
    optimizer.zero_grad()
    unlearner = projgrad.OrthoGrad(model, optimizer)
    for _ in range(3):
        assert live.of(lambda: unlearner.step(lambda: losses(forget).mean(), lambda: losses(retain))) <= 1.05 * most
