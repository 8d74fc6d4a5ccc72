"""The tape in float32 and below: autocast, gradient scaling, degenerate and vanishing samples, dropout, checkpoints."""

import copy

import oracle
import pytest
import torch
from steps import ERROR, MODES, check, close, mixed, mlp, project, record, trained, truth, wide
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo.case import to_ramp

import projgrad

pytestmark = pytest.mark.usefixtures("float64")


def test_dropout_is_the_same_in_both_backward_passes():
    model, x = mlp(nn.Dropout(0.5), nn.Tanh()).train(), torch.randn(5, 8)
    tape, losses = record(model, lambda: to_ramp(model(x)))
    G = truth(model, losses)
    close(tape.gram(losses), oracle.gram(G))
    u = {name: torch.randn_like(p) for name, p in trained(model).items()}
    for name, p in trained(model).items():
        p.grad = u[name].clone()
    tape.project_(losses, keep_output_gradients=False)  # two backward passes of one graph
    for name, value in oracle.project(u, G, "global").items():
        torch.testing.assert_close(trained(model)[name].grad, value, rtol=0, atol=ERROR)


def test_checkpointed_layers_are_exact():
    model, x = mlp(nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.0)), torch.randn(5, 8)
    check(model, lambda: to_ramp(model[3:](checkpoint(model[:3], x, use_reentrant=False))))


def cosine(G, result):
    """max_j |cos(g_j, result)| in float64, samples without gradient left out."""
    G, result = oracle.matrix(G), torch.cat([g.double().flatten() for g in result.values()])
    G = G[G.norm(dim=1) > 0]
    return float((G @ result / G.norm(dim=1) / result.norm()).abs().max())


def _classifier(dtype, n=8):
    torch.set_default_dtype(dtype)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 8))
    x, y = torch.randn(n, 32), torch.randint(8, (n,))
    return model, lambda: F.cross_entropy(model(x).float(), y, reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_leaves_its_own_rounding_and_no_more(mode, dtype):
    model, closure = _classifier(torch.float32)

    def cast():
        with torch.autocast("cpu", dtype):
            return closure()

    eps = torch.finfo(dtype).eps
    G = truth(model, cast())
    tape, losses = record(model, cast)
    close(tape.gram(losses), oracle.gram(G), 8 * eps)
    _, result, _ = project(model, cast, **MODES[mode])
    assert cosine(G, result) <= 2 * eps


@pytest.mark.parametrize("mode", MODES)
def test_a_model_in_bfloat16_reports_its_rounding(mode):
    model, closure = _classifier(torch.bfloat16)
    G = truth(model, closure())
    shares = torch.randn(8) @ oracle.matrix(G).to(torch.bfloat16)  # most of u lies in the span
    u = dict(zip(G, shares.split([p.numel() for p in model.parameters()]), strict=True))
    u = {name: (g / shares.norm() + 0.01 * torch.randn_like(g)).view(G[name].shape[1:]) for name, g in u.items()}
    _, result, done = project(model, closure, u, **MODES[mode])
    assert all(g.isfinite().all() for g in result.values())
    assert done.residual > 1e-3
    if mode != "per_tensor":
        assert cosine(G, result) <= 2 * done.residual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("half", ["duplicated", "fitted", "nearly_fitted"])
def test_degenerate_retain_samples_in_float32(half, mode):
    model, closure = _classifier(torch.float32, 16)
    factor = {"fitted": 0.0, "nearly_fitted": 1e-6}

    def changed():
        other = 3 * closure()[:8] if half == "duplicated" else factor[half] * closure()[8:]
        return torch.cat([closure()[:8], other])

    G = truth(model, changed())
    _, result, done = project(model, changed, **MODES[mode])
    assert done.residual <= 1e-6
    names = [[name] for name in G] if mode == "per_tensor" else [list(G)]
    for some in names:
        alone = {name: result[name] for name in some}
        if torch.cat([g.flatten() for g in alone.values()]).norm() > 1e-3:
            assert cosine({name: G[name] for name in some}, alone) <= 1e-6, some


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-42])
def test_vanishing_gradients_in_float32(size, count, mode):
    """Of some samples or of all."""
    model, closure = _classifier(torch.float32)
    sizes = torch.ones(8).index_fill(0, torch.arange(count), size)
    _, result, done = project(model, lambda: closure() * sizes, **MODES[mode])
    assert all(g.isfinite().all() for g in result.values())
    assert 0 <= done.residual < 1e-5 and done.preserved_norm > 0


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_vanishing_gradients_do_not_overflow(mode):
    """Well-fitted samples have gradients of 1e-36 and less: ⟨u, g⟩ / ‖g‖² is then beyond float32."""
    model, closure = _classifier(torch.float32)
    sizes = torch.logspace(0, -41, 8, dtype=torch.float32)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.0), **MODES[mode])
    record = unlearner.step(lambda: 1e4 * closure().mean(), lambda: closure() * sizes)
    assert record.residual <= 1e-6 and record.preserved_norm > 0


@pytest.mark.parametrize("mode", MODES)
def test_vanishing_gradients_stay_out_of_refinement(mode, monkeypatch):
    """Those that are too small to count must not come back in its later rounds."""
    monkeypatch.setattr("projgrad.tape.project.RESIDUAL", 1e-12)  # refine whatever comes out
    monkeypatch.setattr("projgrad.ops.refinement.starts_in_float64", lambda n, dtype, rtol: True)
    model = nn.Linear(64, 8, dtype=torch.float32)
    x = (torch.randn(64) + torch.logspace(0, -7, 24)[:, None] * torch.randn(24, 64)).float()
    sizes = torch.ones(24, dtype=torch.float32).index_fill(0, torch.arange(0, 24, 3), 1e-33)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.0), **MODES[mode])
    record = unlearner.step(lambda: model(x.roll(1, 1)).square().mean(), lambda: model(x).square().sum(1) * sizes)
    assert record.refinements and 0 < record.preserved_norm < 1


def _scaled_steps(scaler):
    model, closure = _classifier(torch.float32)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    return model, unlearner, closure


@pytest.mark.parametrize("keep", [False, True])
def test_gradient_scaler_changes_nothing(keep):
    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**14)):
        torch.manual_seed(0)
        model, unlearner, closure = _scaled_steps(scaler)
        unlearner.keep_output_gradients = keep
        for _ in range(2):
            assert not unlearner.step(lambda c=closure: c().mean(), closure).skipped
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["forget", "retain"])
def test_gradient_scaler_skips_overflow(where):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    model, unlearner, closure = _scaled_steps(scaler)
    before = copy.deepcopy(model.state_dict())
    huge = lambda: closure() * 1e20  # noqa: E731
    forget, retain = (huge, closure) if where == "forget" else (closure, huge)
    assert unlearner.step(lambda: forget().mean(), retain).skipped
    assert scaler.get_scale() == 2.0**99
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [mixed, wide])
def test_every_step_is_the_formula_whatever_came_before(build, mode):
    """Every step is the formula, whatever was learnt in the steps before."""
    model, x = build()
    closure = lambda: to_ramp(model(x))  # noqa: E731
    forget = lambda: to_ramp(model(x.flip(-1))).square().mean()  # noqa: E731
    params = trained(model)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.01), alpha=0.3, **MODES[mode])
    for _ in range(4):
        G = truth(model, closure())
        u = dict(zip(params, torch.autograd.grad(forget(), params.values()), strict=True))
        expected = oracle.project(u, G, MODES[mode].get("scope", "global"))
        before = {name: p.detach().clone() for name, p in params.items()}
        unlearner.step(forget, closure)
        for name, p in params.items():
            update = 0.3 * G[name].mean(0) - 0.7 * expected[name]
            torch.testing.assert_close(
                p.detach(), before[name] - 0.01 * update, rtol=0, atol=1e-10 * (1 + u[name].norm())
            )


@pytest.mark.parametrize("mode", ["kept", "two_passes"])
def test_a_refinement_does_not_use_factors_of_the_gradient_before_it(mode):
    """The second step knows the forget gradient as factors, which its first correction makes stale."""
    torch.set_default_dtype(torch.float32)
    model, x = wide()
    forgotten = x[:2] + 1e-3 * torch.randn(2, 128)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1.0), alpha=0.0, **MODES[mode])
    before, changes = copy.deepcopy(model.state_dict()), []
    for _ in range(2):
        record = unlearner.step(lambda: to_ramp(model(forgotten)).sum(), lambda: to_ramp(model(x)))
        assert record.refinements and record.residual < 1e-6
        changes.append({name: p.detach() - before[name] for name, p in trained(model).items()})
        model.load_state_dict(before)
    for name, change in changes[0].items():
        assert (changes[1][name] - change).norm() <= 1e-3 * change.norm()
