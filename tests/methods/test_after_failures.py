"""What a failed step must not leave behind for the next one."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from unlearners import flat_parameters

import projgrad
from projgrad.methods import closures

pytestmark = pytest.mark.same_without_extension


def problem(make, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    x, xf = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    y, yf = torch.randint(3, (6,)), torch.randint(3, (4,))
    optimizer = make(model.parameters())
    forget = lambda: cross_entropy(model(xf), yf)  # noqa: E731
    retain = lambda: cross_entropy(model(x), y, reduction="none")  # noqa: E731
    return model, optimizer, projgrad.OrthoGrad(model, optimizer, alpha=0.3, **options), (forget, retain)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def refuse(*_):
    raise KeyError("refused")


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("where", ["clipping", "stepping"])
def test_a_scaler_is_ready_for_the_step_after_one_that_failed(where, metric, monkeypatch):
    found = []
    for fails in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        model, optimizer, unlearner, closures = problem(adamw, scaler=scaler, max_norm=1.0, metric=metric)
        unlearner.step(*closures)
        if fails:
            with monkeypatch.context() as patch, pytest.raises(KeyError):
                hook = optimizer.register_step_pre_hook(refuse) if where == "stepping" else None
                if where == "clipping":
                    patch.setattr(torch.nn.utils, "clip_grad_norm_", refuse)
                unlearner.step(*closures)
            if hook is not None:
                hook.remove()
        unlearner.step(*closures)
        found.append((flat_parameters(model), scaler.state_dict()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("how", ["loaded", "another group"])
def test_settings_that_come_between_backward_and_the_step_count(how):
    found = []
    for replaced in (False, True):
        model, optimizer, unlearner, closures = problem(adamw, metric="optimizer")
        unlearner.step(*closures)
        unlearner.backward(*closures)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lr"] = 1e-3
        if not replaced:
            optimizer.param_groups[0]["lr"] = 1e-3
        elif how == "loaded":
            optimizer.load_state_dict(saved)
        else:
            optimizer.param_groups[0] = optimizer.param_groups[0] | {"lr": 1e-3}
        optimizer.step()
        found.append(flat_parameters(model))
    assert torch.equal(*found)


def test_steps_between_a_checkpoint_and_the_first_of_ours_let_the_forget_momentum_decay():
    found = []
    for resumed in (False, True):
        model, optimizer, unlearner, (forget, retain) = problem(adamw, metric="optimizer")
        unlearner.step(forget, retain)
        if resumed:
            saved = optimizer.state_dict()
            optimizer = adamw(model.parameters())
            optimizer.load_state_dict(saved)
            unlearner = projgrad.OrthoGrad(model, optimizer, alpha=0.3, metric="optimizer")
        optimizer.zero_grad()
        retain().mean().backward()
        optimizer.step()
        unlearner.step(forget, retain)
        found.append(flat_parameters(model))
    assert torch.equal(*found)


def test_a_step_that_is_taken_again_counts_as_it_is_taken_then():
    """A hook refuses the first one, and gradients are clipped before the second."""
    found = []
    for fails in (False, True):
        model, optimizer, unlearner, closures = problem(adamw, metric="optimizer")
        unlearner.step(*closures)
        unlearner.backward(*closures)
        if fails:
            hook = optimizer.register_step_pre_hook(refuse)
            with pytest.raises(KeyError):
                optimizer.step()
            hook.remove()
        for p in model.parameters():
            p.grad.mul_(0.125)
        optimizer.step()
        found.append(flat_parameters(model))
    assert torch.equal(*found)


def test_factors_of_a_forget_gradient_do_not_outlive_a_failed_step():
    _, _, unlearner, (forget, retain) = problem(sgd)
    unlearner._factors_help = True
    with pytest.raises(KeyError):
        unlearner.step(forget, refuse)
    unlearner._forget({"a": forget, "b": forget}, unlearner_closures(unlearner, forget, retain))
    assert not unlearner._factors


def unlearner_closures(unlearner, forget, retain):
    return closures.Closures(unlearner.model, unlearner.optimizer, a=forget, b=forget, retain=retain)


def test_an_interrupt_where_a_closure_begins_does_not_lock_the_parameters(monkeypatch):
    """All later steps were refused as if they were made inside that closure."""
    model, _, unlearner, given = problem(sgd)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(closures, "_last_operation", refuse)
        unlearner.step(*given)
    before = flat_parameters(model)
    unlearner.step(*given)
    assert not closures._running and not torch.equal(flat_parameters(model), before)
