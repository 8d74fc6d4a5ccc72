"""What is given to `projgrad.evaluate`: labels of all kinds, models that diverged, results that hold NaN."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from projgrad.evaluate import (
    Classification,
    differences,
    distance,
    gap,
    histogram,
    paired,
    scores,
    summarize,
    summarize_study,
    tow,
    uis,
    verdict,
)
from projgrad.evaluate.problem import Part

pytestmark = pytest.mark.same_without_extension

LABELS = torch.arange(40) % 4
X = nn.functional.one_hot(LABELS, 4).float()


def problem(labels=LABELS, name="forget"):
    data = dict.fromkeys(("retain", "forget", "test", "validation", "strangers"), (X, LABELS))
    return Classification(**{**data, name: (X, labels)})


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("as_part", [False, True], ids=["tuple", "Part"])
def test_integers_of_any_type_are_labels(dtype, as_part):
    model = nn.Linear(4, 4)
    data = {name: (X, LABELS.to(dtype)) for name in ("retain", "forget", "test")}
    if as_part:
        data = {name: Part((x,), y) for name, (x, y) in data.items()}
    plain = Classification(**dict.fromkeys(data, (X, LABELS)))
    assert scores(Classification(**data), model) == scores(plain, model)
    two = (LABELS > 1, (LABELS > 1).long())
    models = [Classification(**dict.fromkeys(data, (X, y))) for y in two]
    assert scores(models[0], model) == scores(models[1], model)


@pytest.mark.parametrize("name", ["retain", "forget", "test", "validation", "strangers"])
@pytest.mark.parametrize("label", [-100, -1])
def test_labels_that_losses_ignore_are_refused(name, label):
    """They would count as wrong, and as members of the training set with certainty."""
    labels = LABELS.clone()
    labels[[3, 5]] = label
    with pytest.raises(
        ValueError, match=rf"labels of {name} should be .*; 2 of 40 are negative, such as {label}: leave"
    ):
        problem(labels, name)
    kept = labels >= 0
    data = {"retain": (X, LABELS), "forget": (X, LABELS), "test": (X, LABELS), name: (X[kept], labels[kept])}
    assert 0 <= scores(Classification(**data), nn.Linear(4, 4))["mia_auc"] <= 1


@pytest.mark.parametrize("name", ["retain", "forget", "test", "validation", "strangers"])
def test_labels_beyond_the_classes_of_the_model_are_named(name):
    labels = LABELS.clone()
    labels[7] = 9
    with pytest.raises(ValueError, match=f"{name}: labels go up to 9, and the model has logits of 4 classes"):
        scores(problem(labels, name), nn.Linear(4, 4))


class Returns(nn.Module):
    """What a function makes of the inputs, for those of its samples that are in some classes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def spoiled(value):
    def logits(x):
        x = x.clone()
        x[x[:, 1] == 1] = value
        return x

    return logits


@pytest.mark.parametrize(
    "function, message",
    [
        (
            spoiled(math.nan),
            "forget: the model gives no probabilities for 10 of 40 samples: their largest logit is nan",
        ),
        (spoiled(math.inf), "for 10 of 40 samples: their largest logit is inf"),
        (spoiled(-math.inf), "for 10 of 40 samples: their largest logit is -inf"),
        (
            lambda x: x[:, 0],
            r"forget: the model should return logits \(samples, classes\).*40 samples it returned \(40,\)",
        ),
        (lambda x: x[:3], r"for 40 samples it returned \(3, 4\)"),
        (lambda x: x[:, None], r"it returned \(40, 1, 4\)"),
        (lambda x: {"y": x}, r"it returned dict"),
    ],
)
def test_models_that_give_no_probabilities_are_refused_by_part(function, message):
    with pytest.raises(ValueError, match=message):
        scores(problem(), Returns(function))
    right = Returns(lambda x: x)
    for references in ({"original": Returns(function)}, {"retrained": Returns(function)}):
        with pytest.raises(ValueError, match=r"(forget|test): the model"):
            scores(problem(), right, **references)


def test_classes_that_a_model_rules_out_are_no_error():
    assert scores(problem(), Returns(lambda x: torch.where(x == 1, 0.0, -math.inf)))["forget"] == 1


@pytest.mark.parametrize(
    "samples, message",
    [
        (X, "forget should be .x, y. or a data set of such samples; got Tensor"),
        (None, "forget should be .x, y. .*; got NoneType"),
        ((X, LABELS.to(torch.complex64)), r"should be class indices .samples,., they are torch.complex64 \(40,\)"),
        ((X, LABELS[:, None]), r"they are torch.int64 \(40, 1\)"),
        ((torch.tensor(1.0), LABELS), "a number against 40"),
    ],
)
def test_samples_of_another_form_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        Classification(retain=(X, LABELS), test=(X, LABELS), forget=samples)


ACCURACIES = {"forget": 0.5, "retain": 0.5, "test": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, "0.5", [0.5]], ids=str)
@pytest.mark.parametrize("metric", [tow, gap, uis])
def test_metrics_refuse_accuracies_outside_zero_to_one(metric, value):
    for pair in (({**ACCURACIES, "test": value}, ACCURACIES), (ACCURACIES, {**ACCURACIES, "test": value})):
        with pytest.raises(ValueError, match=r"accuracies are shares between 0 and 1, 'test' is"):
            metric(*pair)
    with pytest.raises(ValueError, match="accuracies by part, as `scores` returns them; got float"):
        metric(0.5, ACCURACIES)


def test_accuracies_of_any_kind_of_number():
    for kind in (np.float32, np.float64, torch.tensor):
        assert tow({name: kind(0.5) for name in ACCURACIES}, ACCURACIES) == 1
    with pytest.raises(ValueError, match="parts should name one part or more"):
        gap(ACCURACIES, ACCURACIES, parts=())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_distance_is_a_number(value):
    model = nn.Sequential(nn.Linear(2, 2))
    original = copy.deepcopy(model)
    with torch.no_grad():
        model[0].bias[0] = value
    for pair in ((model, original), (original, model)):
        with pytest.raises(ValueError, match=r"'0.bias' holds NaN or Inf"):
            distance(*pair)
    with pytest.raises(ValueError, match="original should be a model or its parameters by name; got list"):
        distance(model, list(original.parameters()))


def test_a_histogram_is_of_probabilities():
    with pytest.raises(ValueError, match="confidence has NaN for 1 of 2 samples"):
        histogram(torch.tensor([0.5, math.nan]))
    with pytest.raises(ValueError, match=r"confidence has values that are no probabilities, between 0.5 and 2.0"):
        histogram([0.5, 2.0])


# Results


def results(value, metric="tow", **more):
    runs = [
        {"method": method, "seed": seed, "n": 4, "scores": {"tow": 0.5, "test": 0.5}}
        for method in ("scrub", "orthograd")
        for seed in (0, 1)
    ]
    target = runs[3] if metric == "seconds" else runs[3]["scores"]
    target[metric] = value
    return {"runs": runs, "study": runs, **more}


CONCLUSIONS = {
    "summarize": summarize,
    "summarize_study": summarize_study,
    "paired": lambda some: paired(some, "orthograd", "scrub"),
    "differences": differences,
    "verdict": lambda some: verdict(some, {}),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), torch.tensor(math.nan)], ids=repr)
@pytest.mark.parametrize("name", CONCLUSIONS)
def test_no_conclusion_from_what_is_not_finite(name, value):
    with pytest.raises(ValueError, match=r"tow of orthograd, seed 1, is (nan|inf), and so .* Write None"):
        CONCLUSIONS[name](results(value))
    if name.startswith("summarize"):
        with pytest.raises(ValueError, match=r"seconds of orthograd, seed 1, is"):
            CONCLUSIONS[name](results(value, "seconds"))
    CONCLUSIONS[name](results(None))


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, float])
def test_numbers_of_any_kind_count(kind):
    row = summarize(results(kind(0.25)))["orthograd"]
    assert row["tow"] == {"mean": 0.375, "std": pytest.approx(0.125 * math.sqrt(2)), "count": 2}
    assert paired(results(kind(0.25)), "orthograd", "scrub").mean == -0.125
    assert "bins" not in summarize(results([1, 2], "bins"))["orthograd"]


@pytest.mark.parametrize("call", [summarize, CONCLUSIONS["paired"], CONCLUSIONS["verdict"]])
def test_results_of_another_form_are_named(call):
    for wrong in ([], {"scenarios": {}}, None):
        with pytest.raises(ValueError, match=f'with its runs under "runs"; got {type(wrong).__name__}'):
            call(wrong)
    with pytest.raises(ValueError, match="a run should have scores; it has method, seed"):
        call({"runs": [{"method": "scrub", "seed": 0}]})
