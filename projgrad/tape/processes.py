"""What the processes of a group tell one another, and how all of them stop where one fails."""

from __future__ import annotations

import hashlib
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_private import all_gather_single, reduce_scatter_single, timeout_of

BUCKET = 25 << 20  # bytes that are reduced at once, as DistributedDataParallel does
FEW = 2  # numbers that go with every agreement
ALIGNED = 16  # bytes: every tensor in a buffer of bytes begins at a multiple of it
ERRORS = (FloatingPointError, ArithmeticError, ValueError, TypeError, RuntimeError)  # raised as they are elsewhere

# Groups of the same processes in which they agree, on the host. One that failed may be here while others exchange
# gradients there: in one group the two would meet, and gloo ends a process whose sizes differ.
_agreeing: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


class Processes:
    """The processes that take a step together.

    Before they exchange anything they `agree` that all have come so far. A process that fails says so at that point
    instead, and all others raise too. One that says nothing makes them raise when the group's timeout is over.

    device: where tensors lie that are exchanged. rank, size: of this process, and how many there are.
    sent: bytes that this process sent to others, by purpose, as rings send them: an all-reduce of s bytes counts
        2 s (size - 1) / size.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()
        self._failed: Exception | None = None  # kept until the next agreement
        self._told: Exception | None = None  # the others know of it, or cannot be told
        if group not in _agreeing:
            ranks, timeout = dist.get_process_group_ranks(group), timeout_of(group, device)
            with self._exchanging():
                _agreeing[group] = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
        self._agreeing = _agreeing[group]

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Put off an error until the next `agree`: the others count on this process to exchange something before."""
        try:
            yield
        except Exception as error:
            if self.told(error):
                raise
            self._failed = self._failed or error

    def told(self, error: Exception) -> bool:
        """Return whether the other processes know of an error: it passes through as it is, up to `together`."""
        return error is self._told

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell the others of an error in the context, at the point where they will agree on something next."""
        self._failed = self._told = None
        try:
            yield
        except Exception as error:
            if not self.told(error):
                self._failed = error
                self.agree()
            raise

    def agree(self, *numbers: int) -> list[list[int]]:
        """Return what every process gives here, by rank; raise if one of them failed."""
        # One that failed elsewhere does not know how many numbers are expected: a few always are, and more go after.
        few = numbers if len(numbers) <= FEW else ()
        every = self._gather(self._failed is not None, *few, *[0] * (FEW - len(few)))
        failed = [rank for rank, (flag, *_) in enumerate(every) if flag]
        if failed:
            self._raise(failed)
        return self._gather(*numbers) if len(numbers) > FEW else [theirs[: len(numbers)] for _, *theirs in every]

    def _gather(self, *mine: int) -> list[list[int]]:
        numbers = torch.tensor(mine, dtype=torch.int64)
        every = numbers.new_empty((self.size, len(mine)))
        with self._exchanging():
            dist.all_gather(list(every.unbind()), numbers, group=self._agreeing)
            self.sent["agreements"] += numbers.nbytes * (self.size - 1)
            return every.tolist()

    def _raise(self, failed: Sequence[int]) -> None:
        """Raise this process's own error, or that of the first other one that failed."""
        error, self._failed = self._failed, None
        own = None if error is None else _named(error)
        with self._exchanging():
            told: list[Any] = [None] * self.size
            dist.all_gather_object(told, own, group=self._agreeing)
        kinds = {told[rank][0] for rank in failed}
        # A step with NaN may be skipped, but only by all.
        worst = next((rank for rank in failed if told[rank][0] != "FloatingPointError"), failed[0])
        if error is None or (own[0] == "FloatingPointError" and kinds != {"FloatingPointError"}):
            kind, words = told[worst]
            raised = next(e for e in ERRORS if e.__name__ == kind)(f"process {worst} failed, so all stop: {words}")
            raised.__cause__ = error
            error = raised
        self._told = error
        raise error

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Raise RuntimeError where the others do not answer."""
        try:
            yield
        except Exception as error:
            self._told = RuntimeError(
                "the other processes did not answer: one of them has ended, or did not come to the same point of the "
                f"step before the timeout of the process group ({error})"
            )
            raise self._told from error

    def same(self, what: str, value: object) -> None:
        """Check that all processes have the same value; raises ValueError."""
        digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
        every = [theirs for (theirs,) in self.agree(digest)]
        differing = [rank for rank, theirs in enumerate(every) if theirs != every[0]]
        if differing:
            raise ValueError(f"processes 0 and {differing[0]} disagree on {what}: they must be built alike")

    def gather_objects(self, mine: object, purpose: str) -> list[Any]:
        """Return what every process gives, by rank: small things of Python."""
        every: list[Any] = [None] * self.size
        with self._exchanging():
            dist.all_gather_object(every, mine, group=self._agreeing)
        self.sent[purpose] += len(pickle.dumps(mine)) * (self.size - 1)
        return every

    def sum_(self, t: Tensor, purpose: str) -> Tensor:
        """Replace a contiguous tensor by the sum of those of all processes, the same bits everywhere."""
        with self._exchanging():
            dist.all_reduce(t, group=self.group)
        self.sent[purpose] += 2 * t.nbytes * (self.size - 1) // self.size
        return t

    def sum_all_(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Do the same with many, those of one type together in buckets."""
        buckets: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            bucket = buckets.setdefault(t.dtype, [])
            if bucket and sum(x.nbytes for x in bucket) + t.nbytes > BUCKET:
                self._sum_bucket_(bucket, purpose)
                bucket.clear()
            bucket.append(t)
        for bucket in buckets.values():
            self._sum_bucket_(bucket, purpose)

    def _sum_bucket_(self, bucket: Sequence[Tensor], purpose: str) -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            self.sum_(bucket[0], purpose)
            return
        flat = self.sum_(torch.cat([t.flatten() for t in bucket]), purpose)
        for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(part.view(t.shape))

    def gather(self, t: Tensor, purpose: str) -> Tensor:
        """Return the tensors (m,) of all processes, [size, m]."""
        every = t.new_empty(self.size * len(t))
        with self._exchanging():
            all_gather_single(every, t, group=self.group)
        self.sent[purpose] += t.nbytes * (self.size - 1)
        return every.view(self.size, -1)

    def scatter_sum(self, t: Tensor, purpose: str) -> Tensor:
        """Return this process's row of the sum of the tensors [size, m] of all processes."""
        mine = t.new_empty(t.shape[1])
        with self._exchanging():
            reduce_scatter_single(mine, t.flatten(), group=self.group)
        self.sent[purpose] += mine.nbytes * (self.size - 1)
        return mine

    def largest_(self, t: Tensor) -> Tensor:
        """Replace a contiguous tensor by the largest of those of all processes, element by element."""
        with self._exchanging():
            dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)
        self.sent["agreements"] += 2 * t.nbytes * (self.size - 1) // self.size
        return t

    def of_first(self, *tensors: Tensor) -> list[Tensor]:
        """Return what process 0 has of float64 tensors: what all decide by must be the same number everywhere."""
        flat = torch.cat([t.flatten() for t in tensors])
        with self._exchanging():
            dist.broadcast(flat, group=self.group, group_src=0)
        self.sent["agreements"] += flat.nbytes * (self.rank < self.size - 1)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def exchange(
        self, sizes: Sequence[Sequence[int]], fill: Callable[[list[Tensor]], None], purpose: str
    ) -> list[Tensor]:
        """Send bytes to every process and return those that came, by rank.

        sizes: of what process r sends to process s, in bytes, at [r][s]. fill: writes what this process sends into a
        buffer for every receiver; an error in it is put off until the next `agree`.
        """
        leaving, coming = sizes[self.rank], [of_rank[self.rank] for of_rank in sizes]
        out = torch.zeros(sum(leaving), dtype=torch.uint8, device=self.device)
        with self.attempt():
            fill(list(out.split(list(leaving))))
        into = out.new_empty(sum(coming))
        with self._exchanging():
            dist.all_to_all_single(into, out, list(coming), list(leaving), group=self.group)
        self.sent[purpose] += sum(leaving) - leaving[self.rank]
        return list(into.split(list(coming)))


class Alone:
    """One process, in the place of several: nothing is exchanged."""

    attempt = staticmethod(nullcontext)

    def agree(self) -> None:
        """Go on."""

    def sum_(self, t: Tensor, purpose: str) -> Tensor:
        return t

    def largest_(self, t: Tensor) -> Tensor:
        return t

    def sum_all_(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Leave them as they are."""


def _named(error: Exception) -> tuple[str, str]:
    """Return as what an error is raised elsewhere, and its words."""
    kind = next((kind.__name__ for kind in ERRORS if isinstance(error, kind)), None)
    return (kind, str(error)) if kind else ("RuntimeError", f"{type(error).__name__}: {error}")


def padded(size: int) -> int:
    """Return how many bytes of a buffer a tensor of this size takes."""
    return -(-size // ALIGNED) * ALIGNED
