"""Walks through the graph of a forward pass: what identifies it, and which parameters no site accounts for."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .._torch_private import outputs_of
from ..ops.numerics import finfo
from . import carry
from .compiled import compiled
from .recording import Recording
from .refusals import NESTED_TENSORS, REENTRANT

ACCUMULATE = "torch::autograd::AccumulateGrad"


def nodes_of(losses: Tensor) -> list[Node]:
    """Return all nodes of the graph, each once."""
    return nodes_below([losses.grad_fn])


def nodes_below(
    starts: Iterable[Node | None],
    stop: Callable[[Node], bool] = lambda node: False,
    edges: Callable[[Node], Iterable[tuple[Node | None, int]]] = operator.attrgetter("next_functions"),
) -> list[Node]:
    """Return the nodes that are reached from these, with these, each once.

    stop: where it holds the node is left out. edges: where the walk goes on from a node.
    """
    nodes = dict.fromkeys(node for node in starts if node is not None and not stop(node))
    waiting = list(nodes)
    while waiting:
        for following, _ in edges(waiting.pop()):
            if following is not None and following not in nodes and not stop(following):
                nodes[following] = None
                waiting.append(following)
    return list(nodes)


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type with the fewest digits."""
    return max(dtypes, key=lambda d: finfo(d).eps)


def coarsest_of(losses: Tensor, nodes: list[Node]) -> torch.dtype:
    """Return the type with the fewest digits between the losses and the parameters."""
    types = {losses.dtype, *(m.dtype for node in nodes for m in outputs_of(node))}
    return coarser(*(d for d in types if d.is_floating_point))


def audit(recording: Recording, losses: Tensor) -> list[str]:
    """Return the parameters that reach the losses other than through sites with a layout.

    The graph is walked around the sites.
    """

    def edges(node: Node) -> Iterable[tuple[Node | None, int]]:
        if "CompiledFunction" in node.name():
            raise ValueError(
                "a function from torch.compile lies between the losses and the parameters and hides its operations: "
                "call the original function"
            )
        site = recording.site_of.get(node)
        if site is None or site.layout is None:
            return node.next_functions
        # Sources that an earlier site accounts for, and those without a rule here, are inputs like any other.
        sources = [*(s for s in site.sources if s.settled), *site.unclaimed]
        return [(below, 0) for below in (*site.stops, *(source.edge.node for source in sources))]

    outside = set(nodes_below([losses.grad_fn], edges=edges))
    accumulators = {get_gradient_edge(p).node: name for name, p in recording.parameters.items()}
    return [name for node, name in accumulators.items() if node in outside]


def ordered(root: Node) -> list[Node]:
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


def ends_of(recording: Recording, losses: Tensor) -> list[int]:
    """Return the sites, by index, below which the graph has no other: a pass that goes down to them meets all."""
    reaches: dict[Node | None, bool] = {None: False}  # whether there is a site at a node or below it
    ends = []
    for node in reversed(ordered(losses.grad_fn)):
        below, site = any(reaches[f] for f, _ in node.next_functions), recording.site_of.get(node)
        if site is not None and not below:
            ends.append(site.index)
        reaches[node] = below or site is not None
    return ends


def fingerprint(recording: Recording, losses: Tensor) -> int:
    """Return a hash of the whole graph.

    It is of operations, shapes and axes, how they are connected, and which parameters and sites they use.

    Raises:
        ValueError: no parameter that the tape follows is in it, or reentrant checkpointing.
    """
    names = {id(p): name for name, p in recording.parameters.items()}
    if compiled is not None:
        found = compiled.fingerprint(losses, names, list(recording.site_of), _shaped, _setting)
        if found is not None:
            return found
    nodes = nodes_below([losses.grad_fn])
    numbers: dict[Node | None, int] = {None: 0} | {node: k for k, node in enumerate(nodes, 1)}
    links: list[int] = []
    for node in nodes:
        links.append(-1)  # where its edges begin
        for following, nr in node.next_functions:
            links += (numbers[following], nr)
    operations = [node.name() for node in nodes]
    if any("CheckpointFunctionBackward" in operation for operation in {*operations}):
        raise ValueError(REENTRANT)
    leaves = [node.variable for node, kind in zip(nodes, operations, strict=True) if kind == ACCUMULATE]
    used = [names.get(id(leaf)) for leaf in leaves]
    if not any(used):
        raise ValueError("the losses do not depend on any parameter that the tape follows")
    sites = [numbers.get(node) for node in recording.site_of]  # of several forward passes, the one that is used
    try:
        outputs = [size for node in nodes for m in outputs_of(node) for size in (m.dtype, *m.shape)]
    except RuntimeError:  # of a nested tensor the shape cannot be read
        raise ValueError(NESTED_TENSORS) from None
    values = [getattr(node, a) for node in nodes for a in _shaped(type(node))]
    settings = [value if value.__class__ in PLAIN else _setting(value) for value in values]
    # As text: torch has 2^64 - 1 for -1, and the hash of that is the hash of 7.
    return hash((*map(tuple, (links, operations, used, sites, outputs)), str(settings)))


PLAIN = frozenset((int, bool, float, str, tuple, type(None)))


def _setting(value: object) -> object:
    """Return what of a node's attribute belongs to the graph: of a tensor the numbers only if they are integers."""
    if not isinstance(value, Tensor):
        return str(value)
    return value.dtype, tuple(value.shape), *(() if value.is_floating_point() else value.flatten().tolist())


@functools.cache
def _shaped(kind: type) -> tuple[str, ...]:
    return tuple(a for a in dir(kind) if carry.SHAPED.match(a) and "philox" not in a)  # a random generator's state
