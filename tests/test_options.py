"""Options of PGU, of the evaluation and of the reference projectors: not numbers, out of range, of another type."""

import math
import re

import numpy as np
import pytest
import torch
from published_pgu import fitted, perceptron, sgd
from torch import nn

from projgrad import projectors
from projgrad.evaluate import draw, table
from projgrad.methods.pgu.loss import unlearning_loss
from projgrad.methods.pgu.pgu import PGU

pytestmark = pytest.mark.filterwarnings("ignore:PGU protects nothing")
LOGITS, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


def pgu(**options):
    model = perceptron()
    return PGU(model, sgd(model), **options)


def run(**options):
    unlearner, x, y = fitted()
    return unlearner.run([(x[:5], y[:5])], lambda: (1.0, 0.5), **{"epochs": 1, **options})


# name -> (function of a value, values out of range, what is wanted, values that are right)
NUMBERS = {
    "gamma": (lambda v: pgu(gamma=v), (0, -0.5, 1.5, math.inf), "in (0, 1]", (1, 0.5)),
    "gamma for 0.weight": (lambda v: pgu(gamma={"0.weight": v, "default": 0.5}), (0, -1), "in (0, 1]", (1, 0.5)),
    "soft": (lambda v: pgu(soft=v), (-1, -1e-9, math.inf), "in [0, inf)", (0, 0.5)),
    "max_norm": (lambda v: pgu(max_norm=v), (0, -1.0), "in (0, inf]", (1, 0.5, math.inf)),
    "epochs": (lambda v: run(epochs=v), (0, -1), "integer of at least 1", (1, 2)),
    "lr": (lambda v: run(lr=(v, 0.1)), (0, -0.1, math.inf), "in (0, inf)", (1, 0.5)),
    "drop": (lambda v: run(drop=v), (-0.1, math.inf), "in [0, inf)", (0, 0.5)),
    "offset": (lambda v: unlearning_loss(LOGITS, LABELS, v), (-0.1, math.inf), "in [0, inf)", (0, 0.5)),
    "entropy_weight": (
        lambda v: unlearning_loss(LOGITS, LABELS, entropy_weight=v), (-0.1, math.inf), "in [0, inf)", (0, 0.5)
    ),
    "width": (lambda v: table(SCENARIO, {}, v), (0, -5), "integer of at least 1", (80, 1)),
    "size": (
        lambda v: projectors.qr_per_tensor(torch.zeros(2), torch.zeros(1, 2), [v]), (-1,), "integer of at least 0", (2,)
    ),
}  # fmt: skip
SCENARIO = {
    "title": "", "seeds": [0], "sizes": {}, "parameters": 1, "trainable": 1, "forget_title": "", "small": False,
    "settings": {}, "runs": [{"method": "scrub", "seed": 0, "scores": {"test": 0.5}}],
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_or_of_other_types_are_refused(name):
    """NaN, infinity, the sign and other types, truth values among them; what is right in any type of number goes."""
    if name == "width":
        pytest.importorskip("rich")
    call, wrong, wanted, right = NUMBERS[name]
    what, is_integer = rf"{name.split()[0]}\b.* must be (a number |an )?{re.escape(wanted)}; got ", "integer" in wanted
    for value in (math.nan, -math.inf, *wrong):
        with pytest.raises(TypeError if is_integer and isinstance(value, float) else ValueError, match=what):
            call(value)
    for value in ("0.5", [0.5], (), True, np.True_, torch.ones(2), *(() if name == "max_norm" else (None,))):
        with pytest.raises(TypeError, match=what):
            call(value)
    for value in right:
        for kind in (type(value), np.float32 if isinstance(value, float) else np.int64, torch.tensor):
            call(kind(value))
    if is_integer:
        with pytest.raises(TypeError, match=what):
            call(2.5)


MODEL = perceptron()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PGU(sgd(MODEL), MODEL), "model and optimizer are swapped: the model comes first"),
        (lambda: PGU(MODEL, torch.optim.SGD), "optimizer must be a torch optimizer.*; got the class SGD"),
        (lambda: PGU(MODEL, list(MODEL.parameters())), "optimizer must be .*; got a list"),
        (lambda: PGU(MODEL, None), "optimizer must be .*; got a NoneType"),
        (lambda: pgu(forward=3), r"forward must be a function \(model, batch\), or None; got int"),
        (lambda: pgu(check_samples="no"), "check_samples must be True or False; got 'no'"),
        (lambda: pgu(ascend=-1), "ascend must be True or False; got -1"),
        (lambda: fitted()[0].step(torch.ones(())), "forget must be a function without arguments .*; got a Tensor"),
        (lambda: fitted()[0].step((LOGITS, LABELS)), "forget must be a function without arguments .*; got a tuple"),
        (lambda: fitted()[0].run([], 0.5), "run: validate must be a function that returns two accuracies; got float"),
        (lambda: run(progress="bar"), "run: progress must be a function of an Epoch, or None; got str"),
        (lambda: fitted()[0].run([], lambda: 0.5), r"run: validate\(\) must return two accuracies.*; got 0.5"),
        (lambda: fitted()[0].run([], lambda: ("a", "b")), r"run: validate\(\) must return two accuracies.*; got \('a'"),
        (lambda: unlearning_loss(LOGITS.long(), LABELS), "logits must be floating point; got torch.int64"),
        (lambda: unlearning_loss(LOGITS, LABELS.float()), "labels must be integers; got torch.float32"),
    ],
)
def test_other_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: run(lr=0.1), "lr must be two positive numbers, that of the first and of the last epoch; got 0.1"),
        (lambda: run(lr=(0.1,)), r"lr must be two positive numbers, .*; got \(0.1,\)"),
        (lambda: unlearning_loss(LOGITS[:0], LABELS[:0]), r"n at least 1; got \(0, 3\) and \(0,\)"),
        (lambda: unlearning_loss(LOGITS, LABELS - 100), r"integers in \[0, 3\), .*; got -100 to -100"),
        (lambda: projectors.qr(torch.ones(3), torch.ones(2, 2)), r"qr: u must be .*; got u \(3,\) and G \(2, 2\)"),
        (lambda: projectors.lstsq(torch.ones(2), torch.ones(2)), r"lstsq: u must be .*; got u \(2,\) and G \(2,\)"),
        (lambda: projectors.qr(torch.ones(2).double(), torch.ones(1, 2)), "qr: u and G must have one dtype"),
        (
            lambda: projectors.qr_per_tensor(torch.ones(3), torch.ones(1, 3), [1, 1]),
            r"sizes must add up to p = 3; got \[1, 1\], which are 2",
        ),
    ],
)
def test_other_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool], ids=str)
def test_forget_labels_of_any_integer_type(dtype):
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 1, 0])
    assert torch.equal(unlearning_loss(logits, labels.to(dtype)), unlearning_loss(logits, labels))


def test_validation_may_return_any_two_numbers():
    unlearner, x, y = fitted()
    for kind in (list, np.array, torch.tensor):
        done = unlearner.run([(x[:5], y[:5])], lambda kind=kind: kind([1.0, 0.5]), epochs=1, lr=[0.1, 0.1])
        assert done.epochs[0].forget_accuracy == 1


def test_a_closure_that_runs_backward_itself_is_refused():
    """What it leaves in `.grad` would be added to."""
    unlearner, x, _ = fitted()
    model, before = unlearner.model, [p.detach().clone() for p in unlearner.model.parameters()]

    def forget():
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(ValueError, match=r"forget\(\) left a gradient in 0.weight.grad"):
        unlearner.step(forget)
    assert all(map(torch.equal, before, model.parameters())) and all(p.grad is None for p in model.parameters())


def test_pictures_go_where_a_text_says(tmp_path):
    pytest.importorskip("matplotlib")
    results = {"scenarios": {}, "environment": {}, "command": "", "finished": True}
    draw(results, {}, str(tmp_path / "pictures"))
    assert (tmp_path / "pictures").is_dir()


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        PGU(MODEL, sgd(nn.Linear(2, 2)))
