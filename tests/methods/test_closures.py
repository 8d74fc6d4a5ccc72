"""What closures may do besides returning losses, with every method: right, or refused with nothing half done."""

import gc

import pytest
import torch
from torch import nn
from unlearners import DOUBLE, METHODS, ONE_STEP, Problem, sgd

import projgrad
from projgrad.methods.baselines import SalUn

pytestmark = pytest.mark.same_without_extension


def attack(loss, x, how):
    """The inputs one signed gradient step further; `how` differentiates."""
    d = torch.zeros_like(x).requires_grad_()
    return x + 0.1 * how(loss(x + d), d).sign()


def by_grad(losses, d):
    return torch.autograd.grad(losses.sum(), d)[0]


def by_backward(losses, d):
    losses.sum().backward()
    return d.grad


def cleared(optimizer, set_to_none, closure):
    """`closure` with zero_grad() before and after."""
    optimizer.zero_grad(set_to_none)
    loss = closure()
    optimizer.zero_grad(set_to_none)
    return loss


def measured(optimizer, loss, set_to_none=True):
    """A loss whose gradient was looked at: backward() with nothing left of it."""
    loss.mean().backward(retain_graph=True)
    optimizer.zero_grad(set_to_none)
    return loss


HABITS = {
    "zero_grad": (lambda p, o: cleared(o, True, p.forget), lambda p, o: cleared(o, True, p.retain)),
    "zeros": (lambda p, o: cleared(o, False, p.forget), lambda p, o: cleared(o, False, p.retain)),
    "backward_then_zero_grad": (lambda p, o: measured(o, p.forget()), lambda p, o: measured(o, p.retain())),
    "backward_then_zeros": (lambda p, o: measured(o, p.forget(), False), lambda p, o: measured(o, p.retain(), False)),
    "model.zero_grad": (lambda p, o: p.model.zero_grad() or p.forget(), lambda p, o: p.model.zero_grad() or p.retain()),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("name", METHODS)
def test_harmless_habits_change_nothing(name, habit):
    problem = Problem()
    expected = problem.after(name)
    forget, retain = HABITS[habit]
    for _ in range(2):  # stale gradients of before are dropped too
        found = problem.after(name, lambda o: forget(problem, o), lambda o: retain(problem, o))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        for p in problem.model.parameters():
            p.grad = torch.ones_like(p)


@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("name", ONE_STEP)
def test_gradients_made_inside_the_retain_closure_do_not_count(name, how):
    """Adversarial retain samples, made inside the closure; with backward(), whoever made the gradients clears them."""
    problem = Problem()
    x = attack(problem.retain, problem.x, by_grad)
    expected = problem.after(name, retain=lambda o: problem.retain(x))

    def retain(optimizer):
        x = attack(problem.retain, problem.x, by_grad if how == "grad" else by_backward)
        optimizer.zero_grad()
        return problem.retain(x)

    torch.testing.assert_close(problem.after(name, retain=retain), expected, rtol=0, atol=1e-14)


def fill(parameter):
    parameter.grad = torch.ones_like(parameter)


LEAVERS = {
    "backward": lambda p, loss: loss().mean().backward() or loss(),
    "backward_of_the_loss": lambda p, loss: (lambda some: some.mean().backward(retain_graph=True) or some)(loss()),
    "attack": lambda p, loss: attack(lambda x: p.retain(x), p.x, by_backward).sum() * 0 + loss(),
    "fill": lambda p, loss: fill(p.model[0].weight) or loss(),
    "nan": lambda p, loss: (fill(p.model[0].weight), p.model[0].weight.grad.fill_(float("nan")), loss())[-1],
}


@pytest.mark.parametrize("which", ["forget", "retain"])
@pytest.mark.parametrize("leaver", LEAVERS)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_left_behind_are_refused(name, leaver, which):
    problem = Problem()
    loss = getattr(problem, which)
    bad = {which: lambda o: LEAVERS[leaver](problem, loss)}
    with pytest.raises(ValueError, match=rf"{which}\(\) left a gradient in 0\.weight\.grad.*torch\.autograd\.grad"):
        problem.after(name, **bad)
    torch.testing.assert_close(problem.model.state_dict(), problem.state, rtol=0, atol=0)
    assert all(p.grad is None for p in problem.model.parameters())


def test_gradients_of_the_saliency_closure():
    problem = Problem()
    with pytest.raises(ValueError, match=r"saliency\(\) left a gradient in 0\.weight\.grad"):
        SalUn(problem.model, sgd(problem.model), lambda: LEAVERS["backward"](problem, problem.forget))


def test_gradients_of_the_check_closure():
    problem = Problem()
    method = projgrad.FeasibleUpdates(problem.model, sgd(problem.model))
    with pytest.raises(ValueError, match=r"check\(\) left a gradient in 0\.weight\.grad"):
        method.step(problem.forget, problem.retain, lambda: LEAVERS["backward"](problem, problem.retain))


def test_a_gradient_of_another_model_in_the_optimizer():
    """It would move what no loss depends on."""
    problem, other = Problem(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*problem.model.parameters(), other], lr=0.1)
    retain = lambda: fill(other) or problem.retain()  # noqa: E731
    with pytest.raises(ValueError, match=r"retain\(\) left a gradient in parameter 4 of the optimizer\.grad"):
        projgrad.OrthoGrad(problem.model, optimizer).step(problem.forget, retain)
    assert other.eq(1).all() and other.grad is None


def test_gradients_of_other_parameters_are_left_alone():
    """The gradient of a parameter that this optimizer does not hold belongs to somebody else."""
    problem = Problem()
    problem.model[0].bias.grad = mine = torch.ones(7, **DOUBLE)
    optimizer = torch.optim.SGD([problem.model[0].weight], lr=0.1)
    projgrad.OrthoGrad(problem.model, optimizer).step(problem.forget, problem.retain)
    assert problem.model[0].bias.grad is mine and mine.eq(1).all()


def test_a_closure_that_raises_leaves_no_gradient():
    problem = Problem()

    def bad(optimizer):
        problem.retain().mean().backward()
        raise KeyError("no such batch")

    for name in METHODS:
        for which in ("forget", "retain"):
            with pytest.raises(KeyError, match="no such batch"):
                problem.after(name, **{which: bad})
            torch.testing.assert_close(problem.model.state_dict(), problem.state, rtol=0, atol=0)
            assert all(p.grad is None for p in problem.model.parameters())
            problem.after(name)  # and does not stand in the way of the next step


@pytest.mark.parametrize("inner", METHODS)
@pytest.mark.parametrize("outer", METHODS)
@pytest.mark.parametrize("which", ["forget", "retain"])
def test_a_step_inside_a_closure(which, outer, inner):
    problem = Problem()
    nested = METHODS[inner](problem.model, problem.forget)
    loss = getattr(problem, which)
    bad = {which: lambda o: nested.step(problem.forget, problem.retain) and loss()}
    with pytest.raises(RuntimeError, match=rf"inside {which}\(\) of another step, which updates 0\.weight too"):
        problem.after(outer, **bad)
    torch.testing.assert_close(problem.model.state_dict(), problem.state, rtol=0, atol=0)
    assert all(p.grad is None for p in problem.model.parameters())
    problem.after(outer)


def test_a_step_of_itself_inside_its_closure():
    problem = Problem()
    method = projgrad.OrthoGrad(problem.model, sgd(problem.model))
    with pytest.raises(RuntimeError, match="inside retain"):
        method.step(problem.forget, lambda: method.step(problem.forget, problem.retain) and problem.retain())


def test_a_step_of_another_model_inside_a_closure():
    problem, other = Problem(), Problem()
    expected, theirs = problem.after("orthograd"), other.after("orthograd")
    other.model.load_state_dict(other.state)
    nested = METHODS["orthograd"](other.model, other.forget)
    found = problem.after("orthograd", retain=lambda o: nested.step(other.forget, other.retain) and problem.retain())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(other.parameters(), theirs, rtol=0, atol=1e-14)


class Normed:
    """A model with a batch norm, and the weights and statistics that a step of a method leaves."""

    def __init__(self, name, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, **options), nn.Tanh(), nn.Linear(7, 3)).double()
        self.x, self.y = torch.randn(6, 5, **DOUBLE), torch.arange(6) % 3
        self.name, model, optimizer = name, self.model.eval(), sgd(self.model)
        if name == "pgu":
            self.method = projgrad.PGU(model, optimizer, gamma=0.5).fit([self.x])
        elif name == "feasible":
            self.method = projgrad.FeasibleUpdates(model, optimizer)
        else:
            self.method = projgrad.OrthoGrad(model, optimizer, 0.3, metric=name)

    def step(self, mode=lambda: None, forget_mode=lambda: None):
        def losses(before, sign=1):
            before()
            return torch.nn.functional.cross_entropy(self.model(sign * self.x), self.y, reduction="none")

        retain = [] if self.name == "pgu" else [lambda: losses(mode)]
        self.method.step(lambda: losses(forget_mode, -1).mean(), *retain)
        return self.state()

    def state(self):
        return [t.clone() for t in self.model.state_dict().values()]


@pytest.mark.filterwarnings("ignore:PGU")
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "bare"])
@pytest.mark.parametrize("name", ["gradient", "optimizer", "feasible", "pgu"])
def test_a_batch_norm_counts_as_it_is_in_the_forward_pass(name, options):
    expected = Normed(name, **options).step()
    normed = Normed(name, **options)
    normed.model.train()
    for one, two in zip(normed.step(normed.model.eval, normed.model.eval), expected, strict=True):
        assert torch.equal(one, two)
    before, train = normed.state(), normed.model[1].train
    for modes in [(normed.model.eval, train)] + ([] if name == "pgu" else [(train, normed.model.eval)]):
        with pytest.raises(ValueError, match=r"1 is a BatchNorm1d that uses batch statistics.*Call model\.eval\(\)"):
            normed.step(*modes)
        assert all(map(torch.equal, normed.state(), before))  # also the running statistics
    normed.model.train()(normed.x)  # nothing of a step refuses it


@pytest.mark.filterwarnings("ignore:PGU")
@pytest.mark.parametrize("name", ["gradient", "optimizer", "feasible", "pgu"])
def test_a_batch_norm_in_what_was_compiled_before_is_refused(name):
    normed = Normed(name)
    compiled = torch.compile(lambda x: normed.model(x), backend="aot_eager")
    retain = [] if name == "pgu" else [lambda: normed.model.eval()(normed.x).square().sum(1)]

    def forget(mode):
        mode()
        return compiled(normed.x).square().mean()

    for mode in (normed.model.eval, normed.model.train):
        forget(mode)  # compiled here: hooks that the step sets are not called
    weights = [p.clone() for p in normed.model.parameters()]
    with pytest.raises(ValueError, match="1 is a BatchNorm1d that uses batch statistics"):
        normed.method.step(lambda: forget(normed.model.train), *retain)
    assert all(map(torch.equal, normed.model.parameters(), weights))
    normed.method.step(lambda: forget(normed.model.eval), *retain)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_garbage_collector_pauses_and_goes_on_as_before(name, enabled):
    """A step keeps thousands of objects: full collections meanwhile took as long as the step itself."""
    problem, seen = Problem(), []
    collects = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()

        def watched(optimizer):
            seen.append(gc.isenabled())
            return problem.retain()

        problem.after(name, retain=watched)
        assert gc.isenabled() is enabled
        if name == "orthograd":
            assert seen == [False]
        with pytest.raises(KeyError):
            problem.after(name, forget=lambda o: {}["nothing"])
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if collects else gc.disable)()


def test_the_garbage_collector_goes_on_while_there_are_many_closures():
    problem, seen = Problem(), []

    def watched():
        seen.append(gc.isenabled())
        return problem.retain()

    projgrad.OrthoGrad(problem.model, sgd(problem.model)).step(problem.forget, [watched, problem.retain])
    assert all(seen)
