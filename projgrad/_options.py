"""Checks of options: a wrong one is named, with what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def number(value: Any) -> float | int | None:
    """Return the number, of Python, numpy or a tensor without dimensions (truth values too); None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, Real) else None


def check_integer(what: str, value: Any, least: int) -> int:
    """Return an integer of at least `least`; raises TypeError for what is no integer, ValueError for a smaller one."""
    # The type of Python first: it is all that torch.compile can follow here.
    integer = value if type(value) is int else number(value)
    if not isinstance(integer, Integral) or isinstance(integer, bool):
        raise TypeError(f"{what} must be an integer of at least {least}; got {shown(value)}")
    if integer < least:
        raise ValueError(f"{what} must be an integer of at least {least}; got {integer}")
    return int(integer)


def check_callable(what: str, value: Any, wanted: str) -> None:
    if not callable(value):
        raise TypeError(f"{what} must be {wanted}; got {type(value).__name__}")


def within(what: str, value: Any, interval: str) -> float:
    """Return a number in an interval such as "[0, 1)" or "(0, inf]".

    Raises TypeError for what is no number, ValueError for one outside, NaN among them.
    """
    # The types of Python first: they are all that torch.compile can follow here.
    real = value if type(value) in (float, int) else number(value)
    if real is None or isinstance(real, bool):
        raise TypeError(f"{what} must be a number in {interval}; got {shown(value)}")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= real if interval[0] == "[" else low < real  # both False for NaN
    below = real <= high if interval[-1] == "]" else real < high
    if not (above and below):
        raise ValueError(f"{what} must be in {interval}; got {real}")
    return float(real)


def check_solver(prefix: str, damping: Any, rtol: Any) -> tuple[float, float | None]:
    """Check `damping` and `rtol` of a Gram system and return them; both are relative to a unit diagonal."""
    damping = within(f"{prefix}damping", damping, "[0, inf)")
    return damping, None if rtol is None else within(f"{prefix}rtol", rtol, "[0, 1)")


def check_max_norm(value: Any) -> float | None:
    """Check the largest norm of an update and return it, or None; infinity clips nothing, as in torch."""
    return None if value is None else within("max_norm (None: no clipping)", value, "(0, inf]")


def check_flag(name: str, value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # those of Python and of NumPy
        raise TypeError(f"{name} must be True or False; got {shown(value)}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {shown(value)}")


def check_tensors(op: str, **given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")
        if value.is_nested or value.layout != torch.strided:
            kind_of = "a nested one" if value.is_nested else f"one of layout {value.layout}"
            raise TypeError(f"{op}: {name} must be a dense tensor; got {kind_of}")


def shown(value: Any) -> str:
    """Write a wrong argument for a message: numbers and words as they are, of all else the type."""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else kind(value)


def kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def outside() -> int:
    """Return the stacklevel of a warning that points to who called projgrad, perhaps by way of torch."""
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("projgrad", "torch", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
