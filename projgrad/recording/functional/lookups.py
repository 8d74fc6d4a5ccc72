"""Lookups in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch_private import builtins
from ...rules.layout import Layout, gather
from ...rules.lookup import Lookup
from ...rules.rule import Rule
from ..recording import Recorder

SCALED = "{}(scale_grad_by_freq=True) scales one sample's gradient by what the others hold"


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    tape: Recorder,
) -> Tensor:
    """`torch.nn.functional.embedding`: ids (...) into weight (rows, cols).

    Raises:
        ValueError: `scale_grad_by_freq`, whose gradient of one sample depends on the others; `sparse`.
    """
    if scale_grad_by_freq:
        raise ValueError(SCALED.format("embedding"))
    call = tape.call("embedding", input, weight)
    if sparse and call.follows(weight):
        raise ValueError("embedding(sparse=True) has gradients that cannot be projected: use sparse=False")
    padding = None if padding_idx is None else padding_idx % len(weight)
    if max_norm is not None:
        with torch.no_grad():
            builtins.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    y = builtins.embedding(weight, input, -1 if padding is None else padding, False, sparse)
    return lookup(call, y, input, weight, padding)


def lookup(call, y: Tensor, ids: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """Note y = weight[ids]."""

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        ids = saved[0].to(b.device)  # a table on a GPU may be indexed from the CPU
        read = ids % weight_rows
        if padding is not None:
            read = read.masked_fill(ids == padding, -1)
        read, g = layout.split(read, n, fill=-1), layout.split(b, n)
        return [Lookup(read.flatten(1), g.flatten(1, g.ndim - len(weight_shape)), weight_shape)]

    weight_rows, weight_shape = len(weight), weight.shape
    return call.note(y, make, [weight], range(ids.ndim), [ids], True)


def embedding_bag(weight: Tensor, input: Tensor, offsets: Tensor, *args: Any, tape: Recorder) -> tuple[Tensor, ...]:
    """`torch.embedding_bag` with mode sum or mean.

    Raises:
        ValueError: `scale_grad_by_freq`, as for `embedding`.
    """
    names = ("scale_grad_by_freq", "mode", "sparse", "per_sample_weights", "include_last_offset", "padding_idx")
    given = dict(zip(names, args, strict=False))
    if given.get("scale_grad_by_freq"):
        raise ValueError(SCALED.format("embedding_bag"))
    mode, scale = given.get("mode", 0), given.get("per_sample_weights")
    call = tape.call("embedding_bag", weight, input, offsets, scale)
    y, bag, sizes, largest = builtins.embedding_bag(weight, input, offsets, *args)
    shape, padding = weight.shape, given.get("padding_idx")
    bags = len(y)

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        ids, starts, *factor = saved
        owner = layout.owner(bags, n, b.device)
        token = torch.arange(len(ids), device=b.device)
        bag = torch.searchsorted(starts[:bags].contiguous(), token, right=True) - 1
        keep = ids != padding if padding is not None and padding >= 0 else torch.ones_like(ids, dtype=torch.bool)
        g = b[bag]
        if factor:
            g = g * factor[0][:, None]
        if mode == 1:
            counts = torch.zeros(bags, dtype=b.dtype, device=b.device).index_add_(0, bag, keep.to(b.dtype))
            g = g / counts.clamp_min(1)[bag][:, None]
        where = gather(owner[bag].masked_fill(~keep, -1), n)
        padded = torch.cat([ids, ids.new_full((1,), -1)])
        return [Lookup(padded[where.rows], where.split(g, n), shape)]

    saved = [input, offsets, *([scale] if scale is not None else [])]
    claimed = [weight] if mode in (0, 1) else []
    return call.note(y, make, claimed, (0,) if claimed else (), saved, True), bag, sizes, largest
