"""The search for the highest rate, on a real server: each point is a load test of its own.

Assembles `loadtest.capacity` and `loadtest.session`; knows no terminal and no file format.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from loadtest.capacity import Capacity, Point, find_capacity
from loadtest.plan import Plan
from loadtest.reasons import AnyReason, GeneratorLagged, RateNotReached, RequestsDropped
from loadtest.scaling import UTILIZATION
from loadtest.server_metrics import mean_batch_rows, mean_in_flight
from loadtest.session import MAX_REQUESTS, Result, Settings, Watcher, run
from loadtest.slo import Slo
from loadtest.statistics import quantile
from loadtest.verdict import MAX_LAG_PER_THRESHOLD, Judgement, Outcome, doubts_of

CONFIRM_AT = 0.95
"""The rate is confirmed a little below the crossing, which itself is met in half of all runs."""
OPERATE_AT = UTILIZATION
"""Where an autoscaler keeps replicas: what is in flight there is its target."""


@dataclass(frozen=True)
class Measured:
    """What one rate gave; latencies are infinite where so many got no good answer."""

    rate_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    mean_s: float | None
    """of the answers that are no failures; none without one"""
    in_flight: float | None
    """requests in the servers on average, by their own sum of durations; none where they don't say
    """
    request_bytes: float
    """of a request's body, on average"""
    goodput_per_s: float
    good_share: float
    success_ratio: float
    batch_rows: float | None
    outcome: Outcome
    reasons: tuple[str, ...]
    usable: bool
    effective_n: float


@dataclass(frozen=True)
class CapacityResult:
    settings: Settings
    capacity: Capacity
    measured: tuple[Measured, ...]
    """as `capacity.points`"""
    confirmation: Measured | None
    """an independent run at CONFIRM_AT of the rate found; none where none was found"""
    operation: Measured | None = None
    """a run at OPERATE_AT of it"""


def run_capacity(
    settings: Settings, watcher: Watcher, on_point: Callable[[Measured], None]
) -> CapacityResult:
    """Search from the SLO's rate on; raises what `loadtest.session.run` raises."""
    measured: list[Measured] = []

    def measure_at(rate_per_s: float) -> Measured:
        result = run(at_rate(settings, rate_per_s, len(measured)), watcher)
        measured.append(measure(result))
        on_point(measured[-1])
        return measured[-1]

    slo = settings.slo
    capacity = find_capacity(
        lambda rate_per_s: point_of(slo, measure_at(rate_per_s)),
        slo.workload.rate_per_s,
        slo.latency.quantile,
        MAX_REQUESTS / (settings.window_s + settings.warmup_s),
    )
    n = len(measured)
    rate_per_s = capacity.rate_per_s
    confirmation = None if rate_per_s is None else measure_at(CONFIRM_AT * rate_per_s)
    operation = None if rate_per_s is None else measure_at(OPERATE_AT * rate_per_s)
    return CapacityResult(settings, capacity, tuple(measured[:n]), confirmation, operation)


def at_rate(settings: Settings, rate_per_s: float, index: int) -> Settings:
    """The same test at another rate, with arrivals of its own."""
    workload = settings.slo.workload.model_copy(update={"rate_per_s": rate_per_s})
    slo = settings.slo.model_copy(update={"workload": workload})
    return replace(settings, slo=slo, seed=settings.seed + index)


def measure(result: Result) -> Measured:
    samples, judgement = result.played.samples, result.judgement
    latency_s = np.where(samples.ok, samples.latency_s, np.inf)
    p50_s, p95_s, p99_s = (quantile(latency_s, share) for share in (0.5, 0.95, 0.99))
    good = judgement.good
    return Measured(
        rate_per_s=result.settings.slo.workload.rate_per_s,
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
        mean_s=float(samples.latency_s[samples.ok].mean()) if samples.ok.any() else None,
        in_flight=_in_flight(result),
        request_bytes=mean_request_bytes(result.plan),
        goodput_per_s=good.n_good / result.settings.window_s,
        good_share=good.estimate,
        success_ratio=judgement.success_ratio,
        batch_rows=None if result.server is None else mean_batch_rows(result.server.scrapes),
        outcome=judgement.outcome,
        reasons=tuple(one.message for one in judgement.reasons),
        usable=is_usable(judgement, result.settings.slo.latency.threshold_s),
        effective_n=good.n / good.correlation_requests,
    )


def mean_request_bytes(plan: Plan) -> float:
    """Of the bodies that were drawn to be sent, over all protocols."""
    bodies = [len(one.body) for payloads in plan.payloads.values() for one in payloads]
    return sum(bodies) / len(bodies)


def _in_flight(result: Result) -> float | None:
    if result.server is None:
        return None
    return mean_in_flight(result.server.scrapes, result.settings.window_s)


def is_usable(judgement: Judgement, threshold_s: float) -> bool:
    """No doubt but those that a search can live with."""
    return all(_is_bearable(doubt, threshold_s) for doubt in doubts_of(judgement))


def _is_bearable(doubt: AnyReason, threshold_s: float) -> bool:
    """The server was spared requests, or lag moved the crossing by a twentieth of the threshold."""
    if isinstance(doubt, GeneratorLagged):
        return doubt.lag_p99_s <= MAX_LAG_PER_THRESHOLD * threshold_s
    return isinstance(doubt, RequestsDropped | RateNotReached)


def point_of(slo: Slo, measured: Measured) -> Point:
    """The share of bad requests, or the failures' share of their budget if they use more of it."""
    max_bad, max_failed = 1 - slo.latency.quantile, 1 - slo.success_ratio
    failed = 1 - measured.success_ratio
    budget_used = failed / max_failed if max_failed > 0 else float(failed > 0) / max_bad
    bad_share = min(1.0, max(1 - measured.good_share, budget_used * max_bad))
    return Point(measured.rate_per_s, bad_share, measured.effective_n, measured.usable)
