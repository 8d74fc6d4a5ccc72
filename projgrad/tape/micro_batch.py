"""The rules of one of the micro-batches that a union visits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from .gradient_access import Block, KeptGradients
from .passes import Passes
from .placement import Replicas
from .systems import without_underflow

Vector = dict[str, Tensor]  # in the space of the parameters, by name


class MicroBatch(KeptGradients):
    """The rules of one micro-batch: its products are those with r, and Gᵀ w is added to d.

    Both are made in rounds, of some parameters that are whole at one time; of r then in `whole_r`, of d in `sums`.

    placement: how r and d lie. gather: makes r of some parameters whole.
    """

    def __init__(
        self,
        passes: Passes,
        losses: Tensor,
        rates: Mapping[str, float],
        watch: str,
        r: Vector,
        d: Vector,
        placement: Replicas,
        gather: Callable[[Sequence[str]], Mapping[str, Tensor]],
    ) -> None:
        super().__init__(passes, losses, rates, None, watch)
        self.r, self.d, self.placement, self.gather = r, d, placement, gather
        self.whole_r: Mapping[str, Tensor] = {}
        self.sums: Mapping[str, Tensor] = {}

    def products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        return self._without_lost(*super().products(blocks, float64), blocks)

    def _without_lost(self, K: Tensor, v: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """Make K and v zero where digits of gradients are missing."""
        return without_underflow(K, v, blocks)

    def direction(self, name: str) -> Tensor:
        return self.whole_r[name]

    def target(self, name: str) -> Tensor:
        return self.sums[name]

    def _sums(self, blocks: Sequence[Block], float64: bool, gram: bool) -> tuple[Tensor, Tensor]:
        total: tuple[Tensor, Tensor] | None = None
        for names in self.placement.rounds(list(self.r)):
            self.whole_r = {}  # else those of the round before would be in memory beside these
            self.whole_r = self.gather(names)
            with self._only(names):
                some = super()._sums(blocks, float64, gram)
            total = some if total is None else (total[0] + some[0], total[1] + some[1])
        self.whole_r = {}
        return total

    def add_(self, blocks: Sequence[Block], w: Tensor, float64: bool = False) -> None:
        for names in self.placement.rounds(list(self.d)):
            self.sums = self.placement.zeros(names, self.d)
            with self._only(names):
                super().add_(blocks, w, float64)
            self.placement.scatter_(self.sums, self.d)
            self.sums = {}

    @contextmanager
    def _only(self, names: Sequence[str]) -> Iterator[None]:
        """Make a context in which no parameters but these are used."""
        uses, some = self.uses, set(names)
        if len(some) < len(self.r):
            self.uses, self._grouped = [use for use in uses if use.name in some], (None, [])
        try:
            yield
        finally:
            self.uses = uses
