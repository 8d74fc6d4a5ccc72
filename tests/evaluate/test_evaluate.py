"""Metrics against hand-made values, and conclusions that never say more than the seeds allow."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from projgrad.evaluate import (
    Classification,
    differences,
    distance,
    gap,
    histogram,
    membership_auc,
    paired,
    scores,
    summarize,
    summarize_study,
    tow,
    uis,
    verdict,
)
from projgrad.evaluate.metrics import LIMIT

pytestmark = pytest.mark.same_without_extension

RETRAINED = {"forget": 0.25, "retain": 1.0, "test": 0.75}
MODEL = {"forget": 0.5, "retain": 0.5, "test": 1.0}


def test_distances_to_the_retrained_model():
    assert tow(MODEL, RETRAINED) == 0.75 * 0.5 * 0.75
    assert tow(RETRAINED, RETRAINED) == 1
    assert gap(MODEL, RETRAINED) == (0.25 + 0.5 + 0.25) / 3
    assert gap(MODEL, RETRAINED, parts=("retain",)) == 0.5
    assert uis({"test": 0.8}, {"test": 0.6, "forget": 1.0}) == pytest.approx((0.2 + 0.2) / 1.6)


@pytest.mark.parametrize("metric", [tow, gap])
@pytest.mark.parametrize(
    "scores, message", [({"forget": 0.1}, "'retain'"), ({**MODEL, "test": 97.0}, "between 0 and 1, 'test' is 97")]
)
def test_accuracies_that_are_missing_or_no_shares_are_refused(metric, scores, message):
    for pair in ((scores, RETRAINED), (RETRAINED, scores)):
        with pytest.raises(ValueError, match=message):
            metric(*pair)


def test_uis_needs_an_original_that_knows_something():
    with pytest.raises(ValueError, match="test accuracy is 0"):
        uis({"test": 0.0}, MODEL)


def test_attack_on_a_model_that_forgot_nothing_and_on_one_that_never_knew():
    members, unseen = 0.9 + 0.1 * torch.rand(400), 0.1 + 0.7 * torch.rand(400)
    assert membership_auc(forget=members[:200], test=unseen, retain=members[200:]) == 1
    auc = membership_auc(forget=unseen[:200], test=unseen[200:], retain=members)
    forget, held_out = 200, 100
    assert abs(auc - 0.5) <= 4 * math.sqrt((forget + held_out + 1) / (12 * forget * held_out))  # Mann-Whitney's spread


def test_attack_learns_from_retain_which_side_gives_members_away():
    low, high = [0.1, 0.2, 0.15], [0.8, 0.9, 0.85, 0.7]
    assert membership_auc(forget=low, test=high, retain=low) == 1
    assert membership_auc(forget=low, test=high, retain=[0.99, 0.98]) == 0


def test_attack_is_scored_on_test_samples_that_it_was_not_fitted_on():
    """With two test samples, one to fit on: the other alone decides, and which one is the seed's choice."""
    aucs = {membership_auc(forget=[0.5], test=[0.1, 0.9], retain=[0.99], seed=seed) for seed in range(8)}
    assert aucs == {0.0, 1.0}
    assert len({membership_auc([0.5], [0.1, 0.9], [0.99], seed=3) for _ in range(3)}) == 1


def test_membership_auc_is_the_chance_to_rank_a_forgotten_sample_higher():
    assert membership_auc(forget=[1.0, 1.0], test=[0.0, 0.0, 0.0, 0.0], retain=[1.0, 1.0, 0.0]) == 1
    assert membership_auc(forget=[1.0], test=[1.0, 1.0], retain=[1.0]) == 0.5


CONFIDENCES = {
    "any": lambda rng, k: rng.random(k),
    "with ties": lambda rng, k: rng.random(k).round(1),
    "high": lambda rng, k: rng.random(k) ** 0.05,
    "nearly certain": lambda rng, k: np.exp(-rng.exponential(1e-6, k)),
    "too alike for a fit": lambda rng, k: 0.5 + 1e-5 * rng.random(k),
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", CONFIDENCES)
def test_attack_is_the_fit_and_the_area_of_scikit_learn(kind, seed):
    linear_model, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    p = {part: CONFIDENCES[kind](rng, int(rng.integers(2, 60))) for part in ("forget", "test", "retain")}

    def joined(members, others):
        x = np.concatenate([members, others]).clip(LIMIT, 1 - LIMIT)
        return np.log(x / (1 - x))[:, None], np.repeat([1, 0], [len(members), len(others)])

    order = np.random.default_rng(seed).permutation(len(p["test"]))
    attacker = linear_model.LogisticRegression(class_weight="balanced")
    attacker.fit(*joined(p["retain"], p["test"][order[::2]]))
    x, member = joined(p["forget"], p["test"][order[1::2]])
    expected = metrics.roc_auc_score(member, attacker.decision_function(x))
    assert membership_auc(**p, seed=seed) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"forget": []}, "forget should be"),
        ({"test": [0.5]}, "test has 1 samples"),
        ({"retain": [0.5, math.nan]}, "retain has NaN for 1 of 2 samples"),
        ({"retain": 0.5}, "retain should be one probability per sample"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"forget": [1.5]}, "forget has values"),
        ({"test": [[0.5], [0.5]]}, "test should be"),
    ],
)
def test_attack_checks_its_input(change, message):
    with pytest.raises(ValueError, match=message):
        membership_auc(**{"forget": [0.5], "test": [0.5, 0.5], "retain": [0.5], **change})
    with pytest.raises(TypeError, match="seed must be an integer of at least 0; got nan"):
        membership_auc([0.5], [0.5, 0.5], [0.5], math.nan)


def test_histogram_counts_every_sample_once():
    assert histogram(torch.tensor([0.0, 0.01, 0.5, 1.0, 1.0])) == [2, *[0] * 9, 1, *[0] * 8, 2]


def test_distance_is_that_of_trainable_parameters(device):
    original = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
    model = copy.deepcopy(original)
    model[0].requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(2.0)
    expected = 2 * math.sqrt(4 * 2 + 2)
    assert distance(model, original) == pytest.approx(expected, rel=1e-6)
    assert distance(model, {k: v.cpu() for k, v in original.named_parameters()}) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"'1\.weight' is \(2, 4\), in the original \(3, 4\)"):
        distance(model, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).to(device))
    with pytest.raises(ValueError, match=r"no parameter '1\.weight'"):
        distance(model, nn.Sequential(nn.Linear(3, 4)))


def one_hot(labels, wrong=0):
    """Inputs that an identity model gets right, but for the first `wrong`."""
    x = nn.functional.one_hot(labels, 4).float()
    x[:wrong] = x[:wrong].roll(1, dims=1)
    return x


@pytest.fixture
def problem():
    labels = torch.arange(40) % 4
    return Classification(
        retain=(one_hot(labels), labels),
        forget=(one_hot(labels, 30), labels),
        test=(one_hot(labels, 10), labels),
        validation=(one_hot(labels, 20), labels),
        stranger=(one_hot(labels, 40), labels),
    )


def test_scores_of_a_known_model(problem, device):
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4, bias=False)).to(device)
    model[1].weight.data = torch.eye(4, device=device)
    original = copy.deepcopy(model)
    original[1].weight.data += 1
    problem.measure = lambda *_: {"wer_others": 0.5}
    found = scores(problem, model, original, RETRAINED)
    accuracies = {"forget": 0.25, "retain": 1.0, "validation": 0.5, "test": 0.75, "stranger": 0.0}
    assert {name: found[name] for name in accuracies} == accuracies
    assert (found["tow"], found["gap"], found["wer_others"]) == (1.0, 0.0, 0.5)
    assert found["uis"] == pytest.approx((0 + 0.5) / 0.75 / 2)
    assert found["distance"] == pytest.approx(4.0)
    assert {part: sum(counts) for part, counts in found["confidence"].items()} == {"forget": 40, "test": 40}
    right = math.e / (math.e + 3)  # softmax of a one-hot input
    assert found["confidence"]["forget"][int(20 * right)] == 10
    retrained = copy.deepcopy(model)
    assert scores(problem, model, original, retrained) == found
    assert scores(problem, model, {"test": 0.75}, RETRAINED) == {**found, "distance": None}


def test_scores_that_need_a_reference_are_none_without_it(problem):
    found = scores(problem, nn.Linear(4, 4))
    assert [found[name] for name in ("tow", "uis", "gap", "distance")] == [None] * 4
    assert 0 <= found["mia_auc"] <= 1


def test_scores_in_eval_mode_and_leaves_the_mode_as_it_was(problem):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()
    before = [module.training for module in model.modules()]
    assert scores(problem, model) == scores(problem, model)
    assert [module.training for module in model.modules()] == before
    problem.measure = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scores(problem, model)
    assert [module.training for module in model.modules()] == before


def test_samples_as_a_data_set_and_outputs_as_an_object(problem):
    class Wrapped(nn.Linear):
        def forward(self, x, scale):
            return SimpleNamespace(logits=scale[:, None] * super().forward(x))

    model = Wrapped(4, 4)
    parts = {name: getattr(problem, name) for name in ("retain", "forget", "test")}
    scale = torch.ones(40)
    sets = {name: TensorDataset(part.inputs[0], scale, part.labels) for name, part in parts.items()}
    plain = nn.Linear(4, 4)
    plain.load_state_dict(model.state_dict())
    assert scores(Classification(**sets), model)["confidence"] == scores(problem, plain)["confidence"]
    assert scores(Classification(**sets), model)["validation"] is None


@pytest.mark.parametrize(
    "samples, message",
    [
        ((torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)), "forget should have as many .* 3 against 2"),
        ((torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), "forget should have as many"),
        ((torch.zeros(3, 4), torch.zeros(3)), "class indices"),
        ((torch.zeros(3, dtype=torch.long),), "one or more inputs"),
    ],
)
def test_samples_that_do_not_fit_their_labels_are_refused(problem, samples, message):
    with pytest.raises(ValueError, match=message):
        Classification(retain=problem.retain, test=problem.test, forget=samples)


def scenario(values, **more):
    """One run per seed with the given ToW and a test accuracy equal to it."""
    runs = [
        {"method": method, "seed": seed, "scores": {"tow": value, "test": value, "mia_auc": None}, "steps": 10}
        for method, some in values.items()
        for seed, value in enumerate(some)
    ]
    return {"runs": runs, **more}


TITLES = {
    "retrained": "retrained",
    "scrub": "SCRUB",
    "orthograd": "OrthoGrad",
    "orthograd_tensor": "OrthoGrad, tensors",
}


def test_summary_gives_mean_and_standard_error_over_seeds():
    rows = summarize(scenario({"scrub": [0.5, 0.7], "orthograd": [0.9]}))
    assert rows["scrub"]["tow"] == {"mean": 0.6, "std": pytest.approx(0.2 / math.sqrt(2)), "count": 2}
    assert rows["orthograd"]["tow"] == {"mean": 0.9, "std": None, "count": 1}
    assert rows["scrub"]["steps"]["mean"] == 10
    assert "mia_auc" not in rows["scrub"]


def test_study_is_grouped_by_n():
    runs = [{"method": "orthograd", "seed": s, "n": n, "scores": {"test": n + s}} for n in (8, 4) for s in (0, 1)]
    rows = summarize_study({"study": runs})["orthograd"]
    assert list(rows) == [4, 8]
    assert rows[4]["test"]["mean"] == 4.5
    assert summarize_study({"runs": []}) == {}


def test_paired_difference_is_the_paired_t_interval():
    stats = pytest.importorskip("scipy.stats")
    a, b = [0.9, 0.95, 0.8, 0.99], [0.85, 0.96, 0.7, 0.9]
    found = paired(scenario({"a": a, "b": b}), "a", "b")
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.significant == (expected.low > 0)


def test_paired_difference_uses_common_seeds_only():
    some = scenario({"a": [0.9, 0.5], "b": [0.8]})
    assert paired(some, "a", "b").count == 1
    assert paired(some, "a", "b").mean == pytest.approx(0.1)
    assert not paired(some, "a", "b").significant
    assert paired(some, "a", "c") is None


def test_verdict_says_who_is_best_and_whether_that_can_be_told():
    clear = verdict(
        scenario({"retrained": [1, 1, 1], "scrub": [0.8, 0.81, 0.79], "orthograd": [0.9, 0.91, 0.89]}), TITLES
    )
    assert "OrthoGrad is best with 0.900 ± 0.010" in clear
    assert "the best other method (SCRUB) reaches 0.800" in clear
    assert "beyond the spread" in clear
    noisy = verdict(scenario({"scrub": [0.8, 0.7, 0.75], "orthograd": [0.7, 0.85, 0.75]}), TITLES)
    assert "not significant" in noisy
    values = {"scrub": [0.9, 0.91], "orthograd": [0.1, 0.11], "orthograd_tensor": [0.2, 0.21]}
    lost = verdict(scenario(values, orthograd_methods=("orthograd", "orthograd_tensor")), TITLES)
    assert "SCRUB is best" in lost
    assert "the best OrthoGrad variant (OrthoGrad, tensors) reaches 0.205" in lost
    assert "-0.700" in lost


def test_verdict_admits_what_it_does_not_know():
    assert "on one seed" in verdict(scenario({"scrub": [0.8], "orthograd": [0.9]}), TITLES)
    assert verdict(scenario({"scrub": [0.8]}), TITLES) == "Not enough finished runs to compare by ToW."
    assert "share no seed" in verdict(
        {"runs": [*scenario({"scrub": [0.8]})["runs"], {"method": "orthograd", "seed": 7, "scores": {"tow": 0.9}}]},
        TITLES,
    )
    assert "Small" in verdict(scenario({"scrub": [0.8], "orthograd": [0.9]}, small=True), TITLES)
    broken = scenario({"scrub": [0.1, 0.9], "orthograd": [0.9, 0.9]})
    broken["runs"][0]["stopped"] = "not finite"
    text = verdict(broken, TITLES)
    assert "Broke down on some seeds and not seen at its best: SCRUB." in text
    assert "SCRUB (1 of 2)" in text


def test_results_say_which_methods_are_orthograd_and_older_ones_have_the_names_of_their_time():
    values = {"scrub": [0.8, 0.8], "mine": [0.9, 0.9], "orthograd-qr": [0.7, 0.7]}
    named = scenario(values, orthograd_methods=["mine"])
    assert "mine is best with 0.900 ± 0.000; the best other method (SCRUB)" in verdict(named, TITLES)
    assert [row[:2] for row in differences(named)] == [("mine", "scrub")]
    older = scenario(values)
    assert "the best OrthoGrad variant (orthograd-qr)" in verdict(older, TITLES)
    assert [row[:2] for row in differences(older)] == [("orthograd-qr", "mine")]


def test_lower_word_error_rates_and_gaps_win():
    runs = [
        {"method": m, "seed": 0, "scores": {"gap": v, "wer_others": v}} for m, v in (("scrub", 0.1), ("orthograd", 0.2))
    ]
    for metric in ("gap", "wer_others"):
        assert "SCRUB is best" in verdict({"runs": runs}, TITLES, metric)


def test_optional_packages_are_imported_when_they_are_needed():
    code = "import projgrad.evaluate, sys; print({'matplotlib', 'rich', 'sklearn', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
