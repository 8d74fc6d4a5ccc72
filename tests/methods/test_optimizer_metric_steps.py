"""Steps under metric="optimizer": precision, resuming, scalers, other optimizers, and what is refused."""

import copy

import pytest
import torch
from metric_problems import SGD, AdamW, ascent, gradients, unlearner_of, wide
from subjects import Subject
from torch import nn
from torch.nn import functional as F
from torch.optim import Adagrad
from unlearners import classifier, flat_parameters

import projgrad
from projgrad.methods.optimizer_metric import MOMENTUM


@pytest.mark.parametrize("make", [AdamW, torch.optim.Adam, torch.optim.RMSprop, SGD], ids=lambda kind: kind.__name__)
def test_float32_leaves_a_cosine_below_1e_5(make):
    torch.manual_seed(0)
    model, forget, retain = wide(torch.float32)
    options = {"weight_decay": 0.0} if make is AdamW else {}
    unlearner = unlearner_of(model, make(model.parameters(), lr=1e-3, **options), alpha=0.0)
    cosine, _, record = ascent(unlearner, forget, retain)
    assert cosine <= 1e-5 and abs(cosine - record.residual) <= 1e-6
    plain = copy.deepcopy(model)
    projected = projgrad.OrthoGrad(plain, make(plain.parameters(), lr=1e-3, **options), alpha=0.0)
    assert projected.metric == "gradient"


def test_projecting_first_leaves_more_than_a_hundredth_with_adamw():
    torch.manual_seed(0)
    model, forget, retain = wide(torch.float64)
    cosine, *_ = ascent(
        projgrad.OrthoGrad(model, AdamW(model.parameters(), 1e-3, weight_decay=0.0), 0.0), forget, retain
    )
    assert cosine > 1e-2


@pytest.mark.parametrize("scale", [1e-20, 1e15, 0.0], ids=["tiny", "huge", "zero"])
def test_gradients_of_very_different_length_count_alike(scale):
    model, forget, losses = wide(torch.float32, torch.tensor([scale, *[1.0] * 7]))
    params = list(model.parameters())
    G = torch.stack([gradients(loss, params) for loss in losses()])
    before = flat_parameters(model).double()
    record = unlearner_of(model, AdamW(params, 1e-3, weight_decay=0.0), alpha=0.0).step(forget, losses)
    moved = flat_parameters(model).double() - before
    assert ((G @ moved).abs() <= 1e-5 * G.norm(dim=1) * moved.norm()).all()
    assert record.rank == 7 - (scale == 0)


def test_16_bit_parameters_leave_what_their_rounding_leaves():
    torch.manual_seed(0)
    model, forget, retain = wide(torch.bfloat16)
    cosine, moved, record = ascent(
        unlearner_of(model, AdamW(model.parameters(), 1e-2, weight_decay=0.0), 0.0), forget, retain
    )
    assert moved.norm() > 0 and cosine < 5e-2 and record.residual < 5e-2


def test_what_is_resumed_from_a_state_dict_has_the_same_bits():
    torch.manual_seed(0)
    model, forget, retain = classifier(torch.float32)
    optimizer = AdamW(model.parameters(), 1e-2)
    unlearner = unlearner_of(model, optimizer)
    for _ in range(2):
        unlearner.step(forget, retain)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert all(MOMENTUM in state for state in saved[1]["state"].values())
    unlearner.step(forget, retain)
    other, _, _ = classifier(torch.float32)
    again = AdamW(other.parameters(), 1e-2)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    unlearner_of(other, again).step(lambda: forget(other), lambda: retain(other))
    assert torch.equal(flat_parameters(other), flat_parameters(model))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(value, again.state[q][key]) for key, value in optimizer.state[p].items())


def test_the_steps_of_an_optimizer_that_cannot_remember_keep_no_state_of_ours():
    model, forget, retain = classifier()
    optimizer = SGD(model.parameters(), 0.1)
    unlearner_of(model, optimizer).step(forget, retain)
    assert not any(MOMENTUM in state for state in optimizer.state.values())


def test_sgd_applies_what_the_gradient_metric_applies():
    model, forget, retain = classifier()
    other = copy.deepcopy(model)
    unlearner_of(model, SGD(model.parameters(), 0.1)).step(forget, retain)
    projgrad.OrthoGrad(other, SGD(other.parameters(), 0.1), 0.3).step(lambda: forget(other), lambda: retain(other))
    torch.testing.assert_close(flat_parameters(model), flat_parameters(other), rtol=1e-10, atol=1e-12)


def test_momentum_brings_back_nothing():
    """After a step without a forget gradient the momentum of earlier ones moves on, orthogonally."""
    torch.manual_seed(1)
    model, forget, retain = wide(torch.float64)
    unlearner = unlearner_of(model, SGD(model.parameters(), 1e-2, momentum=0.9), 0.0)
    unlearner.step(forget, retain)
    cosine, moved, _ = ascent(unlearner, lambda: 0.0 * forget(), retain)
    assert cosine < 1e-10 and moved.norm() > 0


def test_a_group_with_a_learning_rate_of_zero_stays():
    model, forget, retain = classifier()
    first, *rest = model.parameters()
    optimizer = AdamW([{"params": [first], "lr": 0.0}, {"params": rest}], 1e-2, weight_decay=0.0)
    before = first.clone()
    cosine, *_ = ascent(unlearner_of(model, optimizer, 0.0), forget, retain)
    assert torch.equal(first, before) and cosine < 1e-10
    assert all(state.isfinite().all() for state in optimizer.state[first].values())


def test_parameters_that_only_one_loss_uses_are_updated_too():
    model, forget, retain = classifier()
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("extra", extra)
    forget_more = lambda: forget() + (extra**2).sum()  # noqa: E731
    for scope in ("global", "per_tensor"):
        before = extra.detach().clone()
        optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.0)
        record = unlearner_of(model, optimizer, scope=scope).step(forget_more, retain)
        assert (extra > before).all() and record.residual < 1e-10


@pytest.mark.parametrize("options", [{}, {"lr_decay": 0.5, "initial_accumulator_value": 1e-4}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_forgetting_part_of_adagrad(options, foreach):
    model, forget, retain = classifier()
    params = list(model.parameters())
    unlearner = unlearner_of(model, Adagrad(params, 0.01, foreach=foreach, **options), 0.3)
    for step in range(3):
        G, before = torch.stack([gradients(loss, params) for loss in retain()]), flat_parameters(model)
        r = 0.3 * G.mean(0) + options.get("weight_decay", 0.0) * before
        u = -0.7 * gradients(forget(), params)
        record = unlearner.step(forget, retain)
        root = torch.cat([unlearner.optimizer.state[p]["sum"].flatten() for p in params]).sqrt()
        if "weight_decay" not in options:
            root = torch.maximum(root, 0.999 * torch.maximum(u.abs(), r.abs()))  # had one of them come alone
        F = flat_parameters(model) - before + 0.01 / (1 + step * options.get("lr_decay", 0.0)) * r / (root + 1e-10)
        assert (G @ F / G.norm(dim=1) / F.norm()).abs().max() < 1e-9 and record.residual < 1e-9
        assert 0.01 < record.preserved_norm < 0.99


def changed(name):
    """A class of optimizers that has a function of its own."""
    return type("Changed", (SGD,), {name: lambda self, *given: getattr(SGD, name)(self, *given)})


def test_a_subclass_that_changes_nothing_is_what_it_is_made_of():
    class Mine(AdamW):
        def __init__(self, params):
            super().__init__(params, 1e-2, weight_decay=0.0)

    results = []
    for make in (Mine, lambda params: AdamW(params, 1e-2, weight_decay=0.0)):
        torch.manual_seed(0)
        model, forget, retain = classifier()
        unlearner = unlearner_of(model, make(model.parameters()))
        for _ in range(3):
            unlearner.step(forget, retain)
        unlearner.optimizer.step()  # of somebody else
        results.append((flat_parameters(model), unlearner.optimizer.state[model[0].weight][MOMENTUM]))
    assert all(map(torch.equal, *results))


REFUSED = {
    "unknown": (lambda p: torch.optim.Adamax(p), {}, "can say it in a method"),
    "another step": (lambda p: changed("step")(p, 0.1), {}, "Adagrad are known; got a Changed"),
    "another state": (lambda p: changed("_init_group")(p, 0.1), {}, "Adagrad are known; got a Changed"),
    "projector": (lambda p: SGD(p, 0.1), {"projector": projgrad.projectors.qr}, "cannot be used with projector"),
    "two_passes": (lambda p: SGD(p, 0.1), {"keep_output_gradients": False}, "cannot be used with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_at_once(name):
    model, *_ = classifier()
    make, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        unlearner_of(model, make(model.parameters()), **options)


def test_an_unknown_metric_is_named():
    model, *_ = classifier()
    with pytest.raises(ValueError, match="metric must be 'gradient' or 'optimizer'; got 'adam'"):
        projgrad.OrthoGrad(model, SGD(model.parameters(), 0.1), metric="adam")


@pytest.mark.parametrize(
    ("options", "message"), [({"eps": 0.0}, "needs eps > 0"), ({"lr": float("nan")}, "learning rates")]
)
def test_groups_without_a_usable_diagonal_are_refused(options, message):
    model, forget, retain = classifier()
    optimizer = AdamW(model.parameters(), 1e-2)
    optimizer.param_groups[0].update(options)
    before = flat_parameters(model)
    with pytest.raises(ValueError, match=message):
        unlearner_of(model, optimizer).step(forget, retain)
    assert torch.equal(flat_parameters(model), before) and not optimizer.state


@pytest.mark.parametrize("bad", ["forget", "retain"])
def test_nan_changes_nothing(bad):
    model, forget, retain = classifier()
    optimizer = AdamW(model.parameters(), 1e-2)
    unlearner = unlearner_of(model, optimizer)
    unlearner.step(forget, retain)
    before, state = flat_parameters(model), copy.deepcopy(optimizer.state_dict()["state"])
    closures = {"forget": forget, "retain": retain}
    broken = closures[bad]
    with pytest.raises(FloatingPointError):
        unlearner.step(**closures | {bad: lambda: broken() * float("nan")})
    assert torch.equal(flat_parameters(model), before)
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[key][name]) for name, value in values.items())


def test_a_scaler_unscales_steps_and_skips():
    torch.manual_seed(0)
    model, forget, retain = classifier()
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"max_norm": 0.1}
    optimizer = AdamW(model.parameters(), 1e-2)
    scaled = unlearner_of(model, optimizer, scaler=scaler, **options)
    plain = unlearner_of(other, AdamW(other.parameters(), 1e-2), **options)
    for _ in range(2):
        scaled.step(forget, retain)
        plain.step(lambda: forget(other), lambda: retain(other))
    torch.testing.assert_close(flat_parameters(model), flat_parameters(other), rtol=1e-9, atol=1e-10)
    before = flat_parameters(model)
    record = scaled.step(lambda: forget() * float("inf"), retain)
    assert record.skipped and torch.equal(flat_parameters(model), before) and scaler.get_scale() == 512.0


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 5))


def batch(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 40, generator=generator), torch.randint(5, (n,), generator=generator)


def plain_closures(model, dtype=torch.float32):
    (xf, yf), (x, y) = batch(16, 1), batch(16, 2)
    xf, x = xf.to(dtype), x.to(dtype)
    entropy = nn.functional.cross_entropy
    return lambda: entropy(model(xf), yf), lambda: entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_steps_of_others_let_the_forget_momentum_decay(name):
    """Plain steps in between: what is left of the momentum is corrected, and nothing that is gone."""
    model = mlp(0).double()
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    }[name]
    optimizer = make(model.parameters())
    forget, retain = plain_closures(model, torch.float64)
    unlearner = projgrad.OrthoGrad(model, optimizer, metric="optimizer")
    projgrad.OrthoGrad(model, optimizer, metric="optimizer")  # another one on the same optimizer changes nothing
    unlearner.step(forget, retain)
    before = [optimizer.state[p]["forget_momentum"].clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        retain().mean().backward()
        optimizer.step()
    for p, M in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(optimizer.state[p]["forget_momentum"], 0.9**3 * M)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "fused"])
def test_steps_of_others_that_leave_the_momentum_alone_leave_the_forget_momentum(name):
    """Without momentum an optimizer keeps the one that it had; a fused one is called where a scaler skips a step."""
    model = mlp(0)
    make = {
        "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
        "fused": lambda p: AdamW(p, lr=1e-3, fused=True),
    }[name]
    optimizer = make(model.parameters())
    forget, retain = plain_closures(model)
    unlearner_of(model, optimizer).step(forget, retain)
    before = copy.deepcopy(list(optimizer.state.values()))
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=name == "fused")
    scaler.scale(retain().mean() * (torch.inf if name == "fused" else 1.0)).backward()
    optimizer.param_groups[0]["momentum"] = 0.0
    scaler.step(optimizer)
    for state, was in zip(optimizer.state.values(), before, strict=True):
        own = "exp_avg" if name == "fused" else "momentum_buffer"
        assert torch.equal(state[own], was[own]) and torch.equal(state[MOMENTUM], was[MOMENTUM])


@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.0, 0.0)])
def test_adam_without_a_memory_of_squares(betas):
    model = mlp(0).double()
    unlearner = unlearner_of(model, AdamW(model.parameters(), lr=1e-3, betas=betas, weight_decay=0.0), 0.0)
    for _ in range(2):
        cosine, _, record = ascent(unlearner, *plain_closures(model, torch.float64))
        assert cosine < 1e-12 and record.residual < 1e-12


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizers_and_weights_in_another_order(make, metric):
    """A fused optimizer walks through weight and gradient as they lie in memory."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).double()
    x, y = torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.randint(5, (6,))
    changed = []
    for ordered in (False, True):
        model = copy.deepcopy(first)
        model = model.to(memory_format=torch.channels_last) if ordered else model
        optimizer = make(model.parameters(), lr=0.01, fused=True)
        unlearner = projgrad.OrthoGrad(model, optimizer, metric=metric)
        for _ in range(2):
            unlearner.step(
                lambda m=model: F.cross_entropy(m(-x), y), lambda m=model: F.cross_entropy(m(x), y, reduction="none")
            )
        changed.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*changed, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_an_alpha_out_of_its_range_is_refused_later_too():
    model = mlp(0)
    unlearner = projgrad.OrthoGrad(model, SGD(model.parameters(), lr=0.1))
    unlearner.alpha = 3.0
    with pytest.raises(ValueError, match="alpha"):
        unlearner.step(*plain_closures(model))


@pytest.mark.parametrize("make", [AdamW, torch.optim.RMSprop, Adagrad])
def test_no_weight_is_thrown_far_where_both_parts_of_a_first_gradient_cancel(make):
    """The diagonal of the optimizer is lr / 0 there: each part alone would be 10,000 times lr."""
    model = mlp(0)
    unlearner = unlearner_of(model, make(model.parameters(), lr=1e-3), 0.5)
    usual = 1e-2 if make is torch.optim.RMSprop else 1e-3  # the largest change of a plain first step
    for _ in range(3):
        before = flat_parameters(model)
        record = unlearner.step(*plain_closures(model))
        assert record.residual < 1e-5
        assert (flat_parameters(model) - before).abs().max() < 10 * usual


@pytest.mark.parametrize("make", [torch.optim.Adam, AdamW, torch.optim.RMSprop, Adagrad])
def test_a_step_without_a_forget_part_changes_what_the_optimizer_alone_would(make):
    models = [mlp(0), mlp(0)]
    optimizers = [make(model.parameters(), lr=0.01, weight_decay=0.1) for model in models]
    unlearner = unlearner_of(models[0], optimizers[0], 1.0)
    for _ in range(5):
        record = unlearner.step(*plain_closures(models[0]))
        assert record.preserved_norm == 1 and record.residual == 0
        optimizers[1].zero_grad()
        plain_closures(models[1])[1]().mean().backward()
        optimizers[1].step()
    torch.testing.assert_close(flat_parameters(models[0]), flat_parameters(models[1]))


def test_a_tensor_whose_samples_span_everything_is_no_alarm():
    """What is left of its change is rounding, which has no direction: it is measured beside the change."""
    subject = Subject("metric_nesterov")
    record = subject.step()
    spanned = [t for name, t in record.tensors.items() if t.rank == subject.model.get_parameter(name).numel()]
    assert spanned and all(t.preserved_norm < 1e-12 for t in spanned) and record.residual < 1e-12
