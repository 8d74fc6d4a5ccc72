"""Proves, from the operations of a graph alone, along which dimension of a tensor the samples lie.

A backward pass carries gradients from the losses [n] down to the sites. Where every operation on the way is known to
treat the entries along one dimension alike, that dimension still holds the samples, whatever the numbers are: a proof
that also holds for the next graph of the same operations and shapes. Everything else proves nothing: a product or a
broadcast over the samples, an index, an operation that is not in the table of `carry.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch.autograd.graph import Node

from .._torch_private import outputs_of
from ..rules.layout import Layout
from .carry import Along, Op, Shape, Where, carry, is_tap
from .graph import nodes_below
from .sites import Site


def locate(
    losses_node: Node, n: int, given: Mapping[Site, Layout] | None = None
) -> tuple[dict[Site, Along], set[Site]]:
    """Return where the samples lie in the outputs of sites, if that is proven, and which of `given` the proof took.

    given: layouts of some sites, taken for true.
    """
    known, needed = carried(losses_node, n, given)
    return {node.site: at for node, at in known.items() if at is not None and is_tap(node)}, needed


def carried(
    losses_node: Node, n: int, given: Mapping[Site, Layout] | None = None
) -> tuple[dict[Node, Along | None], set[Site]]:
    """Return the same for every node of the graph; None: nothing is proven."""
    needed: set[Site] = set()
    known: dict[Node, Along | None] = {losses_node: Along(0)}
    for node in _ordered(losses_node):
        at = known.get(node)  # saved for a tap alone: no gradient comes
        if at is None and given and is_tap(node) and node.site in given:
            at = known[node] = along(given[node.site], node.site.shape, n)
            needed.add(node.site)
        following = node.next_functions[:1] if is_tap(node) else node.next_functions  # the others get no gradient
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


def _ordered(root: Node) -> list[Node]:
    """Return every node of the graph before those that it passes gradients to."""
    waiting = Counter(f for node in nodes_below([root]) for f, _ in node.next_functions)  # for so many gradients
    ready, order = [root], []
    while ready:
        order.append(node := ready.pop())
        for f, _ in node.next_functions:
            waiting[f] -= 1
            if f is not None and not waiting[f]:
                ready.append(f)
    return order


def _shape(node: Node, output: int = 0) -> tuple[int, ...]:
    return tuple(outputs_of(node)[output].shape)
