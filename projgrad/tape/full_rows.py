"""Parameters whose per-sample gradients are made in full: used through a computation, or without a rule."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..recording.backward import recomputing
from ..recording.recording import Recording
from ..recording.sites import Source
from .plan import UsePlan


def mapped(recording: Recording, plan: UsePlan, dense: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the per-sample gradients of parameters that are used through something computed from them."""
    rows: dict[str, Tensor] = {}
    used = {id(source): source for site in recording.sites for source in site.sources}
    for source in used.values():
        d = dense.get(id(source))
        if d is None:
            continue
        names = sorted(plan.maps & source.names)
        if source.whole:
            grads: Sequence[Tensor | None] = [d]
        else:
            with recomputing(recording):  # it may have been computed inside of a checkpoint
                grads = _vjps(source, [recording.parameters[name] for name in names], d)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                rows[name] = rows[name] + g if name in rows else g
    for name in sorted(rows):
        yield name, rows[name]


def looped(recording: Recording, losses: Tensor, loops: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the per-sample gradients of parameters that no rule covers, from one backward pass per sample."""
    if not loops:
        return
    names = list(loops)
    inputs = [recording.parameters[name] for name in names]
    rows = {name: p.new_zeros((len(losses), *p.shape)) for name, p in zip(names, inputs, strict=True)}
    for j, one in enumerate(torch.eye(len(losses), dtype=losses.dtype, device=losses.device)):
        with recomputing(recording):
            grads = torch.autograd.grad(losses, inputs, one, retain_graph=True, allow_unused=True)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                rows[name][j] = g
    yield from rows.items()


def _vjps(source: Source, inputs: list[Tensor], d: Tensor) -> Sequence[Tensor | None]:
    """Return dᵀ ∂source/∂inputs for every row of d [n, *source shape]."""
    d = d.to(source.tensor.dtype)
    vjp = functools.partial(torch.autograd.grad, source.edge, inputs, retain_graph=True, allow_unused=True)
    try:
        return vjp(d, is_grads_batched=True)
    except RuntimeError:  # an operation without a batching rule
        rows = [vjp(one) for one in d]
        return [None if g[0] is None else torch.stack(g) for g in zip(*rows, strict=True)]
