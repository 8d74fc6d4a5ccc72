"""How the sites of one forward pass are to be read: where each holds the samples, and what no site accounts for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import LEVELS, Layout, candidates, explains, gather, norms, owners, weights
from .sites import Site

if TYPE_CHECKING:
    from .tape import Tape


@dataclass
class Structure:
    """layouts: per site; None: the site is not used. loops: parameters that need a loop over the losses, and why."""

    layouts: list[Layout | None]
    loops: dict[str, str] = field(default_factory=dict)
    fresh: bool = True  # not compared with plain autograd yet
    turn: int = 0  # which parameter is compared next
    lasting: bool = True  # whether the next forward pass with the same sites can rely on it


def inspect(tape: Tape, losses: Tensor) -> Structure:
    """The structure of the tape's forward pass, from two or more backward passes without weight gradients.

    Weighting sample j by w_j scales what belongs to sample j by w_j and nothing else. The weights are powers of two, so
    there is no rounding to allow for: a layout fits or it does not.

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
    for name in audit(tape, losses):
        structure.loops.setdefault(name, tape.unknown.get(name, "an operation that torch functions do not show"))
    return structure


def _locate(tape: Tape, losses: Tensor, possible: dict[Site, list[Layout]]) -> Structure:
    n, sites = len(losses), tape.sites
    arrived: list[Site] = []

    def measure(w: Tensor, rowwise: bool) -> dict[Site, list[Tensor]]:
        found: dict[Site, list[Tensor]] = {}

        def receive(site: Site, b: Tensor, saved) -> None:
            if site not in arrived:
                arrived.append(site)
            if not b.isfinite().all():
                raise FloatingPointError(f"NaN or Inf in the gradient at {site.name}; nothing was changed")
            found[site] = [norms(b, layout, n) for layout in possible[site]]
            if rowwise and 0 in site.axes:
                found[site].append(torch.linalg.vector_norm(b.flatten(1), dim=1) if b.ndim > 1 else b.abs())

        tape.backward(losses, w, receive)
        return found

    before = measure(torch.ones_like(losses), False)
    scattered = weights(n, -1, losses)
    after = measure(scattered, False)
    structure = Structure([None] * len(sites))
    pending = []
    for i, site in enumerate(sites):
        if all(s.site is not None and s.site is not site and structure.layouts[s.site.index] for s in site.sources):
            continue  # everything is accounted for where these sources were made
        if site not in before:  # its output is not used
            structure.layouts[i] = possible[site][0] if possible[site] else Layout()
            continue
        fitting = [
            layout
            for layout, old, new in zip(possible[site], before[site], after[site], strict=True)
            if explains(old, new, scattered)
        ]
        if fitting:
            structure.layouts[i] = fitting[0]
            if len(fitting) > 1 or not before[site][possible[site].index(fitting[0])].all():
                structure.lasting = structure.lasting and possible[site][0] == fitting[0]
        elif not site.derived:
            pending.append(i)
    if pending:
        _locate_rows(structure, [sites[i] for i in pending], pending, measure, losses)
        if arrived and arrived[0].index in pending and structure.layouts[arrived[0].index] is None:
            raise ValueError(
                f"the gradient at the last {arrived[0].name} mixes samples: the losses share terms (a mean over the "
                "batch, a contrastive loss, batch statistics), so there is no gradient of one sample to protect. "
                "Return one independent loss per sample, sample j along dimension 0"
            )
    return structure


def _locate_rows(structure: Structure, sites: list[Site], pending: list[int], measure, losses: Tensor) -> None:
    """Rows in no regular order (experts that pick tokens): the owner of every row, digit by digit."""
    n = len(losses)
    digits = max(1, -(-(n - 1).bit_length() // (LEVELS.bit_length() - 1)))
    before = measure(torch.ones_like(losses), True)
    after = [measure(weights(n, digit, losses), True) for digit in range(digits)]
    for i, site in zip(pending, sites, strict=True):
        owner = owners(before[site][-1], [a[site][-1] for a in after], n) if 0 in site.axes else None
        if owner is not None:
            structure.layouts[i], structure.lasting = gather(owner, n), False
            continue
        for source in site.sources:
            for name in source.names:
                structure.loops[name] = site.name


def audit(tape: Tape, losses: Tensor) -> set[str]:
    """Parameters that reach the losses other than through active sites: walk the graph, around the sites."""
    accumulators = {torch.autograd.graph.get_gradient_edge(p).node: name for name, p in tape.parameters.items()}
    seen, nodes, found = set(), [losses.grad_fn], set()
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
        site = getattr(node, "site", None)
        if isinstance(site, Site) and site.active:
            nodes += site.stops
            # Sources that an earlier site accounts for, and those without a rule here, are inputs like any other.
            nodes += [s.tensor.grad_fn for s in site.sources if s.settled]
            for source in site.unclaimed:
                if source.tensor.grad_fn is None:
                    found.add(*source.names)
                nodes.append(source.tensor.grad_fn)
            continue
        nodes += [following for following, _ in node.next_functions]
    return found


def announce(loops: dict[str, str]) -> None:
    for name, operation in loops.items():
        warnings.warn(
            f"no rule covers {operation} with parameter {name}: its per-sample gradients come from one backward pass "
            "per sample, exact and slow",
            stacklevel=4,
        )
