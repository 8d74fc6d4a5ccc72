"""The union of micro-batches for a model in shards: the vectors of the iteration lie in shards, like the parameters.

All processes visit a micro-batch at a time, together, since the model's own passes exchange its shards. Whole tensors
of r, and whole sums for d, are in memory for a few parameters at a time. Before every exchange the processes agree that
all have come so far: so an error on one of them, anywhere, stops all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from .gradient_access import Block
from .passes import Passes
from .shards import Shards
from .union import MicroBatch, Union


class ShardedMicroBatch(MicroBatch):
    """The rules of one micro-batch, where r and d lie in shards: products and sums are made in rounds.

    shards: how r and d lie; the other arguments as those of `MicroBatch`.
    """

    def __init__(self, shards: Shards, *args: object) -> None:
        super().__init__(*args)
        self.shards, self.shards_of_r, self.shards_of_d = shards, self.r, self.d

    def _sums(self, blocks: Sequence[Block], float64: bool, gram: bool) -> tuple[Tensor, Tensor]:
        K, v = 0.0, 0.0
        for names in self.shards.rounds(list(self.shards_of_r)):
            self.r = {}  # else those of the round before would be in memory beside these
            self.r = self.shards.gathered(self.shards_of_r, names)
            with self._only(names):
                some_K, some_v = super()._sums(blocks, float64, gram)
            K, v = K + some_K, v + some_v
        self.r = {}
        return K, v

    def add_(self, blocks: Sequence[Block], w: Tensor, float64: bool = False) -> None:
        for names in self.shards.rounds(list(self.shards_of_d)):
            self.d = self.shards.zeros(names, self.shards_of_d)
            with self._only(names):
                super().add_(blocks, w, float64)
            self.shards.scatter_(self.d, self.shards_of_d)
            self.d = {}

    @contextmanager
    def _only(self, names: Sequence[str]) -> Iterator[None]:
        """Make a context in which no parameters but these are used."""
        uses, some = self.uses, set(names)
        self.uses, self._grouped = [use for use in uses if use.name in some], (None, [])
        try:
            yield
        finally:
            self.uses = uses


class ShardedUnion(Union):
    """Takes the span of the per-sample gradients of all micro-batches of all processes out of p.grad, in shards.

    Args:
        shards: where p.grad lies. followed: what stands for the parameters in a forward pass, by name.
        reading: makes a context for backward passes over a micro-batch, of its passes and losses.
        read_nothing: does what a process without samples does in the place of a backward pass, of losses (0,).
        options: as `Union` has them; every process has the same number of micro-batches.
    """

    def __init__(
        self,
        shards: Shards,
        followed: Mapping[str, Tensor],
        reading: Callable[[Passes, Tensor], AbstractContextManager[None]],
        read_nothing: Callable[[Tensor], None],
        **options: object,
    ) -> None:
        self.shards, self.reading, self.read_nothing = shards, reading, read_nothing
        self.micro_batch = functools.partial(ShardedMicroBatch, shards)
        super().__init__(**options, processes=shards.processes)
        for span in self.small.values():  # it makes gradients in full, and those are not in shards
            span.block = Block(span.block.name, {name: followed[name] for name in span.block.parameters})

    def _take(self, p: Tensor) -> Tensor:
        return self.shards.local(super()._take(p))

    def _give(self, name: str, r: Tensor) -> Tensor:
        return self.shards.laid_out(name, r)

    def _read(self, passes: Passes, losses: Tensor, watched: bool) -> MicroBatch:
        with self.reading(passes, losses):
            return super()._read(passes, losses, watched)

    def _visit_nothing(self, passes: Passes, losses: Tensor, last: bool) -> None:
        with self.reading(passes, losses):
            self.read_nothing(losses)
        for names in self.shards.rounds(list(self.r)):
            self.shards.gathered(self.r, names)
        for names in self.shards.rounds(list(self.d)) if not last or self.alpha else ():
            self.shards.scatter_(self.shards.zeros(names, self.d), self.d)

    def _collect(self) -> None:
        """Do nothing: every visit added the shares of all processes to the shards."""

    def _project_small(self) -> None:
        names = [name for span in self.small.values() for name in span.block.parameters]
        whole = self.shards.gathered(self.r, names) if names else {}
        for span in self.small.values():
            span.project_([whole[name] for name in span.block.parameters])
        for name, r in whole.items():
            self.r[name].copy_(self.shards.part(name, r))

    def _of_parameters(self, values: Tensor) -> Tensor:
        return self.shards.summed_products(values)
