"""What processes tell one another of the uses of parameters, before they exchange shares of K; see `crossing`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.numerics import product_dtype
from ..rules.parcels import pack
from ..rules.rule import Rule
from .grouping import Use

Part = tuple[str, object]  # the name of a parameter, and what identifies the part of it


class Description(NamedTuple):
    """What the others have to know of one use on one process.

    kind, shapes, dtypes, fills: of its factors, kind None where only gradients can be sent. rows, cols: of the
    parameter as a matrix. itemsize: of gradients.
    """

    kind: tuple | None
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    fills: tuple[float | None, ...]
    rows: int
    cols: int
    itemsize: int

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of the factors."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]


class Share(NamedTuple):
    """A share of K: of one use, or of some rows of its gradients.

    ranks: of the processes that have the use. rows: None where factors are sent.
    """

    part: Part
    ranks: tuple[int, ...]
    owner: int
    rows: slice | None


def by_part(pieces: Mapping[str, Sequence[Use]]) -> dict[Part, Rule]:
    """Return the rule of every part of a parameter that is used."""
    return {(name, _key(use)): use.rule for name, uses in pieces.items() for use in uses}


def _key(use: Use) -> object:
    """Return what identifies the part of its parameter that a use is of, on every process alike."""
    if use.source.whole:
        return "whole"
    return "rows" if use.source.rows is not None else use.source.window


def describe(rule: Rule) -> Description:
    """Return what the others have to know of a use."""
    parcel, itemsize = pack(rule), rule.dtype.itemsize
    if parcel is None:
        return Description(None, (), (), (), rule.rows, rule.cols, itemsize)
    shapes = tuple(tuple(t.shape) for t in parcel.tensors)
    return Description(
        parcel.kind, shapes, tuple(t.dtype for t in parcel.tensors), parcel.fills, rule.rows, rule.cols, itemsize
    )


def itemsize_of(d: Description, float64: bool) -> int:
    """Return the bytes of one element of gradients as they are sent."""
    return 8 if float64 else d.itemsize


def differs(name: str, every: Sequence[Mapping[Part, Description]]) -> bool:
    """Return whether processes use other parts of a parameter than others, or rows that only they know."""
    parts = [{key for other, key in of_rank if other == name} for of_rank in every]
    used = [some for some in parts if some]
    return bool(used) and ("rows" in used[0] or any(some != used[0] for some in used))


def without(odd: set[str], of_rank: Mapping[Part, Description], parameters: Mapping[str, Tensor]) -> dict:
    """Return the descriptions with one of the whole gradient for every odd parameter."""
    kept = {part: d for part, d in of_rank.items() if part[0] not in odd}
    for name in {part[0] for part in of_rank} & odd:
        p = parameters[name]
        rows = p.shape[0] if p.ndim else 1
        itemsize = product_dtype(p.dtype).itemsize
        kept[name, "whole"] = Description(None, (), (), (), rows, math.prod(p.shape[1:]), itemsize)
    return kept
