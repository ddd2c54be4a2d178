"""Judge a run: met, violated or inconclusive.

The promise has to be shown: it is met only where a lower bound clears the quantile. It is
violated where the window itself fell short. All else, and everything that casts doubt on the
measurement, is inconclusive, and doubt comes first, but for this: requests that the generator
didn't send can only have spared the server, so a violation that stands without them stands, and
so does one that clients who wait for their answers saw at no more than the promised rate.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from loadtest.chaos.findings import Chaos, Finding, action_doubts, calm_of, find, misses_of
from loadtest.drift import Drift, Soak, drift_of, drift_reasons
from loadtest.memory import MemorySeries
from loadtest.reasons import (
    AnswersUngraded,
    AnyReason,
    CountsDisagree,
    EdgeMissing,
    GeneratorBusy,
    GeneratorLagged,
    LatencyDrifts,
    LatencyMissed,
    LoopClosed,
    LossesMissed,
    MemoryGrows,
    MetricMissing,
    MetricsUnreadable,
    RateNotReached,
    RecoveryMissed,
    RequestsCorrelated,
    RequestsDropped,
    RequestsInvalid,
    ScrapesMissing,
    ServerRestarted,
    ServerSlowerThanClient,
    SuccessRatioMissed,
    TooCloseToCall,
    TooFewRequests,
)
from loadtest.samples import FloatArray, Samples
from loadtest.server_metrics import Count, Coverage, Scrapes, counted
from loadtest.settling import requests_to_show
from loadtest.slo import LatencyObjective, Slo
from loadtest.statistics import (
    CONFIDENCE,
    N_BATCHES,
    GoodShare,
    good_share,
    min_requests,
    quantile,
)

Outcome = Literal["met", "violated", "inconclusive"]

MIN_RATE_SHARE = 0.99
MAX_LAG_S = 0.001
MAX_LAG_PER_THRESHOLD = 0.05
MAX_CPU_SHARE = 0.9


@dataclass(frozen=True)
class ServerEvidence:
    """What the server says: both scrapes of each server, or why they can't be had."""

    scrapes: tuple[Scrapes, ...] = ()
    error: str = ""
    coverage: tuple[Coverage, ...] = ()
    """by Prometheus; empty where the servers were asked themselves"""
    memory: tuple[MemorySeries, ...] = ()
    """by Prometheus too"""
    lost: tuple[str, ...] = ()
    """URLs whose counters were lost with a process that was ended on purpose: what they have is
    the least"""
    disturbed: bool = False
    """on purpose, so that scrapes by Prometheus may fail"""


@dataclass(frozen=True)
class Evidence:
    """All that a verdict rests on."""

    slo: Slo
    samples: Samples
    window_s: float
    transports: tuple[str, ...]
    """[n targets] "rest" or "grpc" """
    max_in_flight: int
    cpu_share: float
    """of the generator's sending thread, 0 to 1"""
    server: ServerEvidence | None
    """none: the server isn't asked"""
    closed_loop: int | None = None
    """number of clients that waited for their answers; none: an open loop"""
    label_output: str | None = None
    """none: answers aren't graded"""
    soak: Soak = field(default_factory=Soak)
    chaos: Chaos | None = None
    """none: nobody disturbed the server"""


@dataclass(frozen=True)
class Judgement:
    outcome: Outcome
    reasons: tuple[AnyReason, ...]
    """why it isn't met, doubts first; empty where it is"""
    good: GoodShare
    success_ratio: float
    """observed"""
    achieved_per_s: float
    drift: Drift
    chaos: tuple[Finding, ...] = ()
    """one for each action"""
    calm: GoodShare | None = None
    """of the requests that no action disturbed, on which the lower bound is; none: of all, as
    there was no action, or each was disturbed"""

    @property
    def lower(self) -> float:
        """The bound to judge by."""
        return self.good.lower if self.calm is None else self.calm.lower


def doubts_of(judgement: Judgement) -> tuple[AnyReason, ...]:
    """The reasons that doubt the measurement; not those of too little evidence, nor of misses."""
    others = (
        *(LatencyMissed, SuccessRatioMissed, TooFewRequests, TooCloseToCall, RequestsCorrelated),
        *(LatencyDrifts, MemoryGrows, RecoveryMissed, LossesMissed),
    )
    return tuple(one for one in judgement.reasons if not isinstance(one, others))


def judge(evidence: Evidence) -> Judgement:
    """The verdict on a run of at least one request."""
    samples = evidence.samples
    good = _share_of(samples, samples.latency_s, evidence.slo.latency)
    chaos, findings = evidence.chaos, find(samples, evidence.slo.latency, evidence.chaos)
    misses = [*_misses(evidence, good), *misses_of(chaos, findings)]
    doubts = [*_doubts(evidence, good), *action_doubts(findings)]
    objective, soak = evidence.slo.latency, evidence.soak
    drift = drift_of(samples, objective, good.correlation_requests, soak)
    unshown: list[AnyReason] = []
    calm = _calm(evidence, findings)
    if not misses:
        unshown = [
            *_unshown(objective.quantile, calm or good),
            *drift_reasons(drift, objective, soak),
        ]
    outcome: Outcome = "inconclusive" if doubts or unshown else "violated" if misses else "met"
    if _sparing_only(doubts) and _violated_without_dropped(evidence, good):
        outcome = "violated"
    return Judgement(
        outcome=outcome,
        reasons=(*doubts, *unshown, *misses),
        good=good,
        success_ratio=float(samples.ok.mean()),
        achieved_per_s=_achieved_per_s(evidence),
        drift=drift,
        chaos=findings,
        calm=calm,
    )


def _sparing_only(doubts: list[AnyReason]) -> bool:
    """There are doubts, and all say that the server had less to do than was planned."""
    return bool(doubts) and all(
        isinstance(doubt, RequestsDropped | RateNotReached)
        or (isinstance(doubt, LoopClosed) and doubt.achieved_per_s <= doubt.rate_per_s)
        for doubt in doubts
    )


def _violated_without_dropped(evidence: Evidence, good: GoodShare) -> bool:
    """The window falls short even if every request that wasn't sent had been answered in time."""
    samples, slo = evidence.samples, evidence.slo
    n_dropped = int((~samples.sent).sum())
    best_good = (good.n_good + n_dropped) / good.n
    best_success = (int(samples.ok.sum()) + n_dropped) / good.n
    return best_good < slo.latency.quantile or best_success < slo.success_ratio


def _share_of(samples: Samples, latency_s: FloatArray, objective: LatencyObjective) -> GoodShare:
    answered_s = np.where(samples.ok, latency_s, np.inf)
    return good_share(answered_s, objective.threshold_s, objective.quantile)


def _calm(evidence: Evidence, findings: tuple[Finding, ...]) -> GoodShare | None:
    """None without actions, and where they disturbed every request."""
    samples, objective = evidence.samples, evidence.slo.latency
    calm = calm_of(samples, findings)
    if not findings or not calm.any():
        return None
    answered_s = np.where(samples.ok, samples.latency_s, np.inf)[calm]
    return good_share(answered_s, objective.threshold_s, objective.quantile)


def _misses(evidence: Evidence, good: GoodShare) -> list[AnyReason]:
    """Where the window fell short of the objective."""
    slo, samples = evidence.slo, evidence.samples
    misses: list[AnyReason] = []
    if good.estimate < slo.latency.quantile:
        latency_s = np.where(samples.ok, samples.latency_s, np.inf)
        at_quantile_s = quantile(latency_s, slo.latency.quantile)
        misses.append(
            LatencyMissed(
                quantile=slo.latency.quantile,
                threshold_s=slo.latency.threshold_s,
                good_share=good.estimate,
                latency_at_quantile_s=at_quantile_s if np.isfinite(at_quantile_s) else None,
            )
        )
    n_failed = int((~samples.ok).sum())
    observed = 1 - n_failed / len(samples)
    if observed < slo.success_ratio:
        misses.append(
            SuccessRatioMissed(
                success_ratio=slo.success_ratio,
                observed=observed,
                n_failed=n_failed,
                n=len(samples),
            )
        )
    return misses


def _unshown(wanted: float, good: GoodShare) -> list[AnyReason]:
    """Why a sample that looks good isn't enough to show it."""
    needed = requests_needed(wanted, good.confidence)
    if good.n < needed:
        return [TooFewRequests(quantile=wanted, n=good.n, needed=needed)]
    if good.effective_n < min_requests(wanted, good.confidence):
        return [
            RequestsCorrelated(
                correlation_requests=good.correlation_requests,
                effective_n=good.effective_n,
                n=good.n,
                needed=_needed(wanted, good) or math.ceil(needed * good.correlation_requests),
            )
        ]
    if good.lower < wanted:
        return [
            TooCloseToCall(
                quantile=wanted,
                good_share=good.estimate,
                lower_bound=good.lower,
                n=good.n,
                needed=_needed(wanted, good),
            )
        ]
    return []


def requests_needed(wanted: float, confidence: float = CONFIDENCE) -> int:
    """The fewest requests with which a quantile can be shown at all, by both bounds."""
    return max(min_requests(wanted, confidence), 2 * N_BATCHES)


def _needed(wanted: float, good: GoodShare) -> int | None:
    return requests_to_show(good.n, good.n_good, good.correlation_requests, wanted, good.confidence)


def _doubts(evidence: Evidence, good: GoodShare) -> list[AnyReason]:
    """What makes the measurement itself doubtful."""
    samples = evidence.samples
    doubts: list[AnyReason] = []
    planned_per_s = len(samples) / evidence.window_s
    achieved_per_s = _achieved_per_s(evidence)
    if evidence.closed_loop is None and achieved_per_s < MIN_RATE_SHARE * planned_per_s:
        doubts.append(
            RateNotReached(
                planned_per_s=planned_per_s,
                achieved_per_s=achieved_per_s,
                min_share=MIN_RATE_SHARE,
            )
        )
    if evidence.closed_loop is not None:
        doubts.append(
            LoopClosed(
                n_clients=evidence.closed_loop,
                achieved_per_s=achieved_per_s,
                rate_per_s=evidence.slo.workload.rate_per_s,
            )
        )
    n_dropped = int((~samples.sent).sum())
    if n_dropped:
        doubts.append(
            RequestsDropped(
                n_dropped=n_dropped, n=len(samples), max_in_flight=evidence.max_in_flight
            )
        )
    n_invalid = int(samples.invalid.sum())
    if n_invalid:
        doubts.append(RequestsInvalid(n_invalid=n_invalid, n=len(samples)))
    n_ungraded = int((samples.ok & ~samples.graded).sum())
    if evidence.label_output is not None and n_ungraded:
        doubts.append(
            AnswersUngraded(
                n_ungraded=n_ungraded, n_ok=int(samples.ok.sum()), output=evidence.label_output
            )
        )
    doubts.extend(_lag_doubts(evidence, good))
    if evidence.cpu_share > MAX_CPU_SHARE:
        doubts.append(GeneratorBusy(cpu_share=evidence.cpu_share, limit=MAX_CPU_SHARE))
    doubts.extend(_server_doubts(evidence))
    return doubts


def lag_limit_s(threshold_s: float) -> float:
    return min(MAX_LAG_S, MAX_LAG_PER_THRESHOLD * threshold_s)


def _lag_doubts(evidence: Evidence, good: GoodShare) -> list[AnyReason]:
    """Lag counts where leaving it out would move the share across the quantile."""
    samples, objective = evidence.samples, evidence.slo.latency
    lag_p99_s = quantile(samples.lag_s, 0.99)
    limit_s = lag_limit_s(objective.threshold_s)
    if not lag_p99_s > limit_s:
        return []
    from_send = _share_of(samples, samples.latency_from_send_s, objective)
    if _standing(objective.quantile, good) == _standing(objective.quantile, from_send):
        return []
    return [
        GeneratorLagged(
            lag_p99_s=lag_p99_s,
            limit_s=limit_s,
            good_share=good.estimate,
            good_share_from_send=from_send.estimate,
        )
    ]


def _standing(wanted: float, good: GoodShare) -> str:
    if good.estimate < wanted:
        return "missed"
    return "unshown" if _unshown(wanted, good) else "shown"


def _achieved_per_s(evidence: Evidence) -> float:
    """Requests sent by the time they took to send, at least the window."""
    sent_s = evidence.samples.sent_s[evidence.samples.sent]
    if len(sent_s) == 0:
        return 0.0
    return len(sent_s) / max(evidence.window_s, float(sent_s.max()))


def _server_doubts(evidence: Evidence) -> list[AnyReason]:
    server, threshold_s = evidence.server, evidence.slo.latency.threshold_s
    if server is None:
        return []
    if server.error:
        return [] if server.lost else [MetricsUnreadable(error=server.error)]
    doubts: list[AnyReason] = [
        ServerRestarted(url=pair.url) for pair in server.scrapes if pair.restarted
    ]
    doubts.extend(
        ScrapesMissing(
            url=one.url,
            n_scrapes=one.n_scrapes,
            n_failed=one.n_failed,
            longest_gap_s=one.longest_gap_s,
            interval_s=one.interval_s,
        )
        for one in server.coverage
        if not one.complete and not server.disturbed
    )
    if doubts:
        return doubts
    totals = counted(server.scrapes)
    urls = ", ".join(pair.url for pair in server.scrapes)
    for transport in sorted(set(evidence.transports)):
        if transport not in totals and server.lost:
            continue
        if transport not in totals:
            doubts.append(MetricMissing(url=urls, transport=transport))
        else:
            doubts.extend(_count_doubts(evidence, transport, totals[transport], server.lost))
    doubts.extend(
        EdgeMissing(url=pair.url, threshold_s=threshold_s, edges_s=pair.after.edges_s)
        for pair in server.scrapes
        if pair.after.counts and not pair.after.has_edge
    )
    return doubts


def _count_doubts(
    evidence: Evidence, transport: str, server: Count, lost: tuple[str, ...]
) -> list[AnyReason]:
    """Where counters were lost, the server may have counted any number less."""
    samples = evidence.samples
    mine = np.array([one == transport for one in evidence.transports])[samples.target]
    n_maybe = int((samples.maybe_counted & mine).sum())
    bounds: list[tuple[Literal["requests", "successes"], int, int]] = [
        ("requests", int((samples.answered & mine).sum()), server.n),
        ("successes", int((samples.ok & mine).sum()), server.n_ok),
    ]
    doubts: list[AnyReason] = [
        CountsDisagree(
            transport=transport,
            what=what,
            client_least=0 if lost else least,
            client_most=least + n_maybe,
            server=n,
        )
        for what, least, n in bounds
        if not (0 if lost else least) <= n <= least + n_maybe
    ]
    over = (samples.latency_s > evidence.slo.latency.threshold_s) & samples.sent & mine
    if not doubts and server.n_over > int(over.sum()):
        doubts.append(
            ServerSlowerThanClient(
                transport=transport, client_over=int(over.sum()), server_over=server.n_over
            )
        )
    return doubts
