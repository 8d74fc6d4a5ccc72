"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.backends import cudnn

from ..._torch_private import builtins
from ...rules.layout import Layout
from ...rules.rule import Rows, Rule
from ..recording import Recorder
from .elementwise import fold, folded


def _normalise(tape: Recorder, name: str, function, x: Tensor, weight, bias, axes, where, again=None) -> Tensor:
    """Note y = function(x, weight, bias), x normalised times weight plus bias.

    where: the output's dimensions that weight and bias span. again: the function that makes x normalised once more.
    """
    call = tape.call(name, x, weight, bias)
    y = function(x, weight, bias)

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        spanned = [b.shape[d] for d in where]
        shape = spanned + [1] * (b.ndim - where[0] - len(where))  # behind the parameter's dimensions
        g = layout.split(b, n)
        rules: list[Rule] = []
        if call.follows(weight):
            normal = lambda x: (again or function)(x, None, None)  # noqa: E731
            rules.append(Rows(folded(g, saved[0], shape, layout, n, normal).reshape(n, *spanned)))
        if call.follows(bias):
            rules.append(Rows(fold(g, shape).reshape(n, *spanned)))
        return rules

    return call.note(y, make, [weight, bias], axes, [x] if call.follows(weight) else [])


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tape: Recorder,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    function = lambda x, w, b: builtins.layer_norm(x, normalized_shape, w, b, eps, cudnn.enabled)  # noqa: E731
    last = input.ndim - len(normalized_shape)
    return _normalise(tape, "layer_norm", function, input, weight, bias, range(last), range(last, input.ndim))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    tape: Recorder,
) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    function = lambda x, w, _: builtins.rms_norm(x, normalized_shape, w, eps)  # noqa: E731
    last = input.ndim - len(normalized_shape)
    return _normalise(tape, "rms_norm", function, input, weight, None, range(last), range(last, input.ndim))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tape: Recorder,
) -> Tensor:
    """`torch.nn.functional.group_norm`."""
    function = lambda x, w, b: builtins.group_norm(x, num_groups, w, b, eps, cudnn.enabled)  # noqa: E731
    return _normalise(tape, "group_norm", function, input, weight, bias, (0,), (1,))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    tape: Recorder,
) -> Tensor:
    """`torch.nn.functional.instance_norm`."""
    running = running_mean, running_var
    kept = (None, None) if use_input_stats else running  # they are updated once
    norm, last = builtins.instance_norm, (eps, cudnn.enabled)
    function = lambda x, w, b: norm(x, w, b, *running, use_input_stats, momentum, *last)  # noqa: E731
    again = lambda x, w, b: norm(x, w, b, *kept, use_input_stats, 0.0, *last)  # noqa: E731
    return _normalise(tape, "instance_norm", function, input, weight, bias, (0,), (1,), again)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    tape: Recorder,
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
    norm, running, last = builtins.batch_norm, (running_mean, running_var), (momentum, eps, cudnn.enabled)
    function = lambda x, w, b: norm(x, w, b, *running, False, *last)  # noqa: E731
    return _normalise(tape, "batch_norm", function, input, weight, bias, (0,), (1,))
