"""FeasibleUpdates on small models against the formula written out, composed with other methods, and what it refuses."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from pretend import Gpu, Pretend, to_device, values
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.ops.t_test import quantile

N = 12


def setup(dtype=torch.float64, n=N):
    """A model, closures of its losses, and others of more retain samples."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, more, xf = (torch.randn(k, 5).to(dtype) for k in (n, n, 4))
    y, yf = x[:, :3].argmax(1), torch.randint(3, (4,))
    forget = lambda: F.cross_entropy(model(xf), yf)  # noqa: E731
    retain = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    check = lambda: F.cross_entropy(model(more), more[:, :3].argmax(1), reduction="none")  # noqa: E731
    return model, forget, retain, check


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(model, forget, losses):
    """u of an ascent, and G (n, p)."""
    params = list(model.parameters())
    u = -flat(torch.autograd.grad(forget(), params))
    return u, torch.stack([flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses()])


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


@pytest.mark.parametrize("ascend", [True, False])
@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.Adam(model.parameters(), lr=0.1)])
def test_a_step_is_the_masked_step_of_the_optimizer(make, ascend):
    """The change of the same optimizer without a mask, masked; and the record, with gradients at the weights before."""
    model, forget, retain, _ = setup()
    u, G = gradients(model, forget, retain)
    u = u if ascend else -u
    before = flat(model.parameters())
    twin = copy.deepcopy(model)
    plain = make(twin)
    for p, g in zip(twin.parameters(), u.split([p.numel() for p in twin.parameters()]), strict=True):
        p.grad = g.view_as(p)
    plain.step()
    d = flat(twin.parameters()) - before
    upper = d * G.mean(0) + quantile(0.2, N - 1) * d.abs() * G.std(0) / math.sqrt(N)
    expected = torch.where((d * u <= 0) & (upper <= 0), d, 0)
    optimizer = make(model)
    record = projgrad.FeasibleUpdates(model, optimizer, delta=0.2, ascend=ascend).step(forget, retain)
    change = flat(model.parameters()) - before
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-15)
    assert 0 < (expected != 0).sum() < len(d) / 2
    products = G @ expected
    assert record.kept == pytest.approx(float((expected != 0).sum() / (d != 0).sum()))
    assert record.preserved_norm == pytest.approx(float(expected.norm() / d.norm()))
    assert record.forget_change == pytest.approx(float(u @ expected)) and record.forget_change < 0
    assert record.retain_change == pytest.approx(float(products.mean())) and record.retain_change < 0
    assert record.retain_error == pytest.approx(float(products.std() / math.sqrt(N)))
    assert record.level == 0.2 and record.seconds > 0 and record.method is None
    states = [[v for s in o.state_dict()["state"].values() for v in s.values()] for o in (optimizer, plain)]
    torch.testing.assert_close(*states)  # the optimizer saw the gradient unmasked
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_aggregate_test_keeps_most_of_a_step_that_helps_both(dtype):
    """What helps both moves almost as a whole, and the record is what the testing half says of it."""
    model, _, retain, check = setup(dtype, 64)
    help_ = lambda: check().mean()  # noqa: E731
    _, G = gradients(model, help_, retain)
    before = flat(model.parameters())
    record = projgrad.FeasibleUpdates(model, sgd(model), test="aggregate", ascend=False).step(help_, retain)
    change = (flat(model.parameters()) - before).double()
    eps = torch.finfo(dtype).eps
    assert 0.5 < record.kept <= 1 and record.forget_change < 0
    products = (G.double() @ change)[1::2]
    room = 8 * eps * float((G.double().abs() @ (change.abs() + before.double().abs()))[1::2].mean())
    assert record.retain_change == pytest.approx(float(products.mean()), abs=room)
    assert record.retain_error == pytest.approx(float(products.std() / math.sqrt(32)), abs=room)
    assert record.retain_change + quantile(0.05, 31) * record.retain_error <= 0


@pytest.mark.parametrize("test", ["coordinate", "aggregate"])
def test_nothing_feasible_moves_nothing(test):
    """Forgetting what is to be retained: to first order every helpful coordinate harms."""
    model, _, retain, _ = setup()
    before = copy.deepcopy(model.state_dict())
    feasible = projgrad.FeasibleUpdates(model, sgd(model), delta=0.01, test=test)
    record = feasible.step(lambda: retain().mean(), retain)
    if test == "aggregate":
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert record.kept == record.preserved_norm == record.forget_change == record.retain_change == 0
    assert record.kept <= 0.01 + 3 * 0.1 / math.sqrt(sum(p.numel() for p in model.parameters()))


def test_check_replaces_the_retain_samples():
    """With an optimizer the test is all that retain losses are for."""
    model, forget, retain, check = setup()
    twin_model, records = copy.deepcopy(model.state_dict()), []
    for closures in ((check,), (retain, check), (lambda: pytest.fail("not asked for"), check), (retain,)):
        model.load_state_dict(twin_model)
        records.append(projgrad.FeasibleUpdates(model, sgd(model), delta=0.3).step(forget, *closures))
    assert records[0].retain_change == records[1].retain_change == records[2].retain_change != records[3].retain_change


METHODS = {
    "orthograd": lambda model: projgrad.OrthoGrad(model, sgd(model), alpha=0.0),
    "adam": lambda model: projgrad.OrthoGrad(model, torch.optim.Adam(model.parameters(), lr=0.01), alpha=0.3),
}


@pytest.mark.parametrize("test", ["coordinate", "aggregate"])
@pytest.mark.parametrize("name", METHODS)
def test_the_step_of_orthograd_is_masked_coordinate_by_coordinate(name, test):
    model, forget, retain, check = setup(n=40)
    state, before = copy.deepcopy(model.state_dict()), flat(model.parameters())
    record = projgrad.FeasibleUpdates(model, METHODS[name](model), delta=0.4, test=test).step(forget, retain, check)
    moved = flat(model.parameters()) - before
    model.load_state_dict(state)
    u, G = gradients(model, forget, check)
    again = METHODS[name](model).step(forget, retain)
    proposed = flat(model.parameters()) - before
    assert record.method.rank == again.rank and (((moved - proposed).abs() <= 1e-14) | (moved == 0)).all()
    assert (moved * u <= 0).all() and (G[1::2] if test == "aggregate" else G).mean(0) @ moved <= 0
    assert moved.any() or test == "aggregate"


class Stub:
    """A method with step(forget) alone."""

    def __init__(self, model, optimizer, change=1.0):
        self.model, self.optimizer, self.change, self.seen = model, optimizer, change, []

    def step(self, forget):
        self.seen.append(forget)
        with torch.no_grad():
            for p in self.model.parameters():
                p += self.change
        return "its record"


def test_a_method_that_only_forgets():
    model, forget, retain, _ = setup()
    before = flat(model.parameters())
    stub = Stub(model, sgd(model))
    record = projgrad.FeasibleUpdates(model, stub, delta=0.3).step(forget, retain)
    moved = flat(model.parameters()) - before
    assert record.method == "its record" and stub.seen == [forget]
    assert 0 < record.kept < 1 and ((moved == 0) | ((moved - 1).abs() < 1e-14)).all()


def test_the_step_of_pgu_is_masked_and_keeps_frozen_weights():
    model, forget, retain, _ = setup()
    x = torch.randn(50, 5, dtype=torch.float64)
    pgu = projgrad.PGU(model, sgd(model), gamma=0.6).fit([x])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    M = {name: basis.M[0] for name, basis in pgu.bases.items()}
    record = projgrad.FeasibleUpdates(model, pgu, delta=0.4).step(forget, retain)
    after = dict(model.named_parameters())
    assert 0 < record.kept < 1 and record.method.rank > 0 and record.retain_change < 0
    assert all(torch.equal(after[name], before[name]) for name in before if name not in M)  # biases are frozen
    masked = {name: after[name].detach() - before[name] for name in M}
    model.load_state_dict(before)
    pgu.step(forget)
    for name, basis in M.items():
        proposed = after[name].detach() - before[name]
        assert ((masked[name] == 0) | ((masked[name] - proposed).abs() <= 1e-14)).all()
        assert (proposed @ basis).norm() <= 1e-12


def test_frozen_unused_and_foreign_parameters():
    model, *_ = setup()
    model[0].bias.requires_grad_(False)
    model.add_module("unused", nn.Linear(2, 2).double())
    whole = lambda x: model[2](model[1](model[0](x)))  # noqa: E731
    x, other = torch.randn(N, 5, dtype=torch.float64), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([*model.parameters(), other], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    record = projgrad.FeasibleUpdates(model, optimizer, delta=0.5).step(
        lambda: whole(-x).square().mean(), lambda: whole(x).square().mean(1)
    )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert record.kept > 0 and changed <= {"0.weight", "2.weight", "2.bias"} and other.eq(1).all()


def test_checkpoints_recompute_with_the_weights_before_the_proposal():
    """What is computed again after the proposal is computed with the weights before it."""
    from torch.utils.checkpoint import checkpoint

    records = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(1)
        model, _, _, _ = setup()
        x, y = torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % 3
        losses = lambda run=run, model=model, x=x, y=y: F.cross_entropy(run(model, x), y, reduction="none")  # noqa: E731
        step = projgrad.FeasibleUpdates(model, sgd(model), delta=0.3).step
        records.append(step(lambda losses=losses: losses()[:3].sum(), losses))
    assert records[0].retain_change == pytest.approx(records[1].retain_change, rel=1e-12)
    assert records[0].retain_change < 0


@pytest.mark.parametrize("kind", ["linear", "loop", "convolution"])
def test_weighted_moments_are_those_of_the_single_gradients(kind):
    """Σ w g and Σ (w g)² of the tape, which the split of the samples rests on."""
    layers = {
        "linear": lambda: nn.Linear(6, 4),
        "loop": lambda: nn.Linear(6, 4),
        "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Flatten()),
    }
    model, x, w = layers[kind]().double(), torch.randn(7, 6).double(), torch.tensor([1, 0, 1, 0, 2, -1, 0]).double()
    warned = pytest.warns(UserWarning, match="no rule") if kind == "loop" else nullcontext()

    def closure():
        if kind == "loop":
            return torch.cdist(x, model.weight).square().sum(1) + model.bias.sum() * x[:, 0]
        return model(x).square().sum(1)

    with warned:
        with projgrad.per_sample(model) as tape:
            losses = closure()
        first, second = tape.moments(losses, w)
    params = dict(model.named_parameters())
    for name, p in params.items():
        rows = torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in closure()])
        rows = rows * w.view(-1, *[1] * p.ndim)
        torch.testing.assert_close(first[name], rows.sum(0))
        torch.testing.assert_close(second[name], rows.square().sum(0))


BAD = {
    "forget_vector": (lambda f, r: (r, r), ValueError, r"forget\(\) must return one scalar loss; got \(12,\)"),
    "retain_scalar": (lambda f, r: (f, f), ValueError, r"one loss per sample is needed, shape \(n,\); got \(\)"),
    "few": (lambda f, r: (f, lambda: r()[:1]), ValueError, "at least 2 retain losses; got 1"),
    "check_scalar": (lambda f, r: (f, r, f), ValueError, "one loss per sample is needed"),
    "forget_constant": (lambda f, r: (lambda: f().detach(), r), ValueError, "does not depend on any trainable"),
    "forget_nan": (lambda f, r: (lambda: f() * math.nan, r), FloatingPointError, "forget loss is nan"),
    "retain_inf": (lambda f, r: (f, lambda: r() * math.inf), FloatingPointError, "NaN or Inf in the losses"),
    "forget_gradient": (lambda f, r: (lambda: f() + (0 * f()).sqrt(), r), FloatingPointError, "forget gradient, at 0"),
    "retain_gradient": (lambda f, r: (f, lambda: r() + (r() * 0).sqrt()), FloatingPointError, "NaN or Inf in the"),
    "retain_large": (lambda f, r: (f, lambda: r() * 1e155), FloatingPointError, "NaN or Inf in the"),
}


@pytest.mark.parametrize("test", ["coordinate", "aggregate"])
@pytest.mark.parametrize("name", BAD)
def test_a_refused_step_changes_nothing(name, test):
    closures, error, message = BAD[name]
    least = "at least 2" if test == "coordinate" else "at least 4"
    model, forget, retain, _ = setup()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    feasible = projgrad.FeasibleUpdates(model, optimizer, test=test)
    feasible.step(forget, retain)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message.replace("at least 2", least)):
        feasible.step(*closures(forget, retain))
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_squares_beyond_float32_raise_and_change_nothing():
    """Each gradient is finite, and so is their sum."""
    model, forget, retain, _ = setup(torch.float32)
    scale = torch.ones(())
    feasible = projgrad.FeasibleUpdates(model, sgd(model))
    feasible.step(forget, lambda: retain() * scale)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"sums of the retain gradients or their squares, at 0\.weight"):
        feasible.step(forget, lambda: retain() * (scale * 1e25))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda model: Failing(model.parameters(), lr=0.1), RuntimeError, "out of luck"),
        (lambda model: Stub(model, sgd(model), math.inf), FloatingPointError, "the optimizer proposes, at 0.weight"),
    ],
)
def test_an_optimizer_that_fails_leaves_the_parameters(make, error, message):
    model, forget, retain, _ = setup()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        projgrad.FeasibleUpdates(model, make(model)).step(forget, retain)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("test", ["coordinate", "aggregate"])
def test_a_feasible_step_on_a_gpu_is_the_step_on_the_cpu(test):
    """On a pretend GPU, with OrthoGrad inside: the same step as on the CPU."""
    model, *_ = setup(torch.float32, 32)
    state = copy.deepcopy(model.state_dict())
    x, xf = torch.randn(32, 5), torch.randn(4, 5)

    def step(model, x, xf):
        inner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1))
        feasible = projgrad.FeasibleUpdates(model, inner, delta=0.4, test=test)
        feasible.step(lambda: model(xf).square().mean(), lambda: model(x).logsumexp(1))
        return {name: p.detach() for name, p in model.named_parameters()}

    expected = step(model, x, xf)
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    with Gpu():
        found = values(step(to_device(twin), Pretend(x), Pretend(xf)))
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-6)


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    with pytest.raises(ValueError, match=r"BatchNorm1d that uses batch statistics"):
        projgrad.FeasibleUpdates(model, sgd(model)).step(lambda: model(torch.randn(4, 5)).sum(), lambda: None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda model: (sgd(model), {"delta": 0.0}), r"delta .* in \(0, 0.5\]; got 0.0"),
        (lambda model: (sgd(model), {"delta": 0.7}), "delta .* got 0.7"),
        (lambda model: (sgd(model), {"test": "all"}), "test must be 'coordinate' or 'aggregate'; got 'all'"),
        (lambda model: (model, {}), "Sequential has no step, model, optimizer"),
        (lambda model: (Stub(nn.Linear(1, 1), sgd(model)), {}), "the Stub was made for another model"),
        (lambda model: (torch.optim.SGD([torch.ones(1, requires_grad=True)]), {}), "holds no parameter of the model"),
        (lambda model: (projgrad.OrthoGrad(model, sgd(model), ascend=False), {}), "OrthoGrad has ascend=False"),
        (lambda model: (projgrad.OrthoGrad(model, sgd(model)), {"ascend": False}), "OrthoGrad has ascend=True"),
    ],
)
def test_bad_options_of_feasible_updates_are_refused(make, message):
    model = setup()[0]
    optimizer, options = make(model)
    with pytest.raises(ValueError, match=message):
        projgrad.FeasibleUpdates(model, optimizer, **options)
