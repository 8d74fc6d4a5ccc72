"""Where the samples are in a tensor, found from the gradients themselves."""

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 4  # samples are told apart by weights 1, 2, 4, 8: powers of two scale gradients without rounding


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

    def fits(self, shape: torch.Size, n: int) -> bool:
        return self.rows is None and self.axis < len(shape) and shape[self.axis] % n == 0 and shape[self.axis] > 0


def candidates(shape: torch.Size, axes, n: int) -> list[Layout]:
    """Every way in which n samples can lie along one of the axes, the usual ones first."""
    exact = [Layout(axis) for axis in axes if shape[axis] == n]
    split = [axis for axis in axes if shape[axis] % n == 0 and shape[axis] > n]
    return exact + [Layout(axis, inner) for inner in (False, True) for axis in split]


def norms(b: Tensor, layout: Layout, n: int) -> Tensor:
    """Length of the gradient in each sample's block [n]."""
    return torch.linalg.vector_norm(
        layout.split(b, n).flatten(1), dim=1, dtype=torch.promote_types(b.dtype, torch.float32)
    )


def weights(n: int, digit: int, like: Tensor) -> Tensor:
    """Powers of two that differ between samples [n]; `digit` < 0: scattered, else the base-4 digits of j."""
    j = torch.arange(n, device=like.device)
    level = j * 0x9E3779B1 >> 13 if digit < 0 else j // LEVELS**digit
    level = level % LEVELS
    if digit < 0 and n <= LEVELS:
        level = j
    return (2.0**level).to(like.dtype)


def explains(before: Tensor, after: Tensor, weights: Tensor) -> bool:
    """Whether each sample's block grew by the sample's own weight, exactly up to rounding."""
    expected = before * weights.to(before.dtype)
    return bool(((after - expected).abs() <= 1e-2 * expected + 1e-30).all())


def owners(before: Tensor, after: list[Tensor], n: int) -> Tensor | None:
    """The sample of every row of axis 0 [rows] (-1: none, its gradient is zero); None where a row mixes samples."""
    nonzero = before > 0
    owner = torch.zeros_like(before, dtype=torch.int64)
    for digit, grown in enumerate(after):
        ratio = torch.where(nonzero, grown / before.where(nonzero, 1), 1)
        level = ratio.clamp_min(1e-9).log2().round()
        if ((ratio - 2**level).abs() > 1e-2 * 2**level).any() or (level < 0).any() or (level >= LEVELS).any():
            return None
        owner += level.long() * LEVELS**digit
    if (owner >= n).any():
        return None
    return owner.where(nonzero, -1)


def gather(owner: Tensor, n: int) -> Layout:
    """The layout in which row r belongs to sample owner[r]."""
    order = owner.argsort(stable=True)
    order = order[(owner < 0).sum() :]
    counts = torch.bincount(owner[order], minlength=n)
    starts = counts.cumsum(0) - counts
    rows = owner.new_full((n, int(counts.max()) if n else 0), -1)
    place = torch.arange(len(order), device=owner.device) - starts[owner[order]]
    rows[owner[order], place] = order
    return Layout(rows=rows)
