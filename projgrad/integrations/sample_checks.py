"""What is looked at before anything is trained: columns, labels, and whether a sample's loss is what it should be."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..recording.fixed import evaluating
from .label_losses import POSITIONS
from .pairs import Collator
from .token_losses import (
    IGNORED,
    Batch,
    answers_of,
    counted_labels,
    counts,
    outputs_of,
    sample_losses,
    shifts_labels,
    uncounted,
)

MASKS = "completion_mask", "assistant_masks"  # columns of trl, which makes labels of them
TOKENS = "labels", "position_ids", "attention_mask"
SCANNED = 10_000  # samples whose labels are looked at, of either side
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}  # of losses, relative, without tensor cores; else 1e-3
COARSE = 5e-2  # in 16 bits


def check_columns(name: str, data: Sequence[Any], columns: frozenset[str] | None, model: nn.Module) -> None:
    """Check that a data set has columns that the model takes, and that every sample has a label; raises ValueError.

    Where labels are shifted, that of a first token, or of one behind padding, is none: no token predicts it.

    columns: that the model takes; None: whatever they are.
    """
    first = data[0]
    if not isinstance(first, Mapping):
        return
    if columns is not None and columns.isdisjoint(first):
        raise ValueError(
            f"samples of {name} have none of the model's arguments; they have {', '.join(first)}. Tokenize them, or "
            "set remove_unused_columns=False where a data_collator does it"
        )
    masks = [column for column in MASKS if column in first and "labels" not in first]
    if columns is not None and masks:
        raise ValueError(
            f"samples of {name} have {' and '.join(masks)} and no labels: the mask is dropped before the collator, and "
            f"prompts would count. Make labels of it, {IGNORED} where it is 0, or take the column out"
        )
    if columns is not None and "seq_lengths" in first and "position_ids" not in first:
        raise ValueError(
            f"samples of {name} are packed, and their seq_lengths are dropped before the collator: set "
            "remove_unused_columns=False, with a collator that makes position_ids of them"
        )
    if not isinstance(first.get("labels"), (Sequence, Tensor)):
        return
    bare = [k for k in range(min(len(data), SCANNED)) if not _is_labelled(model, data[k])]
    if bare:
        few = ", ".join(map(str, bare[:4])) + (f" and {len(bare) - 4} more" if len(bare) > 4 else "")
        raise ValueError(f"{name} has samples without any label other than {uncounted(model)}: {few}. Leave them out")


def check_labels(name: str, batch: Batch, model: nn.Module) -> None:
    """Check that a collator has made what the model's loss needs; raises ValueError."""
    needed = answers_of(model)
    if any(batch.get(key) is None for key in needed):
        made = ", ".join(key for key, value in batch.items() if value is not None)
        hint = f" ({IGNORED} where a token does not count)" if needed == ("labels",) else ""
        names = " and ".join(needed)
        raise ValueError(
            f"samples of {name} have no {names}: the collator made {made} of the first one. Add {names}{hint}, or a "
            "data_collator that does"
        )


@torch.no_grad()
def check_loss(model: nn.Module, batch: Batch) -> None:
    """Check that the loss of one sample is the one that the model itself makes; raises ValueError.

    Models whose loss has other parts, or that shift labels in their own way, need `losses`. Rows of several samples
    are not compared: the model's own loss may predict the first token of one from another.
    """
    kind = type(model).__name__
    if not has_labels(model, batch):
        raise ValueError(
            f"no token of the first samples has a label other than {uncounted(model)}: were the answers cut off?"
        )
    with evaluating(model):
        try:
            found, *more = sample_losses(model, {k: v for k, v in batch.items() if k != "token_weights"}).tolist()
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            _check_forward(model, batch)
            reason = str(error).removesuffix(": give `losses`")
            raise ValueError(
                f"the loss of a sample cannot be told for a {kind}: {reason}. Give `losses`, a function of model and "
                "batch that returns one loss per sample, (n,)"
            ) from error
        own = getattr(model(**{k: v for k, v in batch.items() if k != "token_weights"}), "loss", None)
    if own is not None and not more and abs(float(own) - found) > _relative(model) * max(1.0, abs(found)):
        raise ValueError(
            f"a {kind} gives the first sample a loss of {float(own):.6g}, and the mean over its labelled tokens is "
            f"{found:.6g}. Its loss has other parts, or its labels are shifted in another way: give `losses`, a "
            "function of model and batch that returns one loss per sample, (n,)"
        )


@torch.no_grad()
def warn_of_company(model: nn.Module, collate: Collator, samples: Sequence[Any]) -> None:
    """Warn where a sample's loss depends on the samples beside it: what is protected is then another gradient."""
    first, last = min(samples, key=_length), max(samples, key=_length)
    if _differ(collate([first]), collate([first])):  # drawn at random
        return
    with evaluating(model):
        alone = [*sample_losses(model, collate([first])).tolist(), *sample_losses(model, collate([last])).tolist()]
        together = sample_losses(model, collate([first, last])).tolist()
    worst = max(zip(alone, together, strict=False), key=lambda pair: abs(pair[0] - pair[1]))
    if len(alone) == len(together) and abs(worst[0] - worst[1]) > _relative(model) * max(1.0, abs(worst[0])):
        causes = "padding on the left without position_ids, and packed rows in a model that does not keep them apart"
        if answers_of(model) == POSITIONS:
            causes = "padding, where answers might be as well: pad all samples to one length"
        warnings.warn(
            f"the loss of a sample depends on the samples beside it: {worst[0]:.6g} alone, {worst[1]:.6g} in a batch "
            f"of two. What is protected is its gradient in the batch. Common causes: {causes}; this is a "
            f"{type(model).__name__}",
            stacklevel=4,
        )


def has_labels(model: nn.Module, batch: Batch) -> bool:
    """Return whether any label of a batch counts."""
    return not isinstance(batch.get("labels"), Tensor) or counts(counted_labels(model, batch))


def _check_forward(model: nn.Module, batch: Batch) -> None:
    """Check that a model runs on a batch at all; raises ValueError."""
    try:
        outputs_of(model, batch)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"a {type(model).__name__} does not run on its first sample: {error}. The batch has {', '.join(batch)}"
        ) from error
    except AttributeError:
        return


def _is_labelled(model: nn.Module, sample: Mapping[str, Any]) -> bool:
    """Return whether any label of a sample counts, as it is before a collator."""
    labels = sample["labels"]
    if not isinstance(labels, (Sequence, Tensor)):
        return True
    is_flat = labels.ndim == 1 if isinstance(labels, Tensor) else len(labels) and isinstance(labels[0], int)
    if not shifts_labels(model) or not is_flat:
        return counts(labels) if isinstance(labels, Tensor) else any(label != IGNORED for label in labels)
    rows = {name: torch.as_tensor(sample[name])[None] for name in TOKENS if sample.get(name) is not None}
    counted, mask = counted_labels(model, rows), rows.get("attention_mask")
    if mask is not None and mask.shape == counted.shape:
        counted[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
    return counts(counted)


def _length(sample: Any) -> int:
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return 0 if ids is None else len(ids)


def _differ(a: Batch, b: Batch) -> bool:
    return any(isinstance(x, Tensor) and not torch.equal(x, b[name]) for name, x in a.items())


def _relative(model: nn.Module) -> float:
    """Return by how much two ways to the loss of a sample may differ, relative."""
    worst = max([ROUNDING.get(p.dtype, COARSE) for p in model.parameters() if p.is_floating_point()], default=1e-5)
    return max(worst, 1e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-3)  # losses are float32
