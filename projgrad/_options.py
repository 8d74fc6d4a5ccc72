"""Checks of options: a wrong one is named, with what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def number(value: Any) -> float | int | None:
    """A number of Python, numpy or a tensor without dimensions; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, Real) else None


def check_real(what: str, value: Any, wanted: str, allowed: Callable[[float], bool]) -> float:
    """A finite number for which `allowed` holds.

    Raises TypeError for anything but a number, ValueError for another one; both say that it must be `wanted`.
    """
    found = None if isinstance(value, bool) else number(value)
    if found is None:
        raise TypeError(f"{what} must be {wanted}; got {value!r}")
    if not (math.isfinite(found) and allowed(found)):
        raise ValueError(f"{what} must be {wanted}; got {found}")
    return found


def check_integer(what: str, value: Any, least: int) -> int:
    """An integer of at least `least`; raises as `check_real` does."""
    wanted = f"an integer of at least {least}"
    found = check_real(what, value, wanted, lambda number: number >= least)
    if not isinstance(found, Integral):
        raise TypeError(f"{what} must be {wanted}; got {value!r}")
    return int(found)


def check_callable(what: str, value: Any, wanted: str) -> None:
    if not callable(value):
        raise TypeError(f"{what} must be {wanted}; got {type(value).__name__}")
