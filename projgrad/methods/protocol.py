"""What methods ask of what they are given."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

Closure = Callable[[], Tensor]


class SteppingOptimizer(Protocol):
    """An optimizer of torch, or a wrapper of one that shows its parameter groups."""

    param_groups: list[dict[str, Any]]

    def step(self) -> object: ...


class UnlearningMethod(Protocol):
    """A method such as `projgrad.OrthoGrad`: `step(forget, retain)` or `step(forget)` changes the model's weights."""

    model: nn.Module
    optimizer: SteppingOptimizer
    step: Callable[..., object]
