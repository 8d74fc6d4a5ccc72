"""Training and unlearning one model: plain functions of (problem, setting, seed)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from ...evaluate.problem import Part, Problem
from .methods import METHODS, Context, Setting, batches, optimizer_of

CURVE = ("forget_loss", "retain_loss", "rank", "preserved_norm", "residual")


@dataclass
class Unlearned:
    """The records of an unlearning run, beside the model.

    seconds: wall time of all steps and what the method prepares before them, without evaluation. stopped: why the run
    ended early, with the model of the last good point.
    """

    steps: int
    seconds: float
    step_seconds: float | None
    preserved_norm: float | None = None
    residual: float | None = None
    stopped: str | None = None
    curve: list[dict] = field(default_factory=list)


def train(problem: Problem, parts: Sequence[Part], seed: int, tick: Callable[[], None] = lambda: None) -> nn.Module:
    """Train a new model on the parts, by the problem's recipe; `tick` is called after every epoch."""
    data, recipe = Part.joined(*parts), problem.training
    model = problem.build().to(data.labels.device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs, recipe.lr / 10)
    order = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(data), generator=order).to(data.labels.device).split(recipe.batch):
            optimizer.zero_grad()
            problem.losses(model, data[rows]).mean().backward()
            optimizer.step()
        schedule.step()
        tick()
    return model


def unlearn(
    problem: Problem,
    model: nn.Module,
    method: str,
    setting: Setting,
    *,
    seed: int,
    forget_batch: int,
    points: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Unlearned:
    """Unlearn in place with the problem's optimizer, its learning rate falling linearly to 0; n retain samples a step.

    points: how often to look at forget and test accuracy for the curve (0: never). A step whose losses or update are
    not finite ends the run, and the model of the last good point is restored.
    """
    steps = setting.steps
    every = max(1, steps // (points or 8))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(problem, method, model, setting.lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, max(1, steps - 1))
    generators = [torch.Generator().manual_seed(1000 * k + seed) for k in (1, 2, 3)]
    forget_batches = batches(problem.forget, forget_batch, generators[0])
    retain_batches = batches(problem.retain, setting.n, generators[1])
    curve: list[dict] = []
    seconds, records, stopped = [], [], None
    start = _now(problem)
    step = METHODS[method].make(Context(problem, model, optimizer, setting, generators[2]))
    prepared = _now(problem) - start

    def add_point(steps_made: int, record: object) -> None:
        if points:
            shares = {key: problem.accuracy(model, getattr(problem, key)) for key in ("forget", "test")}
            numbers = {key: getattr(record, key, None) for key in CURVE}
            curve.append({"step": steps_made, **shares, **{k: v if v == v else None for k, v in numbers.items()}})

    add_point(0, None)
    last_good = 0, [p.detach().clone() for p in trained]
    for step_index in range(steps):
        if step_index % every == 0:
            checkpoint = step_index, [p.detach().clone() for p in trained]
        batch = next(forget_batches), next(retain_batches)
        start = _now(problem)
        try:
            records.append(step(*batch))
        except FloatingPointError as error:
            stopped = f"step {step_index + 1} of {steps}: {error}"
            break
        seconds.append(_now(problem) - start)
        last_good = checkpoint  # a step from there was finite
        decay.step()
        tick()
        if (step_index + 1) % every == 0 or step_index + 1 == steps:
            add_point(step_index + 1, records[-1])
    if stopped is None and not all(p.isfinite().all() for p in trained):
        stopped = f"after step {steps} a parameter is not finite"
    if stopped:
        stopped += f"; the model after {last_good[0]} steps was restored"
        with torch.no_grad():
            for p, before in zip(trained, last_good[1], strict=True):
                p.copy_(before)
    preserved_norms = [r.preserved_norm for r in records if hasattr(r, "preserved_norm")]
    residuals = [r.residual for r in records if hasattr(r, "residual")]
    return Unlearned(
        steps=len(records),
        seconds=prepared + sum(seconds),
        step_seconds=median(seconds) if seconds else None,
        preserved_norm=median(preserved_norms) if preserved_norms else None,
        residual=max(residuals) if residuals else None,
        stopped=stopped,
        curve=curve,
    )


def _now(problem: Problem) -> float:
    """Read the clock, when the device has finished."""
    if problem.test.labels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
