"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules.layout import Layout
from ...rules.rule import Rows, Rule
from ..recording import Recorder
from .elementwise import blocks, fold


def _tap(x: Tensor, weight, bias, y: Tensor, normalise, axes, where, call) -> Tensor:
    """Tap y = normalise(x) * weight + bias; `where`: the output's dimensions that weight and bias span."""

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        spanned = [b.shape[d] for d in where]
        shape = spanned + [1] * (b.ndim - where[0] - len(where))  # behind the parameter's dimensions
        g = layout.split(b, n)
        rules: list[Rule] = []
        if call.follows(weight):
            parts = []
            for block, x in blocks(g, saved[0], layout, n):
                xhat = layout.split(normalise(x), block.stop - block.start)
                parts.append(fold(g[block] * xhat, shape))
            rules.append(Rows(torch.cat(parts).reshape(n, *spanned)))
        if call.follows(bias):
            rules.append(Rows(fold(g, shape).reshape(n, *spanned)))
        return rules

    return call.tap(y, make, [weight, bias], axes, [x] if call.follows(weight) else [])


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, tape: Recorder) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    call = tape.call("layer_norm", input, weight, bias)
    y = F.layer_norm(input, normalized_shape, weight, bias, eps)
    last = y.ndim - len(normalized_shape)
    plain = lambda x: F.layer_norm(x, normalized_shape, None, None, eps)  # noqa: E731
    return _tap(input, weight, bias, y, plain, range(last), range(last, y.ndim), call)


def rms_norm(input, normalized_shape, weight=None, eps=None, *, tape: Recorder) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    call = tape.call("rms_norm", input, weight)
    y = F.rms_norm(input, normalized_shape, weight, eps)
    last = y.ndim - len(normalized_shape)
    plain = lambda x: F.rms_norm(x, normalized_shape, None, eps)  # noqa: E731
    return _tap(input, weight, None, y, plain, range(last), range(last, y.ndim), call)


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, *, tape: Recorder) -> Tensor:
    """`torch.nn.functional.group_norm`."""
    call = tape.call("group_norm", input, weight, bias)
    y = F.group_norm(input, num_groups, weight, bias, eps)
    plain = lambda x: F.group_norm(x, num_groups, None, None, eps)  # noqa: E731
    return _tap(input, weight, bias, y, plain, (0,), (1,), call)


def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5,
    *, tape: Recorder,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.instance_norm`."""
    call = tape.call("instance_norm", input, weight, bias)
    y = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    plain = lambda x: F.instance_norm(x, mean, var, None, None, use_input_stats, 0.0, eps)  # noqa: E731
    return _tap(input, weight, bias, y, plain, (0,), (1,), call)


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *, tape: Recorder
) -> Tensor:
    """`torch.nn.functional.batch_norm` with running statistics.

    Raises:
        ValueError: `training`: the gradient of one sample then depends on the others.
    """
    if training:
        raise ValueError(
            "batch norm with batch statistics: the gradient of one sample then depends on the others, so there is "
            "nothing to project. Call model.eval() first"
        )
    call = tape.call("batch_norm", input, weight, bias)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    plain = lambda x: F.batch_norm(x, running_mean, running_var, None, None, False, 0.0, eps)  # noqa: E731
    return _tap(input, weight, bias, y, plain, (0,), (1,), call)
