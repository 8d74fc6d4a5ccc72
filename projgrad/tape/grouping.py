"""Uses of parameters whose rules are alike: what is asked of them is computed for all of a group at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recording.sites import Source
from ..rules.rule import Rule
from .consumers import add_, part


class Use(NamedTuple):
    """One use of one parameter."""

    name: str
    source: Source
    rule: Rule


class Group(list[Use]):
    """Uses of one kind of rule and of equal shapes, or a single one."""

    @property
    def rules(self) -> list[Rule]:
        return [use.rule for use in self]

    def gram(self, us: Sequence[Tensor | None], float64: bool) -> tuple[Tensor, Tensor]:
        """Return K [l, n, n] and v [l, n] in float64 for every use; us: a direction for each, None for zero."""
        like = next((u for u in us if u is not None), None)
        if len(self) == 1:
            K, v = self[0].rule.gram(None if like is None else like[None], float64)
            K, v = K[None], None if like is None else v.mT
        else:
            us = us if like is None else [like.new_zeros(like.shape) if u is None else u for u in us]
            K, v = type(self[0].rule).gram_of_group(self.rules, us, float64)
        return K, K.new_zeros(K.shape[:2]) if v is None else v

    def squares(self, float64: bool) -> Tensor:
        """Return ‖g_j‖² [l, n] in float64 for every use."""
        if type(self[0].rule).squares is not Rule.squares:
            return torch.stack([rule.squares(float64) for rule in self.rules])
        return self.gram([None] * len(self), float64)[0].diagonal(dim1=1, dim2=2)

    def dot(self, us: Sequence[Tensor | None], float64: bool) -> Tensor:
        """Return v [l, n] in float64; see `gram`."""
        like = next((u for u in us if u is not None), None)
        if like is None:
            return self.gram(us, float64)[1]
        if len(self) == 1:
            return self[0].rule.dot(like[None], float64).mT
        us = [like.new_zeros(like.shape) if u is None else u for u in us]
        return type(self[0].rule).dot_of_group(self.rules, us, float64)

    def combine_(self, outs: Sequence[Tensor], c: Tensor, float64: bool) -> None:
        """Add Σ_j c_j g_j of every use to the tensor of its parameter in `outs`; c [n] or [l, n]."""
        if len(self) == 1:
            add_(self[0].source, lambda out: self[0].rule.combine_(out, c.flatten(), float64), outs[0])
            return
        targets = [part(use.source, out) for use, out in zip(self, outs, strict=True)]
        type(self[0].rule).combine_group_(self.rules, targets, c, float64)


def grouped(uses: Iterable[Use], alone: Iterable[str] = ()) -> list[Group]:
    """Return the uses in groups, in the order of their first ones; alone: parameters that are in no group."""
    groups: dict[object, Group] = {}
    for use in uses:
        key: object = use.rule.group_key
        if key is None or use.source.rows is not None or use.name in alone:
            key = use.name, id(use.source)
        groups.setdefault((key, use.source.tensor.dtype), Group()).append(use)
    return list(groups.values())
