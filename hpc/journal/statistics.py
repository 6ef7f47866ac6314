"""Means over seeds: their interval, and the t-tests of one group of runs against another, in plain Python.

The distribution is Student's; its tail is the regularised incomplete beta function, by the continued fraction of
Numerical Recipes, 3rd edition, section 6.4.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_TINY, _CLOSE, _ROUNDS = 1e-300, 1e-15, 2000


@dataclass(frozen=True)
class Test:
    """Of one mean against another, two-sided."""

    change: float
    """Of the means; of pairs the mean of their differences."""
    p: float | None
    """None where nothing scatters: a test says nothing then."""
    freedom: float
    """Degrees of freedom of the t distribution."""


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """Half the width of the mean's t interval; None of fewer than two values."""
    if len(values) < 2:
        return None
    quantile = t_quantile((1 + confidence) / 2, len(values) - 1)
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired(values: Sequence[float], others: Sequence[float]) -> Test:
    """The t-test of the differences of pairs, of which there are at least two. Raises ValueError."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    freedom, change = len(differences) - 1, statistics.fmean(differences)
    scatter = statistics.stdev(differences) / math.sqrt(len(differences))
    # Differences that are alike but for rounding would be called certain.
    rounding = 8 * math.ulp(max(map(abs, (*values, *others))))
    return Test(change, p_value(change / scatter, freedom) if scatter > rounding else None, freedom)


def welch(values: Sequence[float], others: Sequence[float]) -> Test:
    """Welch's t-test, of at least two values on each side; the groups may scatter differently."""
    change = statistics.fmean(values) - statistics.fmean(others)
    parts = [statistics.variance(side) / len(side) for side in (values, others)]
    rounding = 8 * math.ulp(max(map(abs, (*values, *others))))
    if (scatter := math.sqrt(sum(parts))) <= rounding:
        return Test(change, None, len(values) + len(others) - 2)
    # Shares of the whole, so that tiny variances do not underflow when they are squared.
    shares = [part / sum(parts) for part in parts]
    freedom = 1 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, (values, others), strict=True))
    return Test(change, p_value(change / scatter, freedom), freedom)


def p_value(t: float, freedom: float) -> float:
    """Two-sided: the probability of a t as far from 0, with so many degrees of freedom."""
    if math.isinf(t):
        return 0.0
    # t*t/(freedom + t*t) and its complement: each is exact where it is small.
    near = t * t / (freedom + t * t)
    return beta(freedom / 2, 0.5, freedom / (freedom + t * t), near)


def t_quantile(share: float, freedom: float) -> float:
    """The t below which `share` of the distribution lies, by halving. Raises ValueError outside of (0, 1)."""
    if not 0 < share < 1 or freedom <= 0:
        raise ValueError(f"no quantile {share} of {freedom} degrees of freedom")
    if share < 0.5:
        return -t_quantile(1 - share, freedom)
    tail, low, high = 2 * (1 - share), 0.0, 1.0
    while p_value(high, freedom) > tail:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if p_value(middle, freedom) > tail else (low, middle)
    return high


def beta(a: float, b: float, x: float, rest: float | None = None) -> float:
    """The regularised incomplete beta function I_x(a, b); `rest` is 1 - x, where that is known better."""
    rest = 1 - x if rest is None else rest
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    if x < (a + 1) / (a + b + 2):
        return math.exp(front) * _fraction(a, b, x) / a
    return 1 - math.exp(front) * _fraction(b, a, rest) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b), by Lentz's method."""
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _ROUNDS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / _away(1 + term * d), _away(1 + term / c)
            found *= d * c
        if abs(d * c - 1) < _CLOSE:
            break
    return found


def _away(value: float) -> float:
    """From zero."""
    return value if abs(value) > _TINY else _TINY
