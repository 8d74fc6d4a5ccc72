"""The probe: its numbers against explicit gradients and closed forms, its advice, and that it changes nothing."""

import copy
import dataclasses
import functools
import json
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlearners import classifier, sgd

import projgrad
from projgrad import projectors
from projgrad.methods.probe.cost import peak_bytes
from projgrad.methods.probe.report import ProbeRow
from projgrad.methods.probe.step_length import FORGETTING, NOTHING, ROUNDING, UNBOUNDED, Limit, largest_rate
from projgrad.methods.probe.unchanged import Unchanged

F64 = torch.float64
pytestmark = pytest.mark.same_without_extension
NORM = nn.BatchNorm1d(5)
quick = functools.partial(projgrad.probe, rounds=1)


def first(losses):
    """Of a retain closure make a function of n."""
    return lambda n: losses()[:n]


# The numbers


@pytest.mark.parametrize("ascend", [True, False])
def test_the_rows_are_those_of_explicit_gradients(ascend):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y, xf, yf = (
        torch.randn(12, 5, dtype=F64),
        torch.arange(12) % 3,
        torch.randn(4, 5, dtype=F64),
        torch.arange(4) % 3,
    )
    forget = lambda: F.cross_entropy(model(xf), yf)  # noqa: E731
    retain = lambda n: F.cross_entropy(model(x[:n]), y[:n], reduction="none")  # noqa: E731
    probed = quick(model, forget, retain, sizes=(8, 3), ascend=ascend)
    params = list(model.parameters())
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])  # noqa: E731
    u, G = flat(forget()), torch.stack([flat(loss) for loss in retain(8)])
    assert [(row.scope, row.samples) for row in probed.rows] == [
        (scope, n) for n in (3, 8) for scope in ("global", "per_tensor")
    ]
    for row in probed.rows:
        n, sizes = row.samples, [p.numel() for p in params] if row.scope == "per_tensor" else [len(u)]
        parts = list(zip(u.split(sizes), G[:n].split(sizes, 1), strict=True))
        u_perp = torch.cat([projectors.lstsq(a, b) for a, b in parts])
        assert row.rank == sum(int(torch.linalg.matrix_rank(b, rtol=1e-12)) for _, b in parts)
        assert row.preserved_norm == pytest.approx(float(u_perp.norm() / u.norm()), rel=1e-9) and row.residual < 1e-12
        if n == 8:
            assert row.spill is None
            continue
        spill = (G[n:] @ u_perp).abs().mean() / u_perp.square().sum() / ((G[n:] @ u).abs().mean() / u.square().sum())
        assert row.spill == pytest.approx(float(spill), rel=1e-6)
        # what the rate promises, at that rate: α = 0.5 halves the forgetting part
        step = ((1 if ascend else -1) * 0.5 * row.learning_rate * u_perp).detach()
        before, start = retain(n).detach(), copy.deepcopy(model.state_dict())
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params) + step, params)
        changed, gain = (retain(n) - before).abs().mean(), 0.5 * row.learning_rate * u_perp.square().sum()
        assert float(changed / gain) == pytest.approx(0.1, rel=0.051) and row.step_length == pytest.approx(
            float(step.norm())
        )
        moved = float(forget())
        model.load_state_dict(start)
        assert row.forget_change == pytest.approx((moved - float(forget())) * (1 if ascend else -1))
    assert probed.plain_change == pytest.approx(float((G @ u).abs().mean() / u.square().sum()))
    assert probed.forget_loss == pytest.approx(float(forget())) and probed.parameters == len(u)
    assert probed.retain_loss == pytest.approx(float(retain(8).mean()))


class Quadratic(nn.Module):
    """Losses Σ_k c_jk w_k² / 2 of sample j, a row c; two weights, so that they can have rates of their own."""

    def __init__(self, p):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(p, dtype=F64)) for _ in range(2))

    def forward(self, c):
        return sum(
            (c_part.sqrt() * w).square().sum(1) / 2 for c_part, w in zip(c.chunk(2, 1), (self.a, self.b), strict=True)
        )


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.05)], ids=str)
def test_the_learning_rate_of_a_quadratic_is_the_closed_form(rates):
    model, n, p = Quadratic(6), 4, 6
    c, direction = torch.rand(n, 2 * p, dtype=F64), torch.randn(2 * p, dtype=F64)
    forget = lambda: (torch.cat([model.a, model.b]) * direction).sum()  # noqa: E731
    optimizer = torch.optim.SGD([{"params": [w], "lr": r} for w, r in zip((model.a, model.b), rates, strict=True)])
    probed = quick(
        model,
        forget,
        lambda n: model(c[:n]),
        sizes=[n],
        scopes=["global"],
        optimizer=optimizer,
        alpha=0.2,
        tolerance=0.03,
    )
    (row,) = probed.rows
    w, relative = torch.cat([model.a, model.b]).detach(), torch.tensor(rates, dtype=F64).repeat_interleave(p) / 0.1
    root = relative.sqrt()
    u_perp = projectors.lstsq(root * direction, root * c * w) / root  # orthogonal after the rates
    slope, step = (relative * u_perp.square()).sum(), relative * u_perp
    second = (c * step.square()).sum(1).mean() / 2
    assert row.learning_rate == pytest.approx(float(0.03 * slope / second) / 0.8, rel=1e-6)
    assert row.step_length == pytest.approx(float(0.03 * slope / second * step.norm()), rel=1e-6)
    assert row.forget_change == pytest.approx(float(0.03 * slope**2 / second), rel=1e-6)
    assert row.why == "" and row.rank == n


def test_a_model_without_second_order_has_no_limit():
    """Losses of (x·w - y)²: a step orthogonal to all x_j changes none of them, however long it is."""
    model, x, y = nn.Linear(9, 1).double(), torch.randn(4, 9, dtype=F64), torch.randn(4, dtype=F64)
    probed = quick(
        model,
        lambda: model(-x.flip(1)).sum(),
        lambda n: (model(x[:n])[:, 0] - y[:n]).square(),
        sizes=[4],
        scopes="global",
    )
    assert [(row.learning_rate, row.why) for row in probed.rows] == [(None, UNBOUNDED)]
    assert "none" in str(probed)


def test_rates_are_found_in_two_trials_of_a_quadratic_and_some_more_otherwise():
    tried = []

    def change(rate, power=2, noise=0.0):
        tried.append(rate)
        return 3.0 * rate**power + noise

    def search(change, start):
        """Where a change is a tenth of a gain of 2 per rate."""
        return largest_rate(lambda rate: change(rate) / (0.2 * rate), start, smallest=1e-12, largest=1e9)

    assert search(change, start=50.0).rate == pytest.approx(0.2 / 3) and len(tried) <= 3
    assert search(lambda r: change(r, 3), start=1.0).rate == pytest.approx((0.2 / 3) ** 0.5, rel=0.05)
    assert search(lambda r: change(r, 1.5), start=1e-6).rate == pytest.approx((0.2 / 3) ** 2, rel=0.11)
    tried.clear()
    edge = search(lambda r: math.nan if r > 7 else 1e-3 * change(r, 0), start=1.0)  # overflows beyond
    assert 6.6 < edge.rate <= 7 and len(tried) < 30
    assert search(lambda r: 0.0, start=1.0) == Limit(None, UNBOUNDED)
    assert search(lambda r: change(r, 1), start=1.0) == Limit(None, ROUNDING)


def test_memory_is_what_the_allocator_gave():
    def call():
        a = torch.zeros(1 << 18)  # 1 MiB
        b = torch.zeros(1 << 19)
        del a
        return torch.zeros(1 << 17), b

    assert peak_bytes(call, torch.device("cpu")) in range(3 << 20, (3 << 20) + 4096)
    with torch.autograd.profiler.profile():
        assert peak_bytes(call, torch.device("cpu")) is None


# The advice


def test_samples_that_touch_other_weights_need_no_protection():
    model = nn.Linear(8, 1, bias=False).double()
    x = torch.eye(8, dtype=F64)
    probed = quick(model, lambda: model(x[6:]).sum(), lambda n: model(x[:6][:n])[:, 0].square(), sizes=(2, 6))
    assert all(row.preserved_norm == 1 for row in probed.rows) and probed.plain_change == 0
    assert probed.verdict == "nothing to protect" and "Nothing to protect" in str(probed)


def test_forgetting_a_protected_sample_is_said_to_be_in_vain():
    model, x, y = nn.Linear(8, 3).double(), torch.randn(6, 8, dtype=F64), torch.arange(6) % 3
    losses = lambda n=6: F.cross_entropy(model(x[:n]), y[:n], reduction="none")  # noqa: E731
    probed = quick(model, lambda: losses()[0], losses, sizes=(2, 4), scopes=["per_tensor", "global"])
    assert all(row.preserved_norm < 1e-6 and row.why == NOTHING and row.learning_rate is None for row in probed.rows)
    assert probed.verdict == "forget among retain" and "lie among the protected ones" in str(probed)


def test_a_loss_without_gradient_is_said_to_be_forgotten():
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    probed = quick(model, lambda: 0 * model(x).sum(), lambda n: model(x[:n]).square().sum(1), sizes=[2])
    assert probed.verdict == "nothing to forget"


def test_samples_that_do_not_protect_others_are_too_few():
    """Where retain samples share nothing but the forget direction, protecting some does not help the others."""
    model, n = nn.Linear(65, 1, bias=False).double(), 32
    x = torch.cat([torch.ones(n, 1), 5 * torch.eye(n, 64)], 1).double()
    forget = torch.zeros(1, 65, dtype=F64)
    forget[0, 0] = 1
    look = functools.partial(quick, model, lambda: model(forget).sum(), sizes=(4, 20), scopes=["global"])
    probed = look(retain=lambda k: model(x[:k])[:, 0])
    assert probed.verdict == "not known" and "Add a larger one to sizes" in probed.advice
    probed = look(retain=lambda k: model(x[:k])[:, 0], sizes=(4, 16, 20))
    assert probed.verdict == "too few samples" and "with n = 16, retain samples that are not" in probed.advice
    assert "Take more of them" in probed.advice
    probed = look(retain=lambda k: model(x[:k])[:, 0], sizes=(16, 64))
    assert probed.verdict == "too few samples" and "There are only 32" in probed.advice
    assert "Take more" not in probed.advice
    assert probed.rows[0].spill == pytest.approx(1)  # g_j = (1, 5 e_j): what u_perp does to it is ‖u_perp‖², as u does
    forget[0, :32] = 1
    alike = torch.ones(n, 65, dtype=F64) + 0.1 * torch.randn(n, 65, dtype=F64)
    probed = look(retain=lambda k: model(alike[:k])[:, 0])
    assert probed.verdict == "worth it" and "and n = 20" in probed.advice and probed.rows[0].spill < 0.5
    probed = look(retain=lambda k: model(alike[:k])[:, 0], sizes=(2, 8))
    assert probed.verdict == "too few samples" and "from digits: with fewer than 16" in probed.advice


@pytest.mark.parametrize("sizes, said", [([20], "a larger one"), ([64], "a smaller one")])
def test_one_size_cannot_show_whether_others_are_protected(sizes, said):
    x = torch.ones(32, 65, dtype=F64) + 0.1 * torch.randn(32, 65, dtype=F64)
    model, target = nn.Linear(65, 1, bias=False).double(), torch.eye(65, dtype=F64)[:1]
    probed = quick(model, lambda: model(target).sum(), lambda n: model(x[:n])[:, 0], sizes=sizes, scopes="global")
    assert probed.verdict == "not known" and f"Add {said}" in probed.advice


def test_forget_samples_among_more_retain_samples_are_said_to_be_there():
    model, x, y = nn.Linear(60, 4).double(), torch.randn(80, 60, dtype=F64), torch.arange(80) % 4
    losses = lambda i: F.cross_entropy(model(x[i]), y[i], reduction="none")  # noqa: E731
    probed = quick(model, lambda: losses(slice(8)).mean(), lambda n: losses(slice(n)), scopes="global")
    assert probed.rows[0].preserved_norm > 0.3 and probed.rows[2].preserved_norm < 1e-6
    assert probed.verdict == "forget among retain" and "with n = 8 " in probed.advice


def test_retain_losses_at_their_minimum_need_no_protection_yet():
    model, x = nn.Linear(60, 4).double(), torch.randn(40, 60, dtype=F64)
    teacher = model(x).softmax(1).detach() + 1e-9 * torch.randn(40, 4, dtype=F64)
    retain = lambda n: F.kl_div(model(x[8:][:n]).log_softmax(1), teacher[8:][:n], reduction="none").sum(1)  # noqa: E731
    probed = quick(model, lambda: F.cross_entropy(model(x[:8]), torch.arange(8) % 4), retain, scopes="global")
    assert probed.plain_change < 1e-6 and probed.verdict == "nothing to protect"
    assert "distillation" in probed.advice


def test_a_rate_at_which_the_objective_gets_worse_is_not_advised():
    """Losses linear in the weights have no limit of their own; the objective ½ w² of a descent is half gained at 1."""
    model = nn.Linear(40, 1, bias=False).double()
    x = torch.cat([torch.ones(20, 1), 0.1 * torch.randn(20, 19), torch.zeros(20, 20)], 1).double()
    retain = lambda n: model(x[:n])[:, 0]  # noqa: E731
    probed = quick(
        model, lambda: model.weight.square().sum() / 2, retain, sizes=(4, 18, 20), scopes="global", ascend=False
    )
    for row in probed.rows:
        assert row.why == FORGETTING and row.learning_rate == pytest.approx(2, rel=0.06)  # η = 1 by half, as α = 0.5
        assert row.forget_change == pytest.approx(0.5 * row.step_length**2, rel=0.06)  # η = 1: the length is ‖u_perp‖
    assert probed.verdict == "worth it" and "gains less than half" in probed.advice
    assert "multiplies the retain part too (alpha=0.5)" in probed.advice
    probed = quick(model, lambda: model.weight.sum(), retain, sizes=(4, 18, 20), scopes="global", alpha=0)
    assert probed.verdict == "worth it" and "No learning rate was found to be too large" in probed.advice


def test_the_table_is_narrow_and_the_dictionary_is_json():
    model, forget, retain = classifier()
    probed = quick(model, forget, first(retain), sizes=(2, 6))
    assert max(map(len, str(probed).splitlines())) <= 100
    numbers = (1.2345e-5, 1.2345e-5, 1.2345e-5, "", 123.456, 1.2345, 123_456_789_012, 10_000_000_000)
    widest = ProbeRow("per_tensor", 256, 99999, 0.98765, 1.2345e-8, 0.98765, *numbers)
    rows = widest, dataclasses.replace(widest, why=ROUNDING, learning_rate=None, step_length=None, forget_change=None)
    wide = dataclasses.replace(probed, rows=rows, notes=("a " * 80,), parameters=10**12)
    assert max(map(len, str(wide).splitlines())) <= 100
    again = json.loads(json.dumps(probed.to_dict()))
    assert again["rows"][0]["rank"] == 2 and again["verdict"] == probed.verdict and len(again["rows"]) == 4
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in probed.rows)


# Nothing changes


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


@pytest.mark.parametrize("fails_at", [None, 1, 2, 5, 11, 17])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("a reason"), torch.OutOfMemoryError])
def test_nothing_changes_also_after_an_error(fails_at, error):
    if fails_at is None and error is not KeyboardInterrupt:
        return
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


# What it works with


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "adapter"])
def test_other_models(kind):
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = torch.randn(24, 6), torch.arange(24) % 3
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    if kind == "adapter":
        model.requires_grad_(False)
        A, B = nn.Linear(6, 2, bias=False), nn.Linear(2, 32, bias=False)
        nn.init.zeros_(B.weight)
        model.add_module("adapter", nn.Sequential(A, B))
        run = lambda x: model[2](model[1](model[0](x) + model.adapter(x)))  # noqa: E731
    else:
        run = model

    def losses(x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return F.cross_entropy(run(x), y, reduction="none")

    before = copy.deepcopy(model.state_dict())
    probed = quick(model, lambda: losses(-x[:8], y[:8]).mean(), lambda n: losses(x[:n], y[:n]), sizes=(4, 12, 24))
    assert [row.samples for row in probed.rows] == [4, 4, 12, 12, 24, 24]
    assert all(row.rank > 0 and row.preserved_norm <= 1.01 for row in probed.rows)
    assert any(row.learning_rate for row in probed.rows)
    assert probed.parameters == (76 if kind == "adapter" else 323)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_fewer_samples_and_too_little_memory_are_noted():
    model, forget, retain = classifier()
    probed = quick(model, forget, first(retain), sizes=(4, 64), scopes=["global"])
    assert [row.samples for row in probed.rows] == [4, 6]
    assert probed.notes == ("retain(64) returned 6 losses: there are no more",)
    calls = []

    def expensive(n):
        calls.append(n)
        if n == 6 and len(calls) > 20:
            raise torch.OutOfMemoryError("no more")
        return retain()[:n]

    probed = quick(model, forget, expensive, sizes=(2, 6), scopes=["global"])
    assert [row.samples for row in probed.rows] == [2] and probed.notes == ("the memory is too small for n = 6",)

    def impossible(n):
        if n == 6:
            raise torch.OutOfMemoryError("no more")
        return retain()[:n]

    probed = quick(model, forget, impossible, sizes=(2, 3, 6), scopes=["global"])
    assert [row.samples for row in probed.rows] == [2, 3] and len(probed.notes) == 1
    with pytest.raises(torch.OutOfMemoryError):
        quick(model, forget, impossible, sizes=[6])


def test_other_samples_for_every_n_are_noticed():
    model, forget, _ = classifier()
    x = torch.randn(64, 5, dtype=F64)
    probed = quick(model, forget, lambda n: model(x[n : 2 * n]).square().mean(1), sizes=(3, 8), scopes=["global"])
    assert probed.rows[0].spill is None and "retain(3) returned other losses than the first of retain(8)" in str(probed)


# Refusals


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"retain": lambda: None}, TypeError, r"retain must be a function of n .* does not take one argument"),
        ({"retain": torch.zeros(3)}, TypeError, r"retain must be a function of n .* got a Tensor"),
        ({"retain": nn.Linear(2, 2)}, TypeError, "retain must be a function of n .* got a Linear"),
        ({"retain": lambda n: torch.zeros(n)}, ValueError, "do not depend on any parameter"),
        ({"forget": [lambda: None]}, TypeError, "forget must be a function without arguments .* got a list"),
        ({"sizes": []}, ValueError, "at least one entry"),
        ({"sizes": 4}, TypeError, r"sizes must be several numbers .* such as \(4, 16\); got a int"),
        ({"retain": lambda n: next(iter([]))}, RuntimeError, "retain raised StopIteration"),
        ({"forget": lambda: next(iter([]))}, RuntimeError, "forget raised StopIteration"),
        ({"sizes": [0]}, ValueError, "must be an integer of at least 1; got 0"),
        ({"sizes": ["8"]}, TypeError, "must be an integer"),
        ({"scopes": ["all"]}, ValueError, "must be 'global' or 'per_tensor'; got 'all'"),
        ({"alpha": 1.0}, ValueError, r"must be in \[0, 1\); got 1.0"),
        ({"tolerance": 0}, ValueError, r"must be in \(0, 1\]"),
        ({"rounds": 0}, ValueError, "rounds must be an integer of at least 1"),
        ({"model": "m"}, TypeError, "model must be a torch.nn.Module"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, ValueError, "no parameter of the model requires a gradient"),
        ({"model": NORM, "forget": lambda: NORM(torch.randn(4, 5)).sum()}, ValueError, "uses batch statistics"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch optimizer"),
        ({"forget": lambda: torch.ones(2, requires_grad=True)}, ValueError, r"one scalar loss"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    model, forget, retain = classifier()
    given = {"model": model, "forget": forget, "retain": first(retain)} | options
    with pytest.raises(error, match=message):
        quick(**given)


def test_wrong_numbers_of_losses_are_refused():
    model, forget, retain = classifier()
    with pytest.raises(ValueError, match=r"retain\(2\) returned 6 losses"):
        quick(model, forget, lambda n: retain(), sizes=[2])
    with pytest.raises(ValueError, match=r"retain\(2\) returned 6 losses"):
        quick(model, forget, lambda n: retain(), sizes=[2, 6])
    with pytest.raises(ValueError, match="use reduction='none'"):
        quick(model, forget, lambda n: retain().mean())


def test_a_step_of_the_probed_setting_is_the_probed_step():
    model, forget, retain = classifier()
    row = quick(model, forget, first(retain), sizes=[6], scopes=["global"]).rows[0]
    record = projgrad.OrthoGrad(model, sgd(model), alpha=0.0).step(forget, retain)
    for name in ("rank", "preserved_norm", "residual"):
        assert getattr(row, name) == getattr(record, name)
