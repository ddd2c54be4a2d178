"""Drift of a long run: whether latency and the servers' memory grow towards their limits.

Facts are for every run that is long enough. They become reasons only where the user says how far
ahead to look: a promise that was kept in the window isn't one that will be.
"""

import math
from dataclasses import dataclass

import numpy as np

from loadtest.memory import MemorySeries
from loadtest.reasons import AnyReason, LatencyDrifts, MemoryGrows
from loadtest.samples import FloatArray, Samples
from loadtest.slo import LatencyObjective
from loadtest.trend import MIN_POINTS, Trend, trend

MAX_BINS = 100
SLOW_PER_BIN = 5
"""Requests beyond the quantile that a bin must hold."""
CORRELATIONS_PER_BIN = 10
"""So that bins are nearly independent, as the trend takes them to be."""
MEMORY_FACTOR = 2.0
"""Where no limit is given: memory that would double within the horizon is too much."""


@dataclass(frozen=True)
class Soak:
    """What a run knows of drift beside its samples."""

    memory: tuple[MemorySeries, ...] = ()
    horizon_s: float | None = None
    """how far ahead of the window's end to look; none: drift isn't judged"""
    max_memory_bytes: float | None = None
    """none: MEMORY_FACTOR times what it had at the start"""


@dataclass(frozen=True)
class MemoryDrift:
    series: MemorySeries
    trend: Trend | None
    """none: too few samples"""


@dataclass(frozen=True)
class Drift:
    latency: Trend | None
    """of the latency at the objective's quantile, in seconds; none: too few requests"""
    memory: tuple[MemoryDrift, ...]


def drift_of(
    samples: Samples, objective: LatencyObjective, correlation_requests: float, soak: Soak
) -> Drift:
    times_s, latencies_s = latency_series(samples, objective.quantile, correlation_requests)
    return Drift(
        latency=trend(times_s, latencies_s),
        memory=tuple(MemoryDrift(one, trend(one.time_s, one.n_bytes)) for one in soak.memory),
    )


def latency_series(
    samples: Samples, quantile: float, correlation_requests: float
) -> tuple[FloatArray, FloatArray]:
    """Times and latencies at the quantile, [m] each, of bins of as many successes in turn.

    Failures have no latency and are the success ratio's. A bin holds at least SLOW_PER_BIN
    requests beyond the quantile and CORRELATIONS_PER_BIN correlation times; m is at most
    MAX_BINS, and 0 where there aren't MIN_POINTS such bins.
    """
    latency_s, time_s = samples.latency_s[samples.ok], samples.intended_s[samples.ok]
    least = max(SLOW_PER_BIN / (1 - quantile), CORRELATIONS_PER_BIN * correlation_requests)
    m = min(MAX_BINS, int(len(latency_s) / least))
    if m < MIN_POINTS:
        return np.zeros(0), np.zeros(0)
    each = len(latency_s) // m
    bins = latency_s[: m * each].reshape(m, each)
    rank = min(each, math.ceil(quantile * each)) - 1
    return (
        time_s[: m * each].reshape(m, each).mean(axis=1),
        np.partition(bins, rank, axis=1)[:, rank],
    )


def drift_reasons(drift: Drift, objective: LatencyObjective, soak: Soak) -> list[AnyReason]:
    """Growth that is sure, and that even at its lower bound reaches the limit in the horizon."""
    if soak.horizon_s is None:
        return []
    reasons: list[AnyReason] = []
    found = drift.latency
    if found is not None and found.grows:
        left_s = (objective.threshold_s - found.end) / found.low_per_s
        if left_s <= soak.horizon_s:
            reasons.append(
                LatencyDrifts(
                    quantile=objective.quantile,
                    threshold_s=objective.threshold_s,
                    latency_s=found.end,
                    growth_s_per_hour=found.per_s * 3600,
                    least_growth_s_per_hour=found.low_per_s * 3600,
                    reached_in_s=max(0.0, left_s),
                    horizon_s=soak.horizon_s,
                )
            )
    for one in drift.memory:
        found = one.trend
        if found is None or not found.grows:
            continue
        limit = soak.max_memory_bytes or MEMORY_FACTOR * found.start
        left_s = (limit - found.end) / found.low_per_s
        if left_s <= soak.horizon_s:
            reasons.append(
                MemoryGrows(
                    url=one.series.url,
                    memory_bytes=found.end,
                    limit_bytes=limit,
                    growth_bytes_per_hour=found.per_s * 3600,
                    least_growth_bytes_per_hour=found.low_per_s * 3600,
                    reached_in_s=max(0.0, left_s),
                    horizon_s=soak.horizon_s,
                )
            )
    return reasons
