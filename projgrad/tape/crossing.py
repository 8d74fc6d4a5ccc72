"""Inner products between the samples of different processes: who computes which share of K, and what is sent for it.

Every use of a parameter has an owner among the processes. The others send it their factors of that use, or, where these
are larger, chunks of their per-sample gradients. It computes the share of all samples, and K is the sum of the shares.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..recording.sites import window_view
from ..rules.convolution import Convolution
from ..rules.parcels import in_line, pack, unpack
from ..rules.product import Grouped
from ..rules.rule import Rows, Rule
from .consumers import explicit
from .grouping import Use
from .processes import Processes, padded
from .shares import Description, Part, Share, by_part, describe, differs, itemsize_of, without

AT_ONCE = 16 << 20  # bytes of all processes that one owner computes with at a time


class Crossing:
    """K = G Gᵀ over the samples of all processes.

    counts: samples of every process. used: parameters that some process uses, in the order of `names`.
    """

    def __init__(
        self,
        processes: Processes,
        names: Sequence[str],
        parameters: Mapping[str, Tensor],
        uses: Sequence[Use],
        counts: Sequence[int],
    ) -> None:
        self.processes, self.counts, self.total = processes, counts, sum(counts)
        n = counts[processes.rank]
        pieces: dict[str, list[Use]] = defaultdict(list)
        for use in uses:
            pieces[use.name].append(use)
        described = {part: describe(rule) for part, rule in by_part(pieces).items()}
        every: list[dict[Part, Description]] = processes.gather_objects(described, "descriptions")
        odd = {name for name in names if differs(name, every)}
        self._rules: dict[Part, Callable[[], Rule]] = {}
        for (name, key), rule in by_part(pieces).items():
            if name not in odd:
                self._rules[name, key] = lambda rule=rule: rule
        for name in odd & pieces.keys():  # parts that are others on another process: the gradient in full

            def whole(name=name) -> Rule:
                some = [(use.source, use.rule) for use in pieces[name]]
                return Rows(explicit(parameters[name], some, n))

            self._rules[name, "whole"] = whole
        self._descriptions = [without(odd, of_rank, parameters) for of_rank in every]
        self.used = [name for name in names if any(name == part[0] for of_rank in every for part in of_rank)]
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        self._samples = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        self.own = slice(starts[processes.rank], starts[processes.rank] + n)
        self._latest: tuple[object, Rule] | None = None  # gradients in full, whose rows are sent one after the other

    def gram(
        self,
        places: Mapping[str, int],
        rates: Mapping[str, float],
        count: int,
        float64: bool,
        diagonal: Callable[[str], Tensor | float] | None = None,
    ) -> Tensor:
        """Return this process's shares of K [count, n, n], those of a parameter at its place, times its rate.

        diagonal: D of a parameter, whole, or a number, for G D Gᵀ without rates. All processes call it alike, in the
        order of names.
        """
        K = torch.zeros(count, self.total, self.total, dtype=torch.float64, device=self.processes.device)
        if diagonal is not None:
            diagonal = functools.lru_cache(1)(diagonal)  # rows of one parameter may come in many rounds
        for shares in self._rounds(places, float64):
            sizes, owned = self._sizes(shares, float64), []
            came = self.processes.exchange(sizes, lambda outs, s=shares: self._fill(outs, s, float64), "K")
            with self.processes.attempt():
                owned = self._joined(shares, came, float64)
            if diagonal is not None:
                self._add_weighted(K, places, diagonal, shares, owned, float64)
                continue
            with self.processes.attempt():
                self._add(K, places, rates, owned, float64)
        self._latest = None
        return K

    def _rounds(self, places: Mapping[str, int], float64: bool) -> Iterator[list[Share]]:
        """Yield shares that are exchanged together; owners have about as much to do as each other."""
        load, held, shares = [0] * self.processes.size, [0] * self.processes.size, []
        parts = dict.fromkeys(part for of_rank in self._descriptions for part in of_rank if part[0] in places)
        for part in sorted(parts, key=lambda part: (part[0], str(part[1]))):
            sizes = self._bytes(part, float64)
            ranks = tuple(rank for rank, size in enumerate(sizes) if size is not None)
            for rows, fraction in self._pieces(part, float64):
                own = [fraction * (sizes[rank] or 0) for rank in range(len(load))]
                owner = min(range(len(load)), key=lambda rank: load[rank] + sum(own) - own[rank])
                load[owner] += sum(own)
                if shares and held[owner] + sum(own) > AT_ONCE:
                    yield shares
                    held, shares = [0] * len(load), []
                held[owner] += sum(own)
                shares.append(Share(part, ranks, owner, rows))
        if shares:
            yield shares

    def _of_ranks(self, part: Part) -> list[Description | None]:
        return [of_rank.get(part) for of_rank in self._descriptions]

    def _factored(self, part: Part, float64: bool) -> bool:
        """Return whether factors are sent: they can be joined, and are no larger than the gradients."""
        ones = [(d, n) for d, n in zip(self._of_ranks(part), self.counts, strict=True) if d is not None]
        first = ones[0][0]
        if any(d.kind is None or d.kind != first.kind for d, _ in ones):
            return False
        return sum(sum(d.sizes) for d, _ in ones) <= sum(n * d.rows * d.cols * itemsize_of(d, float64) for d, n in ones)

    def _bytes(self, part: Part, float64: bool) -> list[int | None]:
        """Return what every process has of a part, in bytes as they are sent; None: it does not use it."""
        ones, factored = self._of_ranks(part), self._factored(part, float64)
        return [
            None if d is None else sum(d.sizes) if factored else n * d.rows * d.cols * itemsize_of(d, float64)
            for d, n in zip(ones, self.counts, strict=True)
        ]

    def _pieces(self, part: Part, float64: bool) -> list[tuple[slice | None, float]]:
        """Return the rows of a parameter that make one share each, with their fraction of it; None: its factors."""
        if self._factored(part, float64):
            return [(None, 1.0)]
        total, rows = sum(filter(None, self._bytes(part, float64))), self._one(part).rows
        count = min(max(1, rows), max(1, -(-total // AT_ONCE)))
        step = max(1, -(-rows // count))
        return [(slice(k, min(rows, k + step)), min(step, rows - k) / rows) for k in range(0, rows, step)]

    def _one(self, part: Part) -> Description:
        return next(d for d in self._of_ranks(part) if d is not None)

    def _shapes(self, share: Share, rank: int, float64: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shapes and types of what a process sends for a share."""
        d = self._descriptions[rank][share.part]
        if share.rows is None:
            return list(zip(d.shapes, d.dtypes, strict=True))
        dtype = torch.float64 if itemsize_of(d, float64) == 8 else torch.float32
        return [((self.counts[rank], share.rows.stop - share.rows.start, d.cols), dtype)]

    def _size(self, share: Share, rank: int, float64: bool) -> int:
        return sum(padded(math.prod(s) * dtype.itemsize) for s, dtype in self._shapes(share, rank, float64))

    def _sizes(self, shares: Sequence[Share], float64: bool) -> list[list[int]]:
        """Return the bytes that every process sends to every other; an owner keeps what it has."""
        sizes = [[0] * self.processes.size for _ in range(self.processes.size)]
        for share in shares:
            for rank in share.ranks:
                if rank != share.owner:
                    sizes[rank][share.owner] += self._size(share, rank, float64)
        return sizes

    def _tensors(self, share: Share, float64: bool) -> list[Tensor]:
        """Return what this process has for a share."""
        if self._latest is not None and self._latest[0] == share.part:
            rule = self._latest[1]
        else:
            rule = self._rules[share.part]()
            if share.rows is not None and isinstance(rule, (Convolution, Grouped)):  # which make all rows anyway
                rule = Rows(rule.chunk(slice(0, rule.rows), float64))
            self._latest = share.part, rule
        tensors = pack(rule).tensors if share.rows is None else [rule.chunk(share.rows, float64)]
        shapes = self._shapes(share, self.processes.rank, float64)
        return [t.to(dtype) for t, (_, dtype) in zip(tensors, shapes, strict=True)]

    def _fill(self, outs: list[Tensor], shares: Sequence[Share], float64: bool) -> None:
        rank, at = self.processes.rank, [0] * len(outs)
        for share in shares:
            if rank not in share.ranks or rank == share.owner:
                continue
            for t in self._tensors(share, float64):
                buffer = outs[share.owner][at[share.owner] :][: t.nbytes]
                if t.numel():
                    buffer.view(t.dtype).copy_(t.flatten())
                at[share.owner] += padded(t.nbytes)

    def _joined(self, shares: Sequence[Share], came: Sequence[Tensor], float64: bool) -> list[tuple[Share, Rule]]:
        """Return the shares that this process owns, with one rule for the samples of all processes."""
        at, owned = [0] * len(came), []
        for share in shares:
            if share.owner != self.processes.rank:
                continue
            columns: list[list[Tensor]] = []
            for rank in share.ranks:
                if rank == self.processes.rank:
                    columns.append(self._tensors(share, float64))
                    continue
                tensors = []
                for shape, dtype in self._shapes(share, rank, float64):
                    size = math.prod(shape) * dtype.itemsize
                    flat = came[rank][at[rank] :][:size]
                    tensors.append(flat.view(dtype).view(shape) if size else flat.new_empty(shape, dtype=dtype))
                    at[rank] += padded(size)
                columns.append(tensors)
            d = self._one(share.part)
            fills = d.fills if share.rows is None else (None,)
            joint = [in_line(some, fill) for some, fill in zip(zip(*columns, strict=True), fills, strict=True)]
            owned.append((share, Rows(joint[0]) if share.rows is not None else unpack(d.kind, joint)))
        return owned

    def _add(
        self,
        K: Tensor,
        places: Mapping[str, int],
        rates: Mapping[str, float],
        owned: Sequence[tuple[Share, Rule]],
        float64: bool,
    ) -> None:
        """Add the shares that this process owns to K."""
        groups = defaultdict(list)
        for share, rule in owned:
            key = rule.group_key if rule.group_key is not None else id(share)
            groups[key, share.ranks].append((share, rule))
        for some in groups.values():
            rules = [rule for _, rule in some]
            wide = float64 or rules[0].cheap  # where that costs nothing to speak of
            if len(rules) == 1:
                shares_of_K = rules[0].gram(None, wide)[0][None]
            else:
                shares_of_K = type(rules[0]).gram_of_group(rules, [None] * len(rules), wide)[0]
            for (share, _), one in zip(some, shares_of_K, strict=True):
                name = share.part[0]
                self._accumulate(K[places[name]], share, rates.get(name, 1.0) * one)

    def _add_weighted(
        self,
        K: Tensor,
        places: Mapping[str, int],
        diagonal: Callable[[str], Tensor | float],
        shares: Sequence[Share],
        owned: Sequence[tuple[Share, Rule]],
        float64: bool,
    ) -> None:
        """Do the same for G D Gᵀ, with the diagonals of all shares; an error is put off."""
        for name in dict.fromkeys(share.part[0] for share in shares):
            D = diagonal(name)
            with self.processes.attempt():
                for share, rule in owned:
                    if share.part[0] == name:
                        self._accumulate(K[places[name]], share, _weighted_gram(rule, share, D, float64))

    def _accumulate(self, K: Tensor, share: Share, one: Tensor) -> None:
        """Add what a share makes of the samples of its processes to K [n, n]."""
        samples = torch.tensor([j for rank in share.ranks for j in self._samples[rank]], device=K.device)
        K[samples[:, None], samples] += one


def _weighted_gram(rule: Rule, share: Share, D: Tensor | float, float64: bool) -> Tensor:
    """Return G D Gᵀ of one share; D: of the whole parameter, or a number."""
    wide = float64 or rule.cheap
    if not isinstance(D, Tensor) or not D.ndim:
        return D * rule.gram(None, wide)[0]
    d = D.contiguous() if share.part[1] == "whole" else window_view(D.contiguous()[None], share.part[1])[0]
    d = d.reshape(rule.shape) if share.rows is None else d.reshape(-1, rule.cols)[share.rows]
    return rule.weighted_gram(d, d.new_zeros(()).expand_as(d), wide)[0]
