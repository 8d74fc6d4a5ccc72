"""What closures may do besides returning losses, with every method: right, or refused with nothing half done."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.baselines import SCRUB, NegGradPlus, PCGrad, SalUn

N = 6
DOUBLE = {"dtype": torch.float64}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def orthograd(**options):
    return lambda model, forget: projgrad.OrthoGrad(model, sgd(model), alpha=0.3, **options)


METHODS = {
    "orthograd": orthograd(),
    "per_tensor": orthograd(scope="per_tensor"),
    "two_passes": orthograd(keep_output_gradients=False),
    "projector": orthograd(projector=projgrad.projectors.lstsq),
    "feasible": lambda model, forget: projgrad.FeasibleUpdates(model, sgd(model), delta=0.5),
    "feasible_orthograd": lambda model, forget: projgrad.FeasibleUpdates(model, orthograd()(model, forget), delta=0.5),
    "neggrad": lambda model, forget: NegGradPlus(model, sgd(model), 0.3),
    "pcgrad": lambda model, forget: PCGrad(model, sgd(model), 0.3),
    "salun": lambda model, forget: SalUn(model, sgd(model), forget),
    "scrub": lambda model, forget: SCRUB(model, sgd(model), 1),
}
TAPED = list(METHODS)[:6]
ONE_STEP = [name for name in METHODS if name != "scrub"]  # both gradients belong to the same weights


class Problem:
    """A model, both closures, and what a step of a method makes of its weights."""

    def __init__(self, depth=2):
        layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)] if depth == 2 else [nn.Linear(5, 3)]
        self.model = nn.Sequential(*layers).double()
        self.x, self.xf = torch.randn(N, 5, **DOUBLE), torch.randn(4, 5, **DOUBLE)
        self.y, self.yf = torch.randint(3, (N,)), torch.randint(3, (4,))
        self.state = copy.deepcopy(self.model.state_dict())

    def forget(self):
        return F.cross_entropy(self.model(self.xf), self.yf)

    def retain(self, x=None):
        return F.cross_entropy(self.model(self.x if x is None else x), self.y, reduction="none")

    def parameters(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def after(self, name, forget=None, retain=None):
        """The weights after one step from the same start; the closures get the optimizer."""
        self.model.load_state_dict(self.state)
        method = METHODS[name](self.model, self.forget)
        method.step(
            self.forget if forget is None else lambda: forget(method.optimizer),
            self.retain if retain is None else lambda: retain(method.optimizer),
        )
        return self.parameters()


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
def test_attacked_inputs(name, how):
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


def train(optimizer, loss):
    """A step of training inside a closure, cleaned up, before or after the loss that is returned."""
    loss().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "trained_before": lambda p, o, loss: train(o, loss) or loss(),
    "trained_after": lambda p, o, loss: (loss(), train(o, loss))[0],
    "scaled": lambda p, o, loss: (p.model[0].weight.detach().mul_(2.0), loss())[1],
}


@pytest.mark.parametrize("depth", [1, 2])  # with one layer no node of the graph has saved a weight
@pytest.mark.parametrize("which", ["forget", "retain"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ONE_STEP)
def test_changed_weights_are_refused(name, change, which, depth):
    problem = Problem(depth)
    loss = getattr(problem, which)
    with pytest.raises(ValueError, match=rf"{which}\(\) changed 0\.(weight|bias) in place.*different weights"):
        problem.after(name, **{which: lambda o: CHANGES[change](problem, o, loss)})
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("name", ONE_STEP)
def test_weights_changed_by_both_closures(name):
    """The loss of each is that of its own weights; the other one's are not the same."""
    problem = Problem()
    forget, retain = (
        lambda o, loss=loss: CHANGES["scaled"](problem, o, loss) for loss in (problem.forget, problem.retain)
    )
    with pytest.raises(ValueError, match=r"retain\(\) changed 0\.weight in place.*different weights"):
        problem.after(name, forget, retain)
    assert all(p.grad is None for p in problem.model.parameters())


class Normed(nn.Module):
    """Rows of the table that are read get a length of 1 at most; with `rows` those of the weight get length 1."""

    def __init__(self, rows):
        super().__init__()
        self.table, self.a, self.b, self.rows = (
            nn.Embedding(20, 5, max_norm=1.0),
            nn.Linear(5, 7),
            nn.Linear(7, 3),
            rows,
        )

    def forward(self, ids):
        if self.rows:
            with torch.no_grad():
                self.a.weight.div_(self.a.weight.norm(dim=1, keepdim=True))
        return self.b(self.a(self.table(ids)).tanh())


NORMED = [(name, False) for name in METHODS] + [(name, True) for name in ("projector", *list(METHODS)[6:])]


@pytest.mark.parametrize("name, rows", NORMED)
def test_weights_normalised_in_the_forward_pass(name, rows):
    """Both closures see the same weights, though each writes them; rows that only one reads do not matter."""
    problem = Problem()
    problem.model, problem.x, problem.xf = Normed(rows).double(), torch.arange(N), torch.arange(3, 7)
    problem.state = copy.deepcopy(problem.model.state_dict())
    found = problem.after(name)
    problem.model.load_state_dict(problem.state)
    for ids in (problem.x, problem.xf, problem.x, problem.xf):  # as they come out
        problem.model(ids)
    problem.state = copy.deepcopy(problem.model.state_dict())
    torch.testing.assert_close(problem.after(name), found, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_weights_normalised_for_one_closure_only(name):
    """What only one of the losses depends on may change in its closure."""
    problem = Problem()
    problem.model, ids = nn.ModuleList([Normed(False), Normed(False)]).double(), torch.arange(N)
    problem.state = copy.deepcopy(problem.model.state_dict())
    problem.forget = lambda: problem.model[0](ids).square().mean()
    problem.retain = lambda: problem.model[1](ids).square().mean(1)
    problem.after(name)


@pytest.mark.parametrize("which", ["forget", "retain"])
def test_a_closure_that_freezes(which):
    problem = Problem()
    loss = getattr(problem, which)
    with pytest.raises(ValueError, match=rf"{which}\(\) set requires_grad of 0\.bias to False"):
        problem.after("orthograd", **{which: lambda o: (loss(), problem.model[0].bias.requires_grad_(False))[0]})


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


@pytest.mark.parametrize("change", [lambda losses: losses, lambda losses: 2 * losses.unsqueeze(1).squeeze(1)])
@pytest.mark.parametrize("name", TAPED)
def test_a_forward_pass_made_outside(name, change):
    problem = Problem()
    losses = problem.retain()
    with pytest.raises(ValueError, match=r"has to be made inside the retain closure"):
        problem.after(name, retain=lambda o: change(losses))
    torch.testing.assert_close(problem.model.state_dict(), problem.state, rtol=0, atol=0)
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize("name", TAPED)
def test_a_forward_pass_in_another_thread(name):
    """Its operations have low numbers too, and it was made inside the closure all the same."""
    problem = Problem()
    expected = problem.after(name)

    def retain(_):
        found = []
        thread = threading.Thread(target=lambda: found.append(problem.retain()))
        thread.start()
        thread.join()
        return found[0]

    torch.testing.assert_close(problem.after(name, retain=retain), expected, rtol=0, atol=1e-13)


class Product(torch.autograd.Function):
    """A layer that no torch function shows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, b):
        x, weight = ctx.saved_tensors
        return b @ weight, b.T @ x


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize("name", TAPED)
def test_a_model_without_any_rule(name):
    problem = Problem(1)
    problem.model = nn.Linear(5, 3, bias=False).double()
    problem.state = copy.deepcopy(problem.model.state_dict())
    expected = problem.after(name)
    found = problem.after(
        name,
        retain=lambda o: F.cross_entropy(Product.apply(problem.x, problem.model.weight), problem.y, reduction="none"),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in ONE_STEP if name != "feasible_orthograd"])
def test_one_graph_for_two_steps(name):
    problem = Problem()
    method, loss = METHODS[name](problem.model, problem.forget), problem.forget()
    method.step(lambda: loss, problem.retain)
    before = problem.parameters()
    with pytest.raises(ValueError, match=r"graph was used before.*inside each closure"):
        method.step(lambda: loss, problem.retain)
    assert torch.equal(problem.parameters(), before) and all(p.grad is None for p in problem.model.parameters())


def test_errors_of_a_closure_are_not_explained():
    """What a closure itself gets wrong is shown as it is."""
    problem = Problem()

    def twice():
        loss = problem.forget()
        torch.autograd.grad(loss, problem.model[0].weight)
        return torch.autograd.grad(loss, problem.model[0].weight)[0].sum()

    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        METHODS["orthograd"](problem.model, problem.forget).step(twice, problem.retain)


def test_inference_mode():
    problem = Problem()
    for name in ("orthograd", "feasible", "neggrad"):
        method = METHODS[name](problem.model, problem.forget)
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
            method.step(problem.forget, problem.retain)
        with torch.no_grad():  # closures run with gradients anyway
            method.step(problem.forget, problem.retain)
