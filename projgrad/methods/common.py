"""What every method asks of a model, its optimizer and the losses of its closures."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._options import kind
from .._torch_private import BatchNorm
from ..recording.fixed import modules_of, parameters_of
from ..recording.host_reads import lengths, to_host
from ..recording.losses import instead
from .protocol import SteppingOptimizer

Tensors = dict[str, Tensor]  # by the name of the parameter


def trainable_parameters(model: nn.Module, optimizer: SteppingOptimizer) -> dict[str, nn.Parameter]:
    """Return what is updated, by name: the model's parameters that require gradients and belong to the optimizer.

    Warns where a layer was probably replaced after the optimizer was built: it then learns in part only. Raises as
    `check_types`, and ValueError where there is no such parameter.
    """
    check_types(model, optimizer)
    held = set(map(id, held_parameters(optimizer)))
    params = parameters_of(model)
    trainable = {name: p for name, p in params.items() if p.requires_grad and id(p) in held}
    foreign = len(held.difference(map(id, params.values())))
    if not trainable:
        why = f"the {len(held) - foreign} of the model that it holds have requires_grad=False"
        if foreign == len(held):
            why = "none of those that it holds belongs to the model: build it after the last change of this model"
        raise ValueError(f"the optimizer holds no parameter of the model that requires a gradient; {why}")
    missing = [name for name, p in params.items() if p.requires_grad and id(p) not in held]
    if foreign and missing:
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        warnings.warn(
            f"the optimizer does not hold {listed} of the model, which stay as they are, but {foreign} parameters "
            "that are not in the model. If a layer was replaced after the optimizer was built, build it anew",
            stacklevel=3,
        )
    return trainable


def held_parameters(optimizer: SteppingOptimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimizer holds, of this model or not."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def lay_out_grads(params: Mapping[str, nn.Parameter]) -> None:
    """Give every p.grad the strides of p: fused optimizers of torch walk through both as they lie in memory."""
    for p in params.values():
        g = p.grad
        if g is None or g.stride() == p.stride():
            continue
        if any(m > 1 and a != b for m, a, b in zip(p.shape, p.stride(), g.stride(), strict=True)):
            p.grad = torch.empty_like(p, dtype=g.dtype).copy_(g)


def clip_(params: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all p.grad so that their norm is at most `max_norm`; return by what they were multiplied."""
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@contextmanager
def stepping(scaler: torch.amp.GradScaler | None, optimizer: SteppingOptimizer) -> Iterator[Callable[[], None]]:
    """Give what takes the optimizer's step, by way of a scaler where there is one.

    After an error in here the scaler is what it was, and ready for the next step.
    """
    if scaler is None:
        yield optimizer.step
        return
    try:
        yield lambda: scaler.step(optimizer)
    except BaseException:
        before = scaler.state_dict()
        with suppress(AssertionError):  # nothing was unscaled yet
            scaler.update()
        scaler.load_state_dict(before)
        raise
    scaler.update()


def learning_rates(optimizer: SteppingOptimizer, params: dict[str, nn.Parameter]) -> dict[str, float]:
    """Return the learning rate of every parameter, by name; nothing if all parameter groups have the same."""
    groups = [group for group in optimizer.param_groups if "lr" in group]
    if len({id(group["lr"]) for group in groups}) < 2:  # a rate on the device is not waited for
        return {}
    rates = [float(group["lr"]) for group in groups]
    rate_of = {id(p): rate for group, rate in zip(groups, rates, strict=True) for p in group["params"]}
    return {name: rate_of[id(p)] for name, p in params.items() if id(p) in rate_of} if len(set(rates)) > 1 else {}


def check_types(model: object, optimizer: object) -> None:
    """Check that these are a model and an optimizer that steps once on `.grad`.

    Raises TypeError where they are swapped or something else, ValueError for LBFGS and maximize=True.
    """
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


def check_alone(
    model: nn.Module, params: dict[str, nn.Parameter], optimizer: SteppingOptimizer, spread: bool = False
) -> None:
    """Check that nothing spreads the model, or its steps, over processes or micro-batches.

    spread: processes take the step together, by way of a DistributedDataParallel or shards.
    Raises ValueError for sharded parameters, DistributedDataParallel over more than one process, DeepSpeed, and a
    wrapper of accelerate that would not step or would scale the gradient.
    """
    for name, p in params.items() if not spread else ():
        if is_sharded(p):
            raise ValueError(
                f"{name} is a DTensor: sharded parameters (FSDP2, tensor parallelism) are not supported here; "
                "OrthoGrad takes those of fully_shard"
            )
    for name, module in model.named_modules() if distributed() else ():
        where = name or "the model"
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"{where} is a FullyShardedDataParallel, which is not supported: use fully_shard")
        if not spread:
            check_replicas(module, where)
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


def is_sharded(p: Tensor) -> bool:
    """Return whether a parameter is spread over processes, as a DTensor."""
    sharding = sys.modules.get("torch.distributed.tensor")  # imported by whatever shards a model
    return sharding is not None and isinstance(p, sharding.DTensor)


def whole(t: Tensor) -> Tensor:
    """Return a tensor whole: a DTensor is gathered, by all processes that hold it."""
    return t.full_tensor() if is_sharded(t) else t


def restore_shards(model: object) -> bool:
    """Put shards back in their places where a forward pass left whole parameters; return whether a model has some."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever calls fully_shard
    if fsdp is None or not isinstance(model, nn.Module):
        return False
    modules = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for module in modules:
        module.reshard()
    return bool(modules)


def distributed() -> bool:
    """Return whether this process is one of a group of processes."""
    return dist.is_available() and dist.is_initialized()


def check_replicas(module: nn.Module, where: str) -> None:
    """Check that a module is no DistributedDataParallel over more than one process; raises ValueError."""
    if isinstance(module, DistributedDataParallel) and (size := dist.get_world_size(module.process_group)) > 1:
        raise ValueError(
            f"{where} is a DistributedDataParallel over {size} processes. Only OrthoGrad takes steps over several, and "
            "has to be given this wrapper or its process_group. Otherwise take the steps in one process, with the "
            "model that it wraps (`model.module`), in the closures too, and broadcast the weights afterwards"
        )


def check_batch_norm(model: nn.Module) -> None:
    """Check that no batch norm would use the statistics of the batch, were the model run as it is; raises ValueError.

    In a step `Closures` checks what is really run.
    """
    for module in modules_of(model):
        check_statistics(module, model)


def check_statistics(module: nn.Module, model: nn.Module) -> None:
    """Check that a module of a model is no batch norm that uses the statistics of the batch; raises ValueError."""
    if not isinstance(module, BatchNorm) or not (module.training or module.running_mean is None):
        return
    name = next((name for name, one in model.named_modules() if one is module), None)
    if name is not None:  # else it is another model's
        raise ValueError(
            f"{name or 'the model'} is a {type(module).__name__} that uses batch statistics: what the model makes "
            "of one sample, and its gradient, then depends on the others. Call model.eval() first"
        )


def scalar_loss(closure: Callable[[], Tensor], name: str = "forget") -> Tensor:
    """Call a closure and return its loss, (); raises ValueError unless it is one number that can be differentiated."""
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"{tuple(loss.shape)}: take its mean" if isinstance(loss, Tensor) else instead(loss, "loss")
        raise ValueError(f"{name}() must return one scalar loss; got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{name}() returned a loss that does not depend on any trainable parameter")
    return loss.reshape(())


def loss_value(loss: Tensor | float, name: str = "forget") -> float:
    """Return the number of a scalar loss; raises FloatingPointError for NaN and infinity."""
    value = float(loss.detach()) if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} loss is {value}; nothing was changed")
    return value


def check_finite_tensors(tensors: Tensors, what: str) -> None:
    """Check that no tensor holds NaN or Inf, with one wait for the device; raises FloatingPointError with the names."""
    norms = to_host(lengths(list(tensors.values())))
    bad = [name for name, norm in zip(tensors, norms, strict=True) if not math.isfinite(norm)]
    if bad:
        raise FloatingPointError(f"NaN or Inf in {what}, at {', '.join(bad[:4])}; no parameter was changed")


def clear_grads(optimizer: SteppingOptimizer) -> None:
    """Set every `.grad` that the optimizer sees to None: a stale one would move what no loss depends on."""
    for p in held_parameters(optimizer):
        p.grad = None


def copies(params: Mapping[str, Tensor]) -> Tensors:
    """Return a copy of every parameter, by name."""
    return {name: p.detach().clone() for name, p in params.items()}


@torch.no_grad()
def write_(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into the parameters of the same names."""
    for name, value in values.items():
        params[name].copy_(value)
