"""What the tape does with a model, as a table: `Tape.explain`."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import NamedTuple

from torch import Tensor

from .._torch_private import TorchDispatchMode, storage_id, tree_leaves
from ..recording.recording import Recording
from ..recording.sites import Source
from ..rules.rule import Rule
from .consumers import Consumer


class Line(NamedTuple):
    """One parameter or part of one.

    use: the calls that used it; rule: what gives its per-sample gradients; route: how their Gram matrix is computed;
    bytes, flops: predicted for that; actual: bytes that were in use besides the factors, at most.
    """

    parameter: str
    use: str
    rule: str
    route: str
    bytes: int
    flops: int
    actual: int


class Explanation(list[Line]):
    """Lines in the order of the backward pass; prints as a table."""

    def __str__(self) -> str:
        head = ("parameter", "use", "rule", "route", "predicted MB", "Mflop", "actual MB")
        numbers = [(f"{s.bytes / 1e6:.2f}", f"{s.flops / 1e6:.1f}", f"{s.actual / 1e6:.2f}") for s in self]
        rows = [(*line[:4], *cells) for line, cells in zip(self, numbers, strict=True)]
        widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        return "\n".join(
            "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, "<<<<>>>", widths, strict=True)).rstrip()
            for row in [head, *rows]
        )


class Explain(Consumer):
    """Computes every Gram matrix under a count of the memory in use."""

    def __init__(self, recording: Recording) -> None:
        self.uses: dict[str, set[str]] = defaultdict(set)
        for site in recording.sites:
            for source in site.sources:
                for name in source.names:
                    self.uses[name].add(site.name)
        self.lines = Explanation()

    def add(self, name: str, source: Source, rule: Rule) -> None:
        with Allocated() as allocated:
            rule.gram(None)
        cost = rule.cost()
        use = ", ".join(sorted(self.uses[name])) or "a loop over the losses"
        self.lines.append(Line(name, use, rule.name, cost.name, cost.bytes, cost.flops, allocated.peak))


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors made while active and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.live: dict[int, list[int]] = {}  # storage -> [bytes, tensors that use it]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {storage_id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            address = storage_id(t)
            if address in self.live:
                self.live[address][1] += 1
            elif address not in before and address:
                self.live[address] = [t.untyped_storage().nbytes(), 1]
            else:
                continue
            weakref.finalize(t, self._gone, address)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return out

    def _gone(self, address: int) -> None:
        entry = self.live.get(address)
        if entry is not None:
            entry[1] -= 1
            if not entry[1]:
                del self.live[address]
