"""The simulation against queueing theory and a slow reference."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from optimizer.capacity import predict
from optimizer.result import LEVELS
from optimizer.simulation import Load, Replica, Spread, Trace, simulate
from tests.optimizer.replicas import NO_FRONT_END, affine, constant, replica, times


@pytest.mark.parametrize("utilization", [0.3, 0.5, 0.7, 0.85])
def test_mean_wait_is_that_of_pollaczek_and_khinchine_when_batches_hold_one(
    utilization: float,
) -> None:
    service_s, n_requests = 0.004, 60_000
    load = Load(utilization / service_s)

    trace = simulate(replica(times(constant(service_s))), load, n_requests=n_requests, seed=1)

    wait_s = (trace.latency_s - service_s)[n_requests // 10 :].mean()
    theory_s = utilization * service_s / (2 * (1 - utilization))
    assert wait_s == pytest.approx(theory_s, rel=0.05)


@pytest.mark.parametrize("n_instances", [1, 2, 4])
@pytest.mark.parametrize("utilization", [0.4, 0.95])
def test_every_answer_is_on_time_by_the_recursion_of_kiefer_and_wolfowitz(
    n_instances: int, utilization: float
) -> None:
    service_s = 0.003
    load = Load(utilization * n_instances / service_s)
    measured = times(constant(service_s), instances=n_instances)

    trace = simulate(replica(measured), load, n_requests=3_000)

    free_s = [0.0] * n_instances
    for arrival_s, answer_s in zip(trace.arrival_s, trace.answer_s, strict=True):
        free_s.sort()
        free_s[0] = max(arrival_s, free_s[0]) + service_s
        assert answer_s == pytest.approx(free_s[0], abs=1e-9)


@pytest.mark.parametrize("arrivals", ["poisson", "constant"])
@pytest.mark.parametrize("max_batch_size", [1, 8], ids=["single", "batched"])
@pytest.mark.parametrize("share", [0.5, 0.8, 3.0], ids=["light", "busy", "overload"])
def test_every_request_is_in_one_batch_or_refused(
    arrivals: Literal["poisson", "constant"], max_batch_size: int, share: float
) -> None:
    chosen = replica(times(affine(0.002, 0.0005), instances=2, spread=1.5), max_batch_size)
    rate_per_s = share * chosen.highest_throughput(1)
    load = replace(Load(rate_per_s, threshold_s=0.02), arrivals=arrivals)

    trace = simulate(replace(chosen, max_queue_size=64), load, n_requests=3_000)

    answered = sorted(index for batch in trace.batches for index in batch.requests)
    assert answered == np.flatnonzero(np.isfinite(trace.answer_s)).tolist()
    assert share > 1 or len(answered) == 3_000
    assert all(1 <= len(batch.requests) <= max_batch_size for batch in trace.batches)


def test_instances_never_idle_while_requests_wait_when_there_is_no_delay() -> None:
    chosen = replica(times(affine(0.002, 0.0005), instances=2, spread=1.5), 8)
    load = Load(0.9 * chosen.highest_throughput(1), threshold_s=0.05)

    trace = simulate(chosen, load, n_requests=3_000)

    for batch in trace.batches:
        oldest_s = min(trace.queued_s[index] for index in batch.requests)
        if oldest_s < batch.start_s - 1e-12:
            assert n_busy(trace, (oldest_s + batch.start_s) / 2) == 2
        assert n_busy(trace, (batch.start_s + batch.finish_s) / 2) <= 2


def n_busy(trace: Trace, instant_s: float) -> int:
    return sum(batch.start_s <= instant_s < batch.finish_s for batch in trace.batches)


def test_simulation_is_equal_when_the_seed_is_and_differs_when_not() -> None:
    chosen = replica(times(affine(0.002, 0.0005), spread=2.0), 8)
    load = Load(500, threshold_s=0.02)

    first, again, other = (predict(chosen, load, n_requests=2_000, seed=s) for s in (3, 3, 4))

    assert first == again
    assert first != other


def test_batch_times_have_the_measured_median_and_99th_percentile() -> None:
    chosen = replica(times(constant(0.004), spread=1.8))

    trace = simulate(chosen, Load(100), n_requests=30_000)

    seconds = [batch.finish_s - batch.start_s for batch in trace.batches]
    assert min(seconds) == pytest.approx(0.004)
    assert np.quantile(seconds, [0.49, 0.99]) == pytest.approx([0.004, 0.0072], rel=0.02)


def test_policy_waits_for_company_when_a_delay_is_allowed() -> None:
    measured = times(affine(0.004, 0.0001), instances=2)
    load = Load(300, threshold_s=0.1)

    eager = predict(replica(measured, 8), load, n_requests=4_000)
    patient = predict(replica(measured, 8, delay_s=0.02), load, n_requests=4_000)

    assert patient.mean_batch_rows > 1.3 * eager.mean_batch_rows
    assert patient.utilization < eager.utilization
    assert patient.p50_s > eager.p50_s


def test_padded_batches_take_as_long_as_the_next_measured_size() -> None:
    measured = replace(times(affine(0.0, 0.001), sizes=(4,)), padded=True)

    trace = simulate(replica(measured, 4), Load(10), n_requests=100)

    durations = {round(batch.finish_s - batch.start_s, 9) for batch in trace.batches}
    assert durations == {0.004}


def test_front_end_limits_the_rate_and_adds_its_time() -> None:
    way = Spread.of([0.003] * 98 + [0.008] * 2)
    front_end = replace(NO_FRONT_END, receive_s=0.0015, answer_s=0.0005, way=way)
    chosen = Replica(times(constant(0.0001)), 4, front_end=front_end)

    prediction = predict(chosen, Load(0.5), n_requests=20_000)

    assert prediction.p50_s == pytest.approx(0.0051, rel=0.01)
    assert prediction.p99_s == pytest.approx(0.0101, rel=0.03)
    assert chosen.highest_throughput(1) == pytest.approx(500)
    assert predict(chosen, Load(550), n_requests=4_000).p99_s > 0.1


def test_instances_wait_for_the_front_end_when_it_works_on_the_same_cores() -> None:
    """One core: an M/D/1 queue whose service is reading, engine and answering."""
    front_end = replace(NO_FRONT_END, receive_s=0.001, answer_s=0.001)
    alone, shared = (
        Replica(times(constant(0.004)), cores, front_end=front_end) for cores in (2, 1)
    )

    assert shared.highest_throughput(1) == pytest.approx(1 / 0.006)
    assert alone.highest_throughput(1) == pytest.approx(1 / 0.004)
    assert predict(alone, Load(200), n_requests=8_000).p99_s < 0.05
    assert predict(shared, Load(200), n_requests=8_000).p99_s > 1
    busy = predict(shared, Load(1), n_requests=4_000)
    assert busy.p50_s == pytest.approx(0.006, rel=1e-3)


def test_answer_stays_unsent_when_the_engine_goes_on_and_no_core_is_free() -> None:
    """Two requests at once on one core: the second's batch begins before the first's answer."""
    wake = Spread.constant(0.003)
    chosen = replace(replica(times(constant(0.01))), front_end=replace(NO_FRONT_END, wake=wake))

    traces = [
        simulate(replace(chosen, cores=cores), Load(95), n_requests=4_000) for cores in (1, 2)
    ]

    for trace, held_s in zip(traces, (0.003, 0.0), strict=True):
        finish_s = {index: one.finish_s for one in trace.batches for index in one.requests}
        begins = {one.start_s for one in trace.batches}
        delays = {
            round(trace.answer_s[index] - finish, 6)
            for index, finish in finish_s.items()
            if finish in begins
        }
        # Less where a request that came in the meantime had the front end waiting already.
        assert max(delays) == held_s


def test_batches_take_what_was_measured_and_what_the_server_adds() -> None:
    measured = times(constant(0.004))
    quantiles = tuple(tuple(0.004 + 0.001 * level for level in LEVELS) for _ in measured.times)
    front_end = replace(NO_FRONT_END, batch_s=0.002, stretch=1.5)
    chosen = Replica(replace(measured, quantiles=quantiles), 1, front_end=front_end)

    trace = simulate(chosen, Load(20), n_requests=20_000)

    seconds = [batch.finish_s - batch.start_s for batch in trace.batches]
    wanted = [0.002 + 1.5 * (0.004 + 0.001 * share) for share in (0.1, 0.5, 0.99)]
    assert np.quantile(seconds, [0.1, 0.5, 0.99]) == pytest.approx(wanted, rel=0.005)


def test_spread_stretches_only_what_is_above_its_median() -> None:
    spread = Spread.of([0.001, 0.002, 0.003]).stretched(2.0)

    assert spread.median_s == 0.002
    assert spread.seconds[0] == 0.001
    assert spread.seconds[-1] == pytest.approx(0.004)


@pytest.mark.parametrize("seconds", [(0.1,), (0.2,) * 12 + (0.1,), (-0.1,) * 13])
def test_spread_refuses_what_is_no_distribution(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        Spread(seconds)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf])
def test_simulation_refuses_when_the_rate_is_no_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        simulate(replica(times(constant(0.01))), Load(rate), n_requests=10)
