"""The rule of convolutions, plain and transposed, in any number of dimensions."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.cost import GramRoute, chunk_bytes
from ..ops.linear_impl import combine_of_layer_, gradients, gram_of_layer
from ..ops.numerics import product_dtype
from .rule import Rule, add_, gram, weighted


class Convolution(Rule):
    """g_j = Σ_l small_jl ⊗ windows(large_j)_l.

    For a convolution `large` is its input, `small` the gradient at its output; for a transposed one the other way
    round. Windows are made for a few channels at a time: all of them together are kernel-size times the input.

    Args:
        large: [n, t, groups * c, *sizes]; t images a sample.
        small: [n, t, groups * r, *positions].
        kernel, stride, dilation: one number per dimension.
        padding: (before, after) per dimension.
        groups: the parameter is [groups * r, c, *kernel].
    """

    name = "convolution"

    def __init__(
        self,
        large: Tensor,
        small: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[tuple[int, int]],
        groups: int,
    ) -> None:
        self.n, self.large, self.small, self.groups, self.device = len(large), large, small, groups, large.device
        self.kernel, self.stride, self.dilation = tuple(kernel), tuple(stride), tuple(dilation)
        self.padding = [side for pair in reversed(padding) for side in pair]  # as F.pad wants it
        self.channels = large.shape[2] // groups
        self.shape = torch.Size((small.shape[2], self.channels, *self.kernel))
        self.dtype = product_dtype(large.dtype, small.dtype)
        self.has_16bit_factor = large.dtype.itemsize == 2 or small.dtype.itemsize == 2
        # Of the factors: a GPU multiplies 16-bit ones as they are.
        self.factor = large.dtype if large.is_cuda and large.dtype == small.dtype else self.dtype

    def _windows(self, groups: slice, channels: slice, dtype: torch.dtype) -> Tensor:
        """Return the windows [n, groups, channels * kernel, t * positions] of the large image."""
        large = self.large.unflatten(2, (self.groups, self.channels))[:, :, groups, channels]
        large = (F.pad(large, self.padding) if any(self.padding) else large).to(dtype)
        positions = self.small.shape[3:]
        steps = [s * d for s, d in zip(large.stride()[4:], self.dilation, strict=True)]
        moves = [s * d for s, d in zip(large.stride()[4:], self.stride, strict=True)]
        size, stride = (*large.shape[:4], *self.kernel, *positions), (*large.stride()[:4], *steps, *moves)
        windows = large.as_strided(size, stride, large.storage_offset())
        windows = windows.movedim(1, 3 + len(self.kernel))
        return windows.reshape(self.n, large.shape[2], large.shape[3] * math.prod(self.kernel), -1)

    def _small(self, groups: slice, dtype: torch.dtype) -> Tensor:
        """Return the small image as [n, groups, r, t * positions]."""
        small = self.small.unflatten(2, (self.groups, -1))[:, :, groups].to(dtype)
        return small.movedim(1, 3).reshape(self.n, small.shape[2], small.shape[3], -1)

    def _spans(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
        """Yield groups and channels that are treated at once: as many as have windows of two chunks."""
        one = self.n * math.prod(self.kernel) * self.small[0, :, 0].numel() * dtype.itemsize
        step = max(1, 2 * chunk_bytes(self.device.type) // max(1, one))
        if self.groups == 1:
            for start in range(0, self.channels, step):
                yield slice(0, 1), slice(start, min(start + step, self.channels))
        else:
            step = max(1, step // self.channels)
            for start in range(0, self.groups, step):
                yield slice(start, min(start + step, self.groups)), slice(0, self.channels)

    def _blocks(self, float64: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield per-sample gradients [n, groups * r, channels, kernel] of every span."""
        dtype = torch.float64 if float64 else self.dtype
        for groups, channels in self._spans(dtype):
            factor = dtype if float64 else self.factor
            p, q = self._small(groups, factor), self._windows(groups, channels, factor)
            g = gradients(q.flatten(0, 1).mT, p.flatten(0, 1).mT, dtype)  # [n groups, r, channels * kernel]
            yield groups, channels, g.view(self.n, p.shape[1] * p.shape[2], -1, math.prod(self.kernel))

    def _part(self, u: Tensor, groups: slice, channels: slice) -> Tensor:
        """Return the view of a tensor [..., *shape] that belongs to a block."""
        r = self.shape[0] // self.groups
        at = u.ndim - len(self.shape)
        return u.narrow(at, groups.start * r, (groups.stop - groups.start) * r).narrow(
            at + 1, channels.start, channels.stop - channels.start
        )

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        g = [block for *_, block in self._blocks(float64)]
        return torch.cat(g, 1 if self.groups > 1 else 2).reshape(self.n, self.rows, self.cols)[:, rows]

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        K, v = 0.0, 0.0
        grouped = (gram(g, None if u is None else self._part(u, *at), float64) for *at, g in self._blocks(float64))
        for k, w in self._linear(u, float64) if self.groups == 1 else grouped:
            K, v = K + k, v + w
        return K, v

    def weighted_gram(self, d: Tensor, u: Tensor, float64: bool = False) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if float64 else self.dtype
        shape = self.groups, self.shape[0] // self.groups, self.channels, math.prod(self.kernel)
        roots, scaled = (t.reshape(shape) for t in weighted(d, u, float64))
        K = torch.zeros(self.n, self.n, dtype=torch.float64, device=self.device)
        v = K.new_zeros(self.n)
        for groups, channels in self._spans(dtype):
            small, windows = self._small(groups, dtype), self._windows(groups, channels, dtype).flatten(0, 1)
            step = max(
                1, chunk_bytes(self.device.type) // (4 * windows.shape[1] * small.shape[1] * self.n * dtype.itemsize)
            )
            for start in range(0, shape[1], step):
                part = groups, slice(start, start + step), channels
                rows = small[:, :, part[1]]
                g = gradients(windows.mT, rows.flatten(0, 1).mT, dtype).view(self.n, *roots[part].shape)
                k, w = gram(g.mul_(roots[part]), scaled[part][None], float64)
                K, v = K + k, v + w[:, 0]
        return K, v

    def _linear(self, u: Tensor | None, float64: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield K and v of every span: with one group, its windows are the inputs of a linear layer."""
        dtype = torch.float64 if float64 else self.factor
        small = self._small(slice(0, 1), dtype)[:, 0]  # [n, r, t * positions]
        for groups, channels in self._spans(dtype):
            windows = self._windows(groups, channels, dtype)[:, 0]  # [n, channels * kernel, t * positions]
            block = windows.new_empty((0, *self.shape)) if u is None else u
            block = self._part(block, groups, channels).flatten(2)
            yield gram_of_layer(windows.mT, small.mT, block, float64)

    def cost(self) -> GramRoute:
        groups, channels = next(self._spans(self.dtype))
        count = (groups.stop - groups.start) * (channels.stop - channels.start)
        positions, taps = self.small[0, :, 0].numel(), math.prod(self.kernel)
        windows = self.n * count * taps * positions * self.dtype.itemsize
        flops = self.n * (2 * positions + self.n + 1) * math.prod(self.shape)
        made = self.n * self.shape[0] // self.groups * count * taps * self.dtype.itemsize
        made = made if self.groups > 1 else min(made, chunk_bytes(self.device.type))
        return GramRoute("chunks", self.shape[0], count * taps, flops, windows + made)

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        if float64:
            return self._combine_windows_(out, c, torch.float64)
        if self.device.type == "cuda":  # cuDNN would multiply in TF32 unless told otherwise, and add atomically
            return self._combine_windows_(out, c, self.dtype)
        dims = len(self.kernel)
        large, small = self.large.flatten(0, 1), self.small.flatten(0, 1)
        weights = c.to(small.dtype).repeat_interleave(self.small.shape[1])
        if large.numel() < small.numel():
            large = large * weights.view(-1, *[1] * (dims + 1)).to(large.dtype)
        else:
            small = small * weights.view(-1, *[1] * (dims + 1))
        before, after = self.padding[::2][::-1], self.padding[1::2][::-1]
        axes = list(zip(small.shape[2:], self.stride, self.kernel, self.dilation, strict=True))
        spans = [(m - 1) * s + (k - 1) * d + 1 for m, s, k, d in axes]
        room = [size + 2 * p - span for size, p, span in zip(large.shape[2:], before, spans, strict=True)]
        if before != after or any(r >= s for r, s in zip(room, self.stride, strict=True)):
            large, before = F.pad(large, self.padding), [0] * dims
            for d, span in enumerate(spans):  # a transposed convolution may write behind its last window
                large = large.narrow(2 + d, 0, span)
        factors = small.to(large.dtype), large, large.new_empty(()).expand(self.shape), None
        geometry = self.stride, before, self.dilation, False, [0] * dims, self.groups
        _, grad, _ = torch.ops.aten.convolution_backward(*factors, *geometry, [False, True, False])
        out.add_(grad)

    def _combine_windows_(self, out: Tensor, c: Tensor, dtype: torch.dtype) -> None:
        for groups, channels in self._spans(dtype):
            if self.groups == 1 and dtype == self.dtype:
                windows, small = self._windows(groups, channels, self.factor), self._small(groups, self.factor)
                g = out.new_zeros((small.shape[2], windows.shape[2]), dtype=self.dtype)
                combine_of_layer_(g, windows[:, 0].mT, small[:, 0].mT, c)
                add_(self._part(out, groups, channels), g)
                continue
            p = self._small(groups, dtype) * c.to(dtype).view(-1, 1, 1, 1)
            g = torch.einsum("nhrl,nhcl->hrc", p, self._windows(groups, channels, dtype))
            add_(self._part(out, groups, channels), g)

    def moments_(self, first: Tensor, second: Tensor) -> None:
        for groups, channels, g in self._blocks(False):
            for out, part in ((first, g.sum(0)), (second, g.square().sum(0))):
                add_(self._part(out, groups, channels), part)
