"""Where the samples are in a tensor, found from the gradients themselves."""

import math
from collections.abc import Sequence
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
        """The dimensions along which the samples lie."""
        return range(self.axis, self.axis + max(1, len(self.lead)))

    def split(self, x: Tensor, n: int, ndim: int | None = None, fill: float | None = 0) -> Tensor:
        """x [..., n k, ...] -> [n, ..., k, ...] with k where the axis was (k = 1 stays). `ndim`: dimensions of the
        tensor that the layout is about, when x is only broadcast against it; `fill`: what stands where a sample has
        fewer rows than others, None for one of its own rows again."""
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

    def reaches(self, x: Tensor, b: Tensor) -> bool:
        """Whether x, which is broadcast against b, lies along the samples itself."""
        return any(-x.ndim <= a - b.ndim and x.shape[a - b.ndim] == b.shape[a] for a in self.axes)

    def owner(self, size: int, n: int, device: torch.device) -> Tensor:
        """The sample of every entry along `axis` [size], -1: none; for rows that of every row."""
        if self.rows is not None:
            owner = torch.full((size + 1,), -1, device=device)
            owner[self.rows] = torch.arange(n, device=device)[:, None]
            return owner[:-1]
        i = torch.arange(size, device=device)
        return i % n if self.inner else i // (size // n)


def candidates(shape: torch.Size, axes, n: int) -> list[Layout]:
    """Every way in which n samples can lie along one of the axes, the usual ones first."""
    exact = [Layout(axis) for axis in axes if shape[axis] == n]
    split = [axis for axis in axes if shape[axis] % n == 0 and shape[axis] > n]
    return exact + [Layout(axis, inner) for inner in (False, True) for axis in split]


def gather(owner: Tensor, n: int, lead: tuple[int, ...] = ()) -> Layout:
    """The layout in which row r, of the leading dimensions counted through, belongs to sample owner[r]."""
    order = owner.argsort(stable=True)
    counts = torch.zeros(n + 1, dtype=torch.int64, device=owner.device)  # of nobody's rows, and of every sample's
    counts.index_add_(0, owner + 1, torch.ones_like(owner))
    nobody, longest = torch.stack([counts[0], counts[1:].max()]).tolist()
    order, starts = order[nobody:], counts[1:].cumsum(0) - counts[1:]
    rows = owner.new_full((n, longest), -1)
    place = torch.arange(len(order), device=owner.device) - starts[owner[order]]
    rows[owner[order], place] = order
    return Layout(rows=rows, lead=lead or (len(owner),))


class Codes:
    """Weights of the samples for a few backward passes, by which the gradient says whose it is.

    From the first pass to every other one the weight of sample j grows by a power of two, negative for half of the
    samples: that does not round, so what belongs to one sample alone grows by exactly its factor. No two samples have
    the same factors. The weights of the first pass are random: a mixture of samples grows by a power of two, or
    vanishes in all passes, for next to none of them. Equal ones would not do: ℓ_j - mean ℓ vanishes.

    base: weights of the first pass [n]. factors: by which they grow in the others, [n] each.
    """

    def __init__(self, n: int, like: Tensor, coarsest: torch.dtype) -> None:
        j = torch.arange(n, device=like.device)
        limit = 3 if coarsest == torch.float16 else 48  # no weight above 1, none far below: it has no more range
        passes = next(k for k in range(1, n + 2) if (2 * limit) ** k >= n)
        self.powers = next(e for e in range(1, limit + 1) if (2 * e) ** passes >= n)
        self.n, self.lowest = n, -(self.powers // 2)
        random = torch.rand((2, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        base = (random[0] < 0.5).to(torch.float64).mul(2).sub(1) * (random[1] + 3) / 8  # ± 3/8 to 1/2
        self.base = base.to(like.device, like.dtype)
        self.digits = [j // (2 * self.powers) ** k % (2 * self.powers) for k in range(passes)]
        self.factors = [self._factor(d).to(like.dtype) for d in self.digits]

    def _factor(self, digit: Tensor) -> Tensor:
        return (1 - 2 * (digit & 1)) * 2.0 ** ((digit >> 1) + self.lowest)

    @property
    def weights(self) -> list[Tensor]:
        """[n] for every pass."""
        return [self.base, *(self.base * f for f in self.factors)]

    def owners(self, passes: Sequence[Tensor], tolerance: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Whose every entry is [r] (-1: nobody's, its gradient is zero), and whether it is a mixture [r], from its
        signature [r, q] in every pass.

        tolerance: by how much an entry may miss its factor, relative. noise: by how much at any rate, but for 0.3 of
        it: the next factor is twice as large, half as large or negative.
        """
        before = passes[0].double()
        size = before.norm(dim=1)
        zero = size <= torch.finfo(passes[0].dtype).tiny / torch.finfo(passes[0].dtype).eps
        size = size.where(~zero, 1)
        owner, mixed = torch.zeros_like(zero, dtype=torch.int64), torch.zeros_like(zero)
        for k, after in enumerate(passes[1:]):
            after = after.double()
            grown = (before / size[:, None] * (after / size[:, None])).sum(1)  # in this order nothing overflows
            power = grown.abs().clamp_min(1e-300).log2().round() - self.lowest
            digit = 2 * power.clamp(0, self.powers - 1).long() + (grown < 0)
            factor = self._factor(digit)
            off = (after - factor[:, None] * before).norm(dim=1) / factor.abs()
            allowed = (tolerance * size).maximum((0.3 * size).minimum(noise))
            appeared = after.norm(dim=1) > 2.0 ** (self.powers // 2 + 4) * noise
            mixed |= torch.where(zero, appeared, ~(off <= allowed))
            owner += digit * (2 * self.powers) ** k
        mixed |= ~zero & (owner >= self.n)
        return owner.where(~zero & ~mixed, -1), mixed


class Signatures:
    """What of a gradient is compared between passes: a few random projections, the same in every pass.

    They are linear: what mixes samples shows to first order, and cannot cancel.
    """

    def __init__(self) -> None:
        self.directions: dict[tuple, Tensor] = {}

    def of(self, b: Tensor, axes: Sequence[int]) -> Tensor:
        """[indices along `axes`, q] for b [*shape]."""
        rest = [d for d in range(b.ndim) if d not in axes]
        sizes = [math.prod(b.shape[d] for d in some) for some in (axes, rest)]
        rows = b.permute(*axes, *rest).reshape(sizes)
        # Scaling by powers of two commutes with the rounding of bfloat16; float16 has not the range for sums.
        rows = rows.float() if rows.dtype.itemsize == 2 else rows
        size, count = rows.shape[1], 4
        if size <= count:
            return rows
        key = size, rows.dtype, rows.device
        if key not in self.directions:
            z = torch.randn((size, count), generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
            self.directions[key] = z.to(b.device)
        return rows @ self.directions[key]
