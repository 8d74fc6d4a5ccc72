"""metric="optimizer" with micro-batches: what fails after the optimizer stepped leaves everything as it was."""

import copy
import itertools

import pytest
import torch
from metric_problems import SGD, Problem, flat
from torch import nn

import projgrad
from projgrad.tape import weighted_union

pytestmark = pytest.mark.same_without_extension


class Broken(Exception):
    """What a closure of a test raises."""


def fails(call, how):
    """Make the second micro-batch do something wrong when it is called for the `call`-th time."""

    def change(problem):
        parts, calls = problem.parts(), itertools.count(1)
        second = parts[1]

        def broken():
            if next(calls) < call:
                return second()
            if isinstance(how, BaseException):
                raise how
            return how(second())

        return [parts[0], broken, *parts[2:]]

    return change


FAILURES = {
    "an error in the second call": (fails(2, Broken()), Broken),
    "an error in the third call": (fails(3, Broken()), Broken),
    "an interrupt": (fails(3, KeyboardInterrupt()), KeyboardInterrupt),
    "out of data": (fails(2, StopIteration()), ValueError),
    "other losses": (fails(2, lambda losses: 1.1 * losses), ValueError),
    "fewer losses": (fails(3, lambda losses: losses[:-1]), ValueError),
    "NaN": (fails(3, lambda losses: losses * torch.nan), FloatingPointError),
    "a mean": (fails(2, lambda losses: losses.mean()), ValueError),
}


def bits(problem, optimizer, scaler):
    """Everything that a step may change, and which tensors hold it."""
    state = {(k, key): value for k, p in enumerate(problem.params) for key, value in optimizer.state[p].items()}
    if not state:
        optimizer.state.clear()  # a look at it makes entries
    held = {key: (id(value), value.clone()) for key, value in state.items() if isinstance(value, torch.Tensor)}
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return flat(problem.params), held, copy.deepcopy(settings), scaler and scaler.state_dict()


def assert_same_bits(problem, optimizer, scaler, before):
    after = bits(problem, optimizer, scaler)
    assert torch.equal(after[0], before[0]) and after[1].keys() == before[1].keys() and after[2:] == before[2:]
    for key, (identity, value) in after[1].items():
        assert identity == before[1][key][0] and torch.equal(value, before[1][key][1])
    assert all(p.grad is None for p in problem.params)


@pytest.mark.parametrize(("earlier", "scaled"), [(0, False), (0, True), (2, True)])
@pytest.mark.parametrize("why", FAILURES)
def test_an_error_after_the_optimizer_stepped_leaves_everything_as_it_was(why, earlier, scaled):
    make, error = FAILURES[why]
    problem = Problem()
    optimizer = problem.optimizer("adamw" if scaled else "nesterov")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1) if scaled else None
    unlearner = problem.unlearner(optimizer, scaler=scaler, union_tolerance=1e-4)
    for _ in range(earlier):
        unlearner.step(problem.forget, problem.parts())
    if scaled and not earlier:
        scaler.scale(torch.ones(()))  # so that it has a state
    before = bits(problem, optimizer, scaler)
    with pytest.raises(error):
        unlearner.step(problem.forget, make(problem))
    assert_same_bits(problem, optimizer, scaler, before)
    unlearner.step(problem.forget, problem.parts())  # and the next step is like any other


@pytest.mark.parametrize("when", [0, 1, 4, 5, 7, 9])
def test_an_interrupt_while_weights_are_exchanged_leaves_everything_as_it_was(when, monkeypatch):
    problem = Problem()
    optimizer = problem.optimizer("adamw")
    unlearner = problem.unlearner(optimizer)
    unlearner.step(problem.forget, problem.parts())
    before, copies = bits(problem, optimizer, None), itertools.count()
    aside = weighted_union.aside

    def interrupted(t):
        if next(copies) == when:
            raise KeyboardInterrupt
        return aside(t)

    monkeypatch.setattr(weighted_union, "aside", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unlearner.step(problem.forget, problem.parts())
    assert next(copies) == when + 1
    assert_same_bits(problem, optimizer, None, before)


@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop_momentum"])
def test_an_error_while_momenta_are_corrected_leaves_everything_as_it_was(name, monkeypatch):
    problem = Problem()
    optimizer = problem.optimizer(name)
    unlearner = problem.unlearner(optimizer)
    unlearner.step(problem.forget, problem.parts())
    before = bits(problem, optimizer, None)
    finish = weighted_union.ChangeUnion.finish_

    def broken(self, carry):
        finish(self, carry)
        raise Broken

    monkeypatch.setattr(weighted_union.ChangeUnion, "finish_", broken)
    with pytest.raises(Broken):
        unlearner.step(problem.forget, problem.parts())
    assert_same_bits(problem, optimizer, None, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_refused_before_the_optimizer_steps_changes_nothing(bad):
    problem = Problem()
    optimizer = problem.optimizer("adamw")
    problem.weights[3] = bad
    before = flat(problem.model.parameters())
    with pytest.raises(FloatingPointError, match=r"retain\[1\]: NaN or Inf in the losses of samples \[2\]"):
        problem.unlearner(optimizer).step(problem.forget, problem.parts())
    assert torch.equal(flat(problem.model.parameters()), before) and not optimizer.state
    with pytest.raises(ValueError, match="solved without projector, damping, rtol"):
        problem.unlearner(optimizer, damping=0.1).step(problem.forget, problem.parts())


def test_a_gradient_that_is_not_finite_changes_nothing():
    problem = Problem()
    zero = torch.zeros((), dtype=torch.float64)
    broken = lambda: problem.forget() + (zero * problem.model.bias.sum()).sqrt()  # noqa: E731
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient to project"):
        problem.unlearner(problem.optimizer("adamw")).step(broken, problem.parts())
    model = nn.Linear(2, 1).half()
    optimizer, before = SGD(model.parameters(), 0.1), flat(model.parameters())
    unlearner = projgrad.OrthoGrad(model, optimizer, 0.5, ascend=False, metric="optimizer")
    x = torch.eye(2).half()
    retain = [
        lambda k=k: 4e4 * model(x[k : k + 1])[:, 0] for k in range(2)
    ]  # the bias has 2e4 and 5e4: 65504 is the end
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient of the step"):
        unlearner.step(lambda: 6e4 * model.bias.sum() + 4e4 * model.bias.sum(), retain)
    assert torch.equal(flat(model.parameters()), before)


class Wide(torch.optim.Optimizer):
    """Says its diagonal itself, and keeps no squares in float16."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.1, eps=1e-8))

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data -= (0.1 * p.grad.float()).to(p.dtype)

    def diagonal(self, param, state, group):
        return torch.full_like(param, 0.1, dtype=torch.float32)


ADAPTIVE = [(kind, fused) for kind in ("Adam", "AdamW", "Adagrad", "RMSprop") for fused in (False, True)]


@pytest.mark.parametrize("where", ["all", "one tensor"])
@pytest.mark.parametrize("kind, fused", [case for case in ADAPTIVE if case != ("RMSprop", True)])
def test_float16_weights_whose_squares_vanish_are_refused_before_anything_is_changed(kind, fused, where):
    """Fused AdamW moved them by thousands where plain torch moves them by 0.01, and the record said 1e-7."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    (model if where == "all" else model[1]).half()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **({"fused": True} if fused else {}))
    unlearner = projgrad.OrthoGrad(model, optimizer, metric="optimizer")
    before, states = flat(model.parameters()), len(optimizer.state)  # Adagrad has one from the beginning
    run = lambda x: model[1](model[0](x.to(model[0].weight.dtype)).half()).float().square().sum(1)  # noqa: E731
    with pytest.raises(ValueError, match=rf"cannot know what {kind} does to .*, which is float16.*under autocast"):
        unlearner.step(lambda: run(torch.randn(4, 8)).mean(), lambda: run(torch.randn(4, 8)))
    assert torch.equal(flat(model.parameters()), before) and len(optimizer.state) == states
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), Wide], ids=["sgd", "its own"])
def test_float16_weights_without_squares_of_theirs_are_taken(make):
    model = nn.Linear(8, 3).half()
    unlearner = projgrad.OrthoGrad(model, make(model.parameters()), metric="optimizer")
    x = torch.randn(4, 8).half()
    record = unlearner.step(lambda: model(-x).square().mean(), lambda: model(x).square().sum(1))
    assert record.residual < 3e-2


def test_float32_adapters_on_a_frozen_float16_base_are_taken():
    base, adapter = nn.Linear(8, 6).half().requires_grad_(False), nn.Linear(6, 3)
    model = nn.ModuleList([base, adapter])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=True)
    unlearner = projgrad.OrthoGrad(model, optimizer, metric="optimizer")
    run = lambda x: adapter(base(x).float()).square().sum(1)  # noqa: E731
    x = torch.randn(2, 8).half()
    assert unlearner.step(lambda: run(-x).mean(), lambda: run(x)).residual < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sgd_that_leaves_16_bit_weights_alone_is_refused(dtype):
    """On a CPU torch 2.13 moves 8 of 1,000 elements, without a word."""
    model = nn.Linear(64, 8).to(dtype)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), 0.1, fused=True), metric="optimizer")
    x, before = torch.randn(4, 64, dtype=dtype), flat(model.parameters())
    with pytest.raises(ValueError, match=r"fused=True.*leaves most elements of weight"):
        unlearner.step(lambda: model(-x).square().mean(), lambda: model(x).square().sum(1))
    assert torch.equal(flat(model.parameters()), before)
