"""OrthoGrad steps against the formula written out, and what it refuses."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlearners import N, classifier, flat_parameters

import projgrad
from projgrad import projectors
from projgrad.methods.common import trainable_parameters


def _written_out(model, forget, retain, per_tensor=False):
    """u, u_perp and the mean retain gradient, as flat vectors."""
    params = list(model.parameters())
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    u = flat(torch.autograd.grad(forget(), params))
    G = torch.stack([flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in retain()])
    sizes = [p.numel() for p in params] if per_tensor else [len(u)]
    parts = zip(u.split(sizes), G.split(sizes, 1), strict=True)
    return u, torch.cat([projectors.lstsq(a, b) for a, b in parts]), G.mean(0)


@pytest.mark.parametrize("ascend", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_the_update_is_the_formula_written_out(scope, alpha, ascend):
    model, forget, retain = classifier()
    before = flat_parameters(model)
    u, u_perp, mean = _written_out(model, forget, retain, scope == "per_tensor")
    unlearner = projgrad.OrthoGrad(
        model, torch.optim.SGD(model.parameters(), lr=0.1), alpha, scope=scope, ascend=ascend
    )
    record = unlearner.step(forget, retain)
    update = alpha * mean + (1 if ascend is False else -1) * (1 - alpha) * u_perp
    torch.testing.assert_close(flat_parameters(model), before - 0.1 * update, rtol=1e-9, atol=1e-12)
    preserved = float(u_perp.norm() / u.norm()) if alpha < 1 else 1.0  # with alpha = 1 there is nothing to project
    assert record.preserved_norm == pytest.approx(preserved, rel=1e-9)
    assert record.residual < 1e-12 and record.seconds > 0
    if scope == "global":
        assert record.rank == N and record.tensors == {}
    else:
        assert list(record.tensors) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert record.tensors["2.bias"].rank == 2  # softmax: the three entries of a bias gradient sum to zero
        assert record.rank == sum(tensor.rank for tensor in record.tensors.values())


def test_first_order_effect_is_forgetting_only():
    """A small projected step changes no retain loss to first order, and raises the forget loss."""
    model, forget, retain = classifier()
    before, forget_before = retain().detach(), forget().detach()
    projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1e-5), alpha=0.0).step(forget, retain)
    raised = forget().detach() - forget_before
    assert raised > 0 and (retain().detach() - before).abs().max() < 1e-3 * raised


@pytest.mark.parametrize("projector", [projectors.qr, projectors.lstsq])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_reference_projectors_give_the_same_step(scope, projector):
    model, forget, retain = classifier()
    twin = copy.deepcopy(model)
    records = []
    for some, kwargs in ((model, {}), (twin, {"projector": projector})):
        unlearner = projgrad.OrthoGrad(some, torch.optim.SGD(some.parameters(), lr=0.1), scope=scope, **kwargs)
        records.append(unlearner.step(functools.partial(forget, some), functools.partial(retain, some)))
    if scope == "global" or projector is projectors.lstsq:
        torch.testing.assert_close(flat_parameters(twin), flat_parameters(model), rtol=1e-9, atol=1e-11)
        assert records[1].preserved_norm == pytest.approx(records[0].preserved_norm, rel=1e-9)
    assert records[1].rank is None and records[0].rank is not None


def test_qr_removes_too_much_where_gradients_repeat():
    """Why the reference projector is not the default: it has no rank test."""
    u, G = torch.randn(60), torch.randn(5, 60)
    G[3], G[4] = G[0], 0
    truth = projectors.lstsq(u, G)
    assert (projgrad.project_out(u, G) - truth).norm() < 1e-5 * truth.norm()
    assert projectors.qr(u, G).norm() < (1 - 1e-3) * truth.norm()


def test_per_tensor_qr_is_qr_of_every_tensor():
    u, G = torch.randn(40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    found = projectors.qr_per_tensor(u, G, [25, 15])
    torch.testing.assert_close(found[:25], projgrad.project_out(u[:25], G[:, :25]))
    torch.testing.assert_close(found[25:], projgrad.project_out(u[25:], G[:, 25:]))


def test_keeping_output_gradients_changes_nothing():
    model, forget, retain = classifier()
    state = copy.deepcopy(model.state_dict())
    results = []
    for some in ({}, {"keep_output_gradients": True}, {"projector": projgrad.project_out}):
        model.load_state_dict(state)
        projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), **some).step(forget, retain)
        results.append(flat_parameters(model))
    for some in results[1:]:
        torch.testing.assert_close(some, results[0], rtol=1e-11, atol=1e-13)


def test_fitted_and_duplicated_samples():
    """Half of the retain samples repeat each other or have no gradient at all: float32, residual at rounding level."""
    model, forget, retain = classifier(torch.float32)
    losses = lambda: torch.cat([retain(), 3 * retain()[:2], 0 * retain()[:2]])  # noqa: E731
    record = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1)).step(forget, losses)
    assert record.rank == N and record.residual <= 1e-6


def test_frozen_and_foreign_parameters_are_left_alone():
    model, forget, retain = classifier()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight, model[2].weight], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    unlearner = projgrad.OrthoGrad(model, optimizer)
    unlearner.step(forget, retain)
    assert list(trainable_parameters(model, unlearner.optimizer)) == ["0.weight", "2.weight"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["0.weight", "2.weight"] and model[2].bias.grad is None


def test_unused_parameters_get_no_gradient():
    """A zero gradient would let AdamW decay them; plain training does not."""
    model, *_ = classifier()
    head = nn.Linear(7, 2).double()
    model.add_module("unused", head)
    body = lambda x: model[2](model[1](model[0](x)))  # noqa: E731
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))
    before = head.weight.detach().clone()
    projgrad.OrthoGrad(model, torch.optim.AdamW(model.parameters(), lr=0.1)).step(
        lambda: F.cross_entropy(body(-x), y), lambda: F.cross_entropy(body(x), y, reduction="none")
    )
    assert head.weight.grad is None and torch.equal(head.weight, before)


def test_nearly_parallel_retain_gradients_in_float64():
    model, forget, _ = classifier()
    x = torch.randn(1, 5, dtype=torch.float64) + 1e-4 * torch.randn(30, 5, dtype=torch.float64)
    for scope in ("global", "per_tensor"):
        unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.0), scope=scope)
        retain = lambda: F.cross_entropy(model(x), torch.arange(30) % 3, reduction="none")  # noqa: E731
        assert unlearner.step(forget, retain).residual <= 1e-6


def test_an_optimizer_that_fails_leaves_no_gradient():
    class Fails(torch.optim.SGD):
        def step(self):
            raise OSError("out of luck")

    model, forget, retain = classifier()
    with pytest.raises(OSError, match="luck"):
        projgrad.OrthoGrad(model, Fails(model.parameters())).step(forget, retain)
    assert all(p.grad is None for p in model.parameters())


def test_a_stale_gradient_moves_nothing():
    """Frozen parameters, and those of other models in the same optimizer, stay where they are."""
    model, forget, retain = classifier()
    other = nn.Parameter(torch.ones(2, dtype=torch.float64))
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD([*model.parameters(), other], lr=0.1))
    model[0].weight.requires_grad_(False)
    model[0].weight.grad, other.grad = torch.ones_like(model[0].weight), torch.ones_like(other)
    before = model[0].weight.clone()
    unlearner.step(forget, retain)
    assert torch.equal(model[0].weight, before) and other.eq(1).all()
    model[0].weight.requires_grad_(True)
    unlearner.step(forget, retain)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_no_valid_step_is_refused(scope):
    """One retain sample, or a few nearly equal ones, in float32 and float64."""
    for seed in range(60):
        torch.manual_seed(seed)
        dtype, n = (torch.float32, torch.float64)[seed % 2], 1 + seed % 3
        model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 2)).to(dtype)
        x, y = torch.randn(1, 6, dtype=dtype) + 1e-4 * torch.randn(n, 6, dtype=dtype), torch.randint(2, (n,))
        retain = lambda x=x, y=y, model=model: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
        forget = lambda x=x, y=y, model=model: F.cross_entropy(model(x + 1e-3), y)  # noqa: E731
        unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), scope=scope)
        record = unlearner.step(forget, retain)
        parts = record.tensors.values() if record.tensors else [record]
        assert all(part.residual <= 4e-6 or part.residual * part.preserved_norm <= 1e-11 for part in parts)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten())
    ids, y = torch.tensor([[0], [1]]), torch.tensor([0, 1])
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"sparse=True.*use sparse=False"):
        unlearner.step(lambda: F.cross_entropy(model(ids), y), lambda: F.cross_entropy(model(ids), y, reduction="none"))


def test_max_norm_clips_the_whole_update():
    model, forget, retain = classifier()
    before = flat_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    projgrad.OrthoGrad(model, optimizer, max_norm=0.01).step(forget, retain)
    assert float((flat_parameters(model) - before).norm()) == pytest.approx(0.01, rel=1e-4)


def _poisoned(closure, value):
    return lambda: closure() * value


BAD_STEPS = {
    "forget_vector": (lambda f, r: (r, r), ValueError, r"forget\(\) must return one scalar loss; got \(6,\)"),
    "retain_scalar": (lambda f, r: (f, f), ValueError, r"one loss per sample is needed, shape \(n,\); got \(\)"),
    "retain_nothing": (lambda f, r: (f, lambda: r()[:0]), ValueError, "there are no losses"),
    "forget_constant": (lambda f, r: (lambda: f().detach(), r), ValueError, "do(es)? not depend on any trainable"),
    "retain_constant": (lambda f, r: (f, lambda: r().detach()), ValueError, "do not depend on any parameter"),
    "forget_nan": (lambda f, r: (_poisoned(f, float("nan")), r), FloatingPointError, "forget loss is nan"),
    "retain_inf": (
        lambda f, r: (f, _poisoned(r, torch.tensor([1, 1, float("inf"), 1, 1, 1]))),
        FloatingPointError,
        r"NaN or Inf in the losses of samples \[2\]",
    ),
    "forget_gradient_nan": (
        lambda f, r: (lambda: f() + (f() * 0).sqrt(), r),
        FloatingPointError,
        "NaN or Inf in the gradient to project",
    ),
    "retain_gradient_nan": (
        lambda f, r: (f, lambda: r() + (r() * 0).sqrt()),
        FloatingPointError,
        "NaN or Inf in the gradient at linear",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_refused_step_changes_nothing(name):
    closures, error, message = BAD_STEPS[name]
    model, forget, retain = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    unlearner = projgrad.OrthoGrad(model, optimizer)
    unlearner.step(forget, retain)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        unlearner.step(*closures(forget, retain))
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())  # nothing that a later optimizer.step() would apply


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(7), nn.BatchNorm1d(7, track_running_stats=False).eval()])
def test_batch_statistics_are_refused(norm):
    model = nn.Sequential(nn.Linear(5, 7), norm, nn.Linear(7, 3))
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    with pytest.raises(ValueError, match=r"1 is a BatchNorm1d that uses batch statistics.*model\.eval\(\)"):
        unlearner.step(lambda: F.cross_entropy(model(x), y), lambda: F.cross_entropy(model(x), y, reduction="none"))


@pytest.mark.parametrize("keep", [False, True])
def test_a_misread_layer_is_noticed(monkeypatch, keep):
    """The check compares what the rules say with what autograd does, and names the parameter."""
    model, forget, retain = classifier()
    from projgrad.rules.rule import Rows

    chunk = Rows.chunk
    monkeypatch.setattr(Rows, "chunk", lambda *args: 1.1 * chunk(*args))
    before = flat_parameters(model)
    unlearner = projgrad.OrthoGrad(
        model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.0, keep_output_gradients=keep
    )
    with pytest.raises(ArithmeticError, match=r"plain autograd disagree.*in .\.bias"):
        unlearner.step(forget, retain)
    assert torch.equal(flat_parameters(model), before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"alpha": 1.5}, r"alpha .* in \[0, 1\]; got 1.5"),
        ({"scope": "layer"}, "scope must be 'global' or 'per_tensor'; got 'layer'"),
        ({"projector": projgrad.projectors.qr, "rtol": 0.0}, "projector .* cannot be used with rtol"),
        (
            {"projector": projgrad.projectors.qr, "damping": 0.1, "scaler": torch.amp.GradScaler("cpu")},
            "projector .* cannot be used with damping, scaler",
        ),
    ],
)
def test_bad_options_of_orthograd_are_refused(kwargs, message):
    model, _, _ = classifier()
    with pytest.raises(ValueError, match=message):
        projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)


def test_optimizer_of_another_model():
    model, _, _ = classifier()
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        projgrad.OrthoGrad(model, torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1))


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_nan_in_a_tensor_that_only_forgetting_uses(scope):
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    x, optimizer = torch.randn(4, 5), torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="gradient to project"):
        projgrad.OrthoGrad(model, optimizer, scope=scope).step(
            lambda: model[0](x).sum() + (model[1](x).sum() * 0).sqrt(), lambda: model[0](x).square().sum(1)
        )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
