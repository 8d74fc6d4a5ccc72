"""Rules as parcels: what is sent of a rule to another process, and one rule made of those of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import Convolution
from .lookup import Lookup
from .product import Grouped, Product
from .rule import Rows, Rule, Sum
from .tied import Tied


class Parcel(NamedTuple):
    """The factors of a rule.

    kind: what the rules of several processes must have in common to be joined. tensors: [n, t, ...], or [n, ...] where
    `fills` is None. fills: what stands at positions that the samples of other processes have more of.
    """

    kind: tuple
    tensors: list[Tensor]
    fills: tuple[float | None, ...]


def pack(rule: Rule) -> Parcel | None:
    """Return the factors of a rule, None where only its gradients can be sent."""
    kind, tensors, fills = _pack(rule)
    if kind is None:
        return None
    return Parcel((kind, tuple(str(t.dtype) for t in tensors)), tensors, fills)


def _pack(rule: Rule) -> tuple[tuple | None, list[Tensor], tuple[float | None, ...]]:
    if type(rule) is Product:
        return ("product", *rule.form), [rule.p.flatten(2), rule.q.flatten(2)], (0, 0)
    if type(rule) is Lookup:
        return ("lookup", tuple(rule.shape)), [rule.ids, rule.b], (-1, 0)
    if type(rule) is Rows:
        return ("rows", tuple(rule.g.shape[1:])), [rule.g], (None,)
    if type(rule) is Grouped:
        form = tuple(rule.sizes), tuple(rule.order), tuple(rule.p.shape[2:]), tuple(rule.q.shape[2:])
        return ("grouped", *form), [rule.p, rule.q], (0, 0)
    if type(rule) is Convolution:
        padding = tuple(zip(rule.padding[::2], rule.padding[1::2], strict=True))[::-1]
        geometry = rule.kernel, rule.stride, rule.dilation, padding, rule.groups
        sizes = tuple(rule.large.shape[2:]), tuple(rule.small.shape[2:])
        return ("convolution", geometry, sizes), [rule.large, rule.small], (0, 0)
    if type(rule) in (Tied, Sum):
        parts = [_pack(one) for one in rule.rules]
        if all(kind is not None for kind, *_ in parts):
            kinds = tuple((kind, len(tensors)) for kind, tensors, _ in parts)
            tensors = [t for _, ts, _ in parts for t in ts]
            return (type(rule).__name__, kinds), tensors, tuple(fill for *_, fills in parts for fill in fills)
    return None, [], ()


def unpack(kind: tuple, tensors: Sequence[Tensor]) -> Rule:
    """Return the rule of factors of a kind, see `Parcel`."""
    return _unpack(kind[0], list(tensors))


def _unpack(kind: tuple, tensors: list[Tensor]) -> Rule:
    name, *rest = kind
    if name == "product":
        return Product(*tensors, *rest)
    if name == "lookup":
        return Lookup(*tensors, torch.Size(rest[0]))
    if name == "rows":
        return Rows(tensors[0])
    if name == "grouped":
        return Grouped(*tensors, list(rest[0]), [], [], list(rest[1]))
    if name == "convolution":
        return Convolution(*tensors, *rest[0])
    rules = []
    for one, count in rest[0]:
        rules.append(_unpack(one, tensors[:count]))
        tensors = tensors[count:]
    return Tied(*rules) if name == "Tied" else Sum(rules)


def in_line(tensors: Sequence[Tensor], fill: float | None) -> Tensor:
    """Return the factors of several processes one after the other, [Σ n, t, ...] with the largest t among them."""
    if len(tensors) == 1:
        return tensors[0]
    if fill is not None:
        longest = max(t.shape[1] for t in tensors)
        tensors = [F.pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]], value=fill) for t in tensors]
    return torch.cat(list(tensors))
