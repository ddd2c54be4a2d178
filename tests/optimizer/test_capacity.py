"""Rates, prices and choices made by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from optimizer.capacity import (
    RATE_TOLERANCE,
    choose_serving,
    cost_per_million,
    max_rate_per_s,
    n_replicas,
    predict,
    sustains,
)
from optimizer.simulation import Load
from tests.optimizer.replicas import NO_FRONT_END, affine, constant, replica, slo, times


def test_prediction_counts_what_was_refused_as_late_and_failed() -> None:
    chosen = replace(replica(times(constant(0.01))), max_queue_size=4)

    prediction = predict(chosen, Load(300, threshold_s=0.2), n_requests=3_000)

    assert prediction.success_ratio == pytest.approx(1 / 3, abs=0.02)
    assert prediction.goodput_per_s == pytest.approx(100, rel=0.05)
    assert prediction.utilization > 0.99
    assert prediction.p99_s == math.inf


def test_highest_rate_is_sustained_and_little_more_is_not() -> None:
    chosen = replica(times(affine(0.002, 0.0005), spread=1.3), 8)
    load = Load(1, threshold_s=0.02)

    rate_per_s = max_rate_per_s(chosen, load)

    assert 0 < rate_per_s < chosen.highest_throughput(1)
    assert sustains(chosen, load.at(rate_per_s))
    assert not sustains(chosen, load.at(rate_per_s * (1 + 2 * RATE_TOLERANCE)))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_early_end_decides_as_the_whole_simulation(quantile: float) -> None:
    chosen = replica(times(affine(0.002, 0.0005), spread=1.3), 4)
    for rate_per_s in np.linspace(0.5, 1.2, 8) * chosen.highest_throughput(1):
        load = Load(rate_per_s, threshold_s=0.02, quantile=quantile)

        prediction = predict(chosen, load, n_requests=2_000)
        kept = prediction.slo_latency_s <= 0.02 and prediction.success_ratio >= 0.999

        assert sustains(chosen, load, n_requests=2_000) == kept


def test_highest_rate_is_zero_when_one_request_alone_is_too_slow() -> None:
    assert max_rate_per_s(replica(times(constant(0.03))), Load(1, threshold_s=0.02)) == 0
    assert max_rate_per_s(replica(times(constant(0.01))), Load(1, 0.02), above_per_s=200) == 0


def test_replicas_share_the_rate() -> None:
    assert n_replicas(200, 250) == 1
    assert n_replicas(200, 200) == 1
    assert n_replicas(200.1, 200) == 2
    assert n_replicas(200, 0) == 1


def test_cost_is_the_price_of_the_seconds_that_a_million_rows_take() -> None:
    assert cost_per_million(0.36, cores=2, max_rate_per_s=100) == pytest.approx(2.0)
    assert cost_per_million(0.36, cores=2, max_rate_per_s=100, rows=4) == pytest.approx(0.5)
    assert cost_per_million(0.36, cores=2, max_rate_per_s=0) == math.inf


def test_choice_batches_when_larger_batches_cost_little() -> None:
    choice = choose_serving([times(affine(0.004, 0.0002))], slo(), 1, 0.04, front_end=NO_FRONT_END)

    assert choice.max_batch_size >= 8
    assert choice.max_rate_per_s > 3 / 0.0042


def test_choice_does_not_batch_when_larger_batches_gain_nothing() -> None:
    choice = choose_serving([times(affine(0.0, 0.002))], slo(), 1, 0.04, front_end=NO_FRONT_END)

    assert choice.max_batch_size == 1
    assert choice.max_queue_delay_s == 0


@pytest.mark.parametrize(
    ("efficiency", "instances"),
    [pytest.param(1.9, 1, id="threads scale"), pytest.param(1.2, 2, id="threads don't scale")],
)
def test_choice_is_between_instances_and_threads(efficiency: float, instances: int) -> None:
    options = [
        times(affine(0.003 / efficiency, 0.001 / efficiency), threads=2),
        times(affine(0.003, 0.001), instances=2),
        times(affine(0.001, 0.0001), instances=4),  # doesn't fit
    ]

    choice = choose_serving(options, slo(), 2, 0.04, front_end=NO_FRONT_END)

    assert (choice.instances, choice.threads) == (instances, 2 // instances)


def test_choice_ranks_variants_by_cost_though_one_replica_is_enough_for_each() -> None:
    slow, fast = (
        choose_serving([times(affine(0.001 / f, 0.0005 / f))], slo(), 1, 0.04) for f in (1.0, 1.5)
    )

    assert slow.replicas == fast.replicas == 1
    assert fast.cost_per_million < slow.cost_per_million


def test_choice_predicts_for_one_of_the_replicas_that_the_rate_needs() -> None:
    choice = choose_serving([times(constant(0.004))], slo(rate_per_s=1_000), 1, 0.04)

    assert choice.replicas == math.ceil(1_000 / choice.max_rate_per_s)
    assert choice.prediction.rate_per_s == pytest.approx(1_000 / choice.replicas)
    # Whether a rate is sustained is decided by another, shorter sample than the prediction's.
    assert choice.prediction.slo_latency_s <= 0.02 * 1.05


def test_choice_has_no_price_when_nothing_keeps_the_slo() -> None:
    options = [times(constant(0.03), instances=2), times(constant(0.025), threads=2)]

    choice = choose_serving(options, slo(), 2, 0.04)

    assert choice.max_rate_per_s == 0
    assert choice.cost_per_million == math.inf
    assert choice.threads == 2


def test_choice_prefers_latency_when_that_is_the_objective() -> None:
    options = [times(constant(0.004), threads=2), times(constant(0.006), instances=2)]

    cheap = choose_serving(options, slo(), 2, 0.04, front_end=NO_FRONT_END)
    quick = choose_serving(options, slo(), 2, 0.04, front_end=NO_FRONT_END, objective="latency")

    assert quick.prediction.slo_latency_s <= cheap.prediction.slo_latency_s
    assert quick.max_rate_per_s >= 200


def test_choice_makes_batches_that_hold_a_request_when_requests_have_many_rows() -> None:
    choice = choose_serving([times(affine(0.001, 0.0001))], slo(rate_per_s=50, rows=12), 1, 0.04)

    assert choice.max_batch_size >= 12
    assert choice.prediction.mean_batch_rows >= 12


def test_choice_refuses_when_no_option_fits_the_cores() -> None:
    with pytest.raises(ValueError, match="at most 1"):
        choose_serving([times(constant(0.01), threads=2)], slo(), 1, 0.04)


def test_choice_leaves_room_for_batches_when_the_front_end_is_the_limit() -> None:
    options = [times(affine(0.0002, 0.00001))]

    chosen = choose_serving(options, slo(), cores=2, price_per_core_hour=0.04)

    assert chosen.max_batch_size == 32
    assert chosen.max_queue_delay_s == 0
