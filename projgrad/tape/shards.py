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
        some: list[str] = []
        for name in names:
            if some and sum(self._bytes(one) for one in (*some, name)) > ROUND:
                yield some
                some = []
            some.append(name)
        if some:
            yield some

    def whole(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        grads = {name: self.parameters[name].grad for name in names}
        for name, grad in grads.items():
            if isinstance(grad, DTensor):
                grads[name] = grad.full_tensor()
                self._count("forget gradient", name)
        return grads

    def sums(self, names: Sequence[str]) -> dict[str, Tensor]:
        ps, device = [self.parameters[name] for name in names], self.processes.device
        return {name: torch.zeros(p.shape, dtype=p.dtype, device=device) for name, p in zip(names, ps, strict=True)}

    def add_(self, sums: Mapping[str, Tensor]) -> None:
        whole = {name: total for name, total in sums.items() if not isinstance(self.parameters[name], DTensor)}
        self.processes.sum_all_(whole.values(), "corrections")
        for name, total in sums.items():
            p = self.parameters[name]
            if name not in whole:
                parts = DTensor.from_local(total, p.device_mesh, [Partial()] * p.device_mesh.ndim, run_check=False)
                total = parts.redistribute(placements=p.placements)
                self._count("corrections", name)
            p.grad = total if p.grad is None else p.grad.add_(total)

    def norms(self, names: Sequence[str]) -> Tensor:
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.processes.device)
        if names:
            grads = [self.parameters[name].grad for name in names]
            local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
            squares = lengths(local).square() / squares.new_tensor([self._copies(g) for g in grads])
        return self.processes.sum_(squares, "agreements").sqrt()

    def _copies(self, grad: Tensor) -> int:
        """Return how many processes hold the same part of a gradient."""
        if not isinstance(grad, DTensor):
            return self.processes.size
        sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
        return math.prod(size for placement, size in sizes if placement.is_replicate())

    def _count(self, purpose: str, name: str) -> None:
        """Count a gathering of shards, or the sum of whole gradients into them."""
        self.processes.sent[purpose] += self._bytes(name) * (self.processes.size - 1) // self.processes.size

    def _bytes(self, name: str) -> int:
        p = self.parameters[name]
        return p.numel() * p.dtype.itemsize
