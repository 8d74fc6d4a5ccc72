"""The one-sided t test of a coordinate, as one comparison: quantiles of Student's t, and margins for rounding."""

import functools
import math
from statistics import NormalDist

import torch

from .numerics import product_dtype

SERIES = 1000  # degrees of freedom from which the series in 1 / ν is exact to float64


def tail(t: float, nu: int) -> float:
    """Return P(T > t) for t ≥ 0 and whole degrees of freedom, a finite sum (Abramowitz, Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan2(t, math.sqrt(nu))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    term, total = (math.cos(theta), 0.0) if nu % 2 else (1.0, 0.0)
    for k in range(1 + nu % 2, nu, 2):
        total += term
        term *= square * k / (k + 1)
    within = 2 / math.pi * (theta + sine * total) if nu % 2 else sine * total
    return (1 - within) / 2


@functools.lru_cache
def quantile(level: float, nu: int) -> float:
    """Return t with P(T > t) = level in (0, 1), for Student's t with nu degrees of freedom."""
    if level > 0.5:
        return -quantile(1 - level, nu)
    if nu >= SERIES:  # Abramowitz and Stegun, 26.7.5
        z = -NormalDist().inv_cdf(level)
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return z + sum(term / nu**k for k, term in enumerate(terms, 1))
    low, high = 0.0, 1.0
    while tail(high, nu) > level:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if tail(middle, nu) > level else (low, middle)
    return high


@functools.lru_cache
def feasibility_thresholds(n: int, level: float, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return bound, slack and floor of `reference.feasible` for sums over n samples held in `dtype`; level 1 keeps all.

    The sums are rounded, and the test must not be less careful for it. Formed in any order in float32 (float64 for
    float64) and rounded once to `dtype`, with e = (n + 4) eps + eps of `dtype`:

        |Σg² - S| ≤ e S,   |Σg - T| ≤ e √(n S),   so that for e ≤ 1/6
        (n - 1) s² ≤ max(S - T² / n, 0) + 4 e S   and   |mean| is short by at most e √(S / n) ≤ e (|mean| + s)

    and the test |mean| ≥ q s / √n becomes |mean| ≥ Q s with Q = (q / √n + e) / (1 - e). Squares that vanish below the
    range of a type are covered by the smallest normal number for each sample. In this form, with r = T / √n and V the
    bound on (n - 1) s², it is r² ≥ Q² n / (n - 1) V: no root, no division.
    """
    stored, summed = torch.finfo(dtype), torch.finfo(product_dtype(dtype))
    e = (n + 4) * summed.eps + stored.eps
    if e > 1 / 6:
        raise ValueError(f"n = {n} samples are too many for sums in {summed.dtype}: the test would be about rounding")
    q = -math.inf if level >= 1 else quantile(level, n - 1)
    Q = (q / math.sqrt(n) + e) / (1 - e)
    return max(Q * abs(Q) * n / (n - 1), -1e300), 4 * e, n * summed.smallest_normal + stored.smallest_normal
