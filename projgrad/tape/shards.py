"""Gradients in shards. Importing DTensor takes a second: this file is imported where a model has some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.functional import pad

from ..recording.host_reads import lengths
from .placement import SUMMED, Replicas

ROUND = 64 << 20  # bytes of whole gradients that are made of shards at one time


class Shards(Replicas):
    """Every process holds a shard of p.grad, as `fully_shard` makes them, or all of it where a parameter is whole."""

    def rounds(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        return self.some(names, ROUND)

    def whole(self, tensors: Mapping[str, Tensor | None], purpose: str) -> Mapping[str, Tensor | None]:
        sharded = {name: self.local(t) for name, t in tensors.items() if isinstance(t, DTensor)}
        return dict(tensors) | self._gather(sharded, purpose)

    def sums(self, names: Sequence[str]) -> dict[str, Tensor]:
        ps, device = [self.parameters[name] for name in names], self.processes.device
        return {name: torch.zeros(p.shape, dtype=p.dtype, device=device) for name, p in zip(names, ps, strict=True)}

    def summed(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: self.laid_out(name, part) for name, part in self._scatter(sums, "corrections").items()}

    def add_(self, sums: Mapping[str, Tensor]) -> None:
        for name, total in self.summed(sums).items():
            p = self.parameters[name]
            p.grad = total if p.grad is None else p.grad.add_(total)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        local = lengths([self.local(t) for t in tensors])
        return local.square() / local.new_tensor([self._copies(t) for t in tensors])

    def total(self, squares: Tensor) -> Tensor:
        return self.processes.sum_(squares, "agreements")

    def norms(self, names: Sequence[str]) -> Tensor:
        if not names:
            return super().norms(names)
        return self.total(self.squares([self.parameters[name].grad for name in names])).sqrt()

    # Vectors that lie like the parameters, of which a process holds its shards as plain tensors.

    def local(self, t: Tensor) -> Tensor:
        return t.to_local() if isinstance(t, DTensor) else t

    def laid_out(self, name: str, local: Tensor) -> Tensor:
        p = self.parameters[name]
        if not isinstance(p, DTensor):
            return local
        place = {"shape": p.shape, "stride": p.stride(), "run_check": False}
        return DTensor.from_local(local, p.device_mesh, p.placements, **place)

    def gathered(self, vector: Mapping[str, Tensor], names: Sequence[str]) -> Mapping[str, Tensor]:
        self.processes.agree()
        return self._gather({name: vector[name] for name in names}, "iterations")

    def part(self, name: str, whole: Tensor) -> Tensor:
        p = self.parameters[name]
        if not isinstance(p, DTensor):
            return whole
        copies = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
        return copies.redistribute(placements=p.placements).to_local()

    def zeros(self, names: Sequence[str], vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: vector[name].new_zeros(self.parameters[name].shape) for name in names}

    def scatter_(self, sums: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> None:
        self.processes.agree()
        for name, part in self._scatter(sums, "iterations").items():
            vector[name].add_(part)

    def collect_(self, vector: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def summed_products(self, values: Tensor, names: Sequence[str]) -> Tensor:
        """Return the sums over all processes; what several of them hold alike counts once."""
        copies = values.new_tensor([self._copies(self.parameters[name]) for name in names])
        return self.processes.sum_(values / copies, "agreements")

    # Exchanges. Of rows, as `fully_shard` makes them, many tensors go together: every process has equally many, less
    # at the end, and what is missing there is filled up.

    def _gather(self, parts: Mapping[str, Tensor], purpose: str) -> dict[str, Tensor]:
        """Return tensors whole of which every process holds parts."""
        whole = dict(parts)
        for names, sizes in self._buckets(parts):
            rows = [_filled(parts[name], size) for name, size in zip(names, sizes, strict=True)]
            every = self.processes.gather(_joined(rows), purpose)
            for name, rows in zip(names, every.split(sizes, 1), strict=True):
                p = self.parameters[name]
                whole[name] = rows.flatten()[: p.numel()].view(p.shape)
        for name in self._others(parts):
            whole[name] = self.laid_out(name, parts[name]).full_tensor()
            self._count(purpose, name, parts[name])
        return whole

    def _scatter(self, sums: Mapping[str, Tensor], purpose: str) -> dict[str, Tensor]:
        """Return this process's parts of the sums over all processes of whole tensors."""
        parts, size = dict(sums), self.processes.size
        self.processes.sum_all_([t for name, t in sums.items() if not self._is_sharded(name)], purpose)
        for names, sizes in self._buckets(sums):
            rows = [_filled(sums[name], size * most).view(size, -1) for name, most in zip(names, sizes, strict=True)]
            mine = self.processes.scatter_sum(_joined(rows), purpose)
            for name, part in zip(names, mine.split(sizes), strict=True):
                shape = self.local(self.parameters[name]).shape
                parts[name] = part[: shape.numel()].view(shape)
        for name in self._others(sums):
            mesh = self.parameters[name].device_mesh
            total = DTensor.from_local(sums[name], mesh, [Partial()] * mesh.ndim, run_check=False)
            parts[name] = total.redistribute(placements=self.parameters[name].placements).to_local()
            self._count(purpose, name, sums[name])
        return parts

    def _buckets(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Sequence[str], list[int]]]:
        """Yield the names of tensors that go together, and how many elements of each a process has at most."""
        rows = [name for name in tensors if self._is_sharded(name) and self._in_rows(name)]
        for dtype in dict.fromkeys(tensors[name].dtype for name in rows):
            for names in self.some([name for name in rows if tensors[name].dtype == dtype], SUMMED):
                shapes = [self.parameters[name].shape for name in names]
                yield names, [-(-shape[0] // self.processes.size) * math.prod(shape[1:]) for shape in shapes]

    def _others(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of sharded tensors that each go alone."""
        return [name for name in tensors if self._is_sharded(name) and not self._in_rows(name)]

    def _is_sharded(self, name: str) -> bool:
        return isinstance(self.parameters[name], DTensor)

    def _in_rows(self, name: str) -> bool:
        p = self.parameters[name]
        return p.device_mesh.ndim == 1 and p.placements == (Shard(0),)

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


def _filled(t: Tensor, size: int) -> Tensor:
    """Return a tensor as one row, with zeros at the end."""
    return t.flatten() if t.numel() == size else pad(t.flatten(), (0, size - t.numel()))


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Return rows side by side; of one no copy."""
    return torch.cat(list(rows), -1) if len(rows) > 1 else rows[0]
