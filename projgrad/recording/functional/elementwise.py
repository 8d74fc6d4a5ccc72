"""Elementwise use of free parameters, and what spreads a parameter over the samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..._torch_private import builtins
from ...ops.cost import chunk_bytes
from ...rules.layout import Layout
from ...rules.rule import Rows, Rule
from ..recording import Recorder


def fold(g: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum g [n, ...] over everything that broadcasting or repeating added to `shape`, [n, *shape]."""
    extra = g.ndim - 1 - len(shape)
    sizes, summed = list(g.shape[: 1 + extra]), list(range(1, 1 + extra))
    for size, wanted in zip(g.shape[1 + extra :], shape, strict=True):
        if size != wanted:
            summed.append(len(sizes))
            sizes.append(size // wanted)
        sizes.append(wanted)
    return g.reshape(sizes).sum(summed) if summed else g


def folded(
    g: Tensor, x: Tensor, shape: Sequence[int], layout: Layout, n: int, make: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Return g [n, ...] times make(x) [n k, ...], summed over what broadcasting added to `shape`: [n, *shape].

    Where the samples are blocks of axis 0 temporaries are made for a few of them at a time.
    """
    step = n
    if layout == Layout() and n:
        step = max(1, chunk_bytes(g.device.type) * n // max(1, 2 * g.numel() * g.element_size()))
    if step >= n:
        return fold(g * layout.split(make(x), n), shape)
    k, parts = len(x) // n, []
    for start in range(0, n, step):
        stop = min(n, start + step)
        parts.append(fold(g[start:stop] * layout.split(make(x[start * k : stop * k]), stop - start), shape))
    return torch.cat(parts)


def _free(y: Tensor, *parameters: Tensor) -> list[int]:
    """Return the axes of y along which the parameters are only broadcast: the samples must lie along one of these."""
    return [
        axis
        for axis in range(y.ndim)
        if all(p.ndim < y.ndim - axis or p.shape[axis - y.ndim + p.ndim] == 1 for p in parameters)
    ]


def _sum(name: str, function: Callable, signs: tuple[int, int], input: Any, other: Any, alpha: Any, tape: Recorder):
    call = tape.call(name, input, other)
    y = function(input, other, alpha=alpha) if alpha != 1 else function(input, other)
    claimed = [t for t in (input, other) if call.follows(t)]

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        g = layout.split(b, n)
        return [Rows(fold(g, shape) * factor) for shape, factor in terms]

    terms = [(t.shape, signs[0] if t is input else signs[1] * alpha) for t in claimed]
    return call.note(y, make, claimed, _free(y, *claimed), [])


def add(input: Tensor, other: Tensor, *, alpha: float = 1, tape: Recorder) -> Tensor:
    """`torch.add` with a parameter on either side."""
    return _sum("add", builtins.add, (1, 1), input, other, alpha, tape)


def sub(input: Tensor, other: Tensor, *, alpha: float = 1, tape: Recorder) -> Tensor:
    """`torch.sub` with a parameter on either side."""
    return _sum("sub", builtins.sub, (1, -1), input, other, alpha, tape)


def add_(input: Tensor, other: Tensor, *, alpha: float = 1, tape: Recorder) -> Tensor:
    return _sum("add_", Tensor.add_, (1, 1), input, other, alpha, tape)


def sub_(input: Tensor, other: Tensor, *, alpha: float = 1, tape: Recorder) -> Tensor:
    return _sum("sub_", Tensor.sub_, (1, -1), input, other, alpha, tape)


def mul(input: Tensor, other: Tensor, *, tape: Recorder) -> Tensor:
    """`torch.mul` with a parameter on either side."""
    call = tape.call("mul", input, other)
    y = builtins.mul(input, other)
    p, x = (input, other) if call.follows(input) else (other, input)
    if call.follows(x) or not isinstance(x, Tensor):
        return call.note(y, None, [], (), [])
    shape = p.shape

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        g, x = layout.split(b, n), saved[0]
        spread = layout.reaches(x, b)
        if spread and x.ndim == b.ndim:
            return [Rows(folded(g, x, shape, layout, n))]
        return [Rows(fold(g * (layout.split(x, n, b.ndim) if spread else x), shape))]

    return call.note(y, make, [p], _free(y, p), [x])


def spread(function: Callable, input: Tensor, *args: Any, tape: Recorder, **kwargs: Any) -> Tensor:
    """Copy a parameter to every sample: expand, repeat and their like."""
    call = tape.call(function.__name__, input)
    y = function(input, *args, **kwargs)
    shape = input.shape

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        return [Rows(fold(layout.split(b, n), shape))]

    lead = y.ndim - len(shape)
    axes = [a for a in range(y.ndim) if a < lead or y.shape[a] != shape[a - lead]]
    return call.note(y, make, [input], axes, [])


def local(function: Callable, args: tuple, kwargs: dict, aligned: bool, tape: Recorder) -> Tensor:
    """Call any function that treats samples alike; it is differentiated on its own, sample by sample, with vmap.

    aligned: dimensions correspond from the right, as in broadcasting; else the samples are along dimension 0.
    """
    flat = [*args, *kwargs.values()]
    call = tape.call(function.__name__, *flat)
    y = function(*args, **kwargs)
    if kwargs.get("dropout_p", args[4] if function.__name__ == "scaled_dot_product_attention" and len(args) > 4 else 0):
        return call.unknown(y)  # made again, it would drop others
    claimed = [t for t in flat if call.follows(t)]
    tensors = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
    followed = [i for i in tensors if call.follows(flat[i])]
    constants = {i: t for i, t in enumerate(flat) if not isinstance(t, Tensor)}
    names, count, total = list(kwargs), len(args), len(flat)

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        given = dict(zip(tensors, saved, strict=True))
        fixed = {i: t for i, t in given.items() if i not in followed}
        batched = [i for i, t in fixed.items() if (aligned or t.ndim == b.ndim) and layout.reaches(t, b)]

        def one(cotangent: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            def run(*parameters: Tensor) -> Tensor:
                values = constants | fixed | dict(zip(batched, parts, strict=True))
                values |= dict(zip(followed, parameters, strict=True))
                ordered = [values[i] for i in range(total)]
                return function(*ordered[:count], **dict(zip(names, ordered[count:], strict=True)))

            return vjp(run, *(given[i].detach() for i in followed))[1](cotangent)

        # Zeros beside a gradient of zero would do, were it not for functions that have no derivative there.
        parts = [layout.split(given[i].detach(), n, b.ndim if aligned else None, fill=None) for i in batched]
        with torch.enable_grad():
            rows = vmap(one)(layout.split(b, n), *parts)
        return [Rows(g) for g in rows]

    spread = any(t.ndim == y.ndim and t.shape[0] > 1 for t in claimed)  # a parameter that lies along the samples
    axes = _free(y, *claimed) if aligned else () if spread else (0,)
    return call.note(y, make, claimed, axes, [flat[i] for i in tensors])


vmap_broadcast = functools.partial(local, aligned=True)
vmap_batch_first = functools.partial(local, aligned=False)
