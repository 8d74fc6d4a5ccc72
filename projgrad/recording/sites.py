"""What a forward pass leaves behind: sources (tensors made of parameters alone) and sites (calls that mix a source with
the samples)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..rules.layout import Layout
from ..rules.rule import Rule


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
    window: tuple[tuple[int, ...], tuple[int, ...], int] | None = None
    rows: Tensor | None = None
    site: Site | None = None

    def __post_init__(self) -> None:
        self.edge = get_gradient_edge(self.tensor)  # of this moment: the tensor may be changed in place later

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
        size, stride, offset = self.window
        return t.as_strided((len(t), *size), (t[0].numel(), *stride), t.storage_offset() + offset)


Make = Callable[[Tensor, Sequence[Tensor], Layout, int], Sequence[Rule | None]]


@dataclass(eq=False)
class Site:
    """One call in the forward pass that used sources.

    sources: the sources whose per-sample gradients `make` gives, in its order.
    make(b, saved, layout, n): rules from the gradient b at the output, once the backward pass brings it.
    axes: dimensions of the output that may hold the samples.
    stops: nodes of the graph where the call's other inputs come from.
    unclaimed: other sources that the call uses.
    shared: axes that hold samples only if the sources were spread over them before.
    guarded: the call keeps its output for the backward pass: nothing may change it in place.
    derived: the inputs do not depend on the samples; whether the output does shows in the backward pass.
    layout: where the samples are, for the losses whose structure was wanted last; None: the site is not used.
    """

    name: str
    sources: list[Source]
    make: Make
    shape: torch.Size
    axes: Sequence[int]
    stops: set
    saved: int
    unclaimed: list[Source]
    shared: Sequence[int] = ()
    guarded: bool = False
    derived: bool = False
    index: int = -1
    layout: Layout | None = None

    @property
    def key(self) -> tuple:
        """Return what identifies the site in the next forward pass of the same model."""
        where = tuple((tuple(sorted(s.names)), s.window) for s in self.sources)
        return self.name, tuple(self.shape), where, self.derived
