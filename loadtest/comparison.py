"""Two load tests side by side: what changed, and whether it is more than chance.

Only runs of the same promise at the same load can be compared. The share of good requests
decides, since it is the objective; latencies are shown.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from loadtest.report import Report

CONFIDENCE = 0.95
"""Two-sided."""

Change = Literal["better", "worse", "no difference shown"]


class NotComparable(ValueError):
    """Reports of different promises or loads; `str()` says in what they differ."""


@dataclass(frozen=True)
class Comparison:
    """`after` less `before`; seconds and shares."""

    change: Change
    share_difference: float
    share_low: float
    share_high: float
    """bounds of the difference"""
    latencies_s: tuple[tuple[float, float | None, float | None], ...]
    """(quantile, before, after); none where so many got no good answer"""
    goodput_per_s: tuple[float, float]


def compare(before: Report, after: Report) -> Comparison:
    """Raises NotComparable."""
    _check_same_promise(before, after)
    low, high = share_difference_bounds(
        (before.requests.n_good, before.requests.n, before.good_share.correlation_requests),
        (after.requests.n_good, after.requests.n, after.good_share.correlation_requests),
    )
    change: Change = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    seen = {one.quantile: one.latency_s for one in after.latency}
    return Comparison(
        change=change,
        share_difference=after.good_share.estimate - before.good_share.estimate,
        share_low=low,
        share_high=high,
        latencies_s=tuple(
            (one.quantile, one.latency_s, seen[one.quantile]) for one in before.latency
        ),
        goodput_per_s=(before.requests.goodput_per_s, after.requests.goodput_per_s),
    )


def share_difference_bounds(
    before: tuple[int, int, float],
    after: tuple[int, int, float],
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Bounds of the difference of two shares, each (number good, number, correlation time).

    Newcombe's score interval for independent shares (1998, Statistics in Medicine 17, method
    10), with the effective numbers in place of the numbers.
    """
    p, p_low, p_high = _wilson(*before, confidence)
    q, q_low, q_high = _wilson(*after, confidence)
    return (
        (q - p) - math.hypot(q - q_low, p_high - p),
        (q - p) + math.hypot(q_high - q, p - p_low),
    )


def _wilson(
    n_good: int, n: int, correlation_requests: float, confidence: float
) -> tuple[float, float, float]:
    """The share and its score interval (Wilson 1927, JASA 22)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, effective_n = n_good / n, n / correlation_requests
    middle = share + z * z / (2 * effective_n)
    half = z * math.sqrt(share * (1 - share) / effective_n + (z / (2 * effective_n)) ** 2)
    scale = 1 + z * z / effective_n
    return share, (middle - half) / scale, (middle + half) / scale


def _check_same_promise(before: Report, after: Report) -> None:
    for name, one, other in (
        ("latency", before.slo.latency, after.slo.latency),
        ("workload", before.slo.workload, after.slo.workload),
        ("profile", before.run.profile, after.run.profile),
        ("closed loop", before.run.closed_loop, after.run.closed_loop),
        ("chaos", before.run.chaos, after.run.chaos),
    ):
        if one != other:
            raise NotComparable(
                f"{name}: got {one} before and {other} after, want the same in both runs"
            )
