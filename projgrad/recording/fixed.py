"""The tensors of a model that depend neither on what is followed nor on the samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

USUAL = vars(nn.Module()).keys() | {"in_features", "out_features"}  # attributes that hold no tables


def fixed_tensors(model: nn.Module, followed: Iterable[Tensor]) -> list[Tensor]:
    """Return buffers, frozen parameters and tables of a model."""
    ids = {id(p) for p in followed}
    fixed: list[Tensor] = []
    for module in modules_of(model):
        attributes = vars(module)
        fixed += [b for b in attributes["_buffers"].values() if b is not None]
        for p in attributes["_parameters"].values():
            if p is not None and not (p.requires_grad or id(p) in ids):
                fixed.append(p)
        for name, value in attributes.items():
            if name not in USUAL and isinstance(value, (Tensor, dict)):
                fixed += _tables(value)
    return fixed


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, without dropout, inside, and put every module's mode back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return every module once, in no order that matters; `modules()` takes five times as long."""
    found, modules = {model}, [model]
    for module in modules:
        for inner in vars(module)["_modules"].values():
            if inner is not None and inner not in found:
                found.add(inner)
                modules.append(inner)
    return modules


def _tables(value: object) -> list[Tensor]:
    """Return the integer tensors that a module keeps in an attribute, such as the ids of virtual tokens."""
    values = value.values() if isinstance(value, dict) else (value,)
    return [t for t in values if isinstance(t, Tensor) and not t.dtype.is_floating_point]
