"""The probe: its numbers against explicit gradients and closed forms, the models that it takes, and refusals."""

import copy
import math

import pytest
import torch
from probing import first, quick
from torch import nn
from torch.nn import functional as F
from unlearners import classifier, sgd

import projgrad
from projgrad import projectors
from projgrad.methods.probe.cost import peak_bytes
from projgrad.methods.probe.step_length import ROUNDING, UNBOUNDED, Limit, largest_rate

F64 = torch.float64
pytestmark = pytest.mark.same_without_extension
NORM = nn.BatchNorm1d(5)


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


def test_a_step_of_the_probed_setting_is_the_probed_step():
    model, forget, retain = classifier()
    row = quick(model, forget, first(retain), sizes=[6], scopes=["global"]).rows[0]
    record = projgrad.OrthoGrad(model, sgd(model), alpha=0.0).step(forget, retain)
    for name in ("rank", "preserved_norm", "residual"):
        assert getattr(row, name) == getattr(record, name)


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
