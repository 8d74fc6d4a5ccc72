"""PGU says when the kept directions leave nothing to forget with, and only then."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from published_pgu import fitted
from torch import nn
from torch.nn.functional import cross_entropy

from projgrad.methods.pgu.pgu import PGU
from projgrad.methods.pgu.schedule import PGURecord, expected_change

F64 = torch.float64
pytestmark = pytest.mark.same_without_extension


@pytest.fixture(scope="module")
def trained():
    """A small network that knows four classes, and what it was trained on."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)]
    model, y = nn.Sequential(*layers).double(), torch.arange(120) % 4
    x = 2 * torch.randn(4, 16, dtype=F64)[y] + 0.5 * torch.randn(120, 16, dtype=F64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict()), layers, x, y


def forget_a_class(trained, gamma, lr, epochs=60, **options):
    state, layers, x, y = trained
    model, forget = nn.Sequential(*layers), y == 0
    model.load_state_dict(state)
    pgu = PGU(model, torch.optim.SGD(model.parameters(), lr=1.0), gamma, **options).fit([x]).forget([x[forget]])

    def accuracies():
        right = (model(x).argmax(1) == y).double()
        return float(right[forget].mean()), float(right[~forget].mean()) - 0.1

    return pgu.run([(x[forget], y[forget])], accuracies, epochs=epochs, lr=lr)


def test_a_basis_that_leaves_nothing_is_said_at_the_first_step_and_at_the_end(trained):
    with pytest.warns(UserWarning, match=r"the kept directions leave 0\.07\d? of .* Use a smaller gamma") as told:
        result = forget_a_class(trained, 0.99, (0.1, 0.01))
    assert len(told) == 1 and told[0].filename == __file__
    assert result.reason == "blocked" and result.kept == 60 and result.error == ""
    assert result.epochs[0].forget_accuracy == result.epochs[-1].forget_accuracy == 1  # nothing is forgotten
    assert all(epoch.record.blocked for epoch in result.epochs[1:])


@pytest.mark.parametrize(
    "gamma, lr",
    [(0.5, (0.1, 0.01)), (0.9, (0.1, 0.01)), (0.99, (4.0, 0.4))],
    ids=["small gamma", "large gamma", "large rate"],
)
def test_a_run_that_forgets_is_silent(trained, gamma, lr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = forget_a_class(trained, gamma, lr)
    assert result.reason == "stopped" and not result.epochs[1].record.blocked
    assert result.epochs[-1].forget_accuracy < result.epochs[0].forget_accuracy


def test_every_request_is_said_once(trained):
    state, layers, x, y = trained
    model = nn.Sequential(*layers)
    model.load_state_dict(state)
    pgu = PGU(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.99).fit([x])
    for start in (0, 16):
        rows = slice(start, start + 16, 4)  # of one class
        pgu.forget([x[rows]])
        with pytest.warns(UserWarning, match="hardly anything will be forgotten"):
            pgu.step(lambda rows=rows: (pgu.model(x[rows]), y[rows]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pgu.step(lambda rows=rows: (pgu.model(x[rows]), y[rows]))


def test_the_published_loss_is_judged_where_it_is_zero_too():
    """It is positive where the labels are likely, and negative where they are not."""
    pgu, x, y = fitted(gamma=0.5)
    losses = []
    for scale in torch.linspace(-3, 3, 13).tolist():  # from unlikely labels to likely ones
        record = pgu.step(lambda scale=scale: (scale * pgu.model(x[:1]).softmax(1), y[:1]))
        losses.append(record.forget_loss)
        assert dataclasses.replace(record, preserved_norm=0.05, expected_change=4e-4).blocked
    assert min(map(abs, losses)) < 0.1


@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_the_expected_change_is_that_of_a_small_step(max_norm):
    pgu, x, y = fitted(gamma=0.5, max_norm=max_norm)
    pgu.optimizer.param_groups[0]["lr"] = 1e-4
    loss = lambda: cross_entropy(pgu.model(x[:5]), y[:5])  # noqa: E731
    before = loss().item()
    record = pgu.step(loss)
    assert loss().item() - before == pytest.approx(record.expected_change, rel=1e-2) and record.gradient_norm > 0.1


def test_what_counts_as_blocked():
    record = PGURecord(3, 9, {}, 0.05, 0.0, 0.1, 1e-4, 2.0, 0.0)
    assert record.blocked
    near_zero = dataclasses.replace(record, forget_loss=-1e-5)
    assert not near_zero.blocked and dataclasses.replace(near_zero, unit=1.0).blocked
    for change in (
        {"preserved_norm": 0.2},
        {"expected_change": 2e-3},
        {"expected_change": math.nan},
        {"forget_loss": 0.1},
    ):
        assert not dataclasses.replace(record, **change).blocked, change
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataclasses.replace(record, expected_change=0.0).warn_if_blocked()  # a warm-up that begins at a rate of 0
    with pytest.warns(UserWarning, match="infinitely many steps"):
        dataclasses.replace(record, expected_change=0.0, gradient_norm=0.0).warn_if_blocked()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.5)
    assert expected_change(optimizer, 2.0, None) == 2.0 and expected_change(optimizer, 2.0, 0.5) == 0.5
    assert expected_change(optimizer, 0.0, 0.5) == 0.0
    optimizer.param_groups[0]["momentum"] = 0.75  # a step is followed by three quarters of it, and so on
    assert expected_change(optimizer, 2.0, None) == 8.0
    optimizer.param_groups[0]["dampening"] = 0.5
    assert expected_change(optimizer, 2.0, None) == 4.0
    assert math.isnan(expected_change(torch.optim.Adam(optimizer.param_groups[0]["params"]), 2.0, None))
