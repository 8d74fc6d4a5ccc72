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
FORGETTING = "forgetting fades"  # there is a rate, and the forget loss limits it, not the retain losses


class Limit(NamedTuple):
    """rate: the largest one, or None. why: UNBOUNDED or ROUNDING, where there is none."""

    rate: float | None
    why: str = ""


def largest_rate(used: Callable[[float], float], start: float, smallest: float, largest: float) -> Limit:
    """Find the rate η at which effects of second order use up what they may be beside those of first order.

    used(η) = 1

    A quotient of the second order by the first is proportional to η: every trial is the last one over what it used,
    and the second is right. Further terms take more trials, with bisection of log η where one leaves the bracket. Of
    several solutions one is found.

    Args:
        used: of a rate; NaN and infinity count as too much.
        start: the first trial. smallest, largest: rates beyond which rounding, or nothing at all, is measured.
    """
    low = high = None
    rate = start
    for _ in range(TRIALS):
        ratio = used(rate)
        if abs(ratio - 1) <= CLOSE:
            return Limit(rate)
        if ratio < 1:
            low = rate
        else:
            high = rate
        if low and high and high / low <= 1 + CLOSE:
            return Limit(low)
        if low == rate and rate >= largest:
            return Limit(None, UNBOUNDED)
        if high == rate and rate <= smallest:
            return Limit(None, ROUNDING)
        factor = 1 / ratio if ratio > 0 else math.inf
        if not math.isfinite(ratio):
            factor = 0.1
        following = rate * min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        if low and high and not low < following < high:
            following = math.sqrt(low * high)
        rate = min(max(following, smallest), largest)
    return Limit(low) if low else Limit(None, ROUNDING)
