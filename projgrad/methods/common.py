"""What every method asks of a model and its optimizer before it changes anything."""

import math
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .._options import kind
from .._torch_private import BatchNorm
from ..recording.losses import instead


def trainable_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """What is updated, by name: the model's parameters that require gradients now and belong to the optimizer.

    Warns where a layer was probably replaced after the optimizer was built: it then learns in part only.
    """
    check_types(model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every = dict(model.named_parameters())
    found = {name: p for name, p in every.items() if p.requires_grad and id(p) in held}
    lost = len(held.difference(map(id, every.values())))
    if not found:
        why = (
            "none of those that it holds belongs to the model: build it after the model was changed, and for this model"
        )
        if lost < len(held):
            why = f"the {len(held) - lost} of the model that it holds have requires_grad=False"
        raise ValueError(f"the optimizer holds no parameter of the model that requires a gradient; {why}")
    missing = [name for name, p in every.items() if p.requires_grad and id(p) not in held]
    if lost and missing:
        warnings.warn(
            f"the optimizer does not hold {_some(missing)} of the model, which stay as they are, but {lost} parameters "
            "that are not in the model. If a layer was replaced after the optimizer was built, build it anew",
            stacklevel=3,
        )
    return found


def learning_rates(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> dict[str, float]:
    """That of every parameter, by name; none if all parameter groups have the same."""
    groups = [group for group in optimizer.param_groups if "lr" in group]
    if len(groups) < 2 or len({id(group["lr"]) for group in groups}) == 1:
        return {}
    rates = [float(group["lr"]) for group in groups]
    if len(set(rates)) == 1:
        return {}
    of = {id(p): rate for group, rate in zip(groups, rates, strict=True) for p in group["params"]}
    return {name: of[id(p)] for name, p in params.items() if id(p) in of}


def check_types(model: object, optimizer: object) -> None:
    if isinstance(optimizer, nn.Module) and hasattr(model, "param_groups"):
        raise TypeError("model and optimizer are swapped: the model comes first")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {kind(model)}")
    if isinstance(optimizer, type) or not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
        raise TypeError(
            "optimizer must be a torch optimizer, such as torch.optim.SGD(model.parameters(), lr=0.1); "
            f"got {kind(optimizer)}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the losses again in every step: use an optimizer that steps on `.grad`")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("the optimizer has maximize=True, which would turn the update around: build it without")


def check_alone(model: nn.Module, params: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """What spreads a model, or its steps, over processes or micro-batches in a way that a step does not follow.

    Raises:
        ValueError: sharded parameters, DistributedDataParallel over more than one process, DeepSpeed, a wrapper of
            accelerate that would not step or would scale the gradient.
    """
    sharding = sys.modules.get("torch.distributed.tensor")  # imported by whatever shards a model
    for name, p in params.items() if sharding is not None else ():
        if isinstance(p, sharding.DTensor):
            raise ValueError(
                f"{name} is a DTensor: sharded parameters (FSDP2, tensor parallelism) are not supported yet"
            )
    for name, module in model.named_modules() if distributed() else ():
        if type(module).__name__ == "FullyShardedDataParallel":
            where = name or "the model"
            raise ValueError(f"{where} is a FullyShardedDataParallel: sharded parameters are not supported yet")
        check_replicas(module, name or "the model")
    kinds = {c.__name__ for c in (*type(optimizer).__mro__, *type(model).__mro__)}
    if any("DeepSpeed" in name for name in kinds):
        raise ValueError("DeepSpeed steps inside its own backward(): it is not supported")
    if "AcceleratedOptimizer" in kinds:
        if not optimizer.gradient_state.sync_gradients:
            raise ValueError(
                "accelerate accumulates gradients now, and its optimizer would skip this step: call `step` outside "
                "`accelerator.accumulate`, or give it the optimizer inside (`optimizer.optimizer`)"
            )
        if optimizer.scaler is not None:
            raise ValueError(
                "accelerate's optimizer would scale the gradient by itself: use the optimizer inside "
                "(`optimizer.optimizer`) and, where there is one, `scaler=accelerator.scaler`"
            )


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def check_replicas(module: nn.Module, where: str) -> None:
    if isinstance(module, DistributedDataParallel) and (size := dist.get_world_size(module.process_group)) > 1:
        raise ValueError(
            f"{where} is a DistributedDataParallel over {size} processes, which is not supported yet: it would not "
            "average what is projected, and every process would end with another model. Take the steps in one process, "
            "with the model that it wraps (`model.module`), in the closures too, and broadcast the weights afterwards"
        )


def scalar_loss(closure: Callable[[], Tensor], name: str = "forget") -> Tensor:
    """What a closure returns, checked to be one loss that can be differentiated; shape ()."""
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"{tuple(loss.shape)}: take its mean" if isinstance(loss, Tensor) else instead(loss, "loss")
        raise ValueError(f"{name}() must return one scalar loss; got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{name}() returned a loss that does not depend on any trainable parameter")
    return loss.reshape(())


def check_finite(loss: float, name: str = "forget") -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} loss is {loss}; nothing was changed")
    return loss


def clear_grads(optimizer: Optimizer) -> None:
    """No `.grad` for the optimizer to see: a stale one would move what no loss depends on."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} that uses batch statistics: what the model makes "
                "of one sample, and its gradient, then depends on the others. Call model.eval() first"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
