"""Who takes the whole steps of a benchmark: training without projection, projgrad, and explicit per-sample gradients.

A job has a model, its optimizer and two closures: `forget` returns one loss, `retain` one of every sample. A contender
makes the job's step of it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ...methods import projectors
from ...methods.common import learning_rates, trainable_parameters
from ...methods.orthograd import OrthoGrad
from ...tape.per_sample import per_sample

ALPHA = 0.5


class Job(Protocol):
    """What a contender steps.

    retain: with a parameter `part` it can be asked for some samples' losses: `retain(part=slice(0, 1))`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    n: int

    def forget(self) -> Tensor: ...

    def retain(self) -> Tensor: ...


Step = Callable[[], object]
Start = Callable[[Job], Step]


def plain(job: Job) -> Step:
    """Start the same step without projection."""

    def step() -> None:
        job.optimizer.zero_grad()
        (-(1 - ALPHA) * job.forget()).backward()
        (ALPHA * job.retain().mean()).backward()
        job.optimizer.step()

    return step


def orthograd(**options: object) -> Start:
    def start(job: Job) -> Step:
        unlearner = OrthoGrad(job.model, job.optimizer, alpha=ALPHA, **options)
        return lambda: unlearner.step(job.forget, job.retain)

    return start


def plain_backward(job: Job) -> Step:
    def step() -> None:
        job.optimizer.zero_grad()
        job.retain().mean().backward()

    return step


def tape_gram(job: Job) -> Step:
    params = trainable_parameters(job.model, job.optimizer)

    def step() -> Tensor:
        with per_sample(job.model, params) as tape:
            losses = job.retain()
        return tape.gram(losses, retain_graph=False)

    return step


def takes_slices(retain: Callable[..., Tensor]) -> bool:
    """Return whether the closure has the parameter `part`, a slice of the samples."""
    return has_parameter(retain, "part")


def has_parameter(function: Callable[..., object], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # what is written in C tells nothing
        return False


def gradients(job: Job, rows: Sequence[Tensor]) -> None:
    """Write the gradient of retain sample j into row j of every [n, p_l].

    One forward and backward pass a sample where `retain` takes slices; else n backward passes of the whole batch.
    """
    params = list(trainable_parameters(job.model, job.optimizer).values())
    losses = None if takes_slices(job.retain) else job.retain()
    for j in range(job.n):
        loss = job.retain(part=slice(j, j + 1)).sum() if losses is None else losses[j]
        grads = torch.autograd.grad(loss, params, retain_graph=losses is not None, allow_unused=True)
        for row, g in zip(rows, grads, strict=True):
            row[j] = 0 if g is None else g.flatten()


def matrix(job: Job) -> tuple[Tensor, list[Tensor]]:
    """Return G [n, p] of the retain samples, in float32 or better, and its parts [n, p_l]: one of every parameter."""
    params = list(trainable_parameters(job.model, job.optimizer).values())
    sizes, dtype = [p.numel() for p in params], torch.promote_types(params[0].dtype, torch.float32)
    G = torch.empty(job.n, sum(sizes), device=params[0].device, dtype=dtype)
    parts = list(G.split(sizes, 1))
    gradients(job, parts)
    return G, parts


def scales(job: Job) -> list[float]:
    """Return √lr of every parameter where their rates differ, else ones: the update is orthogonal after the rates."""
    params = trainable_parameters(job.model, job.optimizer)
    rates = learning_rates(job.optimizer, params)
    return [rates[name] ** 0.5 if rates else 1.0 for name in params]


def gram_project_out(u: Tensor, G: Tensor) -> Tensor:
    """Project by the n x n system, without a rank test."""
    return u - torch.linalg.solve(G @ G.mT, G @ u) @ G


def loop(project: Callable[[Tensor, Tensor], Tensor], scope: str = "global") -> Start:
    """Take explicit per-sample gradients, and project all at once or tensor by tensor, as the published code does."""

    def start(job: Job) -> Step:
        params, weights = list(trainable_parameters(job.model, job.optimizer).values()), scales(job)

        def step() -> None:
            job.optimizer.zero_grad()
            job.forget().backward()
            G, parts = matrix(job)
            means = [part.mean(0) for part in parts]
            u = [
                m.new_zeros(m.shape) if p.grad is None else p.grad.flatten().to(m.dtype) for p, m in _zip(params, means)
            ]
            if scope == "per_tensor":
                new = [project(f, part) for f, part in _zip(u, parts)]
            else:
                for f, part, weight in _zip(u, parts, weights):
                    if weight != 1:
                        f.mul_(weight), part.mul_(weight)
                new = project(torch.cat(u), G).split([p.numel() for p in params])
                new = [f / weight if weight != 1 else f for f, weight in _zip(new, weights)]
            for p, f, m in _zip(params, new, means):
                p.grad = (ALPHA * m - (1 - ALPHA) * f).view_as(p).to(p.dtype)
            job.optimizer.step()

        return step

    return start


def loop_gram(job: Job) -> Step:
    def step() -> Tensor:
        G, _ = matrix(job)
        return G @ G.mT

    return step


def _zip(*lists: Sequence) -> zip:
    return zip(*lists, strict=True)


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    truth: the result that it must have: "plain", "global", "per_tensor", "gram", "orthogonal" of the applied change, of
        the forget gradient alone "u, global" and "u, per_tensor"; "none" where nothing is compared.
    holds: copies of G that it holds at least.
    missing: why it cannot run here. needs_samples: closures alone are not enough for it.
    """

    start: Start
    truth: str
    holds: float = 0.0
    missing: str | None = None
    needs_samples: bool = False


STEPS = {
    "plain": Contender(plain, "plain"),
    "projgrad global": Contender(orthograd(scope="global"), "global"),
    "projgrad per_tensor": Contender(orthograd(scope="per_tensor"), "per_tensor"),
    "projgrad optimizer": Contender(orthograd(metric="optimizer"), "orthogonal"),
    "loop + QR": Contender(loop(projectors.qr), "global", 3.0),
    "loop + QR per_tensor": Contender(loop(projectors.qr, "per_tensor"), "per_tensor", 1.0),
    "loop + Gram": Contender(loop(gram_project_out), "global", 1.0),
}
GRAMS = {
    "plain": Contender(plain_backward, "none"),
    "projgrad gram": Contender(tape_gram, "gram"),
    "loop gram": Contender(loop_gram, "gram", 1.0),
}
