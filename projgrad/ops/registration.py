"""How ops are registered with torch, and how they are called so that transformations of torch.func nest.

`define_op` makes an op with gradient and vmap rule; `device_op` one without, whose call costs a quarter (5 µs, not 19).
torch.func knows gradients of `torch.autograd.Function`s, not those of custom ops: `call` picks the way that is needed.
Inside torch.compile, which knows neither there, vmap alone works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, custom_op

from .._torch_private import inside_transform, name_of

LIBRARY = Library("projgrad", "FRAGMENT")
FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}  # of every op with a gradient, for torch.func
FALLBACKS: dict[str, Callable] = {}  # of every device op, by name: what runs where a device has no kernel


def save_inputs(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def define_op(
    name: str,
    default: Callable,
    *,
    shapes: Callable,
    backward: Callable,
    setup: Callable = save_inputs,
    vmap: Callable | None = None,
) -> Any:
    """Return the op projgrad::`name`, differentiable by autograd and torch.func alike.

    Args:
        default: what it computes where a device has no kernel; its annotations are the schema.
        shapes: the same for tensors without numbers.
        backward, setup: gradient, as `torch.library.register_autograd` takes them; `call` other ops in it.
        vmap: vmap rule. Default: once per element.
    """
    op = custom_op(f"projgrad::{name}", default, mutates_args=())
    vmap = one_by_one(op) if vmap is None else vmap

    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode(name_of(op))

    op.register_fake(shapes)
    op.register_autograd(backward, setup_context=setup)
    op.register_vmap(vmap)
    rules = {"forward": lambda *args: op(*args), "setup_context": setup, "backward": backward, "vmap": vmap, "jvp": jvp}
    FUNCTIONS[op] = type(
        name_of(op), (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()}
    )
    return op


def device_op(schema: str) -> Callable:
    """Make the decorated function the default of a private op, without gradient, that a device may compute its way."""

    def define(function: Callable) -> Callable:
        LIBRARY.define(schema)
        name = schema.split("(")[0]
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        FALLBACKS[name] = function
        return getattr(torch.ops.projgrad, name).default

    return define


def register_kernel(op: Any, device: str, kernel: Callable) -> None:
    """Let `kernel` compute an op on "cpu" or "cuda"."""
    if op in FUNCTIONS:
        op.register_kernel(device)(kernel)
    else:
        LIBRARY.impl(op, kernel, device.upper(), allow_override=True)


def call(op: Any, *args: Any) -> Any:
    """Call an op; gradient formulas and vmap rules must call ops like this too, so that transformations nest."""
    if torch.compiler.is_compiling() or not inside_transform():
        return op(*args)
    return FUNCTIONS[op].apply(*args)


def check_reverse_mode(op: str, *tensors: Tensor) -> None:
    """Refuse forward-mode derivatives: custom ops have no rule for them, and torch takes a missing one for zero."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        refuse_forward_mode(op)


def refuse_forward_mode(op: str) -> None:
    raise RuntimeError(
        f"{op}: forward-mode derivatives (jvp, jacfwd) are not supported: use reverse mode (grad, vjp, jacrev; "
        "jacrev(jacrev(f)) for hessian(f))"
    )


def one_by_one(op: Any) -> Callable:
    """Return the vmap rule of an op that reads all of its input: call it once per element."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        def element(a: Any, d: int | None, i: int) -> Any:
            if d is None:
                return a
            return a.select(d, i) if info.batch_size else a.new_zeros(a.shape[:d] + a.shape[d + 1 :])

        results = []
        for i in range(max(1, info.batch_size)):  # zeros in place of no element: for the shapes of the result
            results.append(call(op, *(element(a, d, i) for a, d in zip(args, in_dims, strict=True))))
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        return tuple(torch.stack(r)[: info.batch_size] for r in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
