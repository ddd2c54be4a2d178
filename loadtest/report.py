"""The record of a load test: a versioned JSON document, enough to draw every picture from.

Times in seconds. A latency of null stands for a request that got no good answer at all.
"""

import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from loadtest.accuracy import AccuracyFacts, accuracy_facts
from loadtest.chaos.facts import ChaosFacts, chaos_facts
from loadtest.chaos.profile import ChaosProfile
from loadtest.document import Strict
from loadtest.drift_facts import DriftFacts, drift_facts
from loadtest.profile import LoadProfile
from loadtest.reasons import AnyReason
from loadtest.samples import FloatArray, Samples, status_label
from loadtest.server_metrics import counted
from loadtest.session import Result
from loadtest.slo import Slo
from loadtest.statistics import quantile
from loadtest.verdict import Outcome, lag_limit_s

EXIT_CODES: Mapping[Outcome, int] = {"met": 0, "violated": 1, "inconclusive": 3}
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
MAX_BINS = 600
N_CURVE_POINTS = 400
PACKAGES = ("trimserve", "locust", "gevent", "geventhttpclient", "grpcio", "numpy")


class Explained(Strict):
    message: str
    reason: AnyReason


class ObjectiveResult(Strict):
    """One objective of the SLO; `kept` is about this window only, not about what it shows."""

    name: Literal["latency", "success_ratio"]
    wanted: float
    observed: float
    lower_bound: float | None
    kept: bool


class LatencyQuantile(Strict):
    quantile: float
    latency_s: float | None


class StatusCount(Strict):
    status: int
    label: str
    n: int
    example: str
    """the first error text seen"""


class RunFacts(Strict):
    model: str
    version: str
    targets: tuple[str, ...]
    inputs: str
    seed: int
    duration_s: float
    warmup_s: float
    timeout_s: float
    max_in_flight: int
    n_payloads: int
    profile: LoadProfile | None = None
    """none: the SLO's own arrivals"""
    closed_loop: int | None = None
    """number of clients that waited for their answers; none: an open loop"""
    workers: int = 1
    """processes that shared the load"""
    chaos: ChaosProfile | None = None
    """what was done to the server meanwhile; none: nothing"""


class RequestFacts(Strict):
    """A good request was answered with a success within the threshold."""

    n: int
    n_sent: int
    n_ok: int
    n_good: int
    planned_per_s: float
    achieved_per_s: float
    goodput_per_s: float
    statuses: tuple[StatusCount, ...]


class GoodShareFacts(Strict):
    estimate: float
    confidence: float
    lower_if_independent: float
    lower_if_correlated: float
    lower_by_batch_means: float | None
    """none: too few requests for it"""
    correlation_requests: float
    effective_n: int
    n_settling: int = 0
    lower_when_settled: float | None = None
    """none: no start is left out"""


class GeneratorFacts(Strict):
    lag_p50_s: float | None
    lag_p99_s: float | None
    lag_max_s: float | None
    lag_limit_s: float
    cpu_share: float
    process_cores: float
    n_warmup: int
    n_warmup_bad: int
    python: str
    packages: dict[str, str]


class TransportCount(Strict):
    """Client and server on the same requests."""

    transport: str
    client_n: int
    client_ok: int
    client_over: int
    server_n: int
    server_ok: int
    server_over: int


class PrometheusFacts(Strict):
    """The scrapes of one server from one end of the measurement to the other."""

    url: str
    from_s: float
    to_s: float
    """Unix time, by Prometheus's clock"""
    interval_s: float
    n_scrapes: int
    n_failed: int
    longest_gap_s: float


class ServerFacts(Strict):
    urls: tuple[str, ...]
    error: str
    transports: tuple[TransportCount, ...]
    prometheus: str | None = None
    """its URL; none: the servers were asked themselves"""
    scraped: tuple[PrometheusFacts, ...] = ()
    lost: tuple[str, ...] = ()
    """URLs whose counters were lost with a process that was ended on purpose: the server's
    numbers are the least, and only checked not to be too many"""


class TimeBin(Strict):
    """Requests by their intended send; latencies of all of them."""

    start_s: float
    sent_per_s: float
    good_per_s: float
    bad_per_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


class Report(Strict):
    api_version: Literal["trimserve/v1"] = Field(alias="apiVersion")
    kind: Literal["LoadTestReport"]
    created_at: str
    verdict: Outcome
    exit_code: int
    reasons: tuple[Explained, ...]
    slo: Slo
    run: RunFacts
    objectives: tuple[ObjectiveResult, ...]
    requests: RequestFacts
    latency: tuple[LatencyQuantile, ...]
    good_share: GoodShareFacts
    generator: GeneratorFacts
    server: ServerFacts | None
    bin_s: float
    timeline: tuple[TimeBin, ...]
    curve: tuple[LatencyQuantile, ...]
    """the distribution, by quantiles that get denser towards the tail"""
    accuracy: AccuracyFacts | None = None
    """none: no labels, or no answer that could be graded"""
    drift: DriftFacts | None = None
    """none: from before reports had it"""
    chaos: ChaosFacts | None = None
    """none: nobody disturbed the server"""


def make_report(result: Result, created_at: datetime) -> Report:
    settings, judgement = result.settings, result.judgement
    samples = result.played.samples
    latency_s = np.where(samples.ok, samples.latency_s, np.inf)
    bin_s = float(max(1, -(-int(np.ceil(settings.window_s)) // MAX_BINS)))
    return Report(
        apiVersion="trimserve/v1",
        kind="LoadTestReport",
        created_at=created_at.isoformat(timespec="seconds"),
        verdict=judgement.outcome,
        exit_code=EXIT_CODES[judgement.outcome],
        reasons=tuple(Explained(message=one.message, reason=one) for one in judgement.reasons),
        slo=settings.slo,
        run=_run_facts(result),
        objectives=_objectives(result),
        requests=_request_facts(result),
        latency=tuple(
            LatencyQuantile(quantile=share, latency_s=_finite(quantile(latency_s, share)))
            for share in sorted({*QUANTILES, settings.slo.latency.quantile})
        ),
        good_share=_good_share_facts(result),
        generator=_generator_facts(result),
        server=_server_facts(result),
        bin_s=bin_s,
        timeline=_timeline(samples, settings.slo.latency.threshold_s, bin_s),
        curve=_curve(latency_s),
        accuracy=accuracy_facts(result),
        drift=drift_facts(judgement.drift, result.soak),
        chaos=chaos_facts(settings.chaos, judgement),
    )


def to_json(report: Report) -> str:
    return report.model_dump_json(by_alias=True, indent=2) + "\n"


def from_json(text: str) -> Report:
    """Raises pydantic.ValidationError for what isn't a report of this version."""
    return Report.model_validate_json(text)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` in one step: a reader sees the old text or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _run_facts(result: Result) -> RunFacts:
    settings, plan = result.settings, result.plan
    return RunFacts(
        model=settings.model,
        version=settings.version,
        targets=tuple(target.url for target in settings.targets),
        inputs="random" if settings.inputs is None else settings.inputs.name,
        seed=settings.seed,
        duration_s=settings.window_s,
        warmup_s=settings.warmup_s,
        timeout_s=plan.timeout_s,
        max_in_flight=plan.max_in_flight,
        n_payloads=len(next(iter(plan.payloads.values()))),
        profile=settings.profile,
        closed_loop=settings.closed_loop,
        workers=1 if settings.workers is None else settings.workers.n,
        chaos=settings.chaos,
    )


def _objectives(result: Result) -> tuple[ObjectiveResult, ...]:
    slo, judgement = result.settings.slo, result.judgement
    return (
        ObjectiveResult(
            name="latency",
            wanted=slo.latency.quantile,
            observed=judgement.good.estimate,
            lower_bound=_finite(judgement.lower),
            kept=judgement.good.estimate >= slo.latency.quantile,
        ),
        ObjectiveResult(
            name="success_ratio",
            wanted=slo.success_ratio,
            observed=judgement.success_ratio,
            lower_bound=None,
            kept=judgement.success_ratio >= slo.success_ratio,
        ),
    )


def _request_facts(result: Result) -> RequestFacts:
    samples, judgement = result.played.samples, result.judgement
    window_s = result.settings.window_s
    return RequestFacts(
        n=len(samples),
        n_sent=int(samples.sent.sum()),
        n_ok=int(samples.ok.sum()),
        n_good=judgement.good.n_good,
        planned_per_s=len(samples) / window_s,
        achieved_per_s=judgement.achieved_per_s,
        goodput_per_s=judgement.good.n_good / window_s,
        statuses=tuple(
            StatusCount(
                status=status,
                label=status_label(status),
                n=n,
                example=result.played.errors.get(status, ""),
            )
            for status, n in samples.count_by_status().items()
        ),
    )


def _good_share_facts(result: Result) -> GoodShareFacts:
    good = result.judgement.good
    return GoodShareFacts(
        estimate=good.estimate,
        confidence=good.confidence,
        lower_if_independent=good.lower_if_independent,
        lower_if_correlated=good.lower_if_correlated,
        lower_by_batch_means=_finite(good.lower_by_batch_means),
        correlation_requests=good.correlation_requests,
        effective_n=good.effective_n,
        n_settling=good.n_settling,
        lower_when_settled=_finite(good.lower_when_settled) if good.n_settling else None,
    )


def _generator_facts(result: Result) -> GeneratorFacts:
    played, lag_s = result.played, result.played.samples.lag_s
    return GeneratorFacts(
        lag_p50_s=_finite(quantile(lag_s, 0.5)),
        lag_p99_s=_finite(quantile(lag_s, 0.99)),
        lag_max_s=_finite(quantile(lag_s, 1.0)),
        lag_limit_s=lag_limit_s(result.settings.slo.latency.threshold_s),
        cpu_share=played.cpu_share,
        process_cores=played.process_cores,
        n_warmup=result.warmed.n_sent,
        n_warmup_bad=result.warmed.n_bad,
        python=platform.python_version(),
        packages=_versions(),
    )


def _server_facts(result: Result) -> ServerFacts | None:
    if result.server is None:
        return None
    totals = counted(result.server.scrapes)
    samples, targets = result.played.samples, result.settings.targets
    over = (samples.latency_s > result.settings.slo.latency.threshold_s) & samples.sent
    transports = []
    for transport in sorted({target.protocol for target in targets} & set(totals)):
        mine = np.array([target.protocol == transport for target in targets])[samples.target]
        server = totals[transport]
        transports.append(
            TransportCount(
                transport=transport,
                client_n=int((samples.sent & mine).sum()),
                client_ok=int((samples.ok & mine).sum()),
                client_over=int((over & mine).sum()),
                server_n=server.n,
                server_ok=server.n_ok,
                server_over=server.n_over,
            )
        )
    return ServerFacts(
        urls=result.settings.scraped_urls,
        error=result.server.error,
        transports=tuple(transports),
        prometheus=result.settings.prometheus,
        scraped=tuple(PrometheusFacts(**asdict(one)) for one in result.server.coverage),
        lost=result.server.lost,
    )


def _timeline(samples: Samples, threshold_s: float, bin_s: float) -> tuple[TimeBin, ...]:
    latency_s = np.where(samples.ok, samples.latency_s, np.inf)
    bins = (samples.intended_s // bin_s).astype(np.int64)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    rows = []
    for begin, end in zip(starts, [*starts[1:], len(bins)], strict=True):
        part = latency_s[begin:end]
        n_good = int((part <= threshold_s).sum())
        p50_s, p95_s, p99_s = (_finite(quantile(part, share)) for share in (0.5, 0.95, 0.99))
        rows.append(
            TimeBin(
                start_s=float(bins[begin]) * bin_s,
                sent_per_s=float(samples.sent[begin:end].sum()) / bin_s,
                good_per_s=n_good / bin_s,
                bad_per_s=(len(part) - n_good) / bin_s,
                p50_s=p50_s,
                p95_s=p95_s,
                p99_s=p99_s,
            )
        )
    return tuple(rows)


def _curve(latency_s: FloatArray) -> tuple[LatencyQuantile, ...]:
    """Half of the points even in the share, half even in the logarithm of the rest."""
    n = len(latency_s)
    ordered = np.sort(latency_s)
    even = np.linspace(0, 1, N_CURVE_POINTS // 2)
    tail = 1 - np.geomspace(1, 1 / n, N_CURVE_POINTS // 2)
    ranks = np.unique(np.ceil(np.concatenate([even, tail, [1.0]]) * n).astype(np.int64).clip(1, n))
    return tuple(
        LatencyQuantile(quantile=float(rank / n), latency_s=_finite(float(ordered[rank - 1])))
        for rank in ranks
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
