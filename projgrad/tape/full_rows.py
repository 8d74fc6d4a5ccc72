"""Parameters whose per-sample gradients are made in full: used through a computation, or without a rule."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..recording.recording import Source
from .plan import UsePlan

if TYPE_CHECKING:
    from .tape import Tape


def mapped(tape: Tape, plan: UsePlan, dense: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Per-sample gradients of parameters that are used through something computed from them."""
    rows: dict[str, Tensor] = {}
    used = {id(source): source for site in tape.sites for source in site.sources}
    for source in used.values():
        d = dense.get(id(source))
        if d is None:
            continue
        names = sorted(plan.maps & source.names)
        if source.whole:
            grads: Sequence[Tensor | None] = [d]
        else:
            with tape._again():  # it may have been computed inside of a checkpoint
                grads = _vjps(source, [tape.parameters[name] for name in names], d)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                rows[name] = rows[name] + g if name in rows else g
    for name in sorted(plan.maps):
        if name in rows:
            yield name, rows[name]


def looped(tape: Tape, losses: Tensor, loops: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The fallback: one backward pass per sample, for the parameters that no rule covers."""
    if not loops:
        return
    names = list(loops)
    inputs = [tape.parameters[name] for name in names]
    rows = {name: p.new_zeros((len(losses), *p.shape)) for name, p in zip(names, inputs, strict=True)}
    for j, one in enumerate(torch.eye(len(losses), dtype=losses.dtype, device=losses.device)):
        with tape._again():
            grads = torch.autograd.grad(losses, inputs, one, retain_graph=True, allow_unused=True)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                rows[name][j] = g
    yield from rows.items()


def _vjps(source: Source, inputs: list[Tensor], d: Tensor) -> Sequence[Tensor | None]:
    """dᵀ ∂source/∂inputs for every row of d [n, *source shape]."""
    d = d.to(source.tensor.dtype)
    vjp = functools.partial(torch.autograd.grad, source.edge, inputs, retain_graph=True, allow_unused=True)
    try:
        return vjp(d, is_grads_batched=True)
    except RuntimeError:  # an operation without a batching rule
        rows = [vjp(one) for one in d]
        return [None if g[0] is None else torch.stack(g) for g in zip(*rows, strict=True)]
