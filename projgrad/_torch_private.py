"""Every private name of torch that projgrad uses, in one place. All of them are in torch 2.11 to 2.13."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from threading import Lock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd.graph import Node
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils.flop_counter import flop_registry

BatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of all batch norms
Dropout = nn.modules.dropout._DropoutNd  # the base class of all dropouts
without_torch_function = torch._C.DisableTorchFunction

# Torch's functions themselves. What stands under their names in torch and torch.nn.functional may be a user's wrapper,
# which was run before a call came to us.
builtins = torch._C._VariableFunctions
linear = torch._C._nn.linear


# Tensors.


def version(t: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return t._version


def base_of(t: Tensor) -> Tensor | None:
    """Return the tensor that autograd knows this one as a view of."""
    return t._base


def untracked_view(t: Tensor) -> Tensor:
    """Return the same numbers as a tensor that autograd takes for no view: nobody may hold what it is a view of."""
    return torch.ops.aten._unsafe_view.default(t, t.shape)


def storage_id(t: Tensor) -> int:
    """Return the address of a tensor's storage object, 0 if it has none."""
    return t.untyped_storage()._cdata


def has_gradient_hooks(t: Tensor) -> bool:
    """Return whether hooks see or change the gradient of a leaf."""
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def drop_gradient_hooks(t: Tensor, hooks: Collection[Callable]) -> None:
    """Remove some hooks from a leaf, also where nobody holds their handle."""
    for held in (t._backward_hooks, t._post_accumulate_grad_hooks):
        for key in [key for key, hook in (held or {}).items() if hook in hooks]:
            del held[key]


def drop_step_hooks(optimizer: torch.optim.Optimizer, hooks: Collection[Callable]) -> None:
    """Remove some hooks of the steps of an optimizer, also where nobody holds their handle."""
    for kind in ("pre", "post"):  # an optimizer that is not torch's may have others
        held = getattr(optimizer, f"_optimizer_step_{kind}_hooks", {})
        for key in [key for key, hook in held.items() if hook in hooks]:
            del held[key]


def function_modes() -> list[TorchFunctionMode]:
    """Return the function modes of this thread that are active, the innermost last."""
    return _get_current_function_mode_stack()


def enter_beneath(mode: TorchFunctionMode, upper: Callable[[TorchFunctionMode], bool]) -> None:
    """Enter a function mode beneath the `upper` ones on top: it sees the calls that they make."""
    above = []
    while (modes := _get_current_function_mode_stack()) and upper(modes[-1]):
        above.append(_pop_mode())
    for entered in (mode, *reversed(above)):
        _push_mode(entered)


def leave(mode: TorchFunctionMode) -> None:
    """Leave a function mode, wherever it is among those that are active, if it is."""
    if not is_active(mode):
        return
    above = []
    while _get_current_function_mode_stack()[-1] is not mode:
        above.append(_pop_mode())
    _pop_mode()
    for entered in reversed(above):
        _push_mode(entered)


@functools.cache
def _overrides(kind: type) -> bool:
    """Return whether a class of tensors does something of its own in torch's functions."""
    override = kind.__torch_function__
    usual = override is torch._C._disabled_torch_function_impl
    return not usual and getattr(override, "__func__", None) is not Tensor.__torch_function__.__func__


def are_overriding(tensors: Sequence[Tensor]) -> bool:
    """Return whether torch would ask a class of tensors among arguments what a function does with them."""
    plain = all(type(t) is Tensor or type(t) is nn.Parameter or not _overrides(type(t)) for t in tensors)
    return not plain and torch._C._is_torch_function_enabled()


def foreach_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the Euclidean norm of every tensor, in few launches."""
    return torch._foreach_norm(tensors, 2, dtype=dtype)


def keep_busy(cycles: int) -> None:
    """Make the current stream of the GPU wait for some clock cycles."""
    torch.cuda._sleep(cycles)


def saved_tensors_hooks() -> tuple[Callable, Callable] | None:
    """Return the functions that pack and unpack what autograd saves now, None where it saves the tensors themselves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def foreach_add_(outs: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add a part to every tensor, in few launches; each is rounded once."""
    torch._foreach_add_(outs, parts)


def keeping_versions(tensors: Sequence[Tensor]) -> AbstractContextManager:
    """Return a context in which changes in place do not count, so that a graph which saved the tensors stays usable."""
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))


# Nodes of the autograd graph.


def outputs_of(node: Node) -> Sequence:
    """Return shape and dtype of every gradient that comes into a node."""
    return node._input_metadata


def sequence_number(node: Node) -> int:
    """Return the number of the operation among those that its thread recorded."""
    return node._sequence_nr()


def saved(node: Node, name: str) -> object:
    """Return what a node keeps of its operation's arguments, such as "dim"."""
    return getattr(node, f"_saved_{name}")


# Parts of `fully_shard` and DistributedDataParallel in a graph. They see gradients and hand them on as they are.

PARALLEL = "torch.distributed.fsdp", "torch.nn.parallel.distributed"


def is_parallel_hook(hook: object) -> bool:
    """Return whether a hook is the one by which a sharded module notices the backward pass."""
    return type(getattr(hook, "__self__", None)).__module__.startswith(PARALLEL)


def is_parallel_node(node: Node) -> bool:
    """Return whether a node is one by which a spread module notices how far the backward pass is."""
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.startswith(PARALLEL)


def reset_sharding(module: nn.Module) -> None:
    """Forget what a pass that failed left behind in a sharded module: the next one would gather in another order."""
    if hasattr(module, "reset_iter_state"):  # of torch 2.13, for the whole model
        with suppress(RuntimeError, AttributeError):  # it is not the root, or has not run yet
            module.reset_iter_state()
        return
    state = module._get_fsdp_state()
    idle = type(state._training_state).IDLE
    state._training_state, state._state_ctx.iter_forward_root = idle, None
    state._state_ctx.post_backward_final_callback_queued = False
    state._modules_to_run_forward.clear()
    if hasattr(state._comm_ctx, "post_forward_order"):  # it has run before
        state._comm_ctx.post_forward_order.clear()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for group in filter(None, groups):
        group._training_state = idle
        group._post_forward_indices.clear()
    module.reshard()


# Called so from torch 2.13 on.
all_gather_single = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """Return how long the processes of a group wait for one another."""
    return group._get_backend(device).options._timeout


# Modules and modes.


INSIDE_COMPILED = (
    "per-sample gradients cannot be recorded inside a function that torch.compile compiled: compile the model, or "
    "parts of it, and leave the step outside"
)


class Uncompiled:
    """Makes what `torch.compile` made run as it was written, in all threads, while somebody is inside."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._stance: AbstractContextManager | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._stance is None and "torch._dynamo" in sys.modules:  # else nothing was compiled yet
                try:
                    self._stance = torch.compiler.set_stance("force_eager")
                except RuntimeError as error:
                    raise RuntimeError(INSIDE_COMPILED) from error
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._stance is not None:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)


uncompiled = Uncompiled()  # the stance of torch is one for all threads


def is_active(mode: TorchFunctionMode) -> bool:
    """Return whether a mode is already entered."""
    return mode in _get_current_function_mode_stack()


def enter(mode: TorchFunctionMode) -> None:
    """Enter a mode, or leave it again where Ctrl-C comes between."""
    try:
        mode.__enter__()
    except BaseException:
        if is_active(mode):
            mode.__exit__(None, None, None)
        raise


def inside_transform() -> bool:
    """Return whether vmap, grad or another transformation of torch.func is running."""
    return torch._C._are_functorch_transforms_active()


def has_kernel(op: str, device: str) -> bool:
    """Return whether something is registered for an op, such as "projgrad::gram", on "cpu" or "cuda" itself."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper())


def run_kernel(op: torch._ops.OpOverload, device: str, args: tuple, kwargs: dict) -> object:
    """Run what an op does on "cpu" or "cuda"; a mode that is active sees the ops that it calls, not the op itself."""
    return op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper())), *args, **kwargs)


def name_of(op: object) -> str:
    """Return the name of a `torch.library.custom_op`."""
    return op._name


@contextmanager
def conversions_of_fakes() -> Iterator[None]:
    """Make a context in which `module.to` gives fake tensors in new parameters: torch would swap them, and cannot."""

    def convert(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        made: dict[int, torch.Tensor] = {}
        for part in module.modules() if recurse else (module,):
            for key, p in part._parameters.items():
                if p is not None:
                    new = lambda p=p: nn.Parameter(function(p.detach()), p.requires_grad)  # noqa: E731
                    part._parameters[key] = made[id(p)] if id(p) in made else made.setdefault(id(p), new())
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[key] = function(buffer)
        return module

    before, nn.Module._apply = nn.Module._apply, convert
    try:
        yield
    finally:
        nn.Module._apply = before


def flops(op: object, args: tuple, kwargs: dict, result: object) -> int:
    """Return the floating-point operations of a call, by torch's formula; 0 of an operation that has none.

    The attention of a CPU has none there: that of a GPU is taken.
    """
    aten, packet = torch.ops.aten, getattr(op, "_overloadpacket", op)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        packet = aten._scaled_dot_product_flash_attention
    elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        packet = aten._scaled_dot_product_flash_attention_backward
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula else 0


# The profiler: the old one, whose records come in order and which says nothing on stderr.


def cpu_allocations(call: Callable[[], object]) -> list[int] | None:
    """Make a call, and return what torch's allocator gave (bytes > 0) and got back (< 0) on the CPU, in order.

    Of what it gave before the call nothing is in it. None where a profiler runs already, or this torch has none; the
    call is made then too.
    """
    try:
        options = (False, True, False, False, False)  # shapes, memory, stack, flops, modules
        state, experimental = torch.autograd.ProfilerState.CPU, torch._C._profiler._ExperimentalConfig()
        torch.autograd._enable_profiler_legacy(torch.autograd.ProfilerConfig(state, *options, experimental))
    except (RuntimeError, AttributeError, TypeError):
        call()
        return None
    try:
        call()
    finally:
        records = torch.autograd._disable_profiler_legacy()
    events = (event for record in records for event in record if event.kind() == "memory_alloc")
    return [event.cpu_memory_usage() for event in events]
