"""Where the samples are in a tensor, found from the gradients themselves."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = {2: 8, 4: 32, 8: 32}  # different weights at once, by the bytes of a number: float16 has no room for more


class Layout(NamedTuple):
    """The samples of a tensor lie along `axis`: as its outer index (sample j is a block), or as its `inner` one (every
    n-th entry), or anywhere: `rows` [n, k] says which entries of axis 0 belong to sample j (-1: none)."""

    axis: int = 0
    inner: bool = False
    rows: Tensor | None = None

    def split(self, x: Tensor, n: int, ndim: int | None = None) -> Tensor:
        """x [..., n k, ...] -> [n, ..., k, ...] with k where the axis was (k = 1 stays). `ndim`: dimensions of the
        tensor that the layout is about, when x is only broadcast against it."""
        axis = self.axis if ndim is None else self.axis - ndim + x.ndim
        if self.rows is not None:
            padded = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
            return padded[self.rows]  # -1 is the row of zeros
        k = x.shape[axis] // n
        if self.inner:
            return x.unflatten(axis, (k, n)).movedim(axis + 1, 0)
        return x.unflatten(axis, (n, k)).movedim(axis, 0)


def candidates(shape: torch.Size, axes, n: int) -> list[Layout]:
    """Every way in which n samples can lie along one of the axes, the usual ones first."""
    exact = [Layout(axis) for axis in axes if shape[axis] == n]
    split = [axis for axis in axes if shape[axis] % n == 0 and shape[axis] > n]
    return exact + [Layout(axis, inner) for inner in (False, True) for axis in split]


def norms(b: Tensor, layout: Layout, n: int) -> Tensor:
    """Length of the gradient in each sample's block [n]."""
    return torch.linalg.vector_norm(layout.split(b, n).flatten(1), dim=1, dtype=torch.float64)


def codes(n: int, like: Tensor) -> list[Tensor]:
    """Weights [n] for one backward pass after the other, powers of two; no two samples get the same in all of them.

    Scaling by a power of two does not round, so what belongs to a sample is scaled by exactly its weight.
    """
    levels = LEVELS[like.element_size()]
    j, passes = torch.arange(n, device=like.device), []
    while not passes or n > 1:
        passes.append((2.0 ** (j % levels - levels // 2)).to(like.dtype))
        j, n = j // levels, -(-n // levels)
    return passes


class Tolerance(NamedTuple):
    relative: float
    absolute: float


def explains(before: Tensor, after: Sequence[Tensor], weights: list[Tensor], tolerance: Tolerance) -> bool:
    """Whether each sample's block [n] grew by the sample's own weight, every time."""
    for grown, w in zip(after, weights, strict=True):
        expected = before * w.double()
        if not ((grown - expected).abs() <= tolerance.relative * expected + tolerance.absolute).all():
            return False
    return True


def owners(before: Tensor, after: Sequence[Tensor], weights: list[Tensor], tolerance: Tolerance) -> Tensor | None:
    """The sample of every row of axis 0 [rows] (-1: none, its gradient is zero); None where a row mixes samples."""
    n, nonzero = len(weights[0]), before > tolerance.absolute
    fits = nonzero.new_ones((len(before), n))
    for grown, w in zip(after, weights, strict=True):
        expected = before[:, None] * w.double()
        fits &= (grown[:, None] - expected).abs() <= tolerance.relative * expected
    if (nonzero & ~fits.any(1)).any():
        return None
    return fits.int().argmax(1).where(nonzero, -1)


def gather(owner: Tensor, n: int) -> Layout:
    """The layout in which row r belongs to sample owner[r]."""
    order = owner.argsort(stable=True)
    counts = torch.zeros(n + 1, dtype=torch.int64, device=owner.device)  # of nobody's rows, and of every sample's
    counts.index_add_(0, owner + 1, torch.ones_like(owner))
    nobody, longest = torch.stack([counts[0], counts[1:].max()]).tolist()
    order, starts = order[nobody:], counts[1:].cumsum(0) - counts[1:]
    rows = owner.new_full((n, longest), -1)
    place = torch.arange(len(order), device=owner.device) - starts[owner[order]]
    rows[owner[order], place] = order
    return Layout(rows=rows)
