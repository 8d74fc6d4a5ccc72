"""What the field measures of a language model that should forget: functions of answers and of probabilities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import harmonic_mean

from torch import Tensor

from .._extras import check_installed


def rouge_l(answer: str, truth: str) -> float:
    """Compute ROUGE-L: the F-measure of the longest common subsequence of words, in lower case.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.

    Example:
        >>> from projgrad.evaluate.language import rouge_l
        >>> rouge_l("Anna was born in Oslo.", "Anna was born in Rome.")
        0.8
    """
    said, true = (re.findall(r"\w+", text.lower()) for text in (answer, truth))
    row = [0] * (len(true) + 1)  # length of the longest common subsequence with the first j words
    for word in said:
        above, row = row, [0]
        for j, other in enumerate(true):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(said) + len(true)) if row[-1] else 0.0


def extraction_strength(right: Tensor, there: Tensor) -> Tensor:
    """Compute the share of an answer that greedy decoding completes when its beginning is given (n,), float64.

    1 - k / |y|, with k the smallest number of tokens after which all others are the most probable ones

    Args:
        right: whether each token is the most probable one after those before it (n, t), bool.
        there: which tokens belong to the answer (n, t), bool.

    Source: Carlini et al., "Extracting Training Data from Large Language Models", as open-unlearning defines it.

    Example:
        >>> from projgrad.evaluate.language import extraction_strength
        >>> right = torch.tensor([[True, False, True, True]])
        >>> extraction_strength(right, torch.ones(1, 4, dtype=torch.bool)).item()
        0.5
    """
    completed = (right | ~there).flip(1).cumprod(1).flip(1).bool() & there  # right, and so are all after it
    return completed.sum(1).double() / there.sum(1)


def truth_ratio(paraphrased: Tensor, wrong: Tensor) -> Tensor:
    """Compute how probable wrong answers are beside the right one in other words (n,).

    R = mean over wrong answers of P(wrong | q)^(1 / |wrong|) / P(paraphrased | q)^(1 / |paraphrased|)

    Args:
        paraphrased: mean loss of a token of the paraphrased answer (n,).
        wrong: the same of every wrong answer (n, k).

    Source: Maini et al., "TOFU", arXiv 2401.06121, equation 1.

    Example:
        >>> from projgrad.evaluate.language import truth_ratio
        >>> truth_ratio(torch.tensor([0.0]), torch.tensor([[0.0, 0.0]])).item()
        1.0
    """
    return (paraphrased[:, None] - wrong).exp().mean(1)


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """Compute the p-value of a two-sided Kolmogorov-Smirnov test; above 0.05 the two cannot be told apart.

    Args:
        ratios: truth ratios of the forget set under the unlearned model.
        reference: the same under a model that was trained without the forget set.

    Raises ModuleNotFoundError where scipy is not installed.

    Source: TOFU, section 3.2.
    """
    check_installed("forget_quality", "evaluate", "scipy")
    from scipy.stats import ks_2samp

    return float(ks_2samp(ratios, reference).pvalue)


def model_utility(scores: Sequence[float]) -> float:
    """Compute the harmonic mean of scores in [0, 1]; 0 where one of them is 0. Source: TOFU, section 3.2.

    Example:
        >>> from projgrad.evaluate.language import model_utility
        >>> model_utility([1.0, 0.5, 0.5])
        0.6
    """
    return harmonic_mean([max(0.0, score) for score in scores])


def attack_auc(members: Tensor, others: Tensor) -> float:
    """Compute the probability that a member's loss is below that of a sample never seen, ties counted half.

    0.5: losses tell nothing. Below: forgotten samples are less likely than unseen ones.

    Example:
        >>> from projgrad.evaluate.language import attack_auc
        >>> attack_auc(torch.tensor([0.1, 0.5]), torch.tensor([0.5, 0.9]))
        0.875
    """
    below = (members[:, None] < others).double() + 0.5 * (members[:, None] == others).double()
    return below.mean().item()
