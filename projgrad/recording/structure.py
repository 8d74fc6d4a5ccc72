"""How the sites of one forward pass are to be read: where each holds the samples, and what no site accounts for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..rules.layout import Layout, candidates
from .backward import recomputing
from .carry import of_torch
from .codes import Codes, Signatures, axes_of, matches, owners_of
from .graph import audit, coarsest_of, ends_of, fingerprint, nodes_of
from .host_reads import Impossible
from .losses import check_shape, check_values
from .recording import Recording
from .search import Search

KNOWN = 1024  # graphs remembered for each model


@dataclass
class Compared:
    """What of a graph has been compared with plain autograd: all rules, once; `turns` parameters since, one a step."""

    rules: bool = False
    turns: int = 0


@dataclass
class Structure:
    """How to read the sites of a forward pass.

    layouts: per site; None: the site is not used. loops: parameters that need a loop over the losses, and why.
    anchors: sites, by index, whose layouts prove all others, for every forward pass with the same graph: to be
        confirmed each time; none where the graph alone is the proof. None: nothing is proven, all is found anew.
    foreign: whether there are nodes in the graph that are not torch's own, or hooks, which may do anything.
    ends: sites, by index, below which the graph has no other.
    coarsest: the floating-point type with the fewest digits that lies between the losses and the parameters.
    """

    layouts: list[Layout | None]
    loops: dict[str, str] = field(default_factory=dict)
    anchors: list[int] | None = field(default_factory=list)
    ends: frozenset[int] = frozenset()
    coarsest: torch.dtype = torch.float64
    foreign: bool = False
    compared: Compared = field(default_factory=Compared)

    @property
    def lasting(self) -> bool:
        """Return whether it may serve another forward pass with the same graph, once its anchors are confirmed."""
        return self.anchors is not None


def structure_of(recording: Recording, losses: Tensor, known: dict[int, Structure], wait: bool = True) -> Structure:
    """Return how to read the sites of a forward pass: as a known one with the same graph, if that holds, or found anew.

    What is new is added to `known`, by a hash of the graph.
    wait: for the losses, which are looked at; else that is left to the next `host_reads.flush()`, where it can be.

    Raises:
        ValueError: losses of a wrong shape, or that share terms between samples.
        FloatingPointError: NaN or Inf in a loss or a gradient.
        ArithmeticError: a second backward pass is not what the first one was.
    """
    check_shape(losses)
    recording.host_reads.defer(losses, check_values)
    key = graph_key(recording, losses)
    structure = known.get(key)
    if wait or recording.host_reads.urgent or structure is None or structure.anchors != []:
        recording.host_reads.flush()
    if structure is None or not confirm(recording, losses, structure):
        before, structure = structure, inspect(recording, losses)
        if before is not None:  # the rules were compared; where the samples are was found anew
            structure.compared = before.compared
        announce({k: v for k, v in structure.loops.items() if before is None or k not in before.loops})
        # Nothing is kept that will not be used again.
        known[key] = structure if structure.lasting else replace(structure, layouts=[])
        while len(known) > KNOWN:
            del known[next(iter(known))]
    elif recording.host_reads.script is not None and structure.anchors:
        found = sorted({recording.sites[index].name for index in structure.anchors})
        raise Impossible(
            "a loss or another operation is not torch's own, so that the samples at "
            f"{', '.join(found)} are confirmed in every step"
        )
    else:
        for site, layout in zip(recording.sites, structure.layouts, strict=True):
            site.layout = layout
    return structure


def graph_key(recording: Recording, losses: Tensor) -> int:
    """Return what graphs that are read alike have in common."""
    graph = fingerprint(recording, losses)
    return hash((len(losses), tuple(site.key for site in recording.sites), graph, recording.hooked))


def inspect(recording: Recording, losses: Tensor) -> Structure:
    """Find the structure of a forward pass, from two or more backward passes without weight gradients.

    Where the operations of the graph prove where the samples are, the passes only confirm it. Elsewhere they decide:
    weighting sample j by w_j scales what belongs to sample j by w_j and nothing else.
    """
    n, sites = len(losses), recording.sites
    nodes = nodes_of(losses)
    foreign = recording.hooked or not all(map(of_torch, nodes))
    ends = frozenset(ends_of(recording, losses))
    structure = Structure([], ends=ends, coarsest=coarsest_of(losses, nodes), foreign=foreign)
    for site in sites:
        site.layout = next(iter(candidates(site.shape, site.axes, 1)), None) if n == 1 else None
    if n > 1:
        search = Search(recording, losses, nodes, ends, structure.coarsest, foreign)
        search.run()
        structure.loops, structure.anchors = search.loops, search.anchors
    structure.layouts = [site.layout for site in sites]
    for name in audit(recording, losses):
        reason = recording.unknown.get(name, "an operation that torch functions do not show")
        structure.loops.setdefault(name, f"no rule covers {reason}")
    return structure


def confirm(recording: Recording, losses: Tensor, structure: Structure) -> bool:
    """Return whether a known structure holds for this graph: the samples are at its anchors where they were.

    Two backward passes, which end at the anchors.
    """
    if not structure.lasting:
        return False
    if not structure.anchors:
        return True
    n, sites = len(losses), [recording.sites[index] for index in structure.anchors]
    codes, signatures = Codes(n, losses, structure.coarsest), Signatures()
    edges = [site.edge for site in sites]
    axes = [axes_of(site, [structure.layouts[site.index]]) for site in sites]

    def signs(w: Tensor) -> list[Tensor]:
        with recomputing(recording):
            grads = torch.autograd.grad(losses, edges, w, retain_graph=True)
        return [signatures.of(b, dims) for b, dims in zip(grads, axes, strict=True)]

    # Twice the weights, and half of what comes: a hook that clips, or noise, would show.
    passes = [[b / 2 for b in signs(2 * codes.base)], *map(signs, codes.weights[1:])]
    for site, dims, *signatures_of_site in zip(sites, axes, *passes, strict=True):
        found = owners_of(codes, site, signatures_of_site, structure.coarsest)
        if not matches(found, dims, structure.layouts[site.index], site, n):
            return False
    return True


def announce(loops: dict[str, str]) -> None:
    """Warn of parameters that take a loop over the losses."""
    for name, reason in loops.items():
        way = "its per-sample gradients come from one backward pass per sample, exact and slow"
        warnings.warn(f"{reason} with parameter {name}: {way}", stacklevel=5)
