"""Gradients in shards. Importing DTensor takes a second: this file is imported where a model has some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from ..recording.host_reads import lengths
from .placement import Replicas

ROUND = 64 << 20  # bytes of whole gradients that are made of shards at one time


class Shards(Replicas):
    """Every process holds a shard of p.grad, as `fully_shard` makes them, or all of it where a parameter is whole."""

    def rounds(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        return self.some(names, ROUND)

    def whole(self, tensors: Mapping[str, Tensor | None], purpose: str) -> Mapping[str, Tensor | None]:
        gathered = dict(tensors)
        for name, t in tensors.items():
            if isinstance(t, DTensor):
                gathered[name] = t.full_tensor()
                self._count(purpose, name, t)
        return gathered

    def sums(self, names: Sequence[str]) -> dict[str, Tensor]:
        ps, device = [self.parameters[name] for name in names], self.processes.device
        return {name: torch.zeros(p.shape, dtype=p.dtype, device=device) for name, p in zip(names, ps, strict=True)}

    def summed(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        totals = dict(sums)
        whole = {name: total for name, total in sums.items() if not isinstance(self.parameters[name], DTensor)}
        super().summed(whole)
        for name in [name for name in sums if name not in whole]:  # in the same order everywhere
            totals[name] = self._shards_of_sum(name, sums[name])
            self._count("corrections", name, sums[name])
        return totals

    def add_(self, sums: Mapping[str, Tensor]) -> None:
        for name, total in self.summed(sums).items():
            p = self.parameters[name]
            p.grad = total if p.grad is None else p.grad.add_(total)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        local = lengths([t.to_local() if isinstance(t, DTensor) else t for t in tensors])
        return local.square() / local.new_tensor([self._copies(t) for t in tensors])

    def total(self, squares: Tensor) -> Tensor:
        return self.processes.sum_(squares, "agreements")

    def norms(self, names: Sequence[str]) -> Tensor:
        if not names:
            return super().norms(names)
        return self.total(self.squares([self.parameters[name].grad for name in names])).sqrt()

    def _shards_of_sum(self, name: str, total: Tensor) -> DTensor:
        """Return the sum over all processes of whole tensors, in shards like a parameter."""
        p = self.parameters[name]
        parts = DTensor.from_local(total, p.device_mesh, [Partial()] * p.device_mesh.ndim, run_check=False)
        return parts.redistribute(placements=p.placements)

    def _copies(self, t: Tensor) -> int:
        """Return how many processes hold the same part of a tensor."""
        if not isinstance(t, DTensor):
            return self.processes.size
        sizes = zip(t.placements, t.device_mesh.shape, strict=True)
        return math.prod(size for placement, size in sizes if placement.is_replicate())

    def _count(self, purpose: str, name: str, like: Tensor) -> None:
        """Count a gathering of shards, or the sum of whole tensors into them; like: of what type."""
        size = self.parameters[name].numel() * like.dtype.itemsize
        self.processes.sent[purpose] += size * (self.processes.size - 1) // self.processes.size
