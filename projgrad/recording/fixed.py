"""The tensors of a model that depend neither on what is followed nor on the samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from .._torch_private import compiles_itself, is_compiled


def fixed_tensors(model: nn.Module, followed: Iterable[Tensor]) -> list[Tensor]:
    """Return buffers, frozen parameters and tables of a model; refuse one of which a part is compiled."""
    ids = {id(p) for p in followed}
    fixed: list[Tensor] = []
    for module in model.modules():
        if is_compiled(module):
            raise ValueError("a compiled model hides its operations: pass the original module (`model._orig_mod`)")
        if compiles_itself(module):
            raise ValueError("model.compile() hides the model's operations: pass a module that was not compiled")
        fixed += module.buffers(recurse=False)
        fixed += [p for p in module.parameters(recurse=False) if not (id(p) in ids or p.requires_grad)]
        fixed += _tables(module)
    return fixed


def _tables(module: nn.Module) -> Iterator[Tensor]:
    """Yield integer tensors that a module keeps as plain attributes, such as the ids of virtual tokens."""
    for value in vars(module).values():
        for t in value.values() if isinstance(value, dict) else (value,):
            if isinstance(t, Tensor) and not t.dtype.is_floating_point:
                yield t
