"""What a forward pass leaves behind: sources (tensors made of parameters alone) and sites (calls that mix a source with
the samples)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .._torch_private import version
from ..rules.layout import Layout
from ..rules.rule import Rule
from .refusals import CHANGED, FREED

Window = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset


@dataclass(eq=False)
class Source:
    """A tensor that depends on parameters but not on the samples: a parameter, a view of one, or computed from some.

    names: the parameters it is made of. parents: the sources it is made of.
    whole: it is the one parameter itself.
    window: (size, stride, offset from the parameter's first element) where it is a view of one contiguous parameter.
    rows: where it holds distinct rows of one parameter, their indices.
    site: the site that made it, if samples may already have been mixed in there (an expanded token, a lookup).
    """

    tensor: Tensor
    names: frozenset[str]
    parents: tuple[Source, ...] = ()
    whole: bool = False
    window: Window | None = None
    rows: Tensor | None = None
    site: Site | None = None

    def __post_init__(self) -> None:
        if not self.whole:
            self._edge = get_gradient_edge(self.tensor)  # of this moment: the tensor may be changed in place later

    @property
    def edge(self) -> GradientEdge:
        """Return the tensor's place in the graph."""
        return get_gradient_edge(self.tensor) if self.whole else self._edge

    @property
    def settled(self) -> bool:
        """Return whether an earlier site delivers this tensor's gradient already, so that later uses are skipped."""
        if self.site is not None and self.site.layout is not None:
            return True
        return bool(self.parents) and all(p.settled for p in self.parents)

    @property
    def spread(self) -> bool:
        """Return whether it may already lie along the samples."""
        return self.site is not None or any(p.spread for p in self.parents)

    def view(self, t: Tensor) -> Tensor:
        """Return the elements of t [m, *parameter shape] (contiguous) that this source holds, [m, *shape]."""
        if self.whole:
            return t
        if self.rows is not None:
            return t[:, self.rows.flatten()].view(len(t), *self.tensor.shape)
        return window_view(t, self.window)


def window_view(t: Tensor, window: Window) -> Tensor:
    """Return the elements of t [m, *parameter shape] (contiguous) in a window of the parameter, [m, *size]."""
    size, stride, offset = window
    return t.as_strided((len(t), *size), (t[0].numel(), *stride), t.storage_offset() + offset)


class Saved:
    """Tensors that a site needs in the backward pass, and that nothing may change in place meanwhile."""

    unpacks = False

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors: Sequence[Tensor] | None = tensors
        self.versions = [version(t) for t in tensors]

    def take(self, keep: bool) -> Sequence[Tensor]:
        """Return the tensors, for the last time unless `keep`.

        Raises RuntimeError where that was done before, or one was changed.
        """
        tensors = self.tensors
        if tensors is None:
            raise RuntimeError(FREED)
        if [version(t) for t in tensors] != self.versions:
            raise RuntimeError(CHANGED)
        if not keep:
            self.tensors = None
        return tensors


class Packed(Saved):
    """The same in the keeping of hooks on saved tensors: `unpack` makes a tensor of each of `tensors`."""

    unpacks = True

    def __init__(self, tensors: Sequence, unpack: Callable[[Any], Tensor]) -> None:
        self.tensors, self.versions, self.unpack = tensors, [], unpack

    def take(self, keep: bool) -> Sequence[Tensor]:
        if self.tensors is None:
            raise RuntimeError(FREED)
        tensors = [self.unpack(t) for t in self.tensors]
        if not keep:
            self.tensors = None
        return tensors


Make = Callable[[Tensor, Sequence[Tensor], Layout, int], Sequence[Rule | None]]


@dataclass(eq=False, slots=True)
class Site:
    """One call in the forward pass that used sources.

    sources: the sources whose per-sample gradients `make` gives, in its order.
    make(b, saved, layout, n): rules from the gradient b at the output, once the backward pass brings it.
    axes: dimensions of the output that may hold the samples.
    edge: the output's place in the graph.
    saved: what `make` needs.
    stops: nodes of the graph where the call's other inputs come from.
    unclaimed: other sources that the call uses.
    shared: axes that hold samples only if the sources were spread over them before.
    factored: the rules keep the gradient and what was saved, and make nothing of them yet.
    derived: the inputs do not depend on the samples; whether the output does shows in the backward pass.
    layout: where the samples are, for the losses whose structure was wanted last; None: the site is not used.
    """

    name: str
    sources: list[Source]
    make: Make
    shape: torch.Size
    axes: Sequence[int]
    edge: GradientEdge
    saved: Saved
    stops: list[Node]
    unclaimed: list[Source]
    shared: Sequence[int] = ()
    factored: bool = False
    derived: bool = False
    index: int = -1
    layout: Layout | None = None

    @property
    def key(self) -> tuple:
        """Return what identifies the site in the next forward pass of the same model."""
        sources = tuple([(s.names, s.window) for s in self.sources])
        return self.name, self.shape, sources, self.derived, self.saved.unpacks  # hooks may round what they keep
