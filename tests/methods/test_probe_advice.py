"""The advice of the probe, and the table that it stands in."""

import dataclasses
import functools
import json

import pytest
import torch
from probing import first, quick
from torch import nn
from torch.nn import functional as F
from unlearners import classifier

from projgrad.methods.probe.report import ProbeRow
from projgrad.methods.probe.step_length import FORGETTING, NOTHING, ROUNDING

F64 = torch.float64
pytestmark = pytest.mark.same_without_extension


def test_samples_that_touch_other_weights_need_no_protection():
    model = nn.Linear(8, 1, bias=False).double()
    x = torch.eye(8, dtype=F64)
    probed = quick(model, lambda: model(x[6:]).sum(), lambda n: model(x[:6][:n])[:, 0].square(), sizes=(2, 6))
    assert all(row.preserved_norm == 1 for row in probed.rows) and probed.plain_change == 0
    assert probed.verdict == "nothing to protect" and "Nothing to protect" in str(probed)


def test_forgetting_a_protected_sample_is_said_to_be_in_vain():
    model, x, y = nn.Linear(8, 3).double(), torch.randn(6, 8, dtype=F64), torch.arange(6) % 3
    losses = lambda n=6: F.cross_entropy(model(x[:n]), y[:n], reduction="none")  # noqa: E731
    probed = quick(model, lambda: losses()[0], losses, sizes=(2, 4), scopes=["per_tensor", "global"])
    assert all(row.preserved_norm < 1e-6 and row.why == NOTHING and row.learning_rate is None for row in probed.rows)
    assert probed.verdict == "forget among retain" and "lie among the protected ones" in str(probed)


def test_a_loss_without_gradient_is_said_to_be_forgotten():
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    probed = quick(model, lambda: 0 * model(x).sum(), lambda n: model(x[:n]).square().sum(1), sizes=[2])
    assert probed.verdict == "nothing to forget"


def test_samples_that_do_not_protect_others_are_too_few():
    """Where retain samples share nothing but the forget direction, protecting some does not help the others."""
    model, n = nn.Linear(65, 1, bias=False).double(), 32
    x = torch.cat([torch.ones(n, 1), 5 * torch.eye(n, 64)], 1).double()
    forget = torch.zeros(1, 65, dtype=F64)
    forget[0, 0] = 1
    look = functools.partial(quick, model, lambda: model(forget).sum(), sizes=(4, 20), scopes=["global"])
    probed = look(retain=lambda k: model(x[:k])[:, 0])
    assert probed.verdict == "not known" and "Add a larger one to sizes" in probed.advice
    probed = look(retain=lambda k: model(x[:k])[:, 0], sizes=(4, 16, 20))
    assert probed.verdict == "too few samples" and "with n = 16, retain samples that are not" in probed.advice
    assert "Take more of them" in probed.advice
    probed = look(retain=lambda k: model(x[:k])[:, 0], sizes=(16, 64))
    assert probed.verdict == "too few samples" and "There are only 32" in probed.advice
    assert "Take more" not in probed.advice
    assert probed.rows[0].spill == pytest.approx(1)  # g_j = (1, 5 e_j): what u_perp does to it is ‖u_perp‖², as u does
    forget[0, :32] = 1
    alike = torch.ones(n, 65, dtype=F64) + 0.1 * torch.randn(n, 65, dtype=F64)
    probed = look(retain=lambda k: model(alike[:k])[:, 0])
    assert probed.verdict == "worth it" and "and n = 20" in probed.advice and probed.rows[0].spill < 0.5
    probed = look(retain=lambda k: model(alike[:k])[:, 0], sizes=(2, 8))
    assert probed.verdict == "too few samples" and "from digits: with fewer than 16" in probed.advice


@pytest.mark.parametrize("sizes, said", [([20], "a larger one"), ([64], "a smaller one")])
def test_one_size_cannot_show_whether_others_are_protected(sizes, said):
    x = torch.ones(32, 65, dtype=F64) + 0.1 * torch.randn(32, 65, dtype=F64)
    model, target = nn.Linear(65, 1, bias=False).double(), torch.eye(65, dtype=F64)[:1]
    probed = quick(model, lambda: model(target).sum(), lambda n: model(x[:n])[:, 0], sizes=sizes, scopes="global")
    assert probed.verdict == "not known" and f"Add {said}" in probed.advice


def test_forget_samples_among_more_retain_samples_are_said_to_be_there():
    model, x, y = nn.Linear(60, 4).double(), torch.randn(80, 60, dtype=F64), torch.arange(80) % 4
    losses = lambda i: F.cross_entropy(model(x[i]), y[i], reduction="none")  # noqa: E731
    probed = quick(model, lambda: losses(slice(8)).mean(), lambda n: losses(slice(n)), scopes="global")
    assert probed.rows[0].preserved_norm > 0.3 and probed.rows[2].preserved_norm < 1e-6
    assert probed.verdict == "forget among retain" and "with n = 8 " in probed.advice


def test_retain_losses_at_their_minimum_need_no_protection_yet():
    model, x = nn.Linear(60, 4).double(), torch.randn(40, 60, dtype=F64)
    teacher = model(x).softmax(1).detach() + 1e-9 * torch.randn(40, 4, dtype=F64)
    retain = lambda n: F.kl_div(model(x[8:][:n]).log_softmax(1), teacher[8:][:n], reduction="none").sum(1)  # noqa: E731
    probed = quick(model, lambda: F.cross_entropy(model(x[:8]), torch.arange(8) % 4), retain, scopes="global")
    assert probed.plain_change < 1e-6 and probed.verdict == "nothing to protect"
    assert "distillation" in probed.advice


def test_a_rate_at_which_the_objective_gets_worse_is_not_advised():
    """Losses linear in the weights have no limit of their own; the objective ½ w² of a descent is half gained at 1."""
    model = nn.Linear(40, 1, bias=False).double()
    x = torch.cat([torch.ones(20, 1), 0.1 * torch.randn(20, 19), torch.zeros(20, 20)], 1).double()
    retain = lambda n: model(x[:n])[:, 0]  # noqa: E731
    probed = quick(
        model, lambda: model.weight.square().sum() / 2, retain, sizes=(4, 18, 20), scopes="global", ascend=False
    )
    for row in probed.rows:
        assert row.why == FORGETTING and row.learning_rate == pytest.approx(2, rel=0.06)  # η = 1 by half, as α = 0.5
        assert row.forget_change == pytest.approx(0.5 * row.step_length**2, rel=0.06)  # η = 1: the length is ‖u_perp‖
    assert probed.verdict == "worth it" and "gains less than half" in probed.advice
    assert "multiplies the retain part too (alpha=0.5)" in probed.advice
    probed = quick(model, lambda: model.weight.sum(), retain, sizes=(4, 18, 20), scopes="global", alpha=0)
    assert probed.verdict == "worth it" and "No learning rate was found to be too large" in probed.advice


def test_the_table_is_narrow_and_the_dictionary_is_json():
    model, forget, retain = classifier()
    probed = quick(model, forget, first(retain), sizes=(2, 6))
    assert max(map(len, str(probed).splitlines())) <= 100
    numbers = (1.2345e-5, 1.2345e-5, 1.2345e-5, "", 123.456, 1.2345, 123_456_789_012, 10_000_000_000)
    widest = ProbeRow("per_tensor", 256, 99999, 0.98765, 1.2345e-8, 0.98765, *numbers)
    rows = widest, dataclasses.replace(widest, why=ROUNDING, learning_rate=None, step_length=None, forget_change=None)
    wide = dataclasses.replace(probed, rows=rows, notes=("a " * 80,), parameters=10**12)
    assert max(map(len, str(wide).splitlines())) <= 100
    again = json.loads(json.dumps(probed.to_dict()))
    assert again["rows"][0]["rank"] == 2 and again["verdict"] == probed.verdict and len(again["rows"]) == 4
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in probed.rows)
