"""One loss per sample of models that judge a sample as a whole: classes, numbers, or where in a text an answer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))
SPANS = "ForQuestionAnswering"
POSITIONS = "start_positions", "end_positions"
SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def class_sums(logits: Tensor, labels: Tensor, problem: str | None) -> tuple[Tensor, Tensor]:
    """Return the sums of every sample's losses and weights, [n] each, as transformers' classifiers define them.

    Args:
        logits: [n, k]. labels: [n] of classes; [n, k] of several classes a sample, or of numbers.
        problem: problem_type of the model's configuration; None: as the shapes and types say.

    Raises:
        ValueError: labels that are not of the shape or type of the problem.
    """
    k = logits.shape[-1]
    if problem is None:
        problem = "regression" if k == 1 else MULTI if labels.is_floating_point() else SINGLE
    if problem == SINGLE:
        if labels.is_floating_point() or labels.numel() != len(logits) or logits.ndim != 2 or k < 2:
            raise ValueError(
                f"labels {labels.dtype} for logits of {tuple(logits.shape)} are of no classifier: give `losses`"
            )
        return cross_entropy(logits.float(), labels.flatten(), reduction="none"), logits.new_ones(len(logits)).float()
    if labels.numel() != logits.numel():
        raise ValueError(f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape)}")
    function = mse_loss if problem == "regression" else binary_cross_entropy_with_logits
    losses = function(logits.float(), labels.float().view_as(logits), reduction="none").flatten(1)
    return losses.sum(1), losses.new_full((len(losses),), losses.shape[1])


def span_sums(starts: Tensor, ends: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the sums of every sample's losses and weights, [n] each: of where its answer starts and of where it ends.

    A position outside of the text does not count.

    Args:
        starts, ends: logits [n, t] of both positions. batch: holds the positions, [n] each.
    """
    losses = []
    for logits, name in zip((starts, ends), POSITIONS, strict=True):
        t = logits.shape[1]
        positions = batch[name].flatten().long().clamp(0, t)
        losses.append(cross_entropy(logits.float(), positions, ignore_index=t, reduction="none"))
    return losses[0] + losses[1], losses[0].new_full((len(starts),), 2.0)
