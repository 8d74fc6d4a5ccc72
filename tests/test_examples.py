"""The examples run and say what the package does."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import projgrad

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def by_hand():
    return load("orthograd_by_hand")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_orthograd_by_hand_takes_the_steps_of_orthograd(by_hand, alpha):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    theirs = copy.deepcopy(mine)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    unlearner = projgrad.OrthoGrad(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), alpha=alpha)
    for _ in range(5):
        (xf, yf), (xr, yr) = ((torch.randn(n, 6, dtype=torch.float64), torch.randint(4, (n,))) for n in (7, 10))
        preserved = by_hand.step(mine, optimizer, (xf, yf), (xr, yr), alpha)
        record = unlearner.step(
            lambda xf=xf, yf=yf: cross_entropy(theirs(xf), yf),
            lambda xr=xr, yr=yr: cross_entropy(theirs(xr), yr, reduction="none"),
        )
        assert preserved == pytest.approx(record.preserved_norm, abs=1e-12)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_orthograd_by_hand_forgets_one_class_and_keeps_the_others(by_hand, capsys):
    by_hand.main()
    last = capsys.readouterr().out.splitlines()[-1]
    forget, retain = (int(last.split(f"{name} ")[1].split("%")[0]) for name in ("forget", "retain"))
    assert forget < 5 and retain > 90, last


@pytest.mark.same_without_extension
def test_forget_facts_forgets_four_people_and_keeps_the_others(tmp_path, capsys):
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    table = load("forget_facts").main(str(tmp_path))
    assert min(table["taught"]) > 0.95
    forget, retain = table["orthograd"]
    assert forget < 0.2 and retain > 0.95 and table["grad_ascent"][1] < 0.2, table
    assert "orthograd" in capsys.readouterr().out.splitlines()[-1]
