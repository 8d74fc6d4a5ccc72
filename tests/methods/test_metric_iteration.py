"""metric="optimizer" with micro-batches of a wide network: how far the iteration goes, rounding, dropout, momentum."""

import copy
import warnings

import metric_problems
import pytest
import torch
from metric_problems import SGD, AdamW, RMSprop, Wide, flat, gradients
from torch.nn import functional as F

import projgrad
from projgrad.tape import union, weighted_union

pytestmark = pytest.mark.same_without_extension


@pytest.mark.parametrize("make", [AdamW, RMSprop, SGD], ids=lambda kind: kind.__name__)
def test_the_default_tolerance_holds_in_float32_and_the_record_tells_what_is_left(make, monkeypatch):
    problem = Wide()
    monkeypatch.setattr(union, "SMALL", 0)
    options = {"weight_decay": 0.0} if make is AdamW else {}
    moved, record, unit = problem.ascent(lambda p: make(p, lr=1e-3, **options))
    cosine = float((unit @ moved).abs().max() / moved.norm())
    assert cosine <= 1e-4 and abs(cosine - record.residual) <= 1e-5
    assert 3 < record.iterations < 100 and 0 < record.estimated_error < 1e-4
    # Once for the retain part, once for every iteration, and at least once for what was applied.
    passes = len(problem.masks) / 8
    assert record.iterations + 2 <= passes <= record.iterations + 5


def test_a_change_as_small_as_the_rounding_of_the_weights_ends_the_iteration():
    problem = Wide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved, record, unit = problem.ascent(lambda p: AdamW(p, lr=3e-8, weight_decay=0.0))
    cosine = float((unit @ moved).abs().max() / moved.norm())
    assert 1e-4 < cosine < 1e-1 and record.residual == pytest.approx(cosine, rel=0.1)
    assert record.iterations < 60 and record.estimated_error < 1e-4


def test_rounding_is_taken_back_where_the_iteration_goes_on(monkeypatch):
    """Else what it measures is rounding, and it would never end."""
    problem, measured = Wide(), []
    is_rounding = weighted_union.ChangeUnion._is_rounding

    def spy(self, before):
        measured.append(before)
        return len(measured) > 1 and is_rounding(self, before)

    monkeypatch.setattr(weighted_union.ChangeUnion, "_is_rounding", spy)
    _, record, _ = problem.ascent(lambda p: AdamW(p, lr=3e-8, weight_decay=0.0))
    assert len(measured) == 2 and max(measured) < 1e-4 < record.residual and record.iterations < 60


def test_a_tensor_that_the_samples_span_has_no_direction_left():
    problem = Wide(count=4)
    _, record, _ = problem.ascent(lambda p: AdamW(p, lr=1e-5, weight_decay=0.0), scope="per_tensor")
    bias = record.tensors["3.bias"]  # 4 elements, and 64 samples
    assert bias.preserved_norm < 0.1 and bias.residual < 1e-2


def test_16_bit_parameters_leave_what_their_rounding_leaves():
    problem = Wide(torch.bfloat16, 2)
    moved, record, unit = problem.ascent(lambda p: AdamW(p, lr=1e-2, weight_decay=0.0))
    cosine = float((unit @ moved).abs().max() / moved.norm())
    assert moved.norm() > 0 and cosine < 5e-2 and record.residual < 5e-2


def test_the_limit_of_passes_warns():
    problem = Wide(torch.float64)
    with pytest.warns(UserWarning, match="after 3 passes over 8 micro-batches the result has a cosine of") as warned:
        moved, record, unit = problem.ascent(lambda p: AdamW(p, lr=1e-2, weight_decay=0.0), max_passes=4)
    assert warned[0].filename == metric_problems.__file__ and len(problem.masks) == 4 * 8
    assert record.residual == pytest.approx(float((unit @ moved).abs().max() / moved.norm()), rel=1e-6)


def test_dropout_has_the_same_masks_before_and_after_the_optimizer_steps():
    problem = Wide(torch.float64, 3, dropout=0.5)
    params = list(problem.model.parameters())
    twin = copy.deepcopy(problem.model)
    before = flat(params)
    optimizer = AdamW(params, 1e-2, weight_decay=0.0)
    unlearner = projgrad.OrthoGrad(problem.model, optimizer, 0.0, metric="optimizer", union_tolerance=1e-9)
    torch.manual_seed(3)
    unlearner.step(problem.forget, problem.parts())
    after = torch.rand(3)
    first, moved = problem.masks[:3], flat(params) - before
    assert all(torch.equal(mask, first[k % 3]) for k, mask in enumerate(problem.masks))
    for x, y, mask in zip(problem.x.split(16), problem.y.split(16), first, strict=True):
        losses = F.cross_entropy(twin[3](2 * mask * torch.tanh(twin[0](x))), y, reduction="none")
        G = torch.stack([gradients(loss, list(twin.parameters())) for loss in losses])
        assert (G @ moved).abs().max() < 1e-8 * G.norm(dim=1).max() * moved.norm()
    torch.manual_seed(3)
    problem.forget()
    for part in problem.parts():
        part()
    assert torch.equal(torch.rand(3), after)


def test_momentum_brings_back_nothing():
    """A step without a forget gradient: the momentum of earlier ones moves on, orthogonally."""
    problem = Wide(torch.float64, 3)
    optimizer = SGD(problem.model.parameters(), 1e-2, momentum=0.9)
    forget = problem.forget
    for weight in (1.0, 0.0):
        problem.forget = lambda weight=weight: weight * forget()
        moved, _, unit = problem.ascent(lambda _: optimizer, union_tolerance=1e-9)
    assert moved.norm() > 0 and (unit @ moved).abs().max() < 1e-8 * moved.norm()
