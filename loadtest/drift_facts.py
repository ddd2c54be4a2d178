"""What a report holds of drift, and its chart."""

from dataclasses import asdict
from typing import Any

from loadtest.document import Strict
from loadtest.drift import Drift, Soak
from loadtest.trend import Trend

COLOURS = ("#4a7fd0", "#2f9e6e", "#8d5fc4", "#d6453d", "#7a7a7a")


class TrendFacts(Strict):
    """A line through a series; bounds of its slope with 95 % confidence, two-sided."""

    n: int
    per_s: float
    low_per_s: float
    high_per_s: float
    start: float
    end: float
    grows: bool
    """surely, over the whole window and over its second half alone"""


class MemoryFacts(Strict):
    url: str
    trend: TrendFacts | None
    """in bytes; none: too few samples"""
    time_s: tuple[float, ...]
    n_bytes: tuple[float, ...]


class DriftFacts(Strict):
    horizon_s: float | None
    """none: shown, not judged"""
    latency: TrendFacts | None
    """of the latency at the objective's quantile, in seconds; none: too few requests"""
    memory: tuple[MemoryFacts, ...]


def drift_facts(drift: Drift, soak: Soak) -> DriftFacts:
    return DriftFacts(
        horizon_s=soak.horizon_s,
        latency=_trend_facts(drift.latency),
        memory=tuple(
            MemoryFacts(
                url=one.series.url,
                trend=_trend_facts(one.trend),
                time_s=tuple(one.series.time_s.tolist()),
                n_bytes=tuple(one.series.n_bytes.tolist()),
            )
            for one in drift.memory
        ),
    )


def memory_chart(facts: DriftFacts) -> dict[str, Any]:
    """Resident memory of each server over the window, in megabytes."""
    traces = [
        {
            "x": list(one.time_s),
            "y": [value / 1e6 for value in one.n_bytes],
            "name": one.url,
            "mode": "lines",
            "line": {"color": COLOURS[index % len(COLOURS)], "width": 2},
            "hovertemplate": "%{y:.4g} MB",
        }
        for index, one in enumerate(facts.memory)
    ]
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "time, s"}},
            "yaxis": {"title": {"text": "resident memory, MB"}, "rangemode": "tozero"},
            "hovermode": "x unified",
        },
    }


def _trend_facts(trend: Trend | None) -> TrendFacts | None:
    return None if trend is None else TrendFacts(**asdict(trend))
