"""Each case is a run that would be met but for one thing, and the reason it must give."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loadtest.reasons import (
    CountsDisagree,
    EdgeMissing,
    GeneratorBusy,
    GeneratorLagged,
    LatencyMissed,
    MetricMissing,
    MetricsUnreadable,
    RateNotReached,
    Reason,
    RequestsCorrelated,
    RequestsDropped,
    RequestsInvalid,
    ServerRestarted,
    ServerSlowerThanClient,
    SuccessRatioMissed,
    TooCloseToCall,
    TooFewRequests,
)
from loadtest.samples import (
    DROPPED,
    GRPC_BASE,
    HTTP_OK,
    TIMED_OUT,
    UNFINISHED,
    Samples,
    status_label,
)
from loadtest.server_metrics import Count, Scrapes, Snapshot
from loadtest.slo import Slo
from loadtest.verdict import Evidence, ServerEvidence, judge

N = 3000
WINDOW_S = 30.0
THRESHOLD_S = 0.05


def make_slo(quantile: float = 0.99, success_ratio: float = 0.99) -> Slo:
    return Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "test",
            "latency": {"quantile": quantile, "threshold_ms": THRESHOLD_S * 1e3},
            "workload": {"rate_per_s": N / WINDOW_S},
            "success_ratio": success_ratio,
            "window_s": WINDOW_S,
        }
    )


def make_samples(
    n: int = N,
    slow: slice | None = None,
    status: dict[int, int] | None = None,
    lag_s: float = 0.0,
    latency_s: float = 0.01,
) -> Samples:
    """Requests that take about `latency_s` but for those in `slow`, and for other statuses."""
    intended_s = np.arange(n, dtype=np.float64) * (WINDOW_S / n)
    latencies_s = latency_s + np.random.default_rng(1).uniform(0, 1e-4, n)
    if slow is not None:
        latencies_s[slow] = 0.2
    statuses = np.full(n, HTTP_OK, np.int32)
    for index, one in (status or {}).items():
        statuses[index] = one
    sent_s = np.where(statuses == DROPPED, np.nan, intended_s + lag_s)
    ended = ~np.isin(statuses, (DROPPED, UNFINISHED))
    return Samples(
        intended_s=intended_s,
        sent_s=sent_s,
        done_s=np.where(ended, intended_s + lag_s + latencies_s, np.nan),
        target=np.zeros(n, np.int32),
        status=statuses,
    )


def make_server(
    n: int = N,
    n_ok: int = N,
    n_over: int = 0,
    transport: str = "rest",
    has_edge: bool = True,
    restarted: bool = False,
) -> ServerEvidence:
    before = Snapshot(1.0, {transport: Count(10, 10, 10)}, (0.05,), has_edge)
    after = Snapshot(
        2.0 if restarted else 1.0,
        {transport: Count(10 + n, 10 + n_ok, 10 + n_over)},
        (0.05,),
        has_edge,
    )
    return ServerEvidence(scrapes=(Scrapes("http://server/metrics", before, after),))


GOOD = Evidence(
    slo=make_slo(),
    samples=make_samples(),
    window_s=WINDOW_S,
    transports=("rest",),
    max_in_flight=64,
    cpu_share=0.2,
    server=make_server(),
)


def test_verdict_is_met_when_nothing_is_wrong() -> None:
    judgement = judge(GOOD)
    assert judgement.outcome == "met"
    assert judgement.reasons == ()
    assert judgement.good.lower >= 0.99


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param(
            {"samples": make_samples(slow=slice(0, N, 50)), "server": None},
            LatencyMissed(
                quantile=0.99,
                threshold_s=THRESHOLD_S,
                good_share=0.98,
                latency_at_quantile_s=0.2,
            ),
            id="two percent are slow",
        ),
        pytest.param(
            {
                "samples": make_samples(status=dict.fromkeys(range(0, N, 80), 503)),
                "server": make_server(n_ok=N - 38),
                "slo": make_slo(quantile=0.9),
            },
            SuccessRatioMissed(success_ratio=0.99, observed=1 - 38 / N, n_failed=38, n=N),
            id="one in eighty fails",
        ),
    ],
)
def test_verdict_is_violated_when_the_window_fell_short(
    changes: dict[str, Any], wanted: Reason
) -> None:
    judgement = judge(replace(GOOD, **changes))
    assert judgement.outcome == "violated"
    (reason,) = judgement.reasons
    assert reason.model_dump() == pytest.approx(wanted.model_dump())


def test_verdict_counts_a_fast_failure_as_bad_when_latency_is_judged() -> None:
    samples = make_samples(status=dict.fromkeys(range(0, N, 50), 500))
    judgement = judge(replace(GOOD, samples=samples, server=None))
    assert judgement.outcome == "violated"
    assert judgement.reasons == (
        LatencyMissed(
            quantile=0.99, threshold_s=THRESHOLD_S, good_share=0.98, latency_at_quantile_s=None
        ),
        SuccessRatioMissed(success_ratio=0.99, observed=0.98, n_failed=60, n=N),
    )


@pytest.mark.parametrize(
    ("changes", "kind", "numbers"),
    [
        pytest.param(
            {"samples": make_samples(n=298), "server": None},
            TooFewRequests,
            {"quantile": 0.99, "n": 298, "needed": 299},
            id="one request too few",
        ),
        pytest.param(
            {"samples": make_samples(slow=slice(1000, 1029)), "server": None},
            RequestsCorrelated,
            {
                "correlation_requests": pytest.approx(28.7, rel=0.2),
                "effective_n": pytest.approx(104, rel=0.2),
                "n": N,
                "needed": pytest.approx(8600, rel=0.2),
            },
            id="all slow ones in one burst",
        ),
        pytest.param(
            {"samples": make_samples(slow=slice(0, N, 120)), "server": None},
            TooCloseToCall,
            {
                "quantile": 0.99,
                "good_share": pytest.approx(0.99167, abs=1e-4),
                "lower_bound": pytest.approx(0.98836, abs=1e-4),
                "n": N,
                "needed": pytest.approx(25700, rel=0.05),
            },
            id="the bound is below, though the share is above",
        ),
        pytest.param(
            {"samples": make_samples(lag_s=0.5, latency_s=-0.49), "window_s": 29.0},
            RateNotReached,
            {"planned_per_s": pytest.approx(N / 29), "achieved_per_s": pytest.approx(N / 30.49)},
            id="sending took longer than the window",
        ),
        pytest.param(
            {"samples": make_samples(status={5: DROPPED}), "server": make_server(N - 1, N - 1)},
            RequestsDropped,
            {"n_dropped": 1, "n": N, "max_in_flight": 64},
            id="a single request is dropped",
        ),
        pytest.param(
            {"samples": make_samples(status={5: 400}), "server": make_server(N, N - 1)},
            RequestsInvalid,
            {"n_invalid": 1, "n": N},
            id="a single request is wrong",
        ),
        pytest.param(
            {"samples": make_samples(lag_s=0.045, latency_s=0.01), "server": None},
            GeneratorLagged,
            {
                "lag_p99_s": pytest.approx(0.045),
                "limit_s": 0.001,
                "good_share": 0.0,
                "good_share_from_send": 1.0,
            },
            id="late sending alone breaks the promise",
        ),
        pytest.param(
            {"cpu_share": 0.91},
            GeneratorBusy,
            {"cpu_share": 0.91, "limit": 0.9},
            id="a busy generator",
        ),
        pytest.param(
            {"server": ServerEvidence(error="refused")},
            MetricsUnreadable,
            {"error": "refused"},
            id="metrics that went away",
        ),
        pytest.param(
            {"server": make_server(transport="grpc")},
            MetricMissing,
            {"url": "http://server/metrics", "transport": "rest"},
            id="the transport isn't counted",
        ),
        pytest.param(
            {"server": make_server(has_edge=False)},
            EdgeMissing,
            {"url": "http://server/metrics", "threshold_s": THRESHOLD_S, "edges_s": (0.05,)},
            id="no edge on the threshold",
        ),
        pytest.param(
            {"server": make_server(n=N + 1, n_ok=N)},
            CountsDisagree,
            {
                "transport": "rest",
                "what": "requests",
                "client_least": N,
                "client_most": N,
                "server": N + 1,
            },
            id="the server saw one request more",
        ),
        pytest.param(
            {"server": make_server(n_ok=N - 1)},
            CountsDisagree,
            {
                "transport": "rest",
                "what": "successes",
                "client_least": N,
                "client_most": N,
                "server": N - 1,
            },
            id="the server saw one success less",
        ),
        pytest.param(
            {"server": make_server(n_over=1)},
            ServerSlowerThanClient,
            {"transport": "rest", "client_over": 0, "server_over": 1},
            id="the server saw a slow request that the client did not",
        ),
        pytest.param(
            {"server": make_server(restarted=True)},
            ServerRestarted,
            {"url": "http://server/metrics"},
            id="the server restarted",
        ),
    ],
)
def test_verdict_is_inconclusive_when_the_measurement_is_doubtful(
    changes: dict[str, Any], kind: type[Reason], numbers: dict[str, Any]
) -> None:
    judgement = judge(replace(GOOD, **changes))
    assert judgement.outcome == "inconclusive"
    reason = judgement.reasons[0]
    assert type(reason) is kind
    assert {name: getattr(reason, name) for name in numbers} == numbers
    assert reason.message


def test_verdict_ignores_lag_when_it_changes_nothing() -> None:
    fast = replace(GOOD, samples=make_samples(lag_s=0.02, latency_s=0.01))
    slow = replace(GOOD, samples=make_samples(lag_s=0.02, latency_s=0.1), server=None)
    assert judge(fast).outcome == "met"
    assert judge(slow).outcome == "violated"


def test_verdict_puts_doubt_before_violation_when_both_are_there() -> None:
    changed = replace(GOOD, samples=make_samples(latency_s=0.2), cpu_share=1.0, server=None)
    judgement = judge(changed)
    assert judgement.outcome == "inconclusive"
    assert [type(one) for one in judgement.reasons] == [GeneratorBusy, LatencyMissed]


def test_verdict_lets_the_server_miss_a_request_when_the_client_gave_up_on_it() -> None:
    samples = make_samples(status={5: TIMED_OUT})
    for n in (N - 1, N):
        assert judge(replace(GOOD, samples=samples, server=make_server(n, N - 1))).outcome == "met"
    judgement = judge(replace(GOOD, samples=samples, server=make_server(N - 2, N - 2)))
    assert judgement.outcome == "inconclusive"


@pytest.mark.parametrize(
    ("status", "label"),
    [
        (200, "HTTP 200"),
        (GRPC_BASE + 14, "gRPC UNAVAILABLE"),
        (TIMED_OUT, "timed out"),
        (GRPC_BASE + 99, "gRPC 99"),
    ],
)
def test_status_label_is_readable_when_the_status_is(status: int, label: str) -> None:
    assert status_label(status) == label


def test_verdict_is_violated_when_the_window_falls_short_without_the_dropped_requests() -> None:
    samples = make_samples(slow=slice(0, N // 2), status={N - 1: DROPPED})
    judgement = judge(replace(GOOD, samples=samples, server=None))
    assert judgement.outcome == "violated"
    assert {reason.kind for reason in judgement.reasons} == {"requests_dropped", "latency_missed"}


def test_verdict_is_inconclusive_when_only_the_dropped_requests_make_the_window_fall_short() -> (
    None
):
    samples = make_samples(status=dict.fromkeys(range(N // 50), DROPPED))
    judgement = judge(replace(GOOD, samples=samples, server=None))
    assert judgement.outcome == "inconclusive"
