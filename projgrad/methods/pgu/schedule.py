"""The published schedule of PGU and its stop rules, and what steps, epochs and runs report."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..._options import check_callable, check_choice, check_integer, number, outside, within
from ..common import copies, write_
from ..protocol import SteppingOptimizer

# A step is blocked below both. Preserved norms alone do not tell: with large gradients 0.025 forgot best (CIFAR-10).
LITTLE_LEFT = 0.1  # preserved norm
LITTLE_DONE = 5e-4  # of the forget loss in one step. On digits 1.4e-4 forgot nothing in 60 epochs, 1.1e-3 a little


@dataclass(frozen=True)
class PGURecord:
    """The numbers of one step.

    rank, width: kept directions k and inputs i, summed over the projected layers (and groups): rank / width is the
        protected share of the input space. ranks: k by name.
    preserved_norm: norm of the projected over that of the unprojected gradient, projected layers only.
    residual: largest ‖D M‖ / ‖D‖ over layers, D the projected gradient; with soft, what is left on purpose.
    gradient_norm: ‖D‖ over all projected layers, before it is clipped.
    expected_change: by how much the step changes the forget loss, to first order: η ‖D‖², clipping taken in, for SGD
        at the largest learning rate η of the optimizer, times 1 - its dampening over 1 - its momentum; NaN for other
        optimizers.
    forget_loss: what was minimised or, with a scalar and ascend=True, maximised; before the step.
    seconds: wall time of the whole step.
    unit: what takes the place of a smaller forget_loss in `blocked`: 1 for `unlearning_loss`, which passes through
        zero, 0 for a scalar, which is not judged where it does.
    """

    rank: int
    width: int
    ranks: dict[str, int]
    preserved_norm: float
    residual: float
    gradient_norm: float
    expected_change: float
    forget_loss: float
    seconds: float
    unit: float = 0.0

    @property
    def blocked(self) -> bool:
        """Whether the kept directions leave so little that such steps do nothing.

        preserved_norm < 0.1 and expected_change < 5e-4 max(|forget_loss|, unit): 2,000 steps for a change of its own
        size.
        """
        return self.preserved_norm < LITTLE_LEFT and self.expected_change < LITTLE_DONE * self._size

    @property
    def _size(self) -> float:
        return max(abs(self.forget_loss), self.unit)

    def warn_if_blocked(self) -> None:
        """Say that a step was blocked, and what helps; not at a learning rate of 0, with which a warm-up begins."""
        if not self.blocked or (self.gradient_norm and not self.expected_change):
            return
        steps = f"{self._size / self.expected_change:,.0f}" if self.expected_change else "infinitely many"
        warnings.warn(
            f"PGU: the kept directions leave {self.preserved_norm:.2g} of the forget gradient's length. At this "
            f"learning rate it takes {steps} steps to change the forget loss by its own size: unless the gradient "
            'grows, hardly anything will be forgotten. Use a smaller gamma, rule="energy" or a larger learning rate',
            stacklevel=outside(),
        )


@dataclass(frozen=True)
class Epoch:
    """After an epoch (0: before the first): what `validate` returned, and the last step's record."""

    epoch: int
    forget_accuracy: float
    other_accuracy: float
    record: PGURecord | None

    @property
    def difference(self) -> float:
        return abs(self.other_accuracy - self.forget_accuracy)


@dataclass(frozen=True)
class Run:
    """kept: the epoch whose weights the model has now. reason: "stopped" by the rule, "finished" all epochs, "blocked"
    the same while the kept directions left next to nothing of the gradient (`PGURecord.blocked` after every epoch), or
    "diverged". error: what diverged. epochs: all of them, from 0."""

    kept: int
    reason: str
    error: str
    epochs: list[Epoch]


def run(
    step: Callable[[object], PGURecord],
    optimizer: SteppingOptimizer,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable,
    validate: Callable[[], tuple[float, float]],
    *,
    epochs: int = 100,
    lr: tuple[float, float] = (0.1, 0.01),
    stop: str = "validation",
    drop: float = 0.05,
    progress: Callable[[Epoch], None] | None = None,
) -> Run:
    """Take steps of `unlearning_loss` over the forget set until a stop rule holds; `PGU.run` gives the first arguments.

    The published optimizer is SGD without momentum, with batches of 128.

    stop="validation": the first epoch where the validation accuracy is above the forget accuracy ends it; of its model
        and the one before, that with the smaller difference stays.
    stop="retain", for a whole class: the first epoch where the retain accuracy is more than `drop` below that of the
        model as given ends it; the model before stays.

    NaN or Inf in a loss, a gradient, a weight or an accuracy ends it too; the model before that epoch stays.

    Args:
        step: takes one step on a batch; PGU is fitted, and the forget samples were taken out by `forget`.
        optimizer, weights: whose learning rates are set, and what the steps change.
        batches: the forget set, the same at every epoch: (inputs, labels), or a dictionary with "labels". The model is
            run as in `fit`; logits (n, classes) are what it returns, or that object's `logits`.
        validate: returns the forget accuracy and, by the rule, the validation or retain accuracy, in [0, 1].
        epochs, lr: the learning rate falls exponentially from the first to the second value over the epochs, and is
            put back afterwards.
        progress: called after each epoch.

    Raises ValueError for an unknown rule, an option out of its range or no batches, TypeError for another type.
    """
    check_choice("run: stop", stop, ("validation", "retain"))
    check_integer("run: epochs", epochs, 1)
    if not isinstance(lr, Iterable) or len(lr := tuple(lr)) != 2:
        raise ValueError(f"run: lr must be two positive numbers, that of the first and of the last epoch; got {lr!r}")
    first, last = (within("run: lr of the first and of the last epoch", rate, "(0, inf)") for rate in lr)
    drop = within("run: drop, a difference of accuracies,", drop, "[0, inf)")
    check_callable("run: validate", validate, "a function that returns two accuracies")
    if progress is not None:
        check_callable("run: progress", progress, "a function of an Epoch, or None")
    rates = [group["lr"] for group in optimizer.param_groups]
    history: list[Epoch] = []

    def measure(record: PGURecord | None) -> Epoch:
        accuracies = _accuracies(validate())
        now = Epoch(len(history), *accuracies, record)
        history.append(now)
        if not all(map(math.isfinite, accuracies)):
            raise FloatingPointError(f"validate() returned {accuracies}")
        if progress is not None:
            progress(now)
        return now

    def is_last(now: Epoch) -> bool:
        if stop == "validation":
            return now.other_accuracy > now.forget_accuracy
        return history[0].other_accuracy - now.other_accuracy > drop + 1e-9  # 0.52 - 0.47 > 0.05 in floating point

    try:
        if is_last(measure(None)):
            return Run(0, "stopped", "", history)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = first * (last / first) ** (epoch / max(1, epochs - 1))
            before = copies(weights)
            try:
                now = measure(_steps(step, batches, weights))
            except FloatingPointError as error:
                write_(weights, before)
                return Run(epoch, "diverged", str(error), history)
            if is_last(now):
                if stop == "validation" and now.difference < history[-2].difference:
                    return Run(epoch + 1, "stopped", "", history)
                write_(weights, before)
                return Run(epoch, "stopped", "", history)
        is_blocked = all(epoch.record.blocked for epoch in history[1:])
        return Run(epochs, "blocked" if is_blocked else "finished", "", history)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def expected_change(optimizer: SteppingOptimizer, norm: float, max_norm: float | None) -> float:
    """Return how much a step of SGD along a gradient of this norm, clipped, changes the loss, to first order.

    With momentum, as much as the steps after it bring of it, too. NaN for other optimizers: their steps are longer.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return math.nan
    rates = []
    for group in optimizer.param_groups:
        damped = 1 - group["dampening"] if group["momentum"] else 1.0
        rates.append(float(group["lr"]) * damped / max(1 - group["momentum"], 1e-9))
    clip = min(1.0, max_norm / norm) if max_norm is not None and norm else 1.0
    return max(rates) * clip * norm * norm


def _accuracies(returned: object) -> list[float]:
    """Return the two accuracies that `validate` returned; raises TypeError for anything else."""
    pair = tuple(returned) if isinstance(returned, Iterable) else ()
    if len(pair) != 2 or any(number(value) is None for value in pair):
        raise TypeError(f"run: validate() must return two accuracies, of forget and other samples; got {returned!r}")
    return [float(value) for value in pair]


def _steps(step: Callable[[object], PGURecord], batches: Iterable, weights: Mapping[str, nn.Parameter]) -> PGURecord:
    """Take the steps of one epoch, and return the last one's record."""
    record = None
    for batch in batches:
        record = step(batch)
    if record is None:
        raise ValueError("run: an epoch without a batch; pass a list or a loader, not an iterator that is used up")
    for name, p in weights.items():
        if not p.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or Inf after a step")
    return record
