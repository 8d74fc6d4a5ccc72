"""Whether the interception of a forward pass saw all uses of the weights: its calls against the graph of autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge


class Uses:
    """Accounts for the nodes of the graph of one forward pass that take a weight in.

    A call that was seen made the nodes between its output and its inputs; they may take weights in. Any other node that
    does belongs to a use that was not seen: in a scripted module, another thread, a function of C++.

    A function of the user's own (`torch.autograd.Function`) is one node, whose forward pass runs without a graph. It is
    accounted for where as many uses without a graph were seen in it.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.leaves = {get_gradient_edge(p).node: name for name, p in weights.items()}  # held: their identity counts
        self.clear()

    def clear(self) -> None:
        """Before the next forward pass."""
        self.made: set[Node] = set()  # by calls that were seen to use a weight
        self.ends: set[Node] = set()  # nodes from which the graph is walked
        self.hidden: Counter[str] = Counter()  # uses that made no graph

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """What a call got and gave: even where this is the only sign of what made it."""
        self.ends.update(t.grad_fn for t in tensors if t.grad_fn is not None)

    def made_by(self, inputs: Iterable[Node], outputs: Iterable[Tensor], names: set[str], view: bool) -> None:
        """A call that was seen, with these weights: nodes of its other inputs, its outputs, and whether these are the
        weight again."""
        todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
        if not todo and not view:
            self.hidden.update(names)
        borders = set(inputs)
        while todo:
            node = todo.pop()
            if node not in self.made and node not in borders and node not in self.leaves:
                self.made.add(node)
                todo.extend(_next(node))

    def unseen(self, result: object) -> tuple[dict[str, str], bool]:
        """Weights with uses that were not seen, each with the name of such a node; and whether any use is in the graph.

        result: what the forward pass returned.
        """
        self.reach(_tensors_in(result, set()))
        todo, walked = list(self.ends), set(self.ends)
        same: dict[Node, str | None] = {}
        missed: dict[str, list[Node]] = {}
        used = False
        while todo:
            node = todo.pop()
            for below in _next(node):
                name = self._weight(below, same)
                used |= name is not None
                if name is not None and node not in self.made:
                    missed.setdefault(name, []).append(node)
                if below not in walked:
                    walked.add(below)
                    todo.append(below)
        found = {}
        for name, nodes in missed.items():
            own = [node for node in nodes if isinstance(node, BackwardCFunction)]
            other = next((node for node in nodes if not isinstance(node, BackwardCFunction)), None)
            if other is not None or len(own) > self.hidden[name]:
                found[name] = (own[0] if other is None else other).name()
        return found, used

    def _weight(self, node: Node, known: dict[Node, str | None]) -> str | None:
        """Which weight a node gives, alone: as it is, or by functions of one input, such as its transposition and the
        cast that autocast makes once for all uses."""
        path = []
        while node is not None and node not in self.leaves and node not in known:
            path.append(node)
            node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
        name = self.leaves.get(node, known.get(node))
        known.update(dict.fromkeys(path, name))
        return name


def _next(node: Node) -> Iterator[Node]:
    return (below for below, _ in node.next_functions if below is not None)


def _tensors_in(found: object, seen: set[int]) -> Iterator[Tensor]:
    """In containers, and in the attributes of objects such as the outputs of transformers."""
    if isinstance(found, Tensor):
        yield found
    elif id(found) not in seen and not isinstance(found, (nn.Module, str, bytes, type)):
        seen.add(id(found))
        if isinstance(found, Mapping):
            found = found.values()
        elif not isinstance(found, (tuple, list, set, frozenset)):
            found = list(getattr(found, "__dict__", {}).values())
        for part in list(found):
            yield from _tensors_in(part, seen)
