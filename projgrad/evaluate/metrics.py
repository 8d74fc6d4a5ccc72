"""Measures of what unlearning did to a model: pure functions, and `scores` that calls them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    import numpy as np
except ModuleNotFoundError as error:
    message = "projgrad.evaluate needs numpy: pip install 'projgrad[evaluate]'"
    raise ModuleNotFoundError(message, name="numpy") from error

from .._options import check_integer, number
from ..recording.fixed import evaluating
from .problem import Part, Problem

BINS = 20  # of a confidence histogram
PARTS = ("forget", "retain", "test")
# Of two mean logits: a quarter of it is the loss's slope where the fit begins, 1e-4 where scikit-learn's fit ends.
UNDECIDED = 4e-4
LIMIT = torch.finfo(torch.float32).eps  # losses are float32: confidences nearer to 0 or 1 differ by rounding only


def tow(scores: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Compute the tug of war: how near the model is to one retrained without the forget set; 1 is as good as that.

    ToW = Π over forget, retain and test of (1 - |acc - acc_retrained|)

    scores, retrained: accuracies in [0, 1] by part.
    Raises ValueError where an accuracy is missing or not in [0, 1].
    Source: Zhao et al., "What makes unlearning hard and what to do about it", NeurIPS 2024.

    Example:
        >>> from projgrad.evaluate import tow
        >>> tow({"forget": 0.5, "retain": 1.0, "test": 0.9}, {"forget": 0.0, "retain": 1.0, "test": 0.9})
        0.5
    """
    return float(np.prod([1 - abs(a - b) for a, b in _pairs(scores, retrained, PARTS)]))


def gap(scores: Mapping[str, float], retrained: Mapping[str, float], parts: Sequence[str] = PARTS) -> float:
    """Compute the mean absolute difference of accuracy to the retrained model; 0 is as good as retraining.

    gap = mean over parts of |acc - acc_retrained|

    scores, retrained: accuracies in [0, 1] by part; parts: those that count.
    Raises ValueError where an accuracy is missing or not in [0, 1].
    Source: the "average gap" of Fan et al., "SalUn", ICLR 2024, on accuracies alone.

    Example:
        >>> from projgrad.evaluate import gap
        >>> gap({"forget": 0.5, "retain": 1.0, "test": 0.75}, {"forget": 0.0, "retain": 1.0, "test": 0.5})
        0.25
    """
    if not parts:
        raise ValueError("gap: parts should name one part or more; got none")
    return float(np.mean([abs(a - b) for a, b in _pairs(scores, retrained, parts)]))


def uis(original: Mapping[str, float], unlearned: Mapping[str, float]) -> float:
    """Compute the unlearning impact score: test accuracy should stay, forget accuracy come to it; 0 is ideal.

    UIS = ½ (|O_t - U_t| / O_t + |O_t - U_u| / O_t)        O original, U unlearned; t test, u forget set

    original: its test accuracy under "test"; unlearned: accuracies in [0, 1] under "test" and "forget".
    Meant for forget samples that resemble the test set. Where a whole class or wrong labels are to be forgotten,
    success is a forget accuracy of 0, and this calls it far from ideal: look at ToW there.
    Raises ValueError where one is missing or not in [0, 1], or where the original's is 0.
    Source: the metric as OrthoGrad reports it (arXiv 2503.02312).

    Example:
        >>> from projgrad.evaluate import uis
        >>> uis({"test": 0.8}, {"test": 0.8, "forget": 0.4})
        0.25
    """
    before, after, forget = _accuracy(original, "test"), _accuracy(unlearned, "test"), _accuracy(unlearned, "forget")
    if before == 0:
        raise ValueError("the original model's test accuracy is 0: UIS is relative to it and is not defined")
    return (abs(before - after) + abs(before - forget)) / (2 * before)


def membership_auc(forget: Any, test: Any, retain: Any, seed: int = 0) -> float:
    """Measure how well an attacker tells forget samples from unseen ones by the model's confidence; 0.5 is chance.

    x = log(p / (1 - p)), p clipped by float32's eps; attacker: logistic regression on x, classes balanced, fitted on
    retain (members) against one half of test (non-members); result: area under its ROC curve for forget against the
    other half of test.

    forget, test, retain: probability that the model gives to each sample's label, each (samples,).
    seed: of the split of test.
    With one feature the fit decides only whether a high or a low confidence speaks for membership, and its slope has
    the sign of mean(x of retain) - mean(x of the calibration half): only that is computed. Means within 4e-4 decide
    nothing, and the area is 0.5. Where retain and test look alike the sign is chance, and so is the side of 0.5.
    Below 0.5 forget samples look less like members than unseen ones do. That is right where test samples are no model
    for them: with wrong labels, or a whole class forgotten, the retrained model itself is near 0. Compare with its
    value; 0.5 is the goal only where it has it.
    Raises ValueError for probabilities outside [0, 1] or NaN, no samples, or fewer than two test samples.
    Source: confidence attack with logit scaling, Carlini et al., "Membership inference attacks from first principles",
    S&P 2022, without shadow models.

    Example:
        >>> from projgrad.evaluate import membership_auc
        >>> membership_auc(forget=[0.99, 0.98], test=[0.6, 0.5, 0.7, 0.4], retain=[0.99, 0.97, 0.98])
        1.0
    """
    forget, test, retain = (_logits(name, p) for name, p in (("forget", forget), ("test", test), ("retain", retain)))
    if len(test) < 2:
        raise ValueError(f"test has {len(test)} samples: the attack needs one to calibrate on and one to be scored on")
    seed = check_integer("seed", seed, 0)
    order = np.random.default_rng(seed).permutation(len(test))
    calibration, held_out = test[order[::2]], np.sort(test[order[1::2]])
    difference = retain.mean() - calibration.mean()
    if abs(difference) <= UNDECIDED:
        return 0.5
    below, not_above = (np.searchsorted(held_out, forget, side) for side in ("left", "right"))
    area = float((below + not_above).sum()) / (2 * len(forget) * len(held_out))  # ties count half
    return area if difference > 0 else 1 - area


@torch.no_grad()
def distance(model: nn.Module, original: nn.Module | Mapping[str, Tensor]) -> float:
    """Measure how far unlearning moved the trainable parameters: ‖θ - θ_original‖₂ over those that require gradients.

    original: the model before unlearning, or its parameters by name.
    Raises ValueError where the original lacks a parameter or has it in another shape, or one holds NaN or Inf.

    Example:
        >>> from projgrad.evaluate import distance
        >>> model, original = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> _ = model.load_state_dict({k: v + 1 for k, v in original.state_dict().items()})
        >>> round(distance(model, original), 5)  # the root of 6
        2.44949
    """
    before = dict(original.named_parameters()) if isinstance(original, nn.Module) else original
    if not isinstance(before, Mapping):
        raise ValueError(f"original should be a model or its parameters by name; got {type(original).__name__}")
    total = 0.0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name not in before:
            raise ValueError(f"the original has no parameter {name!r}: compare a model with the one it was copied from")
        if before[name].shape != p.shape:
            raise ValueError(f"{name!r} is {tuple(p.shape)}, in the original {tuple(before[name].shape)}")
        moved = (p.double() - before[name].to(p.device).double()).square().sum().item()
        if not math.isfinite(moved):
            raise ValueError(f"{name!r} holds NaN or Inf, in the model or in the original: it has no distance")
        total += moved
    return total**0.5


def histogram(confidence: Tensor) -> list[int]:
    """Count the confidences in each of 20 equal bins of [0, 1]."""
    return np.histogram(_probabilities("confidence", confidence), BINS, (0, 1))[0].tolist()


def scores(
    problem: Problem,
    model: nn.Module,
    original: nn.Module | Mapping[str, float] | None = None,
    retrained: nn.Module | Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Compute all that is reported about a model on an unlearning problem; None where it cannot be said.

    problem: for data of your own a `Classification`.
    original: the model before unlearning, for "uis" and "distance"; with its scores instead of the model: no distance.
    retrained: the model trained without the forget set, or its scores, for "tow" and "gap".

    Returns accuracies, shares in [0, 1], under "forget", "retain", "validation", "test" and the names of the problem's
    other parts, then "mia_auc", "tow", "uis", "gap", "distance", what the problem measures itself, and "confidence":
    histograms of the probability given to the labels of forget and test. The model is scored in eval mode and left in
    its own.

    Raises:
        ValueError: too few samples for `membership_auc`, an original with other parameters than the model, or a model
            whose output is of another shape, has fewer classes than the labels, or is NaN; it begins with the part.

    Example:
        >>> from projgrad.evaluate import Classification, scores
        >>> model, data = torch.nn.Linear(4, 3), {}
        >>> for part in ("retain", "forget", "test"):
        ...     data[part] = torch.randn(30, 4), torch.randint(3, (30,))
        >>> list(scores(Classification(**data), model))[:6]
        ['forget', 'retain', 'validation', 'test', 'mia_auc', 'tow']
    """
    parts = {name: getattr(problem, name) for name in ("forget", "retain", "validation", "test")} | problem.others
    with evaluating(model):
        values = {
            name: None if part is None else _scored(name, problem.accuracy, model, part) for name, part in parts.items()
        }
        confidence = {name: _scored(name, problem.confidence, model, parts[name]) for name in PARTS}
        goal = _accuracies(problem, retrained, PARTS)
        measured = problem.measure(model, goal)
    before = _accuracies(problem, original, ("test",))
    return {
        **values,
        "mia_auc": membership_auc(**confidence),
        "tow": tow(values, goal) if goal else None,
        "uis": uis(before, values) if before and before.get("test") != 0 else None,
        "gap": gap(values, goal) if goal else None,
        "distance": distance(model, original) if isinstance(original, nn.Module) else None,
        **measured,
        "confidence": {name: histogram(confidence[name]) for name in ("forget", "test")},
    }


def _accuracies(problem: Problem, model: Any, names: Sequence[str]) -> Mapping[str, float] | None:
    if not isinstance(model, nn.Module):
        return model
    with evaluating(model):
        return {name: _scored(name, problem.accuracy, model, getattr(problem, name)) for name in names}


def _scored(name: str, score: Callable, model: nn.Module, part: Part) -> Any:
    """Score a part; an error says which part it is about."""
    try:
        return score(model, part)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _pairs(
    scores: Mapping[str, float], retrained: Mapping[str, float], parts: Sequence[str]
) -> list[tuple[float, float]]:
    return [(_accuracy(scores, part), _accuracy(retrained, part)) for part in parts]


def _accuracy(scores: Mapping[str, float], part: str) -> float:
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores should be accuracies by part, as `scores` returns them; got {type(scores).__name__}")
    value = scores.get(part)
    if value is None:
        raise ValueError(f"no accuracy under {part!r}: there are {', '.join(scores)}")
    value = number(value)
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"accuracies are shares between 0 and 1, {part!r} is {scores[part]!r}")
    return value


def _probabilities(name: str, values: Any) -> np.ndarray:
    p = torch.as_tensor(values).detach().double().cpu().numpy()
    if p.ndim != 1 or not len(p):
        raise ValueError(f"{name} should be one probability per sample and at least one, its shape is {p.shape}")
    if np.isnan(p).any():
        raise ValueError(
            f"{name} has NaN for {int(np.isnan(p).sum())} of {len(p)} samples: the model's output is NaN there"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"{name} has values that are no probabilities, between {p.min()} and {p.max()}")
    return p


def _logits(name: str, values: Any) -> np.ndarray:
    p = _probabilities(name, values).clip(LIMIT, 1 - LIMIT)
    return np.log(p) - np.log1p(-p)
