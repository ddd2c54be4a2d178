"""The search on simulated M/D/1 servers, of which the highest rate is known."""

import numpy as np
import pytest
from sklearn.isotonic import isotonic_regression

from loadtest.capacity import Point, crossing, find_capacity, isotonic_blocks
from loadtest.statistics import good_share
from tests.loadtest.queues import share_within, sojourns

SERVICE_S = 0.005
QUANTILE = 0.99
WINDOW_S = 30.0


class SimulatedServer:
    """A single server with a fixed service time; each measurement has its own arrivals."""

    def __init__(self, threshold_s: float, seed: int) -> None:
        self.threshold_s = threshold_s
        self.seed = seed
        self.n_requests = 0

    def measure(self, rate_per_s: float) -> Point:
        self.seed += 1000
        n = round(rate_per_s * WINDOW_S)
        self.n_requests += n
        waits = sojourns(rate_per_s * SERVICE_S, n, 1, self.seed)[0] * SERVICE_S
        share = good_share(waits, self.threshold_s, QUANTILE)
        return Point(rate_per_s, 1 - share.estimate, n / share.correlation_requests)


def known_capacity(threshold_s: float) -> float:
    """The rate at which just QUANTILE of the requests take at most `threshold_s`."""
    low, high = 0.01, 0.99
    for _ in range(30):
        middle = (low + high) / 2
        within = float(share_within(threshold_s / SERVICE_S, f"{middle:.9f}"))
        low, high = (middle, high) if within >= QUANTILE else (low, middle)
    return low / SERVICE_S


@pytest.mark.parametrize(("threshold_s", "start_per_s"), [(0.05, 20.0), (0.03, 400.0)])
def test_capacity_is_within_five_percent_in_nineteen_of_twenty_searches(
    threshold_s: float, start_per_s: float
) -> None:
    wanted = known_capacity(threshold_s)
    errors = []
    for seed in range(20):
        server = SimulatedServer(threshold_s, seed)
        found = find_capacity(server.measure, start_per_s, QUANTILE, 1e6)
        assert found.ending == "found"
        assert found.rate_per_s is not None
        errors.append(found.rate_per_s / wanted - 1)
    assert np.mean(np.abs(errors) <= 0.05) >= 0.95, np.round(errors, 3)
    assert abs(float(np.mean(errors))) < 0.03


def test_capacity_is_not_bracketed_when_the_limit_is_reached_first() -> None:
    found = find_capacity(lambda rate: Point(rate, 0, 1000), 100, 0.99, 500)
    assert (found.ending, found.rate_per_s) == ("not_bracketed", None)
    assert [one.rate_per_s for one in found.points] == [100, 200, 400, 500]


def test_capacity_is_not_bracketed_when_no_rate_is_low_enough() -> None:
    found = find_capacity(lambda rate: Point(rate, 1, 1000), 100, 0.99, 500)
    assert (found.ending, found.rate_per_s) == ("not_bracketed", None)


@pytest.mark.parametrize("limit_per_s", [50, 150, 700])
def test_capacity_is_unknown_when_the_generator_is_the_limit(limit_per_s: float) -> None:
    found = find_capacity(
        lambda rate: Point(rate, 0 if rate < 750 else 0.9, 1000, rate < limit_per_s),
        100,
        0.99,
        10_000,
    )
    assert (found.ending, found.rate_per_s) == ("unusable", None)
    assert not found.points[-1].usable


def test_isotonic_blocks_are_those_of_scikit_learn_when_fitted() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=200) + np.arange(200) / 60, rng.uniform(0.1, 3, 200)
    starts = isotonic_blocks(values, weights)
    sizes = np.diff([*starts, 200])
    means = np.add.reduceat(weights * values, starts) / np.add.reduceat(weights, starts)
    wanted = isotonic_regression(values, sample_weight=weights)
    np.testing.assert_allclose(np.repeat(means, sizes), wanted)


def test_crossing_lies_between_the_points_around_it_when_they_are_exact() -> None:
    points = [Point(100.0, 0.001, 1e9), Point(200.0, 0.1, 1e9)]
    # From 0.1 % to 10 % the logarithm passes 1 % halfway, which is the geometric mean of the rates.
    assert crossing(points, 0.01) == pytest.approx(100 * 2**0.5, rel=1e-4)


@pytest.mark.parametrize("bad_share", [0.0, 0.5])
def test_crossing_is_none_when_all_points_are_on_one_side(bad_share: float) -> None:
    points = [Point(rate, bad_share, 1000) for rate in (100.0, 200.0)]
    assert crossing(points, 0.01) is None
