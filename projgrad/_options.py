"""Checks of options: one for each kind, so that all functions refuse the same things with the same words.

All look at Python numbers only: no wait for a device, and nothing that `torch.compile` or `vmap` would see.
"""

import operator
from collections.abc import Sequence

from torch import Tensor


def number(what: str, value: object, allowed: str) -> float:
    """`value` as a float in the interval `allowed`, written as in the message: "[0, 1)" or "(0, inf]". Never NaN.

    Raises:
        TypeError: not one real number. True and False are none: they are meant for another argument.
        ValueError: outside the interval.
    """
    low, high = (float(x) for x in allowed[1:-1].split(","))
    try:
        x = value if type(value) is float else float(_no_flag_no_text(value))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must be a number in {allowed}; got {shown(value)}") from None
    if not ((low <= x if allowed[0] == "[" else low < x) and (x <= high if allowed[-1] == "]" else x < high)):
        raise ValueError(f"{what} must be in {allowed}; got {value}")
    return x


def whole(what: str, value: object, least: int) -> int:
    """`value` as an integer of at least `least`."""
    try:
        x = value if type(value) is int else operator.index(_no_flag_no_text(value))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must be an integer; got {shown(value)}") from None
    if x < least:
        raise ValueError(f"{what} must be at least {least}; got {value}")
    return x


def flag(name: str, value: object) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # those of Python and of NumPy
        raise TypeError(f"{name} must be True or False; got {shown(value)}")
    return bool(value)


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {shown(value)}")


def solver(prefix: str, damping: object, rtol: object) -> tuple[float, float | None]:
    """`damping` and `rtol` of a Gram system; both are relative to a unit diagonal."""
    damping = number(f"{prefix}damping", damping, "[0, inf)")
    return damping, None if rtol is None else number(f"{prefix}rtol", rtol, "[0, 1)")


def clip(value: object) -> float | None:
    """`max_norm`: the largest norm of an update, or None; infinity clips nothing, as in torch."""
    return None if value is None else number("max_norm (None: no clipping)", value, "(0, inf]")


def tensors(op: str, **given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")


def shown(value: object) -> str:
    """A wrong argument in a message: numbers and words as they are, of all else the type."""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else kind(value)


def kind(value: object) -> str:
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"a {name}"


def _no_flag_no_text(value: object) -> object:
    if isinstance(value, (bool, str, bytes)):
        raise TypeError
    return value
