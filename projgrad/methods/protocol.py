"""What methods ask of what they are given."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

Closure = Callable[[], Tensor]


class SteppingOptimizer(Protocol):
    """An optimizer of torch, or a wrapper of one that shows its parameter groups."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> object: ...


class UnlearningMethod(Protocol):
    """A method such as `projgrad.OrthoGrad`: `step(forget, retain)` or `step(forget)` changes the model's weights."""

    # Properties: a method may hold a narrower type than asked for here, such as torch's own Optimizer.
    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> SteppingOptimizer: ...

    @property
    def step(self) -> Callable[..., object]: ...
