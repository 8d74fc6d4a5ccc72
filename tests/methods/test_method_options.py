"""Options of the ops, of OrthoGrad, FeasibleUpdates and the baselines: what is no number, not finite or of the wrong
sign is refused by name."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.methods.baselines import SCRUB, NegGradPlus, PCGrad, SalUn

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["0.5", None, True, [0.5], 1j, torch.ones(2)]
G, u, K = torch.randn(3, 7), torch.randn(7), torch.eye(3)


def model_and_optimizer():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def closures(model):
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    return lambda: F.cross_entropy(model(-x), y), lambda: F.cross_entropy(model(x), y, reduction="none")


def saliency(model):
    return closures(model)[0]


def project_(**options):
    model, _ = model_and_optimizer()
    with projgrad.per_sample(model) as tape:
        losses = closures(model)[1]()
    saliency(model)().backward()
    return tape.project_(losses, **options)


def orthograd(**options):
    return projgrad.OrthoGrad(*model_and_optimizer(), **options)


def feasible_updates(**options):
    return projgrad.FeasibleUpdates(*model_and_optimizer(), **options)


def salun(**options):
    model, optimizer = model_and_optimizer()
    return SalUn(model, optimizer, saliency(model), **options)


def scrub(max_steps=1, **options):
    return SCRUB(*model_and_optimizer(), max_steps, **options)


def baseline(kind):
    return lambda **options: kind(*model_and_optimizer(), **options)


neggrad, pcgrad = baseline(NegGradPlus), baseline(PCGrad)


def feasible(n=4, **options):
    return projgrad.feasible(u, u, u, u.square(), n, **options)


def project_out(**options):
    return projgrad.project_out(u, G, **options)


def gram_solve(**options):
    return projgrad.gram_solve(K, u[:3], **options)


# Function, option, interval, what is right.
NUMBERS = [
    *[(f, "damping", "[0, inf)", [0, 0.1, np.float32(0.1), torch.tensor(0.1)]) for f in (project_out, gram_solve)],
    *[(f, "rtol", "[0, 1)", [None, 0.0, 1e-3]) for f in (project_out, gram_solve, orthograd, project_)],
    *[(f, "damping", "[0, inf)", [0, 0.1]) for f in (orthograd, project_)],
    *[(f, "alpha", "[0, 1]", [0, 1, 0.5]) for f in (orthograd, neggrad, pcgrad, salun)],
    *[(f, "max_norm", "(0, inf]", [None, 1, INF]) for f in (orthograd, neggrad, pcgrad, salun, scrub)],
    *[(f, "delta", "(0, 0.5]", [0.05, 0.5]) for f in (feasible, feasible_updates)],
    (salun, "share", "(0, 1]", [0.1, 1]),
]
named = dict(ids=[f"{f.__name__ if f.__name__ != '<lambda>' else 'baseline'}-{option}" for f, option, *_ in NUMBERS])


def outside(interval):
    low, high = (float(x) for x in interval[1:-1].split(","))
    ends = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "()"]
    return [NAN, -INF, low - 1, *ends, *([high + 1, INF] if high < INF else [])]


@pytest.mark.parametrize("function, option, interval, right", NUMBERS, **named)
def test_numbers_outside_their_interval(function, option, interval, right):
    for value in outside(interval):
        message = rf"{option}.* must be in {re.escape(interval)}; got {re.escape(str(value))}"
        with pytest.raises(ValueError, match=message):
            function(**{option: value})
    for value in right:
        function(**{option: value})


@pytest.mark.parametrize("function, option, interval, right", NUMBERS, **named)
def test_what_is_no_number(function, option, interval, right):
    for value in NO_NUMBERS:
        if value is None and None in right:
            continue
        with pytest.raises(TypeError, match=rf"{option}.* must be a number in {re.escape(interval)}; got "):
            function(**{option: value})


@pytest.mark.parametrize(
    "function, option, least, right",
    [
        (feasible, "n", 2, [2, np.int64(3)]),
        (scrub, "max_steps", 0, [0, 3]),
    ],
)
def test_options_that_count_take_whole_numbers_only(function, option, least, right):
    with pytest.raises(ValueError, match=rf"got {least - 1}"):
        function(**{option: least - 1})
    with pytest.raises(ValueError, match="got -3"):
        function(**{option: -3})
    for value in (2.5, NAN, "2", True, *([] if None in right else [None])):
        with pytest.raises(
            (TypeError, ValueError), match=rf"{option} must be an integer of at least \d; got '?{value}"
        ):
            function(**{option: value})
    for value in right:
        function(**{option: value})


@pytest.mark.slow
def test_checks_of_options_are_compiled_without_a_graph_break():
    """With numbers that torch.compile takes as variables after their second value."""

    def both(u, G, n, damping, rtol, delta):
        kept = projgrad.feasible(u, -u, u, u.square(), n, delta=delta)
        return projgrad.project_out(kept, G, damping=damping, rtol=rtol)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for options in ((3, 0.1, 1e-3, 0.05), (4, 0.2, 1e-2, 0.1), (5, 0.3, 1e-1, 0.2)):
        torch.testing.assert_close(compiled(u, G, *options), both(u, G, *options))


@pytest.mark.parametrize("function", [orthograd, feasible_updates, neggrad])
def test_a_flag_that_is_none(function):
    """ascend="False" would ascend."""
    for value in ("False", 0, None, torch.tensor(True)):
        with pytest.raises(TypeError, match="ascend must be True or False"):
            function(ascend=value)
    function(ascend=np.bool_(False))
    with pytest.raises(TypeError, match="keep_output_gradients must be True or False; got 'no'"):
        orthograd(keep_output_gradients="no")


@pytest.mark.parametrize(
    "function, option, choices",
    [(orthograd, "scope", "global"), (project_, "scope", "per_tensor"), (feasible_updates, "test", "aggregate")],
)
def test_choices_other_than_the_listed_are_refused(function, option, choices):
    for value in ("all", None, 1, torch.ones(2)):
        with pytest.raises(ValueError, match=rf"{option} must be '.*{choices}.*; got "):
            function(**{option: value})


def test_objects_of_the_wrong_kind():
    with pytest.raises(TypeError, match="projector must be a function of u and G; got a Tensor"):
        orthograd(projector=G)
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler; got a float"):
        orthograd(scaler=2.0)


def test_a_scaler_that_is_not_enabled():
    """It would let the step with an infinite gradient pass that makes a scaler scale less."""
    model, optimizer = model_and_optimizer()
    forget, retain = closures(model)
    before = copy.deepcopy(model.state_dict())
    unlearner = projgrad.OrthoGrad(model, optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(FloatingPointError, match="forget loss is nan"):
        unlearner.step(lambda: forget() * NAN, retain)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not unlearner.step(forget, retain).skipped


def test_an_infinite_max_norm_clips_nothing():
    for make in (projgrad.OrthoGrad, NegGradPlus, PCGrad):
        torch.manual_seed(0)
        model, optimizer = model_and_optimizer()
        pair, state, found = closures(model), copy.deepcopy(model.state_dict()), []
        for max_norm in (None, INF):
            model.load_state_dict(state)
            make(model, optimizer, 0.3, max_norm=max_norm).step(*pair)
            found.append(copy.deepcopy(model.state_dict()))
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x: projgrad.project_out(x, G), "project_out: u"),
        (lambda x: projgrad.project_out(u, x), "project_out: G"),
        (lambda x: projgrad.gram(x), "gram: G"),
        (lambda x: projgrad.gram_solve(x, u), "gram_solve: K"),
        (lambda x: projgrad.gram_solve(K, x), "gram_solve: b"),
        (lambda x: projgrad.feasible(u, x, u, u, 3), "feasible: u"),
        (lambda x: projgrad.basis_project(G, x), "basis_project: M"),
        (lambda x: projgrad.linear_gram(x, G), "linear_gram: a"),
        (lambda x: projgrad.linear_gram(G, G, G, x), "linear_gram: b2"),
        (lambda x: projgrad.linear_dot(G, G, x), "linear_dot: u"),
        (lambda x: projgrad.linear_combine(G, G, x), "linear_combine: c"),
        (lambda x: projgrad.linear_moments(G, x), "linear_moments: b"),
    ],
)
def test_what_is_no_tensor(call, name):
    for x in ([1.0, 2.0], np.ones((3, 7)), 1.0):
        with pytest.raises(TypeError, match=rf"{name} must be a tensor; got (list|ndarray|float)"):
            call(x)


MAKERS = {
    "OrthoGrad": projgrad.OrthoGrad,
    "FeasibleUpdates": projgrad.FeasibleUpdates,
    "NegGradPlus": NegGradPlus,
    "PCGrad": PCGrad,
    "SalUn": lambda model, optimizer: SalUn(model, optimizer, saliency(model)),
    "SCRUB": lambda model, optimizer: SCRUB(model, optimizer, 1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_swapped_or_wrong_model_and_optimizer_are_refused(name):
    make, (model, optimizer) = MAKERS[name], model_and_optimizer()
    with pytest.raises(TypeError, match="model and optimizer are swapped"):
        make(optimizer, model)
    with pytest.raises(TypeError, match=r"such as torch\.optim\.SGD\(.*got the class Adam"):
        make(model, torch.optim.Adam)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got the class Linear"):
        make(nn.Linear, optimizer)
    kind = ValueError if name == "FeasibleUpdates" else TypeError  # which takes methods too
    with pytest.raises(kind, match=r"optimizer must be a torch optimizer.*list"):
        make(model, list(model.parameters()))
    with pytest.raises(kind, match=r"optimizer must be a torch optimizer.*ExponentialLR"):
        make(model, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))


class Wrapped:
    """An optimizer that is none by its class, as schedules and wrappers are."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_anything_that_steps_is_an_optimizer(name):
    model, optimizer = model_and_optimizer()
    before = copy.deepcopy(model.state_dict())
    MAKERS[name](model, Wrapped(optimizer)).step(*closures(model))
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Output(dict):
    """What models of transformers return."""

    def __init__(self, logits):
        super().__init__(logits=logits, loss=logits.mean())
        self.logits, self.loss = logits, logits.mean()


WRONG = {
    "output": (lambda loss: Output(loss()), r"Output: take its `\.l"),
    "dictionary": (lambda loss: {"logits": loss()}, r"dict: take its `\.l"),
    "tuple": (lambda loss: (loss(), None), "tuple: return the tensor of the loss"),
    "nothing": (lambda loss: loss() and None if loss().numel() == 1 else None, "None.*return anything"),
    "item": (lambda loss: float(loss().mean()), r"float: return the tensor itself; \.item\(\)"),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", MAKERS)
def test_wrong_losses_of_closures_are_refused_and_change_nothing(name, wrong, which):
    model, optimizer = model_and_optimizer()
    method, pair = MAKERS[name](model, optimizer), list(closures(model))
    change, message = WRONG[wrong]
    loss = pair[which]
    pair[which] = lambda: change(loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        method.step(*pair)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["OrthoGrad", "FeasibleUpdates"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda losses: losses.unsqueeze(1), r"got \(6, 1\): use losses\.squeeze\(1\)"),
        (lambda losses: losses.mean(), r"got \(\): use reduction='none'"),
        (
            lambda losses: losses.unsqueeze(1).expand(6, 4),
            r"got \(6, 4\).*one number of each sample.*losses\.mean\(1\)",
        ),
        (lambda losses: losses.view(6, 1, 1), r"got \(6, 1, 1\).*losses\.flatten\(1\)\.mean\(1\)"),
        (lambda losses: torch.complex(losses, losses), "losses must be real; got torch.complex64"),
    ],
)
def test_shapes_of_retain_losses(name, change, message):
    model, optimizer = model_and_optimizer()
    forget, retain = closures(model)
    with pytest.raises(ValueError, match=message):
        MAKERS[name](model, optimizer).step(forget, lambda: change(retain()))


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_closure(name):
    model, optimizer = model_and_optimizer()
    method, (forget, retain) = MAKERS[name](model, optimizer), closures(model)
    method.step(forget, retain)  # and `.grad` may hold what it left
    for bad, kind in ((forget(), "a Tensor"), (model, "a Sequential"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=rf"forget must be a function.*`lambda: .*got {kind}"):
            method.step(bad, retain)
        with pytest.raises(TypeError, match=rf"retain must be a function.*`lambda: .*got {kind}"):
            method.step(forget, bad)
        assert all(p.grad is None for p in model.parameters())


def test_a_saliency_that_is_no_closure():
    model, optimizer = model_and_optimizer()
    with pytest.raises(TypeError, match=r"saliency must be a function.*got a Tensor"):
        SalUn(model, optimizer, saliency(model)())


@pytest.mark.parametrize("method", [projgrad.OrthoGrad, projgrad.FeasibleUpdates, projgrad.baselines.NegGradPlus])
def test_optimizers_that_would_not_apply_the_update_are_refused(method):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="LBFGS evaluates the losses again"):
        method(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"maximize=True.*turn the update around"):
        method(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
