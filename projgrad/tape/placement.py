"""Where the gradients of a model lie that is spread over processes: whole on each of them, or in shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ..recording.host_reads import lengths
from .passes import Passes
from .processes import Alone, Processes

SUMMED = 4 << 20  # bytes of whole tensors that are made for some parameters at one time, only to be exchanged


class Replicas:
    """Every process holds the whole p.grad, the same on all."""

    def __init__(self, processes: Processes | Alone, parameters: Mapping[str, Tensor]) -> None:
        self.processes, self.parameters = processes, parameters

    def rounds(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """Yield the names of parameters whose whole gradients are in memory at one time."""
        yield names

    def some(self, names: Sequence[str], limit: int = SUMMED) -> Iterator[Sequence[str]]:
        """Yield as many names at a time as have so many bytes."""
        some: list[str] = []
        for name in names:
            if some and sum(self._bytes(one) for one in (*some, name)) > limit:
                yield some
                some = []
            some.append(name)
        if some:
            yield some

    def whole(self, tensors: Mapping[str, Tensor | None], purpose: str) -> Mapping[str, Tensor | None]:
        """Return tensors that lie as their parameters do, whole."""
        return tensors

    def sums(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole tensors to add this process's samples to, for `add_`.

        They are the p.grad themselves: those of process 0 stay what they are, and the others begin at zero.
        """
        for name in names:
            p = self.parameters[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            elif self.processes.rank:
                p.grad.zero_()
        return {name: self.parameters[name].grad for name in names}

    def summed(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums over all processes of whole tensors, lying as their parameters do."""
        self.processes.sum_all_(sums.values(), "corrections")
        return sums

    def add_(self, sums: Mapping[str, Tensor]) -> None:
        """Add to every p.grad the sum over all processes of what was added to `sums`."""
        self.summed(sums)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return shares of ‖t‖² of tensors that lie as their parameters do, [len(tensors)] float64, for `total`."""
        return lengths(tensors).square()

    def total(self, squares: Tensor) -> Tensor:
        """Return sums of `squares` of whole tensors."""
        return squares

    def norms(self, names: Sequence[str]) -> Tensor:
        """Return ‖p.grad‖ of parameters that have one, [len(names)] float64."""
        if not names:
            return torch.zeros(0, dtype=torch.float64, device=self.processes.device)
        return lengths([self.parameters[name].grad for name in names])

    # Vectors that lie like the parameters: plain tensors, what a process holds of them.

    def local(self, t: Tensor) -> Tensor:
        """Return what this process holds of a tensor."""
        return t

    def laid_out(self, name: str, local: Tensor) -> Tensor:
        """Return what this process holds as a tensor that lies like a parameter."""
        return local

    def gathered(self, vector: Mapping[str, Tensor], names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return a vector's tensors of these names whole, once all processes that exchange them have come so far."""
        return vector

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return what this process holds of a tensor that is whole, and the same on all."""
        return whole

    def zeros(self, names: Sequence[str], vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return whole tensors of a vector's types to add samples to, for `scatter_`: here the vector."""
        return vector

    def scatter_(self, sums: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> None:
        """Add the sums over all processes of whole tensors to a vector, once all have come so far: see `collect_`."""

    def collect_(self, vector: Mapping[str, Tensor]) -> None:
        """Make a vector the sum over all processes, where `scatter_` has not done so."""
        self.processes.sum_all_(vector.values(), "correction")

    def summed_products(self, values: Tensor, names: Sequence[str]) -> Tensor:
        """Return inner products of whole tensors [len(names)], from those of what every process holds."""
        return values

    def _bytes(self, name: str) -> int:
        p = self.parameters[name]
        return p.numel() * p.dtype.itemsize


class Spread(Protocol):
    """How a model is spread over processes, as the union of their retain samples has to know it.

    placement: of p.grad. followed: what stands for the parameters in a forward pass, by name.
    """

    placement: Replicas
    followed: Mapping[str, Tensor]

    def reading(self, passes: Passes, losses: Tensor) -> AbstractContextManager[None]:
        """Make a context for backward passes over this process's samples; losses: of them, perhaps (0,)."""

    def read_nothing(self, losses: Tensor) -> None:
        """Do what a process without samples has to do in the place of backward passes; losses (0,)."""


class InOneProcess(Spread):
    """Not spread over any others."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.placement, self.followed = Replicas(Alone(), parameters), parameters

    def reading(self, passes: Passes, losses: Tensor) -> AbstractContextManager[None]:
        return nullcontext()
