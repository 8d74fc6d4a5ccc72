"""An unlearning problem from a user's own samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .problem import Part, Problem

Samples = Part | Dataset | tuple[Tensor, ...]


class Classification(Problem):
    """Samples given as tensors or data sets, to be scored by `scores`.

    retain, forget, test, validation and any others by name: (x, y), with several inputs (ids, mask, y), or a data set
    of such samples, which is read into memory. y holds class indices, (samples,), integers of any type.
    The model is called as model(x) on its own device; it returns logits (samples, classes), or an object that has them
    as .logits.
    Raises ValueError where a part is empty, its inputs and labels differ in number, or a label is negative: -100, which
    the losses of torch leave out, is no class; do not pass such samples. When a model is scored it is raised for logits
    of another shape, labels beyond their classes, and NaN.

    Example:
        >>> from projgrad.evaluate import Classification
        >>> x, y = torch.randn(30, 4), torch.randint(3, (30,))
        >>> problem = Classification(retain=(x[:20], y[:20]), forget=(x[20:25], y[20:25]), test=(x[25:], y[25:]))
        >>> len(problem.retain), len(problem.forget), len(problem.test)
        (20, 5, 5)
    """

    training = None

    def __init__(
        self, *, retain: Samples, forget: Samples, test: Samples, validation: Samples | None = None, **others: Samples
    ) -> None:
        self.retain, self.forget, self.test = part("retain", retain), part("forget", forget), part("test", test)
        self.validation = None if validation is None else part("validation", validation)
        self.others = {name: part(name, samples) for name, samples in others.items()}
        self.classes = 1 + max(int(part.labels.max()) for part in (self.retain, self.forget, self.test))

    def logits(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        weight = next(model.parameters(), None)
        part = part if weight is None else part.to(weight.device)
        output = model(*part.inputs)
        logits = getattr(output, "logits", output)
        _check_logits(logits, part.labels)
        return logits, part.labels


def part(name: str, samples: Samples) -> Part:
    """Return the samples as tensors, labels as int64; name: what to call them in an error."""
    if isinstance(samples, Part):
        samples = (*samples.inputs, samples.labels)
    elif isinstance(samples, Dataset):
        samples = default_collate([samples[row] for row in range(len(samples))])
    if not isinstance(samples, (tuple, list)):
        raise ValueError(f"{name} should be (x, y) or a data set of such samples; got {type(samples).__name__}")
    *inputs, labels = map(torch.as_tensor, samples)
    if not inputs:
        raise ValueError(f"{name} should be (x, y) with one or more inputs before the labels")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        shape = tuple(labels.shape)
        raise ValueError(f"labels of {name} should be class indices (samples,), they are {labels.dtype} {shape}")
    if not len(labels) or any(x.ndim == 0 or len(x) != len(labels) for x in inputs):
        counts = ", ".join(str(len(x)) if x.ndim else "a number" for x in inputs)
        raise ValueError(f"{name} should have as many inputs as labels, and some: {counts} against {len(labels)}")
    labels = labels.long()
    if labels.min() < 0:
        raise ValueError(
            f"labels of {name} should be class indices from 0; {int((labels < 0).sum())} of {len(labels)} are "
            f"negative, such as {int(labels.min())}: leave out samples without a class, x[y >= 0] and y[y >= 0]"
        )
    return Part(tuple(inputs), labels)


def _check_logits(logits: object, labels: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model should return logits (samples, classes), or an object that has them as .logits; for "
            f"{len(labels)} samples it returned {got}"
        )
    if labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels go up to {int(labels.max())}, and the model has logits of {logits.shape[1]} classes, from 0 on"
        )
    bad = ~logits.amax(1).isfinite()
    if bad.any():
        raise ValueError(
            f"the model gives no probabilities for {int(bad.sum())} of {len(bad)} samples: their largest logit is "
            f"{float(logits[bad][0].amax())}. Score the model as it was before it diverged"
        )
