"""The tensors of a model that depend neither on what is followed nor on the samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .compiled import compiled

USUAL = frozenset(vars(nn.Module())) | {"in_features", "out_features"}  # attributes that hold no tables


def fixed_tensors(model: nn.Module, followed: Iterable[Tensor]) -> list[Tensor]:
    """Return buffers, frozen parameters and tables of a model."""
    ids, fixed, modules = {id(p) for p in followed}, [], modules_of(model)
    for module in modules:
        fixed += [b for b in held(module, "_buffers").values() if b is not None]
        for p in held(module, "_parameters").values():
            if p is not None and not (p.requires_grad or id(p) in ids):
                fixed.append(p)
    for value in attributes_of(modules, USUAL):
        values = value.values() if isinstance(value, dict) else (value,)
        fixed += [t for t in values if isinstance(t, Tensor) and not t.dtype.is_floating_point]
    return fixed


def attributes_in_python(modules: Iterable[nn.Module], usual: Collection[str]) -> list[Tensor | dict]:
    """Return the tensors and dictionaries that modules hold in attributes of other names than the usual ones.

    Integer tensors among them are tables that no sample changes, such as the ids of virtual tokens.
    """
    return [
        value
        for module in modules
        for name, value in vars(module).items()
        if name not in usual and isinstance(value, (Tensor, dict))
    ]


attributes_of = attributes_in_python if compiled is None else compiled.attributes


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


def held(module: nn.Module, kind: str) -> Mapping[str, Any]:
    """Return the "_modules", "_parameters" or "_buffers" right inside of a module, by name."""
    found = vars(module).get(kind)
    return getattr(module, kind) if found is None else found  # what torch.jit.trace made asks another object


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return every module once, with what stands before the names of its parameters.

    The order is that of `named_modules()`, which takes five times as long.
    """
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module not in found:
            found[module] = prefix
            if inner := held(module, "_modules"):
                waiting += [(f"{prefix}{name}.", m) for name, m in reversed(inner.items()) if m is not None]
    return found


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, each once, as `named_parameters()` does, which takes twice as long."""
    if type(model).named_parameters is not nn.Module.named_parameters:  # a model that names its parameters itself
        return dict(model.named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for module, prefix in modules_of(model).items():
        for name, p in held(module, "_parameters").items():
            if p is not None and id(p) not in found:
                found[id(p)] = prefix + name, p
    return dict(found.values())
