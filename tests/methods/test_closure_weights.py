"""Closures that change weights, and graphs that were not made inside them."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlearners import METHODS, ONE_STEP, TAPED, N, Problem


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


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", METHODS)
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


def test_inference_mode_is_refused_and_no_grad_is_lifted():
    problem = Problem()
    for name in ("orthograd", "feasible", "neggrad"):
        method = METHODS[name](problem.model, problem.forget)
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
            method.step(problem.forget, problem.retain)
        with torch.no_grad():  # closures run with gradients anyway
            method.step(problem.forget, problem.retain)
