"""How long a server took to recover from a disturbance, and how many requests it lost by then.

Exact, from each request's own times; knows neither what the disturbance was nor what is allowed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from loadtest.samples import DROPPED, BoolArray, FloatArray, Samples
from loadtest.slo import LatencyObjective


@dataclass(frozen=True)
class Recovery:
    recovery_s: float | None
    """from the disturbance's start; 0 where nothing was lost; none: not within the window"""
    n_lost: int
    """bad requests intended before the recovery that ended after the disturbance's start"""


def recovery_of(
    samples: Samples,
    objective: LatencyObjective,
    window_s: float,
    start_s: float,
    hold_s: float,
) -> Recovery:
    """What a disturbance that began at `start_s` of the window did.

    The server has recovered at the intended time of the first good request, intended at
    `start_s` or later, from which at least the objective's quantile of the requests intended in
    the next `hold_s` are good; those must lie in the window. A request is good if it was answered
    with a success within the threshold.
    """
    intended_s = samples.intended_s
    good = samples.ok & (samples.latency_s <= objective.threshold_s)
    first = int(np.searchsorted(intended_s, start_s, "left"))
    begins = np.arange(first, len(intended_s))
    ends = np.searchsorted(intended_s, intended_s[first:] + hold_s, "left")
    before = np.concatenate([[0], np.cumsum(good)])
    share = (before[ends] - before[begins]) / (ends - begins)
    held = good[first:] & (share >= objective.quantile) & (intended_s[first:] + hold_s <= window_s)
    recovered = np.flatnonzero(held)
    moment_s = float(intended_s[first + recovered[0]]) if len(recovered) else np.inf
    lost = ~good & (intended_s < moment_s) & (ends_of(samples) > start_s)
    n_lost = int(lost.sum())
    if not len(recovered):
        return Recovery(None, n_lost)
    return Recovery(moment_s - start_s if n_lost else 0.0, n_lost)


def undisturbed(samples: Samples, disturbances: Iterable[tuple[float, Recovery]]) -> BoolArray:
    """[n] not under way at any moment between a disturbance's start and its recovery.

    Disturbances are (start in the window, what it did).
    """
    calm, ended_s = np.ones(len(samples), np.bool_), ends_of(samples)
    for start_s, recovery in disturbances:
        end_s = np.inf if recovery.recovery_s is None else start_s + recovery.recovery_s
        calm &= (samples.intended_s >= end_s) | (ended_s <= start_s)
    return calm


def ends_of(samples: Samples) -> FloatArray:
    """[n] when each request ended: infinite if it never did, at once if it was never sent."""
    done_s = np.where(np.isnan(samples.done_s), np.inf, samples.done_s)
    return np.where(samples.status == DROPPED, samples.intended_s, done_s)
