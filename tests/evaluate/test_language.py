"""The field's measures of language models against values worked out by hand."""

import math

import pytest
import torch

from projgrad.evaluate.language import (
    attack_auc,
    extraction_strength,
    forget_quality,
    model_utility,
    rouge_l,
    truth_ratio,
)

pytestmark = pytest.mark.same_without_extension


@pytest.mark.parametrize(
    "answer, truth, want",
    [
        ("Anna keeps a dog.", "anna keeps a dog", 1.0),
        ("a dog keeps Anna", "Anna keeps a dog", 2 * 2 / 8),  # in order: "a dog"
        ("The cat", "The cat sat on the mat", 2 * 2 / 8),  # recall 2/6, precision 2/2
        ("x a y b z c", "a b c", 2 * 3 / 9),
        ("Oslo", "Rome", 0.0),
        ("", "Rome", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(answer, truth, want):
    assert rouge_l(answer, truth) == pytest.approx(want)


def test_extraction_strength_is_the_share_of_the_end_that_is_completed():
    right = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()
    there = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert extraction_strength(right, there).tolist() == [1.0, 0.0, 1.0, 0.25]


def test_truth_ratio_compares_probabilities_of_a_token():
    ratio = truth_ratio(torch.tensor([math.log(2)]), torch.tensor([[math.log(4), math.log(8)]]))
    assert ratio.item() == pytest.approx((2 / 4 + 2 / 8) / 2)


def test_forget_quality_is_one_for_equal_ratios_and_tiny_for_other_ones():
    pytest.importorskip("scipy")
    reference = [i / 10 for i in range(10)]
    assert forget_quality(reference, reference) == 1.0
    # All below all: D = 1, of the 20 choose 10 orders two are as far apart
    assert forget_quality([x - 5 for x in reference], reference) == pytest.approx(2 / math.comb(20, 10))


def test_utility_is_zero_where_one_part_is_lost():
    assert model_utility([0.5, 0.25]) == pytest.approx(1 / 3)
    assert model_utility([1.0, 0.0]) == model_utility([1.0, -0.5]) == 0.0


def test_attack_counts_pairs_and_halves_ties():
    assert attack_auc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])) == (1 + 1 + 0 + 0.5) / 4
    assert attack_auc(torch.zeros(3), torch.zeros(2)) == 0.5
