"""Training, unlearning and evaluating one model: plain functions of (task, settings, seed)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Part, Task
from .methods import cnn, make

TRAINING = {  # Adam, cosine decay to a tenth; long enough for digits to learn its wrong labels by heart
    "digits": {"lr": 4e-3, "batch": 64, "epochs": 50},
    "faces": {"lr": 1e-3, "batch": 16, "epochs": 30},
}
FORGET_BATCH = 128


@dataclass(frozen=True)
class Setting:
    """lr at the first step, number of steps, retain samples a step; alpha for the methods that have one."""

    lr: float
    steps: int
    n: int
    alpha: float | None = None


@dataclass
class Run:
    """One model's accuracies in [0, 1]; `forget` is the share of the forget set still given the labels to forget."""

    forget: float
    retain: float
    validation: float
    test: float
    curve: list[dict] = field(default_factory=list)
    step_seconds: float | None = None
    preserved_norm: float | None = None
    residual: float | None = None


def new_model(task: Task, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cnn(tuple(task.test.x.shape[-2:]), task.classes)


def train(task: Task, seed: int, *, with_forget: bool, tick: Callable[[], None] = lambda: None) -> nn.Sequential:
    """The original model (with the forget set) or the retrained one (without)."""
    model = new_model(task, seed)
    parts = [task.retain, task.forget] if with_forget else [task.retain]
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    lr, size, epochs = (TRAINING[task.name][key] for key in ("lr", "batch", "epochs"))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, lr / 10)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(size):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
        tick()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    return (model(part.x).argmax(1) == part.y).double().mean().item()


def evaluate(model: nn.Module, task: Task) -> Run:
    return Run(*(accuracy(model, getattr(task, part)) for part in ("forget", "retain", "validation", "test")))


def batches(part: Part, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches without repetition inside one; all of the part where it is smaller."""
    while True:
        order = torch.randperm(len(part.y), generator=generator)
        for rows in order.split(size)[: max(1, len(order) // size)]:
            yield part.x[rows], part.y[rows]


def unlearn(
    model: nn.Module,
    task: Task,
    method: str,
    setting: Setting,
    *,
    seed: int,
    points: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Run:
    """Unlearn in place by SGD, the learning rate falling linearly to 0; n retain samples a step.

    points: how many times to evaluate for the curve (0: no curve). Evaluation does not count into the seconds.
    """
    lr, steps, n, alpha = setting.lr, setting.steps, setting.n, setting.alpha
    every = max(1, steps // points) if points else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    unlearner = make(method, model, optimizer, alpha)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, max(1, steps - 1))
    generator = torch.Generator().manual_seed(1000 + seed)
    forget_batches = batches(task.forget, FORGET_BATCH, generator)
    retain_batches = batches(task.retain, n, torch.Generator().manual_seed(2000 + seed))
    curve, seconds, records = [], [], []

    def point(step: int) -> None:
        curve.append({"step": step, "test": accuracy(model, task.test), "forget": accuracy(model, task.forget)})

    for step in range(steps):
        if every and step % every == 0:
            point(step)
        (xf, yf), (xr, yr) = next(forget_batches), next(retain_batches)
        start = time.perf_counter()
        record = unlearner.step(
            lambda x=xf, y=yf: cross_entropy(model(x), y),
            lambda x=xr, y=yr: cross_entropy(model(x), y, reduction="none"),
        )
        seconds.append(time.perf_counter() - start)
        records += [record] if record else []
        decay.step()
        tick()
    if every:
        point(steps)
    run = evaluate(model, task)
    run.curve, run.step_seconds = curve, median(seconds)
    if records:
        run.preserved_norm = median(r.preserved_norm for r in records)
        run.residual = max(r.residual for r in records)
    return run
