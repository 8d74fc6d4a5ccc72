"""How the sites of one forward pass are to be read: where each holds the samples, and what no site accounts for."""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .layout import Layout, Tolerance, candidates, codes, explains, gather, norms, owners
from .sites import Site, Source

if TYPE_CHECKING:
    from .tape import Tape


# What reorders rows by numbers that the graph does not show, or mixes samples without a parameter in sight.
DATA_DEPENDENT = re.compile("Index|Gather|Scatter|Masked(Select|Scatter)|Take|Sort|Unique|Packed|Pack|Put|Segment")
SHAPED = re.compile("_saved_.*(dim|size|shift|start|end|split|stride|train|perm|axis|offset|diagonal|repeat)")


REENTRANT = "reentrant checkpointing cannot be followed: use checkpoint(use_reentrant=False)"


@dataclass
class Structure:
    """How to read the sites of a forward pass.

    layouts: per site; None: the site is not used. loops: parameters that need a loop over the losses, and why.
    lasting: whether a forward pass with the same graph is to be read in the same way.
    verified: whether the rules have been compared with plain autograd. turn: which parameter is compared next.
    """

    layouts: list[Layout | None]
    loops: dict[str, str] = field(default_factory=dict)
    lasting: bool = True
    verified: bool = False
    turn: int = 0


def inspect(tape: Tape, losses: Tensor) -> Structure:
    """The structure of the tape's forward pass, from two or more backward passes without weight gradients.

    Weighting sample j by w_j scales what belongs to sample j by w_j and nothing else. The weights are powers of two, so
    there is next to no rounding to allow for: a layout fits or it does not.

    Raises:
        ValueError: the losses share terms between samples.
    """
    n, sites = len(losses), tape.sites
    possible = {s: candidates(s.shape, s.axes, n) for s in sites}
    if n == 1:
        structure = Structure([possible[s][0] if possible[s] else None for s in sites])
    else:
        structure = _locate(tape, losses, possible)
    for site, layout in zip(sites, structure.layouts, strict=True):
        site.active = layout is not None
    unclaimed, ordered = audit(tape, losses)
    for name in unclaimed:
        structure.loops.setdefault(name, tape.unknown.get(name, "an operation that torch functions do not show"))
    structure.lasting = structure.lasting and ordered
    return structure


class _Measure:
    """Lengths of the gradient at every site: of each sample's block for every possible layout, or of every row."""

    def __init__(self, tape: Tape, losses: Tensor, possible: dict[Site, list[Layout]]) -> None:
        self.tape, self.losses, self.possible = tape, losses, possible
        self.tolerance = Tolerance(1e-2, 0.0)
        self.first: Site | None = None  # the last site of the forward pass

    def __call__(self, w: Tensor, rowwise: bool = False) -> dict[Site, list[Tensor]]:
        found: dict[Site, list[Tensor]] = {}
        narrow = self.losses.dtype.itemsize == 2

        def receive(site: Site, b: Tensor, saved) -> None:
            nonlocal narrow
            self.first = self.first or site
            narrow = narrow or b.dtype.itemsize == 2
            if not b.isfinite().all():
                raise FloatingPointError(f"NaN or Inf in the gradient at {site.name}; nothing was changed")
            if rowwise:
                rows = torch.linalg.vector_norm(b.unsqueeze(-1).flatten(1), dim=1, dtype=torch.float64)
                anywhere = candidates(site.shape, range(b.ndim), len(w))
                found[site] = [rows, *(norms(b, layout, len(w)) for layout in anywhere)]
            else:
                found[site] = [norms(b, layout, len(w)) for layout in self.possible[site]]

        self.tape.backward(self.losses, w, receive)
        # Numbers near the smallest have lost digits.
        self.tolerance = Tolerance(1e-2 if narrow else 1e-4, 64 * torch.finfo(self.losses.dtype).tiny)
        return found


def _locate(tape: Tape, losses: Tensor, possible: dict[Site, list[Layout]]) -> Structure:
    measure, weights = _Measure(tape, losses, possible), codes(len(losses), losses)
    before, after = measure(torch.ones_like(losses)), [measure(w) for w in weights]
    structure = Structure([None] * len(tape.sites))
    pending = []
    for site in tape.sites:
        made_before = [s for s in site.sources if s.site is not site and _settled(s, structure)]
        if len(made_before) == len(site.sources) or site not in before:
            continue  # everything is accounted for where these sources were made, or no loss depends on it
        fitting = []
        for k, layout in enumerate(possible[site]):
            if layout.axis in site.shared and not made_before:
                continue  # the samples would share one parameter's elements out among them
            if explains(before[site][k], [a[site][k] for a in after], weights, measure.tolerance):
                fitting.append(layout)
        if fitting:
            structure.layouts[site.index] = fitting[0]
            blank = not before[site][possible[site].index(fitting[0])].all()
            if len(fitting) > 1 or (blank and (site.derived or len(possible[site]) > 1)):
                structure.lasting = False  # with other numbers it may turn out differently
        elif not site.derived:
            pending.append(site)
    if pending:
        mixed = _locate_rows(structure, pending, measure, weights)
        last = measure.first
        if last in mixed and possible[last]:
            raise ValueError(
                f"the gradient at the last {last.name} mixes samples: the losses share terms (a mean over the batch, a "
                "contrastive loss, batch statistics), so there is no gradient of one sample to protect. Return one "
                "independent loss per sample, sample j along dimension 0"
            )
    return structure


def _settled(source: Source, structure: Structure) -> bool:
    if source.site is not None and structure.layouts[source.site.index] is not None:
        return True
    return bool(source.parents) and all(_settled(p, structure) for p in source.parents)


def _locate_rows(structure: Structure, sites: list[Site], measure: _Measure, weights: list[Tensor]) -> list[Site]:
    """Rows in no regular order (experts that pick tokens): the owner of every row. Sites that nothing explains."""
    mixed = []
    before = measure(torch.ones_like(weights[0]), rowwise=True)
    after = [measure(w, rowwise=True) for w in weights]
    for site in sites:
        grown = list(zip(*(a[site] for a in after), strict=True))  # by rows, then by every layout on any axis
        owner = owners(before[site][0], grown[0], weights, measure.tolerance)
        fits = (explains(b, g, weights, measure.tolerance) for b, g in zip(before[site][1:], grown[1:], strict=True))
        if owner is None and not any(fits):
            mixed.append(site)
        owner = owner if 0 in site.axes else None
        if owner is not None:
            structure.layouts[site.index], structure.lasting = gather(owner, len(weights[0])), False
            continue
        for source in site.sources:
            for name in source.names:
                structure.loops[name] = site.name
    return mixed


def audit(tape: Tape, losses: Tensor) -> tuple[set[str], bool]:
    """Parameters that reach the losses other than through active sites, by a walk of the graph around the sites; and
    whether everything met on the way treats rows in an order that does not depend on the data."""
    accumulators = {get_gradient_edge(p).node: name for name, p in tape.parameters.items()}
    seen, nodes, found, ordered = set(), [losses.grad_fn], set(), True
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in accumulators:
            found.add(accumulators[node])
            continue
        if "CompiledFunction" in node.name():
            raise ValueError(
                "the losses come out of torch.compile, which hides its operations: call the original module"
            )
        ordered = ordered and not DATA_DEPENDENT.search(node.name())
        site = getattr(node, "site", None)
        if isinstance(site, Site) and site.active:
            nodes += site.stops
            # Sources that an earlier site accounts for, and those without a rule here, are inputs like any other.
            nodes += [s.edge.node for s in (*site.sources, *site.unclaimed) if s in site.unclaimed or s.settled]
            continue
        nodes += [following for following, _ in node.next_functions]
    return found, ordered


def fingerprint(tape: Tape, losses: Tensor) -> int:
    """A hash of the whole graph: operations, their shapes and axes, how they are connected, and which parameters.

    Raises:
        ValueError: no parameter that the tape follows is in it, or reentrant checkpointing.
    """
    accumulators = {get_gradient_edge(p).node: name for name, p in tape.parameters.items()}
    numbers: dict[object, int] = {}
    nodes, parts = [losses.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is None or node in numbers:
            parts.append(numbers.get(node, -1))
            continue
        if "CheckpointFunctionBackward" in node.name():
            raise ValueError(REENTRANT)
        numbers[node] = len(numbers)
        parts.append(
            (accumulators.get(node) or node.name(), *(_setting(getattr(node, a)) for a in _shaped(type(node))))
        )
        nodes += [following for following, _ in node.next_functions]
    if not any(part[0] in tape.parameters for part in parts if isinstance(part, tuple)):
        raise ValueError("the losses do not depend on any parameter that the tape follows")
    return hash(tuple(parts))


def _setting(value: object) -> object:
    """What of an attribute of a node belongs to the graph: of a tensor the numbers only if they are integers."""
    if not isinstance(value, Tensor):
        return str(value)
    return value.dtype, tuple(value.shape), *(() if value.is_floating_point() else value.flatten().tolist())


@functools.cache
def _shaped(kind: type) -> tuple[str, ...]:
    return tuple(a for a in dir(kind) if SHAPED.match(a) and "philox" not in a)  # the state of a random generator


def announce(loops: dict[str, str]) -> None:
    for name, operation in loops.items():
        warnings.warn(
            f"no rule covers {operation} with parameter {name}: its per-sample gradients come from one backward pass "
            "per sample, exact and slow",
            stacklevel=4,
        )
