"""The published schedule of PGU and its stop rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._options import check_callable, check_integer, check_real, number
from .batches import run_model

if TYPE_CHECKING:
    from .pgu import PGU, PGURecord


@dataclass(frozen=True)
class Epoch:
    """After an epoch (0: before the first): what `validate` returned, and the last step's record."""

    epoch: int
    forget_accuracy: float
    other_accuracy: float
    record: PGURecord | None


@dataclass(frozen=True)
class Run:
    """kept: the epoch whose weights the model has now. reason: "stopped" by the rule, "finished" all epochs, or
    "diverged". error: what diverged. epochs: all of them, from 0."""

    kept: int
    reason: str
    error: str
    epochs: list[Epoch]


def run(
    pgu: PGU,
    batches: Iterable,
    validate: Callable[[], tuple[float, float]],
    *,
    epochs: int = 100,
    lr: tuple[float, float] = (0.1, 0.01),
    stop: str = "validation",
    drop: float = 0.05,
    progress: Callable[[Epoch], None] | None = None,
) -> Run:
    """Steps of `unlearning_loss` over the forget set until a stop rule holds; the published optimizer is SGD without
    momentum, batches of 128.

    stop="validation": the first epoch where the validation accuracy is above the forget accuracy ends it; of its model
        and the one before, that with the smaller difference stays.
    stop="retain", for a whole class: the first epoch where the retain accuracy is more than `drop` below that of the
        model as given ends it; the model before stays.

    NaN or Inf in a loss, a gradient, a weight or an accuracy ends it too; the model before that epoch stays.

    Args:
        pgu: fitted; its forget samples taken out by `forget`.
        batches: the forget set, the same at every epoch: (inputs, labels), or a dictionary with "labels". The model is
            run as in `fit`; logits (n, classes) are what it returns, or that object's `logits`.
        validate: returns the forget accuracy and, by the rule, the validation or retain accuracy, in [0, 1].
        epochs, lr: the learning rate falls exponentially from the first to the second value over the epochs, and is
            put back afterwards.
        progress: called after each epoch.

    Raises:
        ValueError: an unknown rule, epochs < 1, learning rates that are not positive, drop < 0, no batches.
        TypeError: an option that is no number, or no function.
    """
    if stop not in ("validation", "retain"):
        raise ValueError(f"run: stop must be 'validation' or 'retain'; got {stop!r}")
    check_integer("run: epochs", epochs, 1)
    if not isinstance(lr, Iterable) or len(lr := tuple(lr)) != 2:
        raise ValueError(f"run: lr must be two positive numbers, that of the first and of the last epoch; got {lr!r}")
    for value in lr:
        check_real("run: lr", value, "two positive numbers", lambda x: x > 0)
    check_real("run: drop", drop, "a number of at least 0, a difference of accuracies", lambda x: x >= 0)
    check_callable("run: validate", validate, "a function that returns two accuracies")
    if progress is not None:
        check_callable("run: progress", progress, "a function of an Epoch, or None")
    weights = {name: pgu.model.get_parameter(name) for name in pgu.bases}
    rates = [group["lr"] for group in pgu.optimizer.param_groups]
    seen: list[Epoch] = []

    def look(record: PGURecord | None) -> Epoch:
        found = validate()
        pair = tuple(found) if isinstance(found, Iterable) else ()
        if len(pair) != 2 or any(number(value) is None for value in pair):
            raise TypeError(f"run: validate() must return two accuracies, of forget and other samples; got {found!r}")
        seen.append(Epoch(len(seen), *map(float, pair), record))
        for value in (seen[-1].forget_accuracy, seen[-1].other_accuracy):
            if not math.isfinite(value):
                raise FloatingPointError(f"validate() returned {value}")
        if progress is not None:
            progress(seen[-1])
        return seen[-1]

    def over(now: Epoch) -> bool:
        if stop == "validation":
            return now.other_accuracy > now.forget_accuracy
        return seen[0].other_accuracy - now.other_accuracy > drop + 1e-9  # 0.52 - 0.47 > 0.05 in floating point

    try:
        if over(look(None)):
            return Run(0, "stopped", "", seen)
        for epoch in range(epochs):
            rate = lr[0] * (lr[1] / lr[0]) ** (epoch / max(1, epochs - 1))
            for group in pgu.optimizer.param_groups:
                group["lr"] = rate
            good = {name: p.detach().clone() for name, p in weights.items()}
            try:
                now = look(_epoch(pgu, batches, weights))
            except FloatingPointError as error:
                _put_back(weights, good)
                return Run(epoch, "diverged", str(error), seen)
            if over(now):
                before = seen[-2]
                nearer = abs(before.other_accuracy - before.forget_accuracy) <= now.other_accuracy - now.forget_accuracy
                if stop == "retain" or nearer:
                    _put_back(weights, good)
                    return Run(epoch, "stopped", "", seen)
                return Run(epoch + 1, "stopped", "", seen)
        return Run(epochs, "finished", "", seen)
    finally:
        for group, rate in zip(pgu.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _epoch(pgu: PGU, batches: Iterable, weights: dict[str, Tensor]) -> PGURecord:
    record = None
    for batch in batches:
        record = pgu.step(lambda batch=batch: _logits(pgu, batch))
    if record is None:
        raise ValueError("run: an epoch without a batch; pass a list or a loader, not an iterator that is used up")
    for name, p in weights.items():
        if not p.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or Inf after a step")
    return record


def _logits(pgu: PGU, batch: object) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        labels = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
    else:
        raise ValueError('run: a batch must be (inputs, labels), or a dictionary with "labels"')
    out = (pgu.forward or run_model)(pgu.model, batch)
    return getattr(out, "logits", out), labels


@torch.no_grad()
def _put_back(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, p in weights.items():
        p.copy_(values[name])
