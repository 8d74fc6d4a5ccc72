"""Whether the interception of a forward pass saw all uses of the weights: its calls against the graph of autograd."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

from ...recording.graph import nodes_below


class Uses:
    """Account of the nodes in the graph of one forward pass that take a weight in.

    A call that was seen made the nodes between its output and its inputs. Any other node that takes a weight in belongs
    to a use that was not seen: in a scripted module, another thread, a function of C++.

    A function of the user's own (`torch.autograd.Function`) is one node, whose forward pass runs without a graph. It is
    accounted for where as many uses without a graph were seen in it.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.leaves = {get_gradient_edge(p).node: name for name, p in weights.items()}  # held: their identity counts
        self.clear()

    def clear(self) -> None:
        """Begin the account of the next forward pass."""
        self.made: set[Node] = set()  # by calls that were seen to use a weight
        self.ends: set[Node] = set()  # nodes from which the graph is walked
        self.hidden: Counter[str] = Counter()  # uses that made no graph

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Walk from these tensors too. A call got or gave them: that may be the only sign of what made them."""
        self.ends.update(t.grad_fn for t in tensors if t.grad_fn is not None)

    def made_by(self, inputs: Iterable[Node], outputs: Iterable[Tensor], names: set[str], view: bool) -> None:
        """Account for the nodes that a call made.

        inputs: nodes of its inputs, without the weights. outputs: what it returned. names: the weights that it was
        given. view: whether its outputs are the weight again.
        """
        ends = [t.grad_fn for t in outputs if t.grad_fn is not None]
        if not ends and not view:
            self.hidden.update(names)
        borders = set(inputs)
        self.made.update(nodes_below(ends, lambda node: node in self.made or node in borders or node in self.leaves))

    def unseen(self, result: object) -> tuple[dict[str, str], bool]:
        """Return the weights with uses that were not seen, each with the name of such a node.

        And whether any use is in the graph. result: what the forward pass returned.
        """
        self.reach(_tensors_in(result, set()))
        known: dict[Node, str | None] = {}
        users: dict[str, list[Node]] = {}  # nodes that take a weight in, by its name
        for node in nodes_below(self.ends):
            for following, _ in node.next_functions:
                if (name := self._weight(following, known)) is not None:
                    users.setdefault(name, []).append(node)
        unseen = {}
        for name, nodes in users.items():
            missed = [node for node in nodes if node not in self.made]
            own = [node for node in missed if isinstance(node, BackwardCFunction)]
            others = [node for node in missed if not isinstance(node, BackwardCFunction)]
            if others or len(own) > self.hidden[name]:
                unseen[name] = (others or own)[0].name()
        return unseen, bool(users)

    def _weight(self, node: Node | None, known: dict[Node, str | None]) -> str | None:
        """Return the weight that a node gives alone, or None.

        It gives it as it is, or by functions of one input, such as its transposition and the cast that autocast makes
        once for all uses.
        """
        path = []
        while node is not None and node not in self.leaves and node not in known:
            path.append(node)
            node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
        name = self.leaves.get(node, known.get(node))
        known.update(dict.fromkeys(path, name))
        return name


def _tensors_in(result: object, visited: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in containers, and in the attributes of objects such as the outputs of transformers."""
    if isinstance(result, Tensor):
        yield result
    elif id(result) not in visited and not isinstance(result, (nn.Module, str, bytes, type)):
        visited.add(id(result))
        if isinstance(result, Mapping):
            parts = result.values()
        elif isinstance(result, (tuple, list, set, frozenset)):
            parts = result
        else:
            parts = getattr(result, "__dict__", {}).values()
        for part in list(parts):
            yield from _tensors_in(part, visited)
