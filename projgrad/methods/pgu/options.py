"""Checks of what `PGU` is made with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..._options import check_callable, check_choice, check_real
from .spectra import RULES


def check_options(
    model: object, optimizer: object, rule: object, max_norm: object, forward: object, **switches: object
) -> None:
    """Check types and ranges; raises TypeError or ValueError with what to write instead."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"PGU: model must be a torch.nn.Module, and comes first; got {type(model).__name__}")
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"PGU: optimizer must be an optimizer made of the model's parameters; got {got}")
    check_choice("PGU: rule", rule, RULES)
    if max_norm is not None:
        check_real("PGU: max_norm", max_norm, "a positive number, or None", lambda x: x > 0)
    if forward is not None:
        check_callable("PGU: forward", forward, "a function (model, batch), or None")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"PGU: {name} must be True or False; got {value!r}")


def shares(gamma: float | Mapping[str, float], weights: Collection[str]) -> dict[str, float]:
    """Return γ by name, with "default" for the weights that it does not name.

    Raises:
        ValueError: a share outside (0, 1], an unknown name, or a weight without one.
        TypeError: a share that is no number.
    """
    given = gamma if isinstance(gamma, Mapping) else {"default": gamma}
    checked = {}
    for name, value in given.items():
        if name != "default" and name not in weights:
            raise ValueError(f"PGU: gamma names {name}, which is no weight that the optimizer holds")
        wanted = "a share of the spectrum, in (0, 1]"
        checked[name] = check_real(f"PGU: gamma for {name}", value, wanted, lambda x: 0 < x <= 1)
    missing = [] if "default" in checked else [name for name in weights if name not in checked]
    if missing:
        raise ValueError(f'PGU: gamma must have "default" or name every weight; it lacks {", ".join(missing)}')
    return checked
