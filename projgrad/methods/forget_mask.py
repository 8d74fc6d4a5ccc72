"""The mask of `OrthoGrad(mask=...)`: the coordinates that forgetting may change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._options import kind
from .._torch_private import version

Seen = dict[str, tuple[Tensor, int]]  # by name, with how often it was written to


def check_mask(model: nn.Module, params: Mapping[str, nn.Parameter], mask: object) -> dict[str, Tensor]:
    """Return the mask of everything that is updated, by the names in `params`, each on the device of its parameter.

    mask: by the names of the model's parameters; a tied weight goes by any of its names, a frozen one may be missing.

    Raises:
        TypeError: no mapping, or something in it that is no tensor.
        ValueError: an unknown name, a tensor that is not boolean or has another shape than its parameter, no mask for a
            parameter that is updated, or different ones for one parameter.
    """
    if not isinstance(mask, Mapping):
        raise TypeError(f"mask must be a dictionary of boolean tensors by the names of parameters; got {kind(mask)}")
    every = dict(model.named_parameters(remove_duplicate=False))
    name_of = {id(p): name for name, p in params.items()}
    checked: dict[str, Tensor] = {}
    for given, m in mask.items():
        if given not in every:
            raise ValueError(f"mask has {given!r}, which is no parameter of the model; it has {_listed(every)}")
        p = every[given]
        if not isinstance(m, Tensor):
            raise TypeError(f"mask of {given} must be a boolean tensor; got {kind(m)}")
        if m.dtype != torch.bool:
            raise ValueError(f"mask of {given} must be boolean, such as m > 0; got {m.dtype}")
        if m.shape != p.shape:
            raise ValueError(f"mask of {given} has shape {tuple(m.shape)}, the parameter {tuple(p.shape)}")
        name, m = name_of.get(id(p)), m.detach().to(p.device)
        if name is None:  # frozen, or not the optimizer's
            continue
        if name in checked and not torch.equal(m, checked[name]):
            raise ValueError(f"mask differs for two names of one tied parameter, {name} and {given}")
        checked[name] = m
    missing = [name for name in params if name not in checked]
    if missing:
        raise ValueError(
            f"mask has nothing for {_listed(missing)}: give every parameter one that is updated, "
            "torch.zeros(p.shape, dtype=torch.bool) where forgetting may change nothing"
        )
    return checked


def digest(mask: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Return a number of every mask, by which processes compare theirs."""
    return [(name, _hash(m.flatten())) for name, m in mask.items()]


def seen(mask: Mapping[str, Tensor]) -> Seen:
    """Return what `is_seen` needs to know a mask again."""
    return {name: (m, _writes(m)) for name, m in mask.items()}


def is_seen(mask: Mapping[str, Tensor], before: Seen) -> bool:
    """Return whether a mask is the same tensors, not written to, as it was for `seen`."""
    return mask.keys() == before.keys() and all(
        m is before[name][0] and _writes(m) == before[name][1] for name, m in mask.items()
    )


def _writes(m: Tensor) -> int:
    """Return how often a mask was written to; of one made in inference mode nobody knows."""
    return 0 if m.is_inference() else version(m)


def _hash(m: Tensor) -> int:
    """Return the sum of mixed places of the true elements, modulo 2^64; m [p]."""
    total, step = torch.zeros((), dtype=torch.int64, device=m.device), 1 << 20
    for start in range(0, len(m), step):
        k = torch.arange(start + 1, min(start + step, len(m)) + 1, device=m.device)
        k = k * 0x9E3779B97F4A7C1  # products wrap around
        total += ((k ^ (k >> 29)) * 0xBF58476D1CE4E5B)[m[start : start + step]].sum()
    return int(total)


def _listed(names: object) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
