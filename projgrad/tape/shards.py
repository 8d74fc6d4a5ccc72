"""Gradients in shards. Importing DTensor takes a second: this file is imported where a model has some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

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

    # Vectors that lie like the parameters, of which a process holds its shards as plain tensors.

    def local(self, t: Tensor) -> Tensor:
        """Return this process's shard of a tensor."""
        return t.to_local() if isinstance(t, DTensor) else t

    def laid_out(self, name: str, local: Tensor) -> Tensor:
        """Return shards as one tensor that lies like a parameter."""
        p = self.parameters[name]
        if not isinstance(p, DTensor):
            return local
        place = {"shape": p.shape, "stride": p.stride(), "run_check": False}
        return DTensor.from_local(local, p.device_mesh, p.placements, **place)

    def gathered(self, vector: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return a vector's tensors of these names whole, once all processes have come so far."""
        self.processes.agree()
        whole: dict[str, Tensor] = {}
        for name in names:
            t = whole[name] = self.laid_out(name, vector[name])
            if isinstance(t, DTensor):
                whole[name] = t.full_tensor()
                self._count("iterations", name, t)
        return whole

    def scatter_(self, sums: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> None:
        """Add the sums over all processes of whole tensors to a vector, once all processes have come so far."""
        self.processes.agree()
        whole = {name: total for name, total in sums.items() if not isinstance(self.parameters[name], DTensor)}
        self.processes.sum_all_(whole.values(), "iterations")
        for name, total in sums.items():
            if name not in whole:
                total = self._shards_of_sum(name, total).to_local()
                self._count("iterations", name, total)
            vector[name].add_(total)

    def zeros(self, names: Sequence[str], vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole zeros in the type of a vector, for `scatter_`."""
        return {name: vector[name].new_zeros(self.parameters[name].shape) for name in names}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's shard of a tensor that all processes hold alike."""
        p = self.parameters[name]
        if not isinstance(p, DTensor):
            return whole
        copies = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
        return copies.redistribute(placements=p.placements).to_local()

    def summed_products(self, values: Tensor) -> Tensor:
        """Return inner products of whole tensors, from those of this process's shards, [number of parameters].

        What several processes hold alike counts once.
        """
        copies = values.new_tensor([self._copies(p) for p in self.parameters.values()])
        return self.processes.sum_(values / copies, "agreements")

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
