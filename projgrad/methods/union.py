"""The retain part of a step over many micro-batches: progress, and the fields of its record."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..tape.processes import Processes
from ..tape.union import Union
from ..tape.weighted_union import HeldUnion
from .closures import Closures
from .micro_batches import MicroBatchOptions, RetainBatches, padded
from .optimizer_metric import LEFT_OUT, MetricStep
from .protocol import Closure
from .replicas import ReplicatedModel


def project_union(
    model: nn.Module,
    closures: Closures,
    named: Mapping[str, Closure],
    options: MicroBatchOptions,
    *,
    scope: str,
    alpha: float,
    rates: Mapping[str, float],
    prepare: Callable[[Tensor], Tensor],
    spread: ReplicatedModel | None = None,
) -> dict[str, Any]:
    """Set p.grad to its projection plus α mean_j(g_j) over all micro-batches; return the fields of the record.

    spread: over processes, each with micro-batches of its own.
    """
    batches, names = RetainBatches(model, closures, named, prepare, spread), list(named)
    visits = len(named) if spread is None else spread.visits(len(named))
    processes = None if spread is None else spread.processes
    largest = max(rates.values(), default=0.0)
    relative = {name: rate / largest for name, rate in rates.items()} if largest else {}
    with _progress(options, visits) as notify:
        union = (Union if spread is None else spread.union)(
            batches=[functools.partial(batches.recorded, *one) for one in padded(names, visits)],
            parameters=closures.params,
            scope=scope,
            alpha=alpha,
            tolerance=options.tolerance,
            max_passes=options.max_passes,
            rates=relative,
            notify=notify,
        )
        projection = union.run()
    fields = {name: value for name, value in vars(projection).items() if name not in LEFT_OUT}
    return fields | _of_losses(batches, projection.samples, processes)


def union_metric_step(
    model: nn.Module,
    closures: Closures,
    named: Mapping[str, Closure],
    options: MicroBatchOptions,
    *,
    scope: str,
    alpha: float,
    prepare: Callable[[Tensor], Tensor],
    spread: ReplicatedModel | None = None,
) -> dict[str, Any]:
    """Add α mean_j(g_j) over all micro-batches to p.grad; return the step that follows, and fields of its record.

    spread: as for `project_union`.
    """
    batches = RetainBatches(model, closures, named, prepare, spread)
    processes = None if spread is None else spread.processes
    visits = [functools.partial(batches.recorded, name) for name in named]
    progress = functools.partial(_progress, options, len(named))

    def hold() -> HeldUnion:
        tolerance, passes = options.tolerance, options.max_passes
        return HeldUnion(visits, closures.params, scope, alpha, tolerance, passes, progress, processes)

    given = () if spread is None else (spread.clip, spread.placement.norms, spread.processes.same)
    step = MetricStep(closures.optimizer, closures.params, hold, *given)
    return {"metric_step": step} | _of_losses(batches, step.held.samples, processes)


def _of_losses(batches: RetainBatches, samples: int, processes: Processes | None) -> dict[str, Any]:
    """Return the mean loss and the number of all micro-batches."""
    losses = sum(values.double().sum() for values in batches.values.values())
    sums = torch.stack([losses, torch.full_like(losses, len(batches.named))])
    losses, count = (sums if processes is None else processes.sum_(sums, "agreements")).tolist()
    return {"retain_loss": losses / samples, "micro_batches": int(count)}


@contextmanager
def _progress(options: MicroBatchOptions, count: int) -> Iterator[Callable[[int, int, float], object]]:
    """Give what is called after every micro-batch: a bar on stderr, with rich, if the options want one."""
    if not options.progress:
        yield lambda *_: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise ImportError("progress=True needs rich: pip install rich") from error
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("retain", total=count)

        def notify(index: int, batch: int, residual: float) -> None:
            description = f"pass {index + 1}" + (f", residual {residual:.1e}" if residual == residual else "")
            bar.update(task, completed=batch + 1, description=description)

        yield notify
