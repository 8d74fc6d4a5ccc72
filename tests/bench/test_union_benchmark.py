"""What bench.micro_batches compares, on a tiny decoder."""

import pytest

from bench.micro_batches import Problem, by_hand_table, contenders, union_table
from bench.micro_batches_metric import measured, metric_table


@pytest.fixture(scope="module")
def results():
    """The forgetting part of `.grad` and its largest cosine, by contender."""
    found = {}
    for name, step in contenders("tiny", 4).items():
        problem = Problem("tiny", 4)
        step(problem)
        found[name] = problem.update(), problem.cosine()
    return found


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_the_union_is_one_batch(results, scope):
    (ours, cosine), (one, _) = results[f"projgrad {scope}"], results[f"one batch, {scope}"]
    assert (ours - one).norm() < 1e-4 * one.norm() and cosine < 1e-4


def test_what_is_done_by_hand_is_not(results):
    for name in ("one after the other", "sum of projections", "mean of projections"):
        assert results[name][1] > 1e-2
    kept = [results[f"basis kept for {steps} steps"][1] for steps in (0, 1, 5, 20)]
    assert kept[0] < 1e-5 and kept == sorted(kept)


def test_the_tables_have_a_line_for_every_result():
    assert union_table().count("\n") > 4 and by_hand_table().count("\n") > 4 and metric_table().count("\n") > 8


def test_the_union_in_the_metric_of_adamw_is_one_batch():
    (row, ours), (one, truth) = (measured("tiny", 4, f"{way}, global") for way in ("projgrad", "one batch"))
    assert (ours - truth).norm() < 1e-4 * truth.norm() and row["cosine"] < 1e-4
    assert row["passes"] == row["iterations"] + 2 and one["passes"] == 1
