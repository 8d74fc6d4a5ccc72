"""The recording of one forward pass: what is followed, and how calls add their sites."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .._torch_private import (
    base_of,
    has_gradient_hooks,
    inside_transform,
    saved_tensors_hooks,
    storage_id,
    untracked_view,
)
from .host_reads import HostReads
from .refusals import NESTED_TENSORS
from .sites import Make, Packed, Saved, Site, Source
from .torch_names import COPIES, VIEWS, is_in_place


class Call:
    """A call about to be made: what it follows, and where its other inputs come from."""

    def __init__(self, recording: Recording, name: str, tensors: Sequence[object]) -> None:
        self.recording, self.name = recording.weak, name  # weakly: the recording holds sites, and they the call
        self.sources: dict[int, Source] = {}
        self.stops: list[Node] = []
        followed = recording.sources
        for t in tensors:
            if id(t) in followed:
                self.sources[id(t)] = followed[id(t)]
            elif isinstance(t, Tensor) and (node := t.grad_fn) is not None:
                self.stops.append(node)

    def follows(self, t: object) -> bool:
        """Return whether per-sample gradients of this argument are wanted."""
        return id(t) in self.sources

    def spread(self, t: object) -> bool:
        """Return whether this argument may already have been spread over the samples."""
        return self.follows(t) and self.sources[id(t)].spread

    def note(
        self,
        y: Tensor,
        make: Make | None,
        claimed: Sequence[object],
        axes: Sequence[int],
        saved: Sequence[Tensor],
        factored: bool = False,
        shared: Sequence[int] = (),
    ) -> Tensor:
        """Return y, and note the call as a site: `make` gives rules for those of `claimed` that are followed.

        axes: dimensions of y that may hold the samples.
        saved: what `make` needs in the backward pass.
        factored, shared: see `Site`.
        """
        sources = [self.sources[id(t)] for t in claimed if id(t) in self.sources]
        recording, rest = self.recording(), []
        if len(sources) < len(self.sources):
            rest = [s for s in self.sources.values() if s not in sources]
            recording.note_unknown(rest, self.name)
        if not sources or make is None or not y.requires_grad:
            return y
        if y.is_nested:
            raise ValueError(NESTED_TENSORS)
        if inside_transform() or any([t.is_complex() for t in (y, *saved)]):
            return self.unknown(y)
        hooks = saved_tensors_hooks()
        if hooks is not None:  # of checkpointing or offloading: they keep what is saved, as for autograd
            saved = [hooks[0](t) for t in saved]
        if recording.recomputing:  # checkpointing repeats a forward pass for what it saves alone
            return y
        base = base_of(y)
        if base is not None and not base.is_leaf and id(base) not in recording.sources and not is_in_place(self.name):
            y = untracked_view(y)  # a change in place of a view, or of its base, would take its node out of the graph
        elif y.grad_fn in recording.site_of:
            y = y.view_as(y)
        kept = Saved(saved) if hooks is None else Packed(saved, hooks[1])
        edge = GradientEdge(y.grad_fn, y.output_nr)
        recording.register(
            Site(self.name, sources, make, y.shape, axes, edge, kept, self.stops, rest, shared, factored)
        )
        return y

    def unknown(self, out):
        """Return the result of a call that no rule knows."""
        self.recording().note_unknown(self.sources.values(), self.name)
        return out


class Recorder(Protocol):
    """What drop-in functions report to: a `Recording`, or the tape around it."""

    def call(self, name: str, *tensors: object) -> Call: ...


class Recording:
    """One forward pass: the tensors made of followed parameters, and the calls that used them.

    Args:
        parameters: what to follow, by name.
        fixed: other tensors that do not depend on the samples, such as buffers.

    Attributes:
        sources, sites: see there.
        unknown: by parameter, the first operation without a rule that used it.
        hooked: whether a hook on a tensor of the forward pass may change its gradient.
        host_reads: numbers of the forward pass, brought to the host once the structure is wanted.
        site_of: the site whose output a node of the graph makes.
        recomputing: whether a backward pass runs parts of the forward pass again.

    Raises:
        TypeError: parameters without names.
        ValueError: a complex parameter, or one with gradient hooks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], fixed: Iterable[Tensor] = ()) -> None:
        if not isinstance(parameters, Mapping):
            raise TypeError(f"parameters must be a dictionary of tensors by name; got {type(parameters).__name__}")
        self.parameters, self.weak = dict(parameters), weakref.ref(self)
        self.sources: dict[int, Source] = {}
        for name, p in self.parameters.items():
            _check_parameter(name, p)
            window = (tuple(p.shape), p.stride(), 0) if p.is_contiguous() else None
            self.sources[id(p)] = Source(p, frozenset([name]), whole=True, window=window)
        self.sites: list[Site] = []
        self.site_of: dict[Node, Site] = {}
        self.unknown: dict[str, str] = {}
        self.hooked = self.recomputing = False
        self.host_reads = HostReads()
        self._fixed = {id(t): t for t in fixed}  # held: a module may drop one, and its id be used again
        self._constants: dict[int, weakref.ref] = {}  # tensors that depend on neither parameters nor samples
        self.constants = self._constants, self._fixed

    def call(self, name: str, *tensors: object) -> Call:
        """Begin a call of these arguments."""
        return Call(self, name, tensors)

    def register(self, site: Site) -> None:
        """Add a site."""
        site.index = len(self.sites)
        self.sites.append(site)
        self.site_of[site.edge.node] = site

    def note_unknown(self, sources: Iterable[Source], operation: str) -> None:
        """Note that no rule covers an operation on these sources."""
        for source in sources:
            self.unknown |= dict.fromkeys(source.names - self.unknown.keys(), operation)

    def source(self, t: Tensor) -> Source | None:
        """Return the source that a tensor is, or None."""
        return self.sources.get(id(t))  # which holds the tensor: no other can have its id

    def meets(self, arguments: Iterable[object]) -> bool:
        """Return whether a followed tensor is among the arguments of a call, lists and tuples of them included."""
        sources = self.sources
        for a in arguments:  # noqa: SIM110 (a generator would take twice as long)
            if id(a) in sources or (isinstance(a, (list, tuple)) and self.meets(a)):
                return True
        return False

    def whole(self, name: str) -> Source:
        """Return the source of a parameter itself."""
        return self.sources[id(self.parameters[name])]

    def forget(self, t: Tensor) -> None:
        """Follow a tensor no longer: it was changed in place by the samples."""
        self.sources.pop(id(t), None)

    def forget_constant(self, t: Tensor) -> None:
        """Count a tensor as constant no longer."""
        self._constants.pop(id(t), None)

    def is_constant(self, t: Tensor) -> bool:
        """Return whether a tensor is known to depend on neither parameters nor samples."""
        ref = self._constants.get(id(t))
        return (ref is not None and ref() is t) or id(t) in self._fixed

    def note_constant(self, t: Tensor) -> None:
        """Note that a tensor depends on neither parameters nor samples."""
        self._constants[id(t)] = weakref.ref(t)

    def derive(self, out: Tensor, parents: Sequence[Source], name: str, ids: Tensor | None = None) -> Tensor:
        """Follow a tensor that the function `name` made of followed ones and constants; ids: of a table's rows."""
        in_place = is_in_place(name)
        if self.source(out) is not None and not in_place:
            return out
        source = Source(out, frozenset().union(*(p.names for p in parents)), tuple(parents))
        parent = parents[0]
        if len(parents) == 1 and not in_place and parent.window is not None:
            (only,) = parent.names
            p = self.parameters[only]
            if name in VIEWS and out.dtype == p.dtype and storage_id(out) == storage_id(p):
                source.window = (tuple(out.shape), out.stride(), out.storage_offset() - p.storage_offset())
            elif name in COPIES and out.shape == parent.tensor.shape:
                source.window = parent.window
        if ids is not None and ids.ndim and ids.numel() and parent.whole:
            self._read_rows(source, ids.to(out.device))
        site = self.site_of.get(out.grad_fn)
        if site is not None:
            site.derived, source.site = True, site
        self.sources[id(out)] = source
        return out

    def _read_rows(self, source: Source, ids: Tensor) -> None:
        """Set `source.rows` to these rows of a table, once the host knows that no row is read twice."""
        ordered = ids.flatten().sort().values

        def keep(distinct: list[float]) -> None:
            source.rows = ids if all(distinct) else None

        self.host_reads.defer(torch.cat([ordered[:1] >= 0, ordered[1:] != ordered[:-1]]).all(), keep, urgent=True)


def _check_parameter(name: str, p: Tensor) -> None:
    if p.is_complex():
        raise ValueError(f"parameter {name} is complex: inner products of its gradients are not defined here")
    if has_gradient_hooks(p):
        raise ValueError(
            f"parameter {name} has gradient hooks, of yours or of a step that another thread takes on this "
            "model: they would change or see what is not a gradient"
        )
