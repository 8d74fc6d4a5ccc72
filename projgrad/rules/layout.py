"""Where the samples are in a tensor, found from the gradients themselves."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The samples of a tensor lie along `axis`: as its outer index (sample j is a block), or as its `inner` one (every
    n-th entry), or anywhere: `rows` [n, k] says which entries of the leading dimensions, of sizes `lead` and counted
    through, belong to sample j (-1: none)."""

    axis: int = 0
    inner: bool = False
    rows: Tensor | None = None
    lead: tuple[int, ...] = ()

    @property
    def axes(self) -> range:
        """Return the dimensions along which the samples lie."""
        return range(self.axis, self.axis + max(1, len(self.lead)))

    def split(self, x: Tensor, n: int, ndim: int | None = None, fill: float | None = 0) -> Tensor:
        """Return x [..., n k, ...] as [n, ..., k, ...], with k where the axis was (k = 1 stays).

        ndim: dimensions of the tensor that the layout is about, when x is only broadcast against it.
        fill: what stands where a sample has fewer rows than others, None for one of its own rows again.
        """
        if ndim is None and self == FIRST:
            return x.view(n, x.shape[0] // n, *x.shape[1:])
        axis = self.axis if ndim is None else self.axis - ndim + x.ndim
        if self.rows is not None:
            if ndim is not None:
                x = x.view(*[1] * (ndim - x.ndim), *x.shape).expand(*self.lead, *[-1] * (ndim - len(self.lead)))
            x = x.flatten(0, len(self.lead) - 1)
            rows = self.rows
            if fill is None:
                rows = rows.where(rows >= 0, rows[:, :1].clamp_min(0))
            else:
                x = torch.cat([x, x.new_full((1, *x.shape[1:]), fill)])  # row -1
            taken = x[rows]
            return taken.view(*taken.shape[:2], *[1] * (len(self.lead) - 1), *x.shape[1:])
        k = x.shape[axis] // n
        if self.inner:
            return x.unflatten(axis, (k, n)).movedim(axis + 1, 0)
        return x.unflatten(axis, (n, k)).movedim(axis, 0)

    def positions(self, x: Tensor, n: int) -> Tensor:
        """Return x [..., n k, ..., i] as [n, t, i], with all positions of a sample along one dimension."""
        if self == FIRST:
            if x.ndim == 3 and x.shape[0] == n:
                return x
            return x.reshape(n, math.prod(x.shape[:-1]) // n, x.shape[-1])
        return self.split(x, n).flatten(1, -2)

    def reaches(self, x: Tensor, b: Tensor) -> bool:
        """Return whether x, which is broadcast against b, lies along the samples itself."""
        return any(-x.ndim <= a - b.ndim and x.shape[a - b.ndim] == b.shape[a] for a in self.axes)

    def owner(self, size: int, n: int, device: torch.device) -> Tensor:
        """Return the sample of every entry along `axis` [size], or of every row; -1: none."""
        if self.rows is not None:
            owner = torch.full((size + 1,), -1, device=device)
            owner[self.rows] = torch.arange(n, device=device)[:, None]
            return owner[:-1]
        i = torch.arange(size, device=device)
        return i % n if self.inner else i // (size // n)


FIRST = Layout()  # sample after sample along dimension 0


def candidates(shape: torch.Size, axes, n: int) -> list[Layout]:
    """Return every way in which n samples can lie along one of the axes, the usual ones first."""
    exact = [Layout(axis) for axis in axes if shape[axis] == n]
    split = [axis for axis in axes if shape[axis] % n == 0 and shape[axis] > n]
    return exact + [Layout(axis, inner) for inner in (False, True) for axis in split]


def gather(owner: Tensor, n: int, lead: tuple[int, ...] = ()) -> Layout:
    """Return the layout in which row r of the leading dimensions, counted through, belongs to sample owner[r]."""
    order = owner.argsort(stable=True)
    counts = torch.zeros(n + 1, dtype=torch.int64, device=owner.device)  # of nobody's rows, and of every sample's
    counts.index_add_(0, owner + 1, torch.ones_like(owner))
    nobody, longest = torch.stack([counts[0], counts[1:].max()]).tolist()
    order, starts = order[nobody:], counts[1:].cumsum(0) - counts[1:]
    rows = owner.new_full((n, longest), -1)
    place = torch.arange(len(order), device=owner.device) - starts[owner[order]]
    rows[owner[order], place] = order
    return Layout(rows=rows, lead=lead or (len(owner),))
