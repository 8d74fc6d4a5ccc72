"""What every method asks of a model and its optimizer before it changes anything."""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer


def owned(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """What is updated, by name: the model's parameters that require gradients now and belong to the optimizer."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in held}
    if not found:
        raise ValueError("the optimizer holds no parameter of the model that requires a gradient")
    return found


def scalar(closure: Callable[[], Tensor], name: str = "forget") -> Tensor:
    """What a closure returns, checked to be one loss that can be differentiated; shape ()."""
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name}() must return one scalar loss; got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{name}() returned a loss that does not depend on any trainable parameter")
    return loss.reshape(())


def check_finite(loss: float, name: str = "forget") -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} loss is {loss}; nothing was changed")
    return loss


def clear(optimizer: Optimizer) -> None:
    """No `.grad` for the optimizer to see: a stale one would move what no loss depends on."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} that uses batch statistics: what the model makes "
                "of one sample, and its gradient, then depends on the others. Call model.eval() first"
            )
