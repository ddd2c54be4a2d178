"""The simulated autoscaler against what Kubernetes documents of its own, and the fleet's queue."""

import pytest

from benchmarks import autoscaling as fleet
from benchmarks import horizontal_autoscaler as hpa


@pytest.mark.parametrize(
    ("total", "replicas", "wanted"),
    [
        pytest.param(8.0, 2, 4, id="twice the target doubles"),
        pytest.param(2.0, 2, 1, id="half the target halves"),
        pytest.param(4.39, 2, 2, id="10 % more is tolerated"),
        pytest.param(4.41, 2, 3, id="more than that is not, and is rounded up"),
        pytest.param(3.61, 2, 2, id="10 % less is tolerated"),
    ],
)
def test_total_asks_for_its_ratio_to_the_target_outside_the_tolerance(
    total: float, replicas: int, wanted: int
) -> None:
    assert hpa.wanted_by_total(total, 2.0, replicas) == wanted


@pytest.mark.parametrize(
    ("used", "unready", "replicas", "wanted"),
    [
        pytest.param([0.9, 0.9], 0, 2, 4, id="all are ready"),
        pytest.param([1.0, 1.0], 2, 4, 4, id="those that start are counted as idle: enough"),
        pytest.param([1.0, 1.0], 1, 3, 4, id="those that start are counted as idle: too few"),
        pytest.param([0.2, 0.2], 2, 4, 1, id="those that start don't count when there is less"),
        pytest.param([], 3, 3, 3, id="none is ready"),
        pytest.param([0.54], 0, 1, 1, id="tolerated"),
    ],
)
def test_utilization_damps_a_rise_by_pods_that_are_not_ready(
    used: list[float], unready: int, replicas: int, wanted: int
) -> None:
    assert hpa.wanted_by_utilization(used, 0.5, unready, replicas) == wanted


def test_default_behavior_adds_four_pods_or_doubles_in_15_s() -> None:
    state = hpa.State(1)
    grown = []
    for now in range(0, 60, 15):
        state = hpa.decide(state, 1_000, now, hpa.DEFAULT, 1, 500)
        grown.append(state.replicas)
    assert grown == [5, 10, 20, 40]


def test_policy_counts_from_what_was_there_when_its_period_began() -> None:
    """Twofold in 30 s: a second sync within it adds nothing."""
    rules = hpa.Rules(0, (hpa.Policy("Percent", 100, 30),))
    behavior = hpa.Behavior(rules, hpa.DEFAULT.down)
    state = hpa.State(3)
    grown = []
    for now in range(0, 60, 15):
        state = hpa.decide(state, 1_000, now, behavior, 1, 500)
        grown.append(state.replicas)
    assert grown == [6, 6, 12, 12]


def test_scaling_down_waits_until_the_window_agrees() -> None:
    """The highest recommendation of the last five minutes counts."""
    state = hpa.decide(hpa.State(8), 8, 0, hpa.DEFAULT, 1, 500)
    when = 0.0
    while state.replicas == 8:
        when += 15
        state = hpa.decide(state, 2, when, hpa.DEFAULT, 1, 500)
    assert (when, state.replicas) == (300, 2)


def test_scaling_down_takes_a_share_at_a_time() -> None:
    down = hpa.Rules(0, (hpa.Policy("Percent", 10, 60),))
    behavior = hpa.Behavior(hpa.DEFAULT.up, down)
    state, taken = hpa.State(20), []
    for now in range(0, 180, 60):
        state = hpa.decide(state, 1, now, behavior, 1, 500)
        taken.append(state.replicas)
    assert taken == [18, 16, 14]


def test_limits_hold() -> None:
    assert hpa.decide(hpa.State(8), 100, 0, hpa.DEFAULT, 2, 10).replicas == 10
    assert hpa.decide(hpa.State(3), 0, 0, hpa.DEFAULT, 2, 10).replicas == 2


def test_behavior_is_read_from_the_manifest() -> None:
    target = fleet.Point(40, 0.6, 0.4, 1.0)
    first = fleet.scalers(target)[0]
    assert (first.least, first.most) == (2, 20)
    assert first.behavior.down == hpa.Rules(300, (hpa.Policy("Percent", 10, 60),))


# --- the queue


@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.8])
def test_queue_has_the_load_that_theory_gives_it(utilization: float) -> None:
    """M/D/1, Pollaczek and Khinchine: in flight are ρ + ρ² / (2 (1 - ρ))."""
    queue = fleet.Queue(0.01, 0.05, 1e9)
    point = fleet.point_at(queue, utilization / 0.01, length_s=3_000)
    assert point.used == pytest.approx(utilization, rel=0.03)
    expected = utilization + utilization**2 / (2 * (1 - utilization))
    assert point.in_flight == pytest.approx(expected, rel=0.08)


def test_fleet_at_its_target_keeps_the_promise_and_its_size() -> None:
    queue = fleet.Queue(0.01, 0.05, 0.25)
    capacity_per_s = fleet.capacity_of(queue)
    target = fleet.point_at(queue, 0.8 * capacity_per_s)
    steady = fleet.usual([4.0] * 600)
    *aimed, usual_cpu = fleet.scalers(target)
    for scaler in aimed:
        run = fleet.simulate(steady, target.rate_per_s, queue, scaler, 15, 1)
        assert run.bad_share < 0.01
        assert set(run.replicas) <= {4, 5}
    longer = fleet.usual([12.0] * 900)
    over = fleet.simulate(longer, target.rate_per_s, queue, usual_cpu, 15, 1)
    assert 1 - sum(over.good[700:]) / sum(over.arrived[700:]) > 0.03


def test_replicas_are_paid_from_when_they_are_asked_for() -> None:
    queue = fleet.Queue(0.01, 0.05, 0.25)
    target = fleet.point_at(queue, 40)
    (scaler, *_) = fleet.scalers(target)
    step = fleet.usual([2.0] * 100 + [6.0] * 200)
    quick, slow = (fleet.simulate(step, 40, queue, scaler, start_s, 1) for start_s in (5, 100))
    assert quick.bad_share < slow.bad_share
    assert next(i for i, n in enumerate(slow.replicas) if n > 2) < 160
