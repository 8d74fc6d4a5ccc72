"""The retain part of a step over many micro-batches: progress, and the fields of its record."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..tape.union import Batch, Union
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
    batches = RetainBatches(model, closures, named, prepare, spread)
    visits = _visits(batches)
    largest = max(rates.values(), default=0.0)
    relative = {name: rate / largest for name, rate in rates.items()} if largest else {}
    with _progress(options, len(visits)) as notify:
        limits = options.tolerance, options.max_passes
        projection = Union(visits, closures.params, scope, alpha, *limits, relative, notify, spread).run()
    fields = {name: value for name, value in vars(projection).items() if name not in LEFT_OUT}
    return fields | _of_losses(batches, projection.samples)


def union_metric_step(
    model: nn.Module,
    closures: Closures,
    named: Mapping[str, Closure],
    options: MicroBatchOptions,
    *,
    scope: str,
    alpha: float,
    prepare: Callable[[Tensor], Tensor],
    mask: Mapping[str, Tensor] | None,
    spread: ReplicatedModel | None = None,
) -> dict[str, Any]:
    """Add α mean_j(g_j) over all micro-batches to p.grad; return the step that follows, and fields of its record.

    mask: as for `MetricStep`. spread: as for `project_union`.
    """
    batches = RetainBatches(model, closures, named, prepare, spread)
    visits = _visits(batches)
    progress = functools.partial(_progress, options, len(visits))

    def hold() -> HeldUnion:
        limits = options.tolerance, options.max_passes
        return HeldUnion(visits, closures.params, scope, alpha, *limits, progress, spread)

    given = () if spread is None else (spread.clip, spread.placement.norms, spread.processes.same)
    step = MetricStep(closures.optimizer, closures.params, hold, *given, mask=mask)
    return {"metric_step": step} | _of_losses(batches, step.held.samples)


def _visits(batches: RetainBatches) -> list[Batch]:
    """Return the forward passes of this process, in shards as many as those of any other."""
    count, spread = len(batches.named), batches.spread
    visits = padded(batches.named, count if spread is None else spread.visits(count))
    return [functools.partial(batches.recorded, *one) for one in visits]


def _of_losses(batches: RetainBatches, samples: int) -> dict[str, Any]:
    """Return the mean loss and the number of all micro-batches."""
    losses = sum(values.double().sum() for values in batches.values.values())
    sums = torch.stack([losses, torch.full_like(losses, len(batches.named))])
    losses, count = (sums if batches.spread is None else batches.spread.processes.sum_(sums, "agreements")).tolist()
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
