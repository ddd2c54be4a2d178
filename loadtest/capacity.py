"""The highest rate at which a share of the requests is good, found by measuring at chosen rates.

Knows no server: `measure` is given, and a simulation will do. Three phases: double or halve the
rate until it is bracketed, bisect the bracket, then measure near the crossing again and again,
as one measurement of a queue near its limit says little. The rate comes from an isotonic fit of
all points, so that no single lucky or unlucky run decides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loadtest.samples import FloatArray

MAX_DOUBLINGS = 12
BRACKET_RATIO = 1.12
"""Bisection ends where the bracket is this narrow."""
NEAR_CROSSING = (0.97, 1.03, 0.99, 1.01, 0.95, 1.05, 0.98, 1.02)
"""Where the last measurements are made, as multiples of the crossing found so far."""

Ending = Literal["found", "unusable", "not_bracketed"]


@dataclass(frozen=True)
class Point:
    """One measurement."""

    rate_per_s: float
    bad_share: float
    effective_n: float
    """independent requests that say as much"""
    usable: bool = True
    """false where the load generator, not the server, was the limit"""


@dataclass(frozen=True)
class Capacity:
    """`rate_per_s` is none where no crossing was found."""

    ending: Ending
    rate_per_s: float | None
    points: tuple[Point, ...]
    """in the order of measuring"""


def find_capacity(
    measure: Callable[[float], Point], start_per_s: float, quantile: float, max_per_s: float
) -> Capacity:
    """Search from `start_per_s` on, up to `max_per_s`, for where the bad share is 1 - quantile.

    It ends at the first point that isn't usable, since higher rates won't be either.
    """
    points: list[Point] = []
    max_bad = 1 - quantile

    def is_good(rate_per_s: float) -> bool | None:
        points.append(measure(rate_per_s))
        return points[-1].bad_share <= max_bad if points[-1].usable else None

    bracket = _bracket(is_good, start_per_s, max_per_s)
    if bracket is None:
        ending: Ending = "not_bracketed" if points[-1].usable else "unusable"
        return Capacity(ending, None, tuple(points))
    low, high = bracket
    while high / low > BRACKET_RATIO:
        middle = math.sqrt(low * high)
        good = is_good(middle)
        if good is None:
            return Capacity("unusable", None, tuple(points))
        low, high = (middle, high) if good else (low, middle)
    for near in NEAR_CROSSING:
        rate_per_s = crossing(points, max_bad)
        if is_good((rate_per_s or math.sqrt(low * high)) * near) is None:
            return Capacity("unusable", None, tuple(points))
    return Capacity("found", crossing(points, max_bad), tuple(points))


def _bracket(
    is_good: Callable[[float], bool | None], start_per_s: float, max_per_s: float
) -> tuple[float, float] | None:
    rate_per_s = start_per_s
    first = is_good(rate_per_s)
    if first is None:
        return None
    for _ in range(MAX_DOUBLINGS):
        before = rate_per_s
        rate_per_s = min(max_per_s, rate_per_s * 2) if first else rate_per_s / 2
        if rate_per_s == before:
            return None
        good = is_good(rate_per_s)
        if good is None:
            return None
        if good != first:
            return (before, rate_per_s) if first else (rate_per_s, before)
    return None


def crossing(points: Sequence[Point], max_bad: float) -> float | None:
    """The rate at which the isotonic fit of the bad share passes `max_bad`; none if it doesn't.

    Between the two blocks of the fit around it the logarithms of share and rate are taken as
    linear, which the tail of a queue nearly is. Half a request is added to good and bad.
    """
    ordered = sorted(points, key=lambda one: one.rate_per_s)
    log_rate = np.log([one.rate_per_s for one in ordered])
    weights = np.array([one.effective_n for one in ordered])
    shares = np.array([one.bad_share for one in ordered])
    starts = isotonic_blocks(shares, weights)
    weight = np.add.reduceat(weights, starts)
    rate = np.add.reduceat(weights * log_rate, starts) / weight
    share = (np.add.reduceat(weights * shares, starts) + 0.5) / (weight + 1)
    above = np.flatnonzero(share > max_bad)
    if len(above) == 0 or above[0] == 0:
        return None
    low, high = above[0] - 1, above[0]
    y_low, y_high, y = math.log(share[low]), math.log(share[high]), math.log(max_bad)
    part = (y - y_low) / (y_high - y_low)
    return float(np.exp(rate[low] + part * (rate[high] - rate[low])))


def isotonic_blocks(values: FloatArray, weights: FloatArray) -> list[int]:
    """Where the blocks begin of the ascending sequence closest to `values`, [n].

    Pool adjacent violators (Ayer et al. 1955, Annals of Mathematical Statistics 26): neighbours
    that fall are put together, at their weighted mean, until none do.
    """
    blocks: list[tuple[int, float, float]] = []
    for index, (value, weight) in enumerate(zip(values.tolist(), weights.tolist(), strict=True)):
        start, mean, total = index, value, weight
        while blocks and blocks[-1][1] >= mean:
            start, other, more = blocks.pop()
            mean = (mean * total + other * more) / (total + more)
            total += more
        blocks.append((start, mean, total))
    return [start for start, _, _ in blocks]
