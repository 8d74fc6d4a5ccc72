"""The baselines are their formulas, and leave everything alone when something is wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from projgrad.methods.baselines import SCRUB, NegGradPlus, PCGrad, SalUn

LR = 0.1


@pytest.fixture
def setup():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    xf, xr = torch.randn(6, 5).double(), torch.randn(9, 5).double()
    yf, yr = torch.randint(3, (6,)), torch.randint(3, (9,))
    forget = lambda: cross_entropy(model(xf), yf)  # noqa: E731
    retain = lambda: cross_entropy(model(xr), yr, reduction="none")  # noqa: E731
    return model, torch.optim.SGD(model.parameters(), lr=LR), forget, retain


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(model, forget, retain):
    params = list(model.parameters())
    return flat(torch.autograd.grad(forget(), params)), flat(torch.autograd.grad(retain().mean(), params))


def update(model, method, *closures):
    """What the method took from the parameters, over the learning rate."""
    before = flat(model.parameters())
    record = method.step(*closures)
    return (before - flat(model.parameters())) / LR, record


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_neggrad_plus_is_its_formula(setup, alpha):
    model, optimizer, forget, retain = setup
    u, r = gradients(model, forget, retain)
    found, record = update(model, NegGradPlus(model, optimizer, alpha), forget, retain)
    torch.testing.assert_close(found, alpha * r - (1 - alpha) * u, rtol=0, atol=1e-13)
    assert (record.forget_loss is None) == (alpha == 1) and (record.retain_loss is None) == (alpha == 0)


def test_an_objective_is_descended(setup):
    model, optimizer, forget, retain = setup
    u, r = gradients(model, forget, retain)
    found, _ = update(model, NegGradPlus(model, optimizer, 0.3, ascend=False), forget, retain)
    torch.testing.assert_close(found, 0.3 * r + 0.7 * u, rtol=0, atol=1e-13)


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_the_update_is_clipped(setup, max_norm):
    model, optimizer, forget, retain = setup
    u, r = gradients(model, forget, retain)
    found, _ = update(model, NegGradPlus(model, optimizer, 0.5, max_norm=max_norm), forget, retain)
    assert found.norm() == pytest.approx(min(max_norm, float((0.5 * r - 0.5 * u).norm())), rel=1e-3)


@pytest.mark.parametrize("conflict", [True, False])
def test_pcgrad_takes_out_what_conflicts_and_no_more(setup, conflict):
    model, optimizer, forget, retain = setup
    if conflict:  # ascent on the forget loss against descent on nearly the same loss
        forget = lambda: 0.5 * retain().mean() + 0.5 * setup[2]()  # noqa: E731
    u, r = gradients(model, forget, retain)
    d = -u if conflict else u
    dot = float(d @ r)
    if not conflict and dot < 0:
        d, dot = -d, -dot
    assert (dot < 0) == conflict
    ascend = bool(torch.equal(d, -u))
    found, _ = update(model, PCGrad(model, optimizer, 0.3, ascend=ascend), forget, retain)
    if conflict:
        r, d = r - dot * d / (d @ d), d - dot * r / (r @ r)
    torch.testing.assert_close(found, 0.3 * r + 0.7 * d, rtol=0, atol=1e-13)


def test_salun_changes_only_the_salient_half(setup):
    model, optimizer, forget, retain = setup
    u, _ = gradients(model, forget, retain)
    method = SalUn(model, optimizer, forget, 0.5)
    found, _ = update(model, method, forget, retain)
    salient = u.abs() >= u.abs().quantile(0.5)
    assert found[~salient].abs().max() == 0 and found[salient].abs().min() > 0
    assert int(salient.sum()) == round(len(u) / 2)


def test_scrub_ascends_only_in_its_first_steps(setup):
    model, optimizer, forget, retain = setup
    method = SCRUB(model, optimizer, 1)
    assert method.step(forget, retain).forget_loss is not None
    _, r = gradients(model, forget, retain)
    found, record = update(model, method, forget, retain)
    assert record.forget_loss is None
    torch.testing.assert_close(found, r, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bad", ["forget", "retain"])
def test_a_loss_that_is_not_finite_changes_nothing(setup, bad):
    model, optimizer, forget, retain = setup
    before = copy.deepcopy(model.state_dict())
    nan = lambda: forget() * float("nan")  # noqa: E731
    for method in (NegGradPlus(model, optimizer, 0.5), PCGrad(model, optimizer, 0.5)):
        with pytest.raises(FloatingPointError, match=f"the {bad} loss is nan"):
            method.step(*((nan, retain) if bad == "forget" else (forget, nan)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_changes_nothing(setup):
    model, optimizer, forget, retain = setup
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="NaN or Inf in the update"):
        NegGradPlus(model, optimizer, 0.5).step(lambda: (forget() - forget().detach()).abs().sqrt(), retain)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_bad_options_and_closures_of_baselines_are_refused(setup):
    model, optimizer, forget, retain = setup
    with pytest.raises(ValueError, match=r"alpha .* must be in \[0, 1\]; got 1.5"):
        NegGradPlus(model, optimizer, 1.5)
    with pytest.raises(ValueError, match=r"share .* must be in \(0, 1\]; got 0"):
        SalUn(model, optimizer, forget, share=0)
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        NegGradPlus(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1))
    with pytest.raises(ValueError, match=r"forget\(\) must return one scalar loss; got \(9,\)"):
        NegGradPlus(model, optimizer).step(retain, retain)


def test_salun_refuses_other_parameters_of_the_same_shapes():
    """The masks of one layer would choose the weights of another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].requires_grad_(False)
    x, optimizer = torch.randn(6, 4), torch.optim.SGD(model.parameters(), lr=0.1)

    def loss():
        return model(x).square().mean()

    method = SalUn(model, optimizer, loss)
    method.step(loss, loss)
    model[0].requires_grad_(False)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match="make a new SalUn"):
        method.step(loss, loss)
