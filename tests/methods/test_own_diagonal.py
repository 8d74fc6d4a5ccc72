"""Optimizers that say their diagonal themselves: what cannot be used, or is not what the step did, changes nothing."""

import copy
import re

import pytest
import torch
from metric_problems import Halves, ascent, unlearner_of, wide
from unlearners import classifier, flat_parameters


def test_any_optimizer_that_says_its_diagonal():
    model, forget, retain = classifier()
    cosine, _, record = ascent(unlearner_of(model, Halves(model.parameters()), 0.0), forget, retain)
    assert cosine < 1e-10 and record.residual < 1e-10 and 0 < record.preserved_norm < 1


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf"), -1.0])
def test_a_diagonal_that_cannot_be_used_changes_nothing(factor):
    model, forget, retain = classifier()
    optimizer = Halves(model.parameters())
    unlearner = unlearner_of(model, optimizer)
    unlearner.step(forget, retain)
    before, state = flat_parameters(model), copy.deepcopy(optimizer.state_dict())
    optimizer.factor = factor
    with pytest.raises(ValueError, match="must be positive and finite"):
        unlearner.step(forget, retain)
    assert torch.equal(flat_parameters(model), before)
    assert str(optimizer.state_dict()["state"]) == str(state["state"])
    assert all(p.grad is None for p in model.parameters())


class Moving(Halves):
    """What `Halves` does, and what `more` makes of a parameter, its gradient and its diagonal."""

    def __init__(self, params, more):
        super().__init__(params)
        self.more = more

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                D = self.diagonal(p, {}, group)
                p += self.more(p, p.grad, D) - D * p.grad


WRONG = {
    "half": lambda p, g, D: 0.5 * D * g,
    "ten times": lambda p, g, D: -9 * D * g,
    "another sign": lambda p, g, D: 2 * D * g,
    "a root": lambda p, g, D: D * g - D * g / (g.abs().sqrt() + 1e-8),
    "sign": lambda p, g, D: D * g - D * g.sign(),
}
RIGHT = {
    "decay": lambda p, g, D: -0.5 * p,
    "noise": lambda p, g, D: 0.1 * torch.randn_like(p),
    "rounding": lambda p, g, D: 0 * p,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_diagonal_that_is_not_what_the_step_did_changes_nothing(name):
    model, forget, retain = classifier()
    optimizer = Moving(model.parameters(), lambda p, g, D: 0 * p)
    unlearner = unlearner_of(model, optimizer)
    unlearner.step(forget, retain)
    before = flat_parameters(model)
    optimizer.more = WRONG[name]
    with pytest.raises(ValueError, match="did not move the parameters by -diagonal"):
        unlearner.step(forget, retain)
    assert torch.equal(flat_parameters(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_what_the_gradient_does_not_enter_is_no_wrong_diagonal(name, dtype):
    model, forget, retain = (part.to(dtype) if k == 0 else part for k, part in enumerate(wide(dtype)))
    optimizer = Moving(model.parameters(), RIGHT[name])
    if name == "rounding":
        optimizer.param_groups[0]["lr"] = 1e-9  # weights in float32 and less hardly move
    along = lambda: forget() - sum(p.square().sum() for p in model.parameters())  # noqa: E731
    for closure in (forget, along):
        assert unlearner_of(model, optimizer).step(closure, retain).preserved_norm <= 1.01


def test_a_diagonal_of_another_shape_is_named():
    model, forget, retain = classifier()
    optimizer = Halves(model.parameters())
    optimizer.diagonal = lambda param, state, group: torch.ones(2, 2)
    with pytest.raises(ValueError, match=re.escape("diagonal() returned shape (2, 2) for 0.weight, which has (7, 5)")):
        unlearner_of(model, optimizer).step(forget, retain)
