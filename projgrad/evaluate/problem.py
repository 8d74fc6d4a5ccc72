"""What an unlearning problem is made of: samples, a model, how it is trained and how it is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH = 256  # samples scored at once


class MissingData(Exception):
    """The package that carries a data set or a model is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Part:
    """Samples: the model's inputs and the labels, each with the samples along dimension 0."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Part:
        return Part(tuple(x[rows] for x in self.inputs), self.labels[rows])

    def to(self, device: torch.device | str) -> Part:
        return Part(tuple(x.to(device) for x in self.inputs), self.labels.to(device))

    @staticmethod
    def joined(*parts: Part) -> Part:
        inputs = zip(*(part.inputs for part in parts), strict=True)
        return Part(tuple(map(torch.cat, inputs)), torch.cat([part.labels for part in parts]))


@dataclass(frozen=True)
class Training:
    """Adam, the learning rate falling as a cosine to a tenth."""

    lr: float
    batch: int
    epochs: int


class Problem:
    """One unlearning problem at one seed. Training data are retain and forget; validation and test hold what should
    stay known, with the same test samples for every seed, so that no search on validation data has seen one.

    retain, forget, validation, test: the samples. forget.labels are what is to be forgotten.
    classes: number of classes.
    training: how the original model was made, and the one retrained without the forget set; None where the original is
        a published model that cannot be made again.
    others: more parts to score, by name. batch: samples scored at once.
    taught: where the original model is the same for every seed, its training samples, in an order that is too.
    """

    retain: Part
    forget: Part
    validation: Part
    test: Part
    classes: int
    training: Training | None
    others: dict[str, Part]
    taught: Part | None = None
    batch = BATCH

    def to(self, device: torch.device | str) -> Problem:
        """Move all samples, in place."""
        for name in ("retain", "forget", "validation", "test"):
            setattr(self, name, getattr(self, name).to(device))
        self.others = {name: part.to(device) for name, part in self.others.items()}
        self.taught = self.taught and self.taught.to(device)
        return self

    def build(self) -> nn.Module:
        """Make a new model, before training; the same for the same seed.

        Only parameters that require gradients are trained and unlearned.
        """
        raise NotImplementedError

    def logits(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        """Return logits (m, classes) and labels (m,): one row per sample, or one per token of the labels."""
        return model(*part.inputs), part.labels

    def losses(self, model: nn.Module, part: Part) -> Tensor:
        """Compute one loss per sample (n,)."""
        logits, labels = self.logits(model, part)
        losses = cross_entropy(logits, labels, reduction="none")
        return losses if len(losses) == len(part) else losses.view(len(part), -1).mean(1)

    def correct(self, model: nn.Module, part: Part) -> Tensor:
        """Return the share of each sample's labels that the model has right, in [0, 1] (n,)."""
        logits, labels = self.logits(model, part)
        return (logits.argmax(1) == labels).double().view(len(part), -1).mean(1)

    def lengths(self, part: Part) -> Tensor:
        """Count the labels of each sample, those of padding (-100) left out (n,)."""
        return (part.labels.view(len(part), -1) != -100).sum(1)

    def optimizer(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Make the optimizer that unlearning steps with."""
        return torch.optim.SGD(parameters, lr)

    def relabelled(self, part: Part, generator: torch.Generator) -> Part:
        """Return the samples with a random other label each."""
        shift = torch.randint(1, self.classes, part.labels.shape, generator=generator).to(part.labels.device)
        return Part(part.inputs, (part.labels + shift) % self.classes)

    def measure(self, model: nn.Module, retrained: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measure anything else that the scenario reports, by name, such as word error rates.

        retrained: the scores of the model trained without the forget set, where they are known.
        """
        return {}

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: Part) -> float:
        """Compute the mean of `correct` over a part, `batch` samples at a time."""
        return torch.cat([self.correct(model, piece) for piece in pieces(part, self.batch)]).mean().item()

    @torch.no_grad()
    def confidence(self, model: nn.Module, part: Part) -> Tensor:
        """Compute the probability that the model gives each sample's label (n,), float64: exp(-loss)."""
        return torch.cat([self.losses(model, piece) for piece in pieces(part, self.batch)]).double().neg().exp().cpu()


def pieces(part: Part, size: int = BATCH) -> list[Part]:
    return [part[start : start + size] for start in range(0, len(part), size)]
