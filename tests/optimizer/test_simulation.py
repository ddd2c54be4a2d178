"""The simulation against queueing theory and a slow reference."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from optimizer.capacity import predict
from optimizer.simulation import FrontEnd, Load, Replica, Trace, simulate
from tests.optimizer.replicas import affine, constant, replica, times


@pytest.mark.parametrize("utilization", [0.3, 0.5, 0.7, 0.85])
def test_mean_wait_is_that_of_pollaczek_and_khinchine_when_batches_hold_one(
    utilization: float,
) -> None:
    service_s, n_requests = 0.004, 120_000
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
    front_end = FrontEnd(serial_s=0.002, delay_s=0.003, delay_p99_s=0.008)
    chosen = Replica(times(constant(0.0001)), 4, front_end=front_end)

    prediction = predict(chosen, Load(0.5), n_requests=20_000)

    assert prediction.p50_s == pytest.approx(0.0051, rel=0.01)
    assert prediction.p99_s == pytest.approx(0.0101, rel=0.03)
    assert chosen.highest_throughput(1) == pytest.approx(500)
    assert predict(chosen, Load(550), n_requests=4_000).p99_s > 0.1


def test_batches_take_longer_when_the_front_end_works_on_the_same_cores() -> None:
    def utilization(cores: int) -> float:
        measured = times(constant(0.004), threads=2)
        chosen = Replica(measured, cores, front_end=FrontEnd(0.001, delay_s=0))
        return predict(chosen, Load(100), n_requests=4_000).utilization

    assert utilization(2) == pytest.approx(2 / (2 - 0.1) * utilization(3), rel=1e-3)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf])
def test_simulation_refuses_when_the_rate_is_no_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        simulate(replica(times(constant(0.01))), Load(rate), n_requests=10)
