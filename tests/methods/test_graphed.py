"""Steps from a CUDA graph: the host's part, with a pretend graph that makes the passes again; `test_cuda_steps.py` has
real ones."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

import projgrad
from projgrad.methods import graphed
from projgrad.recording.host_reads import Differs, Script

pytestmark = pytest.mark.same_without_extension

F64 = torch.float64


class PretendGraph:
    """Fills the tensors of a capture by making all passes again, with the numbers of the rehearsal for the host."""

    def __init__(self, write):
        self.write, self.replays = write, 0
        self.script = Script()
        write(None)
        write(self.script)
        self.grads, self.static = self._run(self.script)

    def _run(self, script):
        script.capture()
        params = self.write(script)
        grads = [(p, p.grad) for p in params.values() if p.grad is not None]
        for p, _ in grads:
            p.grad = None
        log = inspect.getclosurevars(script.again).nonlocals["replay"].log
        tensors = [numbers for numbers, *_ in script.deferred] + [g for _, g in grads]
        return grads, tensors + [t for t in tree_leaves(log) if isinstance(t, torch.Tensor)]

    def replay(self):
        self.replays += 1
        script = Script()
        script._numbers = self.script._numbers
        _, fresh = self._run(script)
        for old, new in zip(self.static, fresh, strict=True):
            old.copy_(new)


class Made(list):
    def __init__(self):
        super().__init__()
        self.without = []


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """All graphs that were made; `without`: the batches of the steps that were made without one."""
    made, without = Made(), graphed.GraphedStep._without

    def captured(write, inputs):
        made.append(PretendGraph(write))
        return made[-1].script, made[-1], made[-1].grads

    monkeypatch.setattr(graphed, "captured", captured)
    monkeypatch.setattr(graphed.GraphedStep, "_without", lambda self, b: (made.without.append(b), without(self, b))[1])
    return made


class Classifier(nn.Module):
    """Tokens, learned positions and a tied head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.table, self.positions = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.inner, self.norm, self.dropout = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(dropout)

    def forward(self, ids):
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.dropout(self.norm(x + self.inner(x).tanh())) @ self.table.weight.mT


def losses(model, ids):
    logits = model(ids[:, :-1])
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def batches(count, n=3):
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(20, (n, 7), generator=generator) for _ in range(2)) for _ in range(count)]


def pair(dtype=F64, lr=0.05, groups=False, build=Classifier, **options):
    """The same model twice, each with its unlearner."""
    torch.manual_seed(0)
    first = build().to(dtype)
    unlearners = []
    for model in (first, copy.deepcopy(first)):
        params = list(model.parameters())
        held = [{"params": params[:2], "lr": 0.5 * lr}, {"params": params[2:]}] if groups else params
        unlearners.append(projgrad.OrthoGrad(model, torch.optim.AdamW(held, lr=lr), **options))
    return unlearners


def graphed_step(unlearner, batch, **kinds):
    model = unlearner.model
    return unlearner.graphed(lambda ids: losses(model, ids).mean(), lambda ids: losses(model, ids), *batch)


def compare(plain, replayed, step, some, exactly=True):
    for forget, retain in some:
        mine = step(forget, retain)
        theirs = plain.step(lambda f=forget: losses(plain.model, f).mean(), lambda r=retain: losses(plain.model, r))
        for name in ("rank", "preserved_norm", "residual", "refinements", "forget_loss", "retain_loss"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-9, abs=1e-12), name
        assert mine.tensors.keys() == theirs.tensors.keys()
        for a, b in zip(plain.model.parameters(), replayed.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"damping": 0.01}, {"groups": True}, {"max_norm": 0.1}])
def test_replays_are_steps(graphs, options, scope, dtype):
    plain, replayed = pair(dtype, scope=scope, **options)
    some = batches(5)
    step = graphed_step(replayed, some[0])
    assert not step.reason and all(
        torch.equal(a, b) for a, b in zip(*(list(u.model.parameters()) for u in (plain, replayed)), strict=True)
    )
    compare(plain, replayed, step, some)
    assert graphs[0].replays == 5 and len(graphs) == 1 and not graphs.without


def test_decisions_that_differ_are_taken_without_the_graph(graphs):
    """More samples than dimensions, duplicated ones, one too bad for one pass: the captured way is not theirs."""
    plain, replayed = pair(torch.float32)
    some = batches(4)
    step = graphed_step(replayed, some[0])
    alike = some[1][1][:1].expand(3, -1).clone()
    compare(plain, replayed, step, [some[1], (some[2][0], alike), some[3]])
    near = [(f, r) for f, r in some]
    compare(plain, replayed, step, near)


@pytest.mark.parametrize("where", ["forget", "retain"])
def test_what_is_refused_changes_nothing(graphs, where):
    unlearner = pair()[0]
    model, some = unlearner.model, batches(2)
    scale = torch.ones((), dtype=F64)
    forget = lambda x: losses(model, x[0]).mean() * x[1]  # noqa: E731
    retain = lambda x: losses(model, x[0]) * x[1]  # noqa: E731
    step = unlearner.graphed(forget, retain, *((ids, scale) for ids in some[0]))
    step(*((ids, scale) for ids in some[0]))
    before = copy.deepcopy((model.state_dict(), unlearner.optimizer.state_dict()))
    scales = {"forget": scale, "retain": scale} | {where: scale * float("nan")}
    with pytest.raises(FloatingPointError):
        step((some[1][0], scales["forget"]), (some[1][1], scales["retain"]))
    after = model.state_dict(), unlearner.optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before[0]), tree_leaves(after[0]), strict=True))
    assert str(before[1]) == str(after[1]) and all(p.grad is None for p in model.parameters())
    step(*((ids, scale) for ids in some[1]))
    assert graphs[0].replays == 3


def test_other_shapes_are_steps_without_the_graph(graphs):
    plain, replayed = pair()
    step = graphed_step(replayed, batches(1)[0])
    compare(plain, replayed, step, [(f[:, :5], r[:2]) for f, r in batches(2)])
    assert graphs[0].replays == 0 and len(graphs.without) == 2
    compare(plain, replayed, step, batches(1))
    assert graphs[0].replays == 1 and len(graphs.without) == 2


CHANGES = {
    "alpha": lambda u: setattr(u, "alpha", 0.1),
    "damping": lambda u: setattr(u, "damping", 0.5),
    "scope": lambda u: setattr(u, "scope", "per_tensor"),
    "frozen": lambda u: u.model.inner.weight.requires_grad_(False),
    "replaced": lambda u: setattr(u.model.inner.weight, "data", u.model.inner.weight.data * 2),
    "rates": lambda u: u.optimizer.param_groups[0].update(lr=0.3),
    "eval": lambda u: u.model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_captured_anew(graphs, change):
    plain, replayed = pair(groups=True)
    some = batches(4)
    step = graphed_step(replayed, some[0])
    compare(plain, replayed, step, some[:2])
    for unlearner in (plain, replayed):
        CHANGES[change](unlearner)
    compare(plain, replayed, step, some[2:])
    assert len(graphs) == 2 and not graphs.without


def test_a_learning_rate_of_all_is_not_part_of_the_graph(graphs):
    plain, replayed = pair()
    some = batches(3)
    step = graphed_step(replayed, some[0])
    for batch in some:
        compare(plain, replayed, step, [batch])
        for unlearner in (plain, replayed):
            unlearner.optimizer.param_groups[0]["lr"] *= 0.5
    assert len(graphs) == 1 and graphs[0].replays == 3 and not graphs.without


def test_batches_of_any_form(graphs):
    plain, replayed = pair()
    model, some = replayed.model, batches(3)
    forget = lambda batch: losses(model, batch["ids"]).mean()  # noqa: E731
    retain = lambda batch: losses(model, batch["parts"][0])  # noqa: E731

    def form(pair):
        return {"ids": pair[0], "name": "a"}, {"parts": [pair[1], None]}

    step = replayed.graphed(forget, retain, *form(some[0]))
    compare(plain, replayed, lambda f, r: step(*form((f, r))), some)
    assert graphs[0].replays == 3 and not graphs.without
    step({"ids": some[0][0], "name": "b"}, form(some[0])[1])
    assert graphs[0].replays == 3


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_reasons_for_no_graph(monkeypatch):
    unlearner = pair()[0]
    model, batch = unlearner.model, batches(1)[0]
    with pytest.warns(UserWarning, match="no CUDA graph.*not torch's own"):
        step = unlearner.graphed(
            lambda ids: losses(model, ids).mean(),
            lambda ids: Foreign.apply(model(ids[:, :-1])).flatten(1).sum(1),
            *batch,
        )
    assert "not torch's own" in step.reason
    assert step(*batch).residual < 1e-9
    for options in ({"keep_output_gradients": False}, {"projector": lambda u, G: u}):
        with pytest.warns(UserWarning, match="no CUDA graph"):
            assert graphed_step(pair(**options)[0], batch).reason
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="not tensors on a GPU"):
        step = graphed_step(unlearner, batch)
    assert step(*batch).residual < 1e-9


def test_errors_of_the_functions_are_those_of_a_step():
    unlearner = pair()[0]
    model, batch = unlearner.model, batches(1)[0]
    with pytest.raises(ValueError, match="one loss per sample"):
        unlearner.graphed(lambda ids: losses(model, ids).mean(), lambda ids: losses(model, ids).mean(), *batch)
    with pytest.raises(ValueError, match="scalar"):
        unlearner.graphed(lambda ids: losses(model, ids), lambda ids: losses(model, ids), *batch)


def test_another_way_than_the_captured_one_is_taken_by_step(graphs):
    """Retain gradients that vanish leave nothing to correct, where a correction was captured."""
    plain, replayed = pair(alpha=0.0)
    model, some = replayed.model, batches(3)
    step = replayed.graphed(
        lambda ids: losses(model, ids).mean(),
        lambda b: losses(model, b[0]) * b[1],
        some[0][0],
        (some[0][1], torch.ones(3)),
    )
    for (forget, retain), scale in zip(some, (1.0, 0.0, 1.0), strict=True):
        before = len(graphs.without)
        mine = step(forget, (retain, torch.full((3,), scale)))
        assert len(graphs.without) - before == (scale == 0)
        theirs = plain.step(
            lambda f=forget: losses(plain.model, f).mean(), lambda r=retain, s=scale: losses(plain.model, r) * s
        )
        assert (mine.rank, mine.refinements) == (theirs.rank, theirs.refinements)
        for a, b in zip(plain.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_rows_that_are_read_twice_are_another_way(graphs):
    """Which rows of a table are read decides how its gradients are kept."""

    class Ordered(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.arange(6))

        def forward(self, ids):
            x = self.table(ids) + self.positions(self.order)
            return self.norm(x + self.inner(x).tanh()) @ self.table.weight.mT

    plain, replayed = pair(build=Ordered)
    some = batches(4)
    step = graphed_step(replayed, some[0])
    compare(plain, replayed, step, some[:2])
    assert not graphs.without
    for unlearner in (plain, replayed):
        unlearner.model.order //= 2
    compare(plain, replayed, step, some[2:])
    assert len(graphs.without) == 2 and len(graphs) == 1


def test_numbers_that_decided_the_way_have_to_be_the_same():
    script, seen = Script(), []
    script.deferred = [(torch.ones(2), seen.append, None), (torch.ones(1), seen.append, [1.0])]
    script.again = lambda reads: reads.flush()
    script.replay()
    assert seen == [[1.0, 1.0]]
    script.deferred[1] = (torch.zeros(1), seen.append, [1.0])
    with pytest.raises(Differs):
        script.replay()
