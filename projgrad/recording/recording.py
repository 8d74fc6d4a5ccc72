"""What the tape keeps of a forward pass: sources (tensors made of parameters alone) and sites (calls that mix a source
with the samples)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .._torch_private import inside_transform, is_view, without_torch_function
from ..rules.layout import Layout
from ..rules.rule import Rule
from .refusals import NESTED_TENSORS

if TYPE_CHECKING:
    from ..tape.tape import Tape


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
        """Its gradient is complete where it was made: later uses of it do not count again."""
        if self.site is not None and self.site.active:
            return True
        return bool(self.parents) and all(p.settled for p in self.parents)

    @property
    def spread(self) -> bool:
        """Whether it may already lie along the samples."""
        return self.site is not None or any(p.spread for p in self.parents)

    def view(self, t: Tensor) -> Tensor:
        """The elements of t [m, *parameter shape] (contiguous) that this source holds, [m, *shape]."""
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
    active: bool = True

    @property
    def key(self) -> tuple:
        """What identifies the site in the next forward pass of the same model."""
        where = tuple((tuple(sorted(s.names)), s.window) for s in self.sources)
        return self.name, tuple(self.shape), where, self.derived


class Tap(torch.autograd.Function):
    """Identity, in place on the output of a call; its backward pass hands the gradient to the tape.

    `anchor` is a leaf whose only use is to be what a backward pass of the tape asks for: autograd then visits every
    tap, and skips everything that only weight gradients need.
    """

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, tape: Tape, site: Site, *saved: Tensor) -> Tensor:
        ctx.tape, ctx.site = tape.ref, site
        ctx.save_for_backward(*saved)
        if site.guarded:
            return y.view_as(y)
        if is_view(y):  # in place on a view would copy its base
            return y.data
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, b: Tensor):
        tape = ctx.tape()
        if tape is not None and tape._receive is not None:
            saved, mixed = ctx.saved_tensors, torch.is_autocast_enabled(b.device.type)
            exact = torch.autocast(b.device.type, enabled=False) if mixed else nullcontext()
            with without_torch_function(), torch.no_grad(), exact:
                tape._receive(ctx.site, b, saved)
        return b, None, None, None, *[None] * ctx.site.saved


class Call:
    """A call about to be made: what it follows, and where its other inputs come from."""

    def __init__(self, tape: Tape, name: str, tensors: Sequence[object]) -> None:
        self.tape, self.name = tape.ref, name  # weakly: the tape holds sites, and they what `tap` is given
        given = [t for t in tensors if isinstance(t, Tensor)]
        self.sources = {id(t): s for t in given if (s := tape.source(t)) is not None}
        self.stops = {t.grad_fn for t in given if id(t) not in self.sources and t.grad_fn is not None}

    def follows(self, t: object) -> bool:
        """Whether per-sample gradients of this argument are wanted."""
        return id(t) in self.sources

    def spread(self, t: object) -> bool:
        """Whether this argument may already have been spread over the samples."""
        return self.follows(t) and self.sources[id(t)].spread

    def tap(
        self,
        y: Tensor,
        make: Make | None,
        claimed: Sequence[object],
        axes: Sequence[int],
        saved: Sequence[Tensor],
        guarded: bool = False,
        shared: Sequence[int] = (),
    ) -> Tensor:
        """y, watched by the tape: `make` gives rules for those of `claimed` that are followed.

        axes: dimensions of y that may hold the samples; saved: what `make` needs in the backward pass; guarded,
        shared: see `Site`.
        """
        sources = [self.sources[id(t)] for t in claimed if id(t) in self.sources]
        rest = [s for s in self.sources.values() if s not in sources]
        tape = self.tape()
        for source in rest:
            tape.note_unknown(source.names, self.name)
        if not sources or make is None or not y.requires_grad:
            return y
        if y.is_nested:
            raise ValueError(NESTED_TENSORS)
        if y.is_complex() or any(t.is_complex() for t in saved) or inside_transform():
            return self.unknown(y)
        site = Site(
            self.name, sources, make, y.shape, tuple(axes), self.stops, len(saved), rest, tuple(shared), guarded
        )
        tape.register(site)
        return Tap.apply(y, tape.anchor, tape, site, *saved)

    def unknown(self, out):
        """The result of a call that no rule knows."""
        for source in self.sources.values():
            self.tape().note_unknown(source.names, self.name)
        return out
