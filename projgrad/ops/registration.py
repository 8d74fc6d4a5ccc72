"""A second way into the ops, for the transformations of torch.func: they know gradients of `torch.autograd.Function`s,
not those of custom ops. Inside torch.compile, which knows neither there, vmap alone works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import inside_transform, name_of

FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def register(op: Any, setup: Callable, backward: Callable, vmap: Callable) -> None:
    """Gradient and vmap rule of an op, for autograd and for torch.func alike."""
    op.register_autograd(backward, setup_context=setup)
    op.register_vmap(vmap)
    name = name_of(op)

    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode(name)

    rules = {"forward": lambda *args: op(*args), "setup_context": setup, "backward": backward, "vmap": vmap, "jvp": jvp}
    FUNCTIONS[op] = type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})


def call(op: Any, *args: Any) -> Any:
    """The op, which a gradient formula or a vmap rule must call like this too, so that transformations nest."""
    if torch.compiler.is_compiling() or not inside_transform():
        return op(*args)
    return FUNCTIONS[op].apply(*args)


def refuse_forward_mode(op: str) -> None:
    raise RuntimeError(
        f"{op}: forward-mode derivatives (jvp, jacfwd) are not supported: use reverse mode (grad, vjp, jacrev; "
        "jacrev(jacrev(f)) for hessian(f))"
    )


def one_by_one(op: Any) -> Callable:
    """The vmap rule of an op that reads all of its input: once per element."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        def element(i: int) -> list:
            return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

        def empty(a: Tensor, d: int) -> Tensor:
            return a.new_zeros(a.shape[:d] + a.shape[d + 1 :])

        if info.batch_size:
            results = [call(op, *element(i)) for i in range(info.batch_size)]
        else:  # the shapes of what there would be
            results = [call(op, *(a if d is None else empty(a, d) for a, d in zip(args, in_dims, strict=True)))]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        return tuple(torch.stack(r)[: info.batch_size] for r in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
