"""What a way to K = G Gᵀ and to the projected forget gradient is. G [n, p] holds the gradients of the retain losses."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ...methods.common import trainable_parameters


class Job(Protocol):
    """A model and two batches, forget and retain. Peers that put hooks on the model leave them there: one peer a job.

    samples: of every batch the inputs of the model and, last, the target; samples come first in each tensor.
    losses: of an output and a target, one loss per sample. forget is the mean of them, retain [n] all of them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    samples: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

    def losses(self, output: Tensor, target: Tensor) -> Tensor: ...

    def forget(self) -> Tensor: ...

    def retain(self) -> Tensor: ...


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to K and to the projection.

    gram: makes a job's call that returns K [n, n]. projection: one that returns the projected forget gradient [p].
    package: what pip installs, in the versions that were tried; module: its name in Python. Both empty: torch alone.
    scope: of the projection, as in `OrthoGrad`; empty for the floor, which projects nothing and has no K.
    needs_samples: it needs `samples` and `losses` of a job, for more than closures can give.
    """

    gram: Callable[[Job], Call]
    projection: Callable[[Job], Call]
    package: str = ""
    module: str = ""
    scope: str = "global"
    needs_samples: bool = True

    def missing(self) -> str | None:
        """Return what to install, None where nothing is missing."""
        if not self.module or importlib.util.find_spec(self.module):
            return None
        return f"{self.module} is not installed: pip install '{self.package}'"

    def start(self, job: Job) -> Call:
        """Return a call that computes K [n, n]. Raise ModuleNotFoundError without the package."""
        self._check(job)
        return self.gram(job)

    def project(self, job: Job) -> Call:
        """Return a call that computes the projected forget gradient [p], trained tensors in the model's order."""
        self._check(job)
        return self.projection(job)

    def _check(self, job: Job) -> None:
        if missing := self.missing():
            raise ModuleNotFoundError(missing)
        if self.needs_samples and not (hasattr(job, "samples") and hasattr(job, "losses")):
            raise TypeError("this peer needs the samples and losses of a job, closures are not enough")


def trained(job: Job) -> list[nn.Parameter]:
    return list(trainable_parameters(job.model, job.optimizer).values())


def batch_losses(job: Job, batch: Iterable[Tensor], model: Callable[..., Tensor] | None = None) -> Tensor:
    *inputs, target = batch
    return job.losses((model or job.model)(*inputs), target)


def wide(x: Tensor) -> Tensor:
    """Return float32 or better: linear algebra has no 16-bit kernels."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def flat(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return every tensor as a dense vector."""
    return [wide(g.to_dense() if g.is_sparse else g).flatten() for g in gradients]


def gradients(loss: Tensor, job: Job, weights: Tensor | None = None) -> list[Tensor]:
    """Return the gradient of every trained tensor, zero where it is not used."""
    return flat(torch.autograd.grad(loss, trained(job), weights, allow_unused=True, materialize_grads=True))
