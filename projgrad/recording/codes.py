"""Whose every entry of a gradient is, told from a few backward passes whose losses are weighted by sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.linear_cuda import product
from ..rules.layout import Layout
from .sites import Site

PIECE = 1 << 20  # entries of a gradient that are looked at together, or a 64th of all


class Owners(NamedTuple):
    """Whose every entry of a gradient is.

    owner: sample of every entry [r], -1: nobody's. mixed: whether it is a mixture [r]. size: its length [r].
    faint: entries below this share of the largest one of their sample may be anybody's.
    """

    owner: Tensor
    mixed: Tensor
    size: Tensor
    faint: float = 0.0


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
        """Return the weights [n] of every pass."""
        return [self.base, *(self.base * f for f in self.factors)]

    def owners(self, passes: Sequence[Tensor], tolerance: float, noise: Tensor) -> Owners:
        """Return whose every entry is; nobody's is one whose gradient is zero.

        passes: signatures [r, q], one for every pass.
        tolerance: by how much an entry may miss its factor, relative. noise: by how much at any rate, but for 0.3 of
        it: the next factor is twice as large, half as large or negative.
        """
        before = passes[0].double()
        size = before.norm(dim=1)
        zero = size <= torch.finfo(passes[0].dtype).tiny / torch.finfo(passes[0].dtype).eps
        length, size = size, size.where(~zero, 1)
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
        return Owners(owner.where(~zero & ~mixed, -1), mixed, length)


class Signatures:
    """What of a gradient is compared between passes: a few random projections, the same in every pass.

    They are linear: what mixes samples shows to first order, and cannot cancel.
    """

    def __init__(self) -> None:
        self.directions: dict[tuple, Tensor] = {}

    def of(self, b: Tensor, axes: Sequence[int]) -> Tensor:
        """Return the signature [indices along `axes`, q] of b [*shape].

        A large gradient is taken in pieces of its longest other dimension. Wide copies of the logits' gradient alone
        would be more than all else that a backward pass holds.
        """
        rest, count = [d for d in range(b.ndim) if d not in axes], 4
        indices, size = (math.prod(b.shape[d] for d in dims) for dims in (axes, rest))
        rows = b.permute(*axes, *rest)
        if size <= count or not indices:
            return _wide(rows.reshape(indices, size))
        if b.is_cuda and b.dtype.itemsize == 2 and rows.is_contiguous():
            return product(rows.view(1, indices, size), self._directions(size, 8, b, b.dtype)[None])[0]
        longest = max(rest, key=lambda d: b.shape[d])
        length, entries = b.shape[longest], max(PIECE, b.numel() // 64)
        step = max(1, min(length, length * entries // b.numel()))
        pieces = b.split(step, longest)
        z, factors = (self._directions(k, count, b, _wide(b[:0]).dtype) for k in (size // length * step, len(pieces)))
        total = 0.0
        for piece, factor in zip(pieces, factors, strict=True):  # random numbers z, times others for every piece
            rows = z[: piece.numel() // indices]
            total = total + (_wide(piece.permute(*axes, *rest).reshape(indices, -1)) @ rows) * factor
        return total

    def _directions(self, size: int, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return random numbers [size, count], the same every time."""
        key = size, dtype, like.device
        if key not in self.directions:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            z = torch.randn((size, count), generator=torch.Generator().manual_seed(0), dtype=wide)
            self.directions[key] = z.to(like.device, dtype)
        return self.directions[key]


def _wide(rows: Tensor) -> Tensor:
    """Return numbers in float32 or better.

    Scaling by powers of two commutes with the rounding of bfloat16; float16 has not the range for sums.
    """
    return rows.float() if rows.dtype.itemsize == 2 else rows


def axes_of(site: Site, layouts: Sequence[Layout]) -> list[int]:
    """Return the dimensions along which entries are told apart."""
    return sorted({layout.axis for layout in layouts} | leading(site))


def owners_of(
    codes: Codes, site: Site, passes: Sequence[Tensor], coarsest: torch.dtype, tolerance: float | None = None
) -> Owners:
    """Return `Codes.owners` of one site, with the tolerances of its device and types.

    On the CPU nothing rounds differently in another pass, unless float16 runs out of digits. On CUDA sums may come in
    another order, as those of attention do: where terms cancel, as for the first of the positions that are attended to,
    the rest is rounding, which does not grow with the weight of a loss.
    """
    first, limits = passes[0], torch.finfo(passes[0].dtype)
    exact = {torch.float64: 1e-12}.get(coarsest, 1e-6)
    noise = first.new_tensor(limits.tiny / limits.eps, dtype=torch.float64)
    if coarsest == torch.float16:  # 64 times its smallest number, in every entry
        noise = noise + 64 * 2.0**-24 * (math.prod(site.shape) / max(1, len(first))) ** 0.5
    faint = 0.0
    if first.is_cuda and first.numel():
        faint = {torch.float64: 1e-12, torch.float32: 1e-5}.get(coarsest, 2.0**-7)
        exact = {torch.float64: 1e-10, torch.float32: 1e-4}.get(coarsest, 1e-2)
        noise = noise.maximum(16 * torch.finfo(coarsest).eps * first.abs().max())
    return codes.owners(passes, exact if tolerance is None else tolerance, noise)._replace(faint=faint)


def changed(once: Tensor, twice: Tensor, coarsest: torch.dtype) -> bool:
    """Return whether a pass with twice the weights did not give twice as much."""
    tolerance = 0.1 if coarsest.itemsize == 2 else 1e-3
    return not bool((twice - 2 * once).norm() <= tolerance * (twice.norm() + 2 * once.norm()))


def matches(found: Owners, axes: Sequence[int], layout: Layout, site: Site, n: int) -> bool:
    """Return whether the owners along `axes` are those of a layout; what is nobody's or faint may be anybody's."""
    owner, mixed, size = (x.view([site.shape[d] for d in axes]) for x in found[:3])
    expected = layout.owner(site.shape[layout.axis], n, owner.device)
    expected = expected.view([-1 if d == layout.axis else 1 for d in axes]).expand(owner.shape)
    right = ~mixed & ((owner == expected) | (owner < 0))
    if found.faint:
        whose = expected.clamp_min(0)
        largest = size.new_zeros(n).scatter_reduce_(0, whose.flatten(), size.flatten(), "amax")
        right |= size <= found.faint * largest[whose]
    return bool(right.all())


def leading(site: Site) -> set[int]:
    """Return the leading dimensions that may hold samples in no regular order."""
    axes, lead = set(site.axes), 0
    while lead in axes:
        lead += 1
    return set(range(lead))
