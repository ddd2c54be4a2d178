from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
from scipy import stats

from loadtest.drift import Soak, drift_of, drift_reasons, latency_series
from loadtest.memory import MemorySampler, MemorySeries, every_s, series_of
from loadtest.reasons import LatencyDrifts, MemoryGrows
from loadtest.samples import Samples
from loadtest.server_metrics import MetricsUnusable
from loadtest.slo import LatencyObjective
from loadtest.statistics import good_share
from loadtest.trend import theil_sen, thinned, trend
from loadtest.verdict import judge
from tests.loadtest.queues import sojourns
from tests.loadtest.test_verdict import GOOD, make_samples, make_slo

HOUR_S = 3600.0


@pytest.mark.parametrize("n", [11, 40, 173])
@pytest.mark.parametrize("decimals", [0, 6])
def test_slope_and_bounds_are_scipys(n: int, decimals: int) -> None:
    """Its sums of ties are our variance; values rounded to whole numbers have many."""
    rng = np.random.default_rng(n)
    times_s = np.sort(rng.uniform(0, 100, n))
    values = np.round(0.05 * times_s + rng.standard_cauchy(n), decimals)
    ours = theil_sen(times_s, values)
    theirs = stats.theilslopes(values, times_s, alpha=0.95)
    assert ours[0] == pytest.approx(theirs.slope)
    assert ours[1] == pytest.approx(theirs.low_slope)
    assert ours[2] == pytest.approx(theirs.high_slope)


def test_trend_finds_growth_when_there_is_one() -> None:
    times_s = np.arange(200.0)
    found = trend(times_s, 5 + 0.01 * times_s + np.random.default_rng(1).normal(0, 0.2, 200))
    assert found is not None
    assert found.grows
    assert found.low_per_s < 0.01 < found.high_per_s
    assert found.end == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.where(np.arange(200) < 60, 1.0, 2.0), id="a step in the first half"),
        pytest.param(np.minimum(np.arange(200.0), 80), id="a start that fills caches"),
        pytest.param(-np.arange(200.0), id="a fall"),
        pytest.param(np.ones(200), id="nothing moves"),
    ],
)
def test_trend_does_not_grow_when_it_is_over(values: Any) -> None:
    found = trend(np.arange(200.0), values)
    assert found is not None
    assert not found.grows


def test_trend_is_none_when_there_are_few_points() -> None:
    assert trend(np.arange(9.0), np.arange(9.0)) is None


def test_series_is_thinned_to_means_when_it_is_long() -> None:
    assert len(thinned(np.arange(1000.0))) == 333
    assert thinned(np.arange(1000.0))[0] == 1.0


@pytest.mark.full
@pytest.mark.parametrize("utilization", [0.7, 0.9])
def test_latency_of_a_steady_queue_seldom_seems_to_grow(utilization: float) -> None:
    """2.5 % would be the rate for independent bins, if the second half weren't asked as well."""
    n, n_grown = 30_000, 0
    objective = LatencyObjective(quantile=0.9, threshold_ms=5000)
    steady = replace(make_samples(n), intended_s=np.arange(n) / 10)
    for latency_s in sojourns(utilization, n, 60, seed=3):
        one = replace(steady, done_s=steady.intended_s + latency_s)
        share = good_share(latency_s, 5.0, 0.9)
        found = drift_of(one, objective, share.correlation_requests, Soak()).latency
        n_grown += found is not None and found.grows
    assert n_grown <= 4


def drifting(growth_s: float, n: int = 12_000) -> Samples:
    """Latencies that grow by `growth_s` over the window."""
    one = make_samples(n)
    return replace(one, done_s=one.done_s + np.linspace(0, growth_s, n))


def test_latency_drift_is_a_reason_when_the_limit_is_within_the_horizon() -> None:
    """From 10 to 15 ms in 30 s: 50 ms come 210 s later."""
    evidence = replace(GOOD, slo=make_slo(), samples=drifting(0.005), server=None)
    assert judge(evidence).outcome == "met"
    assert judge(replace(evidence, soak=Soak(horizon_s=100.0))).outcome == "met"
    judgement = judge(replace(evidence, soak=Soak(horizon_s=300.0)))
    assert judgement.outcome == "inconclusive"
    (reason,) = judgement.reasons
    assert isinstance(reason, LatencyDrifts)
    assert reason.reached_in_s == pytest.approx(210, rel=0.05)
    assert reason.growth_s_per_hour == pytest.approx(0.6, rel=0.05)
    assert "want that not before 0.0833 h" in reason.message


def test_latency_has_no_trend_when_requests_are_too_few_for_it() -> None:
    times_s, latencies_s = latency_series(make_samples(3000), 0.99, 1.0)
    assert len(times_s) == len(latencies_s) == 0


def memory(start: float, per_s: float, n: int = 60) -> MemorySeries:
    times_s = np.arange(n) * 60.0
    noise = np.random.default_rng(1).normal(0, 1e5, n)
    return MemorySeries("http://server/metrics", times_s, start + per_s * times_s + noise)


@pytest.mark.parametrize(
    ("per_s", "limit", "horizon_s", "grows"),
    [
        pytest.param(10e3, None, HOUR_S, False, id="far from twice the start"),
        pytest.param(10e3, None, 10 * HOUR_S, True, id="twice the start"),
        pytest.param(10e3, 150e6, HOUR_S, True, id="the limit"),
        pytest.param(0.0, 150e6, 1000 * HOUR_S, False, id="no growth"),
        pytest.param(10e3, 120e6, 1.0, True, id="over the limit already"),
        pytest.param(10e3, 120e6, None, False, id="not asked"),
    ],
)
def test_memory_is_a_reason_when_it_reaches_its_limit_within_the_horizon(
    per_s: float, limit: float | None, horizon_s: float | None, grows: bool
) -> None:
    soak = Soak((memory(100e6, per_s),), horizon_s, limit)
    objective = LatencyObjective(quantile=0.99, threshold_ms=50)
    reasons = drift_reasons(drift_of(make_samples(), objective, 1.0, soak), objective, soak)
    assert [type(one) for one in reasons] == [MemoryGrows] * grows
    assert judge(replace(GOOD, soak=soak)).outcome == ("inconclusive" if grows else "met")
    if grows:
        assert "http://server/metrics grows by 35.9" in reasons[0].message


def test_drift_is_no_reason_when_the_window_fell_short_anyway() -> None:
    soak = Soak((memory(100e6, 10e3),), 10 * HOUR_S)
    judgement = judge(
        replace(GOOD, samples=make_samples(slow=slice(0, 100)), server=None, soak=soak)
    )
    assert judgement.outcome == "violated"
    assert [one.kind for one in judgement.reasons] == ["latency_missed"]


def test_sampler_bears_a_server_that_is_away_when_it_reads_on() -> None:
    answers = iter(
        [
            "process_resident_memory_bytes 100\n",
            "",
            'other 1\nprocess_resident_memory_bytes{a="b"} 2e+02\n',
            "nothing here\n",
        ]
    )
    all_read = Event()

    def read(url: str) -> str:
        text = next(answers, None)
        if text is None:
            all_read.set()
        if not text:
            raise MetricsUnusable("away")
        return text

    sampler = MemorySampler(("http://s",), 0.0, read)
    sampler.start()
    assert all_read.wait(10)
    sampler.stop()
    (series,) = sampler.series()
    assert series.n_bytes.tolist() == [100.0, 200.0]
    assert series.time_s[0] == 0.0


def test_memory_is_read_50_times_a_window_within_limits() -> None:
    assert [every_s(one) for one in (3, 500, 86_400)] == [1.0, 10.0, 60.0]
    assert series_of("u", [(5.0, 1.0), (7.0, 2.0)]).time_s.tolist() == [0.0, 2.0]
