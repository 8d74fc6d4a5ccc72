"""The rule of convolutions, plain and transposed, in any number of dimensions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import CHUNK_BYTES, Rule, gram, working


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
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.n, self.large, self.small, self.groups = len(large), large, small, groups
        self.kernel, self.stride, self.dilation = tuple(kernel), tuple(stride), tuple(dilation)
        self.padding = [side for pair in reversed(padding) for side in pair]  # as F.pad wants it
        self.channels = large.shape[2] // groups
        self.shape = torch.Size((small.shape[2], self.channels, *self.kernel))
        self.dtype = working(torch.promote_types(large.dtype, small.dtype), False)
        self.half = large.dtype.itemsize == 2 or small.dtype.itemsize == 2

    def _windows(self, groups: slice, channels: slice, dtype: torch.dtype) -> Tensor:
        """[n, groups, channels * kernel, t * positions] of the large image."""
        large = self.large.unflatten(2, (self.groups, self.channels))[:, :, groups, channels]
        large = (F.pad(large, self.padding) if any(self.padding) else large).to(dtype)
        positions = self.small.shape[3:]
        steps = [s * d for s, d in zip(large.stride()[4:], self.dilation, strict=True)]
        moves = [s * d for s, d in zip(large.stride()[4:], self.stride, strict=True)]
        windows = large.as_strided(
            (*large.shape[:4], *self.kernel, *positions),
            (*large.stride()[:4], *steps, *moves),
            large.storage_offset(),
        )  # [n, t, groups, channels, *kernel, *positions]
        windows = windows.movedim(1, 3 + len(self.kernel))
        return windows.reshape(self.n, large.shape[2], large.shape[3] * math.prod(self.kernel), -1)

    def _small(self, groups: slice, dtype: torch.dtype) -> Tensor:
        """[n, groups, r, t * positions]."""
        small = self.small.unflatten(2, (self.groups, -1))[:, :, groups].to(dtype)
        return small.movedim(1, 3).reshape(self.n, small.shape[2], small.shape[3], -1)

    def _blocks(self, wide: bool):
        """Per-sample gradients [n, groups * r, channels, kernel] of some groups, or some channels of the only one."""
        dtype = torch.float64 if wide else self.dtype
        taps, positions = math.prod(self.kernel), self.small[0, :, 0].numel()
        r = self.shape[0] // self.groups
        one = self.n * taps * (positions + r) * dtype.itemsize  # bytes for one channel of one group
        step = max(1, CHUNK_BYTES // max(1, one))
        if self.groups > 1:
            step = max(1, step // self.channels)
            spans = [
                (slice(s, min(s + step, self.groups)), slice(0, self.channels)) for s in range(0, self.groups, step)
            ]
        else:
            spans = [(slice(0, 1), slice(s, min(s + step, self.channels))) for s in range(0, self.channels, step)]
        small = self._small(slice(0, 1), dtype) if self.groups == 1 else None
        for groups, channels in spans:
            p = self._small(groups, dtype) if small is None else small
            q = self._windows(groups, channels, dtype)
            g = torch.matmul(p, q.mT)  # [n, groups, r, channels * kernel]
            self.bytes = max(self.bytes, q.nbytes + g.nbytes)
            yield groups, channels, g.reshape(self.n, g.shape[1] * r, -1, taps)

    def _part(self, u: Tensor, groups: slice, channels: slice) -> Tensor:
        """The view of a tensor [..., *shape] that belongs to a block."""
        r = self.shape[0] // self.groups
        at = u.ndim - len(self.shape)
        return u.narrow(at, groups.start * r, (groups.stop - groups.start) * r).narrow(
            at + 1, channels.start, channels.stop - channels.start
        )

    def chunk(self, rows: slice, wide: bool = False) -> Tensor:
        g = [block for *_, block in self._blocks(wide)]
        return torch.cat(g, 1 if self.groups > 1 else 2).reshape(self.n, self.rows, self.cols)[:, rows]

    def gram(self, u: Tensor | None, wide: bool = False) -> tuple[Tensor, Tensor]:
        K, v = 0.0, 0.0
        for groups, channels, g in self._blocks(wide):
            k, w = gram(g, None if u is None else self._part(u, groups, channels), wide)
            K, v = K + k, v + w
        return K, v

    def combine_(self, out: Tensor, c: Tensor) -> None:
        dims = len(self.kernel)
        scaled = (self.small * c.to(self.small.dtype).view(-1, *[1] * (self.small.ndim - 1))).flatten(0, 1)
        large = F.pad(self.large.flatten(0, 1), self.padding)
        for d in range(dims):  # a transposed convolution may write behind its last window
            span = (self.small.shape[3 + d] - 1) * self.stride[d] + (self.kernel[d] - 1) * self.dilation[d] + 1
            large = large.narrow(2 + d, 0, span)
        weight = large.new_empty(()).expand(self.shape)
        zeros = [0] * dims
        grad = torch.ops.aten.convolution_backward(
            scaled.to(large.dtype),
            large,
            weight,
            None,
            self.stride,
            zeros,
            self.dilation,
            False,
            zeros,
            self.groups,
            [False, True, False],
        )[1]
        out.add_(grad)

    def moments_(self, first: Tensor, second: Tensor) -> None:
        for groups, channels, g in self._blocks(False):
            for out, part in ((first, g.sum(0)), (second, g.square().sum(0))):
                target = self._part(out, groups, channels)
                target.add_(part.reshape(target.shape))
