"""`OrthoGrad.backward`: the update in `.grad`, and steps that somebody else takes."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlearners import flat_parameters

import projgrad

pytestmark = pytest.mark.same_without_extension
AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
MAKE = {
    "sgd": lambda params: SGD(params, lr=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda params: AdamW(params, lr=1e-2),
    "fused": lambda params: AdamW(params, lr=1e-2, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-2),
}


class Twins:
    """Two copies of a model, with an optimizer and an unlearner each, and the same batches."""

    def __init__(self, make="adamw", dtype=torch.float64, pieces=1, scalers=(None, None), twin_options=None, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
        self.models = [model, copy.deepcopy(model)]
        self.optimizers = [MAKE[make](model.parameters()) for model in self.models]
        twins = zip(self.models, self.optimizers, scalers, (options, options | (twin_options or {})), strict=True)
        self.unlearners = [projgrad.OrthoGrad(m, o, 0.3, scaler=s, **given) for m, o, s, given in twins]
        self.pieces, self.dtype = pieces, dtype

    def closures(self, k, step=0):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator).to(self.dtype), torch.randint(4, (16,), generator=generator)
        model = self.models[k]
        retain = projgrad.micro_batches(
            lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
            zip(x[:8].chunk(self.pieces), y[:8].chunk(self.pieces), strict=True),
        )
        return (lambda: F.cross_entropy(model(x[8:]), y[8:])), retain if self.pieces > 1 else retain[0]

    def weights(self, k=1):
        return flat_parameters(self.models[k])


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("make", list(MAKE))
def test_backward_and_a_step_of_the_optimizer_are_a_step(make, pieces, scope, metric):
    twins = Twins(make, pieces=pieces, scope=scope, metric=metric)
    for k in range(3):
        wanted = twins.unlearners[0].step(*twins.closures(0, k))
        record = twins.unlearners[1].backward(*twins.closures(1, k))
        twins.optimizers[1].step()
        torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)
        for name in ("rank", "refinements", "forget_loss", "retain_loss", "micro_batches", "iterations"):
            assert getattr(record, name) == getattr(wanted, name)
        assert record.preserved_norm == pytest.approx(wanted.preserved_norm) and not record.skipped
        assert record.residual <= 1e-4 if pieces > 1 else 1e-10
        assert record.seconds > 0 and record.tensors.keys() == wanted.tensors.keys()


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_clipping_in_between_is_max_norm(pieces, metric):
    twins = Twins(pieces=pieces, metric=metric, max_norm=0.05, twin_options={"max_norm": None})
    for k in range(3):
        wanted = twins.unlearners[0].step(*twins.closures(0, k))
        record = twins.unlearners[1].backward(*twins.closures(1, k))
        norm = nn.utils.clip_grad_norm_(twins.models[1].parameters(), 0.05)
        assert norm > 0.05
        twins.optimizers[1].step()
        torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-9, atol=1e-11)
        assert record.preserved_norm == pytest.approx(wanted.preserved_norm, rel=1e-6)


def test_the_record_is_complete_after_the_step():
    twins = Twins(metric="optimizer")
    record = twins.unlearners[1].backward(*twins.closures(1))
    assert record.residual != record.residual and record.rank is None and record.forget_loss > 0
    twins.optimizers[1].step()
    assert record.residual < 1e-10 and record.rank == 8


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
def test_a_scaler_of_the_loop(metric):
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    twins = Twins(scalers=scalers, metric=metric)
    for k in range(2):
        twins.unlearners[0].step(*twins.closures(0, k))
        twins.unlearners[1].backward(*twins.closures(1, k))
        assert flat_parameters_grad(twins.models[1]).norm() > 50  # scaled
        scalers[1].unscale_(twins.optimizers[1])
        scalers[1].step(twins.optimizers[1])
        scalers[1].update()
        torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
def test_a_scaler_skips_what_is_infinite_and_the_next_step_is_right(metric):
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    twins = Twins(scalers=scalers, metric=metric)
    before = twins.weights()
    forget, retain = twins.closures(1)
    record = twins.unlearners[1].backward(lambda: forget() * float("inf"), retain)
    assert record.skipped
    scalers[1].step(twins.optimizers[1])
    scalers[1].update()
    assert torch.equal(twins.weights(), before)
    scalers[0].scale(torch.zeros(1))  # which makes its state
    scalers[0].update(scalers[1].get_scale())
    twins.unlearners[0].step(*twins.closures(0))
    twins.unlearners[1].backward(*twins.closures(1))
    scalers[1].unscale_(twins.optimizers[1])
    scalers[1].step(twins.optimizers[1])
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-9, atol=1e-11)


def test_a_fused_optimizer_that_unscales_by_itself_is_told_what_to_do():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    twins = Twins("fused", torch.float32, scalers=(None, scaler), metric="optimizer")
    before = twins.weights()
    twins.unlearners[1].backward(*twins.closures(1))
    with pytest.raises(ValueError, match="unscale_"):
        scaler.step(twins.optimizers[1])
    assert torch.equal(twins.weights(), before)


def flat_parameters_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def double_one(model):
    next(model.parameters()).grad.mul_(2)


def turn_all(model):
    for p in model.parameters():
        p.grad.neg_()


def drop_one(model):
    next(model.parameters()).grad = None


def zero_one(model):
    next(model.parameters()).grad.zero_()


@pytest.mark.parametrize("change", [double_one, drop_one, zero_one, turn_all])
def test_another_gradient_than_backward_wrote_is_refused_and_nothing_changes(change):
    twins = Twins(metric="optimizer")
    twins.unlearners[1].backward(*twins.closures(1))
    before = twins.weights()
    change(twins.models[1])
    with pytest.raises(ValueError, match="times one positive factor"):
        twins.optimizers[1].step()
    assert torch.equal(twins.weights(), before) and not twins.optimizers[1].state
    for k in range(2):  # and the next one is right
        twins.unlearners[0].step(*twins.closures(0, k))
        twins.unlearners[1].backward(*twins.closures(1, k))
        twins.optimizers[1].step()
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("again", ["backward", "step"])
def test_only_the_last_gradient_before_a_step_is_corrected(again):
    twins = Twins(metric="optimizer")
    twins.unlearners[1].backward(*twins.closures(1, 5))
    twins.optimizers[1].zero_grad()
    getattr(twins.unlearners[1], again)(*twins.closures(1, 0))
    if again == "backward":
        twins.optimizers[1].step()
    twins.unlearners[0].step(*twins.closures(0, 0))
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)
    for twin in (0, 1):  # a plain step of the loop is left alone
        twins.optimizers[twin].zero_grad()
        twins.closures(twin, 1)[0]().backward()
        twins.optimizers[twin].step()
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)


def test_schedulers_and_hooks_of_the_loop_are_left_alone():
    twins = Twins(metric="optimizer")
    seen = []
    for optimizer in twins.optimizers:
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 3) for optimizer in twins.optimizers]
    for k in range(3):
        twins.unlearners[0].step(*twins.closures(0, k))
        twins.unlearners[1].backward(*twins.closures(1, k))
        twins.optimizers[1].step()
        for scheduler in schedulers:
            scheduler.step()
    assert len(seen) == 6
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)


def test_what_was_accumulated_is_dropped_and_an_error_leaves_nothing():
    twins = Twins()
    twins.closures(1, 3)[0]().backward()
    twins.unlearners[1].backward(*twins.closures(1))
    twins.optimizers[1].step()
    twins.unlearners[0].step(*twins.closures(0))
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)
    with pytest.raises(ZeroDivisionError):
        twins.unlearners[1].backward(twins.closures(1)[0], lambda: 1 / 0)
    assert all(p.grad is None for p in twins.models[1].parameters())


def test_max_norm_is_for_step_alone():
    with pytest.raises(ValueError, match="max_norm clips in step"):
        Twins(max_norm=1.0).unlearners[1].backward(*Twins().closures(1))


def test_the_metric_needs_an_optimizer_with_hooks():
    class Bare:
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 0.1}]

        def zero_grad(self, set_to_none=True):
            pass

        def step(self):
            pass

        def diagonal(self, param, state, group):
            return torch.full_like(param, 0.1)

    model = nn.Linear(6, 4)
    unlearner = projgrad.OrthoGrad(model, Bare(model.parameters()), metric="optimizer")
    with pytest.raises(ValueError, match="register_step_pre_hook"):
        unlearner.backward(lambda: model(torch.ones(1, 6)).sum(), lambda: model(torch.ones(2, 6)).sum(1))


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("when", ["step", "backward"])
def test_hooks_that_clip_are_seen(when, pieces):
    twins = Twins(pieces=pieces, metric="optimizer", max_norm=0.05, twin_options={"max_norm": None})

    def clip(*_):
        nn.utils.clip_grad_norm_(twins.models[1].parameters(), 0.05)

    twins.optimizers[1].register_step_pre_hook(clip)
    for k in range(3):
        twins.unlearners[0].step(*twins.closures(0, k))
        getattr(twins.unlearners[1], when)(*twins.closures(1, k))
        if when == "backward":
            twins.optimizers[1].step()
        torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-9, atol=1e-11)


def test_a_hook_that_changes_elements_is_refused_in_step_too():
    twins = Twins(metric="optimizer")
    twins.optimizers[1].register_step_pre_hook(lambda *_: double_one(twins.models[1]))
    before = twins.weights()
    with pytest.raises(ValueError, match="times one positive factor"):
        twins.unlearners[1].step(*twins.closures(1))
    assert torch.equal(twins.weights(), before)


@pytest.mark.parametrize("then", ["plain", "another", "metric of gradient", "baseline"])
def test_a_gradient_that_was_given_up_is_not_corrected(then):
    twins = Twins(metric="optimizer")
    twins.unlearners[1].backward(*twins.closures(1, 5))
    for k in (0, 1):
        optimizer, model = twins.optimizers[k], twins.models[k]
        told = pytest.warns(UserWarning, match="not corrected") if k and then != "another" else nullcontext()
        if then == "plain":
            optimizer.zero_grad()
            twins.closures(k)[0]().backward()
            with told:
                optimizer.step()
        elif then == "baseline":
            with told:
                projgrad.baselines.NegGradPlus(model, optimizer).step(*twins.closures(k))
        else:
            metric = "optimizer" if then == "another" else "gradient"
            with told:
                projgrad.OrthoGrad(model, optimizer, 0.3, metric=metric).step(*twins.closures(k))
    torch.testing.assert_close(twins.weights(0), twins.weights(1), rtol=1e-12, atol=1e-14)
    assert not hasattr(twins.optimizers[1], "stop_correction")


def test_a_step_with_a_closure_is_refused():
    twins = Twins(metric="optimizer")
    before = twins.weights()
    twins.unlearners[1].backward(*twins.closures(1))
    with pytest.raises(ValueError, match=r"give optimizer\.step no closure"):
        twins.optimizers[1].step(lambda: None)
    assert torch.equal(twins.weights(), before)
    with pytest.raises(RuntimeError, match=r"inside optimizer\.step"):
        twins.optimizers[1].step(lambda: twins.unlearners[1].backward(*twins.closures(1)) and None)


def test_weights_that_change_in_between_are_refused():
    twins = Twins(metric="optimizer")
    twins.unlearners[1].backward(*twins.closures(1))
    with torch.no_grad():
        next(twins.models[1].parameters()).mul_(1.1)
    with pytest.raises(ValueError, match="weights were changed"):
        twins.optimizers[1].step()


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
def test_two_backward_calls_without_a_step_warn(metric, recwarn):
    twins = Twins(metric=metric)
    for k in range(3):
        twins.unlearners[1].backward(*twins.closures(1, k))
        twins.optimizers[1].step()
    twins.unlearners[1].backward(*twins.closures(1))
    twins.optimizers[1].zero_grad()
    twins.unlearners[1].backward(*twins.closures(1))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="lists of closures"):
        twins.unlearners[1].backward(*twins.closures(1))


def saved(unlearner):
    file = io.BytesIO()
    torch.save(unlearner, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_copy_steps_as_the_original_and_leaves_it_alone(copied, metric, pending, pieces):
    """A copy made before the optimizer's step called off the correction of that step, which is the original's."""
    twins = Twins(pieces=pieces, metric=metric)
    twins.unlearners[0].step(*twins.closures(0))
    if pending:
        twins.unlearners[0].backward(*twins.closures(0, 1))
    twin = copied(twins.unlearners[0])
    twins.models[1], twins.optimizers[1] = twin.model, twin.optimizer
    if pending:
        twin.step(*twins.closures(1, 1))
        twins.optimizers[0].step()
        assert torch.equal(twins.weights(0), twins.weights(1))
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):  # in which what was forgotten decays
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for k, unlearner in enumerate((twins.unlearners[0], twin)):
        unlearner.step(*twins.closures(k, 2))
    assert torch.equal(twins.weights(0), twins.weights(1))
