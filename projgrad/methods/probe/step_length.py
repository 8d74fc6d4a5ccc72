"""How long a step may be until its second-order effects count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

LARGEST_FACTOR = 100.0  # between two trials
CLOSE = 0.05  # relative; a learning rate needs no more digits
TRIALS = 30

UNBOUNDED = "no limit found"
ROUNDING = "rounding"
NOTHING = "nothing left"


class Limit(NamedTuple):
    """rate: the largest one, or None. why: UNBOUNDED or ROUNDING, where there is none."""

    rate: float | None
    why: str = ""


def largest_rate(
    change: Callable[[float], float], slope: float, start: float, tolerance: float, smallest: float, largest: float
) -> Limit:
    """Find the rate η at which a change of second order reaches a share of one of first order.

    change(η) = tolerance · slope · η

    A change of exactly second order, ½ η² m, gives η = 2 tolerance · slope / m, in two trials: the ratio of both sides
    is proportional to η, and every trial is the last one times tolerance / ratio. Further terms take more, with
    bisection of log η where a trial leaves the bracket. Of several solutions one is found.

    Args:
        change: of a rate, at least 0; NaN and infinity count as too much.
        start: the first trial. smallest, largest: rates beyond which rounding, or nothing at all, is measured.
    """
    low = high = None
    rate = start
    for _ in range(TRIALS):
        ratio = change(rate) / (rate * slope)
        if abs(ratio / tolerance - 1) <= CLOSE:
            return Limit(rate)
        if ratio < tolerance:
            low = rate
        else:
            high = rate
        if low and high and high / low <= 1 + CLOSE:
            return Limit(low)
        if low == rate and rate >= largest:
            return Limit(None, UNBOUNDED)
        if high == rate and rate <= smallest:
            return Limit(None, ROUNDING)
        factor = tolerance / ratio if ratio else math.inf
        if not math.isfinite(ratio):
            factor = 0.1
        following = rate * min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        if low and high and not low < following < high:
            following = math.sqrt(low * high)
        rate = min(max(following, smallest), largest)
    return Limit(low) if low else Limit(None, ROUNDING)
