"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..._torch_private import builtins
from ...rules.convolution import Convolution
from ...rules.layout import Layout
from ...rules.rule import Rows, Rule
from ..recording import Recorder


def _numbers(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


def geometry(weight: Tensor, stride, padding, dilation) -> tuple[Sequence[int], Sequence[int], Sequence[int], list]:
    """Return kernel, stride, dilation and (before, after) padding of a convolution, one for every dimension."""
    kernel, dims = weight.shape[2:], weight.ndim - 2
    gaps = _numbers(dilation, dims)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(gaps, kernel, strict=True)]
        pad = [(t // 2, t - t // 2) for t in total]
    else:
        pad = [(p, p) for p in _numbers(0 if padding == "valid" else padding, dims)]
    return kernel, _numbers(stride, dims), gaps, pad


def _note(call, y: Tensor, input: Tensor, weight: Tensor, bias, where: tuple, groups: int, transposed: bool) -> Tensor:
    """Note the result of a convolution, plain or transposed; where: its `geometry`."""

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        g = layout.split(b, n)
        rules: list[Rule] = []
        if call.follows(weight):
            x = layout.split(saved[0], n)
            large, small = (g, x) if transposed else (x, g)
            rules.append(Convolution(large, small, *where, groups))
        if call.follows(bias):
            rules.append(Rows(g.flatten(3).sum((1, 3))))
        return rules

    saved = [input] if call.follows(weight) else []
    return call.note(y, make, [weight, bias] if y.ndim == weight.ndim else [], (0,), saved, bool(saved))


def _convolve(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        tape: Recorder,
    ) -> Tensor:
        call = tape.call(function.__name__, input, weight, bias)
        y = function(input, weight, bias, stride, padding, dilation, groups)
        where = geometry(weight, stride, padding, dilation)
        return _note(call, y, input, weight, bias, where, groups, transposed=False)

    conv.__name__ = function.__name__
    conv.__doc__ = f"`torch.nn.functional.{function.__name__}`, padding as numbers or a string."
    return conv


def _convolve_transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
        *,
        tape: Recorder,
    ) -> Tensor:
        call = tape.call(function.__name__, input, weight, bias)
        y = function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        where = geometry(weight, stride, padding, dilation)
        return _note(call, y, input, weight, bias, where, groups, transposed=True)

    conv_transpose.__name__ = function.__name__
    conv_transpose.__doc__ = f"`torch.nn.functional.{function.__name__}`."
    return conv_transpose


conv1d, conv2d, conv3d = map(_convolve, (builtins.conv1d, builtins.conv2d, builtins.conv3d))
conv_transpose1d, conv_transpose2d, conv_transpose3d = map(
    _convolve_transposed, (builtins.conv_transpose1d, builtins.conv_transpose2d, builtins.conv_transpose3d)
)
