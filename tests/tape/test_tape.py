"""The tape beyond single models: the self-check, precision, properties of its products, memory."""

import copy
import gc
import weakref

import oracle
import pytest
import torch
from steps import ERROR, MODES, check, close, mixed, mlp, project, record, trained, truth
from torch import nn
from torch.nn import functional as F
from zoo.case import to_ramp

import projgrad
from projgrad.recording.functional import elementwise
from projgrad.rules import convolution, rule
from projgrad.rules.product import Product
from projgrad.rules.rule import Rows

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:no rule covers")]


@pytest.mark.parametrize("n", [1, 5])
def test_uses_that_no_loss_depends_on(n):
    model, x = mlp(), torch.randn(n, 8)

    def closure():
        model(x + 1).argmax(1)  # a metric
        return to_ramp(model(x))

    check(model, closure)


def test_the_last_step_of_a_bidirectional_layer_is_exact():
    """The backward direction's later steps reach no loss."""
    model = nn.ModuleList([nn.LSTM(8, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3)])
    x = torch.randn(4, 5, 8)
    check(model, lambda: to_ramp(model[1](model[0](x)[0][:, -1])))


@pytest.mark.parametrize("keep", [False, True])
def test_forget_gradient_in_fewer_entries_than_samples(keep):
    """What is orthogonal to n samples may lie in parameters that the forget loss does not touch."""
    model, x, y = mlp(), torch.randn(6, 8), torch.randint(3, (6,))
    closure = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    tape, losses = record(model, closure)
    model[2].bias.grad = torch.tensor([1.0, 2.0, -1.0])
    done = tape.project_(losses, keep_output_gradients=keep)
    u = {name: torch.zeros_like(p) for name, p in trained(model).items()} | {"2.bias": torch.tensor([1.0, 2.0, -1.0])}
    expected = oracle.project(u, truth(model, closure()), "global")
    assert done.preserved_norm > 0.1
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=ERROR)


def test_clusters_that_no_sample_uses():
    """Some tensors get no gradient from any sample, others from some; which ones changes from step to step."""
    model, x = nn.AdaptiveLogSoftmaxWithLoss(8, 12, [3, 7], 2.0), torch.randn(5, 8)
    for y in ([0, 1, 2, 1, 0], [0, 5, 2, 1, 9], [8, 8, 9, 10, 7], [4, 5, 6, 4, 4]):
        check(model, lambda y=y: -model(x, torch.tensor(y))[0])


@pytest.mark.parametrize("lengths", [[5, 5, 4, 5], [1, 3, 5, 2], [2, 5, 1, 1]])
def test_packed_sequences_of_any_lengths_are_exact(lengths):
    model = nn.ModuleList([nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True), nn.Linear(16, 3)])
    x = torch.randn(4, 5, 8)

    def closure():
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        return to_ramp(model[1](model[0](packed)[1][0].transpose(0, 1).flatten(1)))

    check(model, closure)


def test_a_weight_that_is_not_contiguous():
    model, x = mlp(), torch.randn(5, 3, 8)
    model[0].weight = nn.Parameter(torch.randn(8, 6).mT)
    w, b = model[0].weight, model[0].bias
    check(model, lambda: to_ramp(model[2](F.linear(x, w[:3], b[3:]).tanh() @ (w[3:] @ w.mT) + F.linear(x, w))))


@pytest.mark.parametrize("where", ["inside", "half", "outside"])
def test_what_is_computed_outside_is_found_by_a_loop(where):
    model, x = mlp(), torch.randn(5, 8)
    h = model[0](x)
    with projgrad.per_sample(model) as tape:
        if where == "inside":
            h = model[0](x)
        if where != "outside":
            losses = to_ramp(model[2](h.tanh()))
    if where == "outside":
        losses = to_ramp(model[2](h.tanh()))
    close(tape.gram(losses), oracle.gram(truth(model, to_ramp(model(x)))))


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_there_is_nothing_to_project(mode):
    """No gradient to project, or none to be orthogonal to: the result is what was there."""
    model, x = mlp(), torch.randn(5, 8)
    tape, losses = record(model, lambda: to_ramp(model(x)))
    assert tape.project_(losses, **MODES[mode]).preserved_norm == 1
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    u, found, done = project(model, lambda: 0 * to_ramp(model(x)), **MODES[mode])
    assert done.rank == 0 and done.preserved_norm == 1 and done.residual < 1e-15
    torch.testing.assert_close(found, u, rtol=0, atol=0)


# The self-check.


def _scaled(original):
    def wrong(*args):
        out = original(*args)
        return tuple(1.05 * t for t in out) if isinstance(out, tuple) else 1.05 * out

    return wrong


@pytest.mark.parametrize("use", ["gram", "dot", "moments", *MODES])
@pytest.mark.parametrize("kind, method, name", [(Rows, "chunk", r"[02]\.bias"), (Product, "gram", r"[02]\.weight")])
def test_a_misread_rule_is_noticed_every_time(monkeypatch, kind, method, name, use):
    model, x = mlp(), torch.randn(5, 8)
    monkeypatch.setattr(kind, method, _scaled(getattr(kind, method)))
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        tape, losses = record(model, lambda: to_ramp(model(x)))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with pytest.raises(ArithmeticError, match=f"plain autograd disagree.* in {name}"):
            if use in MODES:
                tape.project_(losses, **MODES[use])
            elif use == "dot":
                tape.dot(losses, [torch.randn_like(p) for p in model.parameters()])
            else:
                getattr(tape, use)(losses)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_misread_rule_leaves_no_gradient(monkeypatch, mode):
    """As `Tape.project_` promises for an ArithmeticError."""
    model, x = mlp(), torch.randn(5, 8)
    monkeypatch.setattr(Rows, "chunk", _scaled(Rows.chunk))
    tape, losses = record(model, lambda: to_ramp(model(x)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with pytest.raises(ArithmeticError):
        tape.project_(losses, **MODES[mode])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_misread_rule_is_noticed_later(monkeypatch, mode):
    """Once verified, plain autograd checks one tensor a step, or all of them together."""
    model, x = mlp(), torch.randn(5, 8)
    project(model, lambda: to_ramp(model(x)), **MODES[mode])
    monkeypatch.setattr(Rows, "chunk", _scaled(Rows.chunk))
    with pytest.raises(ArithmeticError, match=r"plain autograd disagree.* in [02]\.bias"):
        for _ in trained(model):
            project(model, lambda: to_ramp(model(x)), **MODES[mode])


# Properties.


def _gram(model, closure):
    tape, losses = record(model, closure)
    return tape.gram(losses)


def test_gram_follows_the_samples():
    """Permuted samples permute K, the halves of a batch are its blocks, a scaled loss scales its row and column."""
    model, ids = mixed()
    K = _gram(model, lambda: to_ramp(model(ids)))
    order, scale = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, 2.0, 0.5, -3.0])
    close(_gram(model, lambda: to_ramp(model(ids[order]))), K[order][:, order], 1e-12)
    close(_gram(model, lambda: to_ramp(model(ids[:2]))), K[:2, :2], 1e-12)
    close(_gram(model, lambda: to_ramp(model(ids[2:]))), K[2:, 2:], 1e-12)
    close(_gram(model, lambda: to_ramp(model(ids)) * scale), K * scale * scale[:, None], 1e-12)


def test_chunk_size_changes_nothing(monkeypatch):
    model, ids = mixed()
    K = _gram(model, lambda: to_ramp(model(ids)))
    for module in (rule, convolution, elementwise):
        monkeypatch.setattr(module, "chunk_bytes", lambda device: 64)
    close(_gram(model, lambda: to_ramp(model(ids))), K, 1e-12)
    check(model, lambda: to_ramp(model(ids)))


@pytest.mark.parametrize("mode", MODES)
def test_projecting_twice_is_projecting_once(mode):
    model, ids = mixed()
    u, once, _ = project(model, lambda: to_ramp(model(ids)), **MODES[mode])
    _, twice, done = project(model, lambda: to_ramp(model(ids)), once, **MODES[mode])
    for name in u:
        assert (twice[name] - once[name]).norm() <= ERROR * u[name].norm()
    assert done.preserved_norm == pytest.approx(1)


def test_frozen_and_unused_parameters():
    model, x = mlp(), torch.randn(5, 8)
    model[0].requires_grad_(False)
    model.add_module("unused", nn.Linear(2, 2))
    tape, losses = record(model, lambda: to_ramp(model[2](model[1](model[0](x)))))
    assert [site.name for site in tape.recording.sites] == ["linear"]
    sums = tape.combine(losses, torch.ones(5))
    assert list(sums) == ["2.weight", "2.bias", "unused.weight", "unused.bias"]
    first, second = tape.moments(losses)
    for found in (sums, first, second):
        assert not found["unused.weight"].any() and found["2.weight"].any()


# Memory.


@pytest.mark.parametrize("use", ["nothing", "gram", "moments", "error", *MODES])
def test_activations_and_the_tape_are_freed_without_garbage_collection(use):
    model, ids = mixed()
    alive = []
    model[4].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            tape, losses = record(model, lambda: to_ramp(model(ids)))
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if use == "error":
                model[7].bias.grad.fill_(float("nan"))
                with pytest.raises(FloatingPointError):
                    tape.project_(losses)
            elif use in MODES:
                tape.project_(losses, **MODES[use])
            elif use != "nothing":
                getattr(tape, use)(losses)
            alive.append(weakref.ref(tape))
            del tape, losses
            assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


# explain.


def test_explain_lists_every_parameter_with_its_route_and_bytes():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 128), nn.Tanh(), nn.Linear(128, 10)
    )
    x = torch.randn(16, 3, 8, 8)
    tape, losses = record(model, lambda: to_ramp(model(x)))
    table = tape.explain(losses)
    assert sorted(line.parameter for line in table) == sorted(trained(model))
    head, *lines = str(table).splitlines()
    assert head.split() == ["parameter", "use", "rule", "route", "predicted", "MB", "Mflop", "actual", "MB"]
    assert len(lines) == len(table) and lines[-1].split()[0] in trained(model)
    uses = {line.parameter: (line.use, line.rule) for line in table}
    assert uses["0.weight"] == ("conv2d", "convolution") and uses["3.weight"][0] == "linear"
    for line in table:
        assert line.flops > 0 and line.route in ("factors", "chunks")
        assert line.actual <= 2 * line.bytes + 1e6 and line.bytes <= 2 * line.actual + 1e6, line


@pytest.mark.parametrize("mode", MODES)
def test_autocast_around_the_projection_changes_nothing(mode):
    torch.set_default_dtype(torch.float32)
    model, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)), torch.randn(5, 3, 8)
    u, expected, _ = project(model, lambda: to_ramp(model(x)), **MODES[mode])

    def closure():
        with torch.autocast("cpu", enabled=False):
            return to_ramp(model(x))

    with torch.autocast("cpu", torch.bfloat16):
        _, found, _ = project(model, closure, u, **MODES[mode])
    for name in u:
        assert torch.equal(found[name], expected[name]), name


def test_losses_that_were_changed_in_place_are_looked_at_anew():
    model = nn.Linear(5, 3)
    with projgrad.per_sample(model) as tape:
        losses = model(torch.randn(4, 5)).square().sum(1)
    tape.gram(losses)
    losses -= losses.mean()
    with pytest.raises(ValueError, match="mixes samples"):
        tape.gram(losses)


def test_a_gradient_has_no_factors_where_another_operation_uses_the_weight_too():
    model = nn.Linear(64, 64, bias=False)
    x, lengths = torch.randn(2, 64), {}
    for used_twice in (False, True):
        with projgrad.per_sample(model) as tape:
            terms = [model(x).square().mean()] + [model.weight.square().mean()] * used_twice
            loss = torch.stack(terms).sum()
        model.weight.grad = None
        lengths[used_twice] = len(tape.accumulate_(loss, -1.0))
    assert lengths == {False: 1, True: 0}


def test_rows_of_a_table_picked_by_the_builtin_function():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    with projgrad.per_sample(model) as tape:
        losses = (x @ torch.embedding(model.weight, torch.arange(4))).square().sum(1)  # of ids known to be constant
    expected = [torch.autograd.grad(one, model.weight, retain_graph=True)[0] for one in losses]
    torch.testing.assert_close(tape.rows(losses)["weight"], torch.stack(expected))
