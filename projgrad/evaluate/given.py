"""An unlearning problem from a user's own samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..scenarios.problem import Part, Problem

Samples = Part | Dataset | tuple[Tensor, ...]


class Classification(Problem):
    """Samples given as tensors or data sets, to be scored by `scores`.

    retain, forget, test, validation and any others by name: (x, y), with several inputs (ids, mask, y), or a data set
    of such samples, which is read into memory. y holds class indices, (samples,).
    The model is called as model(x) on its own device; it returns logits (samples, classes), or an object that has them
    as .logits.
    Raises ValueError where a part is empty, or its inputs and labels differ in number.

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
        self.classes = 1 + max(int(some.labels.max()) for some in (self.retain, self.forget, self.test))

    def logits(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        weight = next(model.parameters(), None)
        part = part if weight is None else part.to(weight.device)
        output = model(*part.inputs)
        return getattr(output, "logits", output), part.labels


def part(name: str, samples: Samples) -> Part:
    """The samples as tensors; name: what to call them in an error."""
    if isinstance(samples, Part):
        return samples
    if isinstance(samples, Dataset):
        samples = default_collate([samples[row] for row in range(len(samples))])
    *inputs, labels = map(torch.as_tensor, samples)
    if not inputs:
        raise ValueError(f"{name} should be (x, y) with one or more inputs before the labels")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels of {name} should be class indices (samples,), they are {labels.dtype} {labels.shape}")
    if not len(labels) or any(len(x) != len(labels) for x in inputs):
        counts = ", ".join(str(len(x)) for x in inputs)
        raise ValueError(f"{name} should have as many inputs as labels, and some: {counts} against {len(labels)}")
    return Part(tuple(inputs), labels)
