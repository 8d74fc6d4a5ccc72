"""Proves, from the operations of a graph alone, along which dimension of a tensor the samples lie.

A backward pass carries gradients from the losses [n] down to the sites. Where every operation on the way is known to
treat the entries along one dimension alike, that dimension still holds the samples, whatever the numbers are: a proof
that also holds for the next graph of the same operations and shapes. Everything else proves nothing: a product or a
broadcast over the samples, an index, an operation that is not in the table of `carry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.autograd.graph import Node

from .._torch_private import outputs_of
from ..rules.layout import Layout
from .carry import Along, Op, Shape, Where, carry
from .graph import ordered
from .sites import Site


def locate(
    losses_node: Node, n: int, sites: Mapping[Node, Site], given: Mapping[Site, Layout] | None = None
) -> tuple[dict[Site, Along], set[Site]]:
    """Return where the samples lie in the outputs of sites, if that is proven, and which of `given` the proof took.

    sites: by the nodes that make their outputs. given: layouts of some sites, taken for true.
    """
    known, needed = carried(losses_node, n, sites, given)
    return {sites[node]: at for node, at in known.items() if at is not None and node in sites}, needed


def carried(
    losses_node: Node, n: int, sites: Mapping[Node, Site], given: Mapping[Site, Layout] | None = None
) -> tuple[dict[Node, Along | None], set[Site]]:
    """Return the same for every node of the graph; None: nothing is proven."""
    needed: set[Site] = set()
    known: dict[Node, Along | None] = {losses_node: Along(0)}
    for node in ordered(losses_node):
        at, site, following = known.get(node), sites.get(node), node.next_functions
        if at is None and given and site in given:
            at = known[node] = along(given[site], site.shape, n)
            needed.add(site)
        where: Where = [None] * len(following)
        if at is not None:
            shapes = [None if f is None else _shape(f, nr) for f, nr in following]
            where = carry(Op(node, at, _shape(node), shapes, n))
        for (f, _), there in zip(following, where, strict=True):
            if f is not None:
                known[f] = there if known.get(f, there) == there else None
    return known, needed


def layout(at: Along, shape: Shape, n: int) -> Layout | None:
    """Return the same as a `Layout`, None where that has no word for it."""
    if at.inner * n == shape[at.dim]:
        return Layout(at.dim)
    return Layout(at.dim, inner=True) if at.inner == 1 else None


def along(layout: Layout, shape: Shape, n: int) -> Along:
    """Return the reverse, for a layout without rows."""
    return Along(layout.axis, 1 if layout.inner else shape[layout.axis] // n)


def _shape(node: Node, output: int = 0) -> tuple[int, ...]:
    return tuple(outputs_of(node)[output].shape)
