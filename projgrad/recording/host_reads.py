"""Numbers that the host needs from the device: asked for together, and waited for as late as possible.

On a GPU every wait empties the queue of work: a step may have a few, but not one for every tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .._torch_private import foreach_norms

SMALL = 1 << 20  # numbers
PIECE = 1 << 17  # elements that float32 sums at once on a CPU: a relative error of 1e-6 at most


class Impossible(Exception):
    """A run on the device that cannot be captured."""


class Differs(Exception):
    """The numbers of a replay ask for another way than the one that was captured."""


class Script:
    """The host's part of a run on the device that is captured and replayed.

    First a run is rehearsed: its numbers are read, and noted. In the capture, where nothing can be read, they are given
    again, so that the host takes the same way. What it would have read is kept, and each replay fills it anew.

    deferred: what was kept, what to do with it, and the numbers of the rehearsal where they decided the way.
    again: goes through the host's part once more, with reads of its own.
    losses: of the forget batch and of the retain samples, as they were read last.
    """

    def __init__(self) -> None:
        self._numbers: list[list[float]] = []
        self._given: Iterator[list[float]] | None = None
        self.deferred: list[tuple[Tensor, Callable[[list[float]], object], list[float] | None]] = []
        self.again: Callable[[HostReads], Any] | None = None
        self.losses: list[float] = []

    def capture(self) -> None:
        """Give the numbers of the rehearsal from now on."""
        self._given, self.deferred = iter(self._numbers), []
        self.losses.clear()

    def replay(self) -> Any:
        """Return what the host's part returns for what the device computed last; raises Differs."""
        self.losses.clear()
        reads = HostReads()
        for numbers, callback, known in self.deferred:
            reads.defer(numbers, callback if known is None else functools.partial(_same, known))
        return self.again(reads)

    def read(self, deferred: Sequence[tuple], more: Sequence[Tensor], keep: bool) -> list[float]:
        """Return the numbers that are asked for; keep: note what is deferred, for the replays."""
        if self._given is None:
            self._numbers.append(to_host(*(numbers for numbers, *_ in deferred), *more))
            return self._numbers[-1]
        answers = next(self._given, None)
        if answers is None:
            raise Impossible("two steps on the same batches read different numbers of the device")
        if keep:
            at = iter(answers)
            for numbers, callback, urgent in deferred:
                known = list(islice(at, len(numbers)))
                self.deferred.append((numbers, callback, known if urgent else None))
        return answers


class HostReads:
    """Numbers on the device and what to do with them; all of them are brought to the host at once.

    urgent: whether some are needed before the samples can be found. script: of a run that is to be replayed.
    """

    replayed = True  # whether replays go through what is deferred

    def __init__(self, script: Script | None = None) -> None:
        self._deferred: list[tuple[Tensor, Callable[[list[float]], object], bool]] = []
        self.urgent, self.script = False, script

    def defer(self, numbers: Tensor, callback: Callable[[list[float]], object], urgent: bool = False) -> None:
        """Call back with these numbers at the next `flush`."""
        self._deferred.append((numbers.detach().flatten(), callback, urgent))
        self.urgent = self.urgent or urgent

    def flush(self, *more: Tensor) -> list[float]:
        """Bring all numbers to the host and call back in the order of `defer`; a callback that raises ends it.

        Returns:
            The numbers of `more`.
        """
        deferred, self._deferred, self.urgent = self._deferred, [], False
        if not deferred and not more:
            return []
        if self.script is None:
            values = iter(to_host(*(numbers for numbers, *_ in deferred), *more))
        else:
            values = iter(self.script.read(deferred, more, self.replayed))
        for numbers, callback, _ in deferred:
            callback(list(islice(values, len(numbers))))
        return list(values)


def _same(known: list[float], numbers: list[float]) -> None:
    if numbers != known:
        raise Differs


def to_host(*numbers: Tensor) -> list[float]:
    """Bring all numbers of these tensors to the host, now."""
    if len(numbers) == 1:
        return numbers[0].flatten().tolist()
    device = numbers[0].device
    return torch.cat([t.flatten().to(device, torch.float64) for t in numbers]).tolist()


def length(t: Tensor) -> Tensor:
    """Return ‖t‖ in float64, ()."""
    return lengths([t])[0]


def lengths(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each, [len(tensors)] float64 on the device of the first."""
    device = tensors[0].device
    # One launch for hundreds of tensors. On a GPU float64 costs nothing, on the CPU little where they are small.
    if device.type == "cuda" or sum(t.numel() for t in tensors) < SMALL:
        norms = foreach_norms(tensors, torch.float64)
        spread = len({norm.device for norm in norms}) > 1
        return torch.stack([norm.to(device) for norm in norms] if spread else norms)
    return torch.tensor([_length(t) for t in tensors], dtype=torch.float64, device=device)


def _length(t: Tensor) -> float:
    dtype, flat = torch.promote_types(t.dtype, torch.float32), t.flatten()
    # Of 33 M elements at once float32 loses 2e-3: its few partial sums are too large for what is added.
    norms = [float(torch.linalg.vector_norm(part, dtype=dtype)) for part in flat.split(PIECE)]
    norm = math.sqrt(sum(x * x for x in norms))
    if not 1e-15 < norm < 1e15:  # squares may have left the range of float32
        norm = float(torch.linalg.vector_norm(t, dtype=torch.float64))
    return norm


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩ in float64, ()."""
    a, b = a.flatten(), b.flatten()
    if not a.is_cuda:
        dtype = torch.promote_types(a.dtype, torch.float32)
        pairs = zip(a.split(PIECE), b.split(PIECE), strict=True)
        product = sum(
            (torch.dot(x.to(dtype), y.to(dtype)).double() for x, y in pairs), a.new_zeros((), dtype=torch.float64)
        )
        if 1e-30 < abs(float(product)) < 1e30:
            return product
    parts = [torch.dot(x.double(), y.double()) for x, y in zip(a.split(1 << 24), b.split(1 << 24), strict=True)]
    return torch.stack(parts).sum()
