import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from loadtest.statistics import (
    batch_means_lower,
    clopper_pearson_lower,
    correlation_time,
    good_share,
    min_requests,
    quantile,
    student_cdf,
    student_quantile,
)

INFINITE = math.inf


@pytest.mark.parametrize(
    ("values", "share", "wanted"),
    [
        pytest.param([3.0, 1.0, 2.0], 0.5, 2.0, id="the middle one of three"),
        pytest.param([1.0, 2.0, 3.0, 4.0], 0.5, 2.0, id="the lower middle one of four"),
        pytest.param([1.0, 2.0, 3.0, 4.0], 1.0, 4.0, id="the largest for all"),
        pytest.param([1.0, 2.0, INFINITE], 0.99, INFINITE, id="an infinite one is a value"),
        pytest.param([1.0, 2.0, INFINITE], 0.6, 2.0, id="an infinite one above doesn't spread"),
        pytest.param(list(range(1, 101)), 0.99, 99.0, id="99 of 100 without rounding up"),
        pytest.param([7.0], 0.01, 7.0, id="a single one"),
    ],
)
def test_quantile_is_an_observed_value_when_any_are_there(
    values: list[float], share: float, wanted: float
) -> None:
    assert quantile(np.array(values, dtype=np.float64), share) == wanted


def test_quantile_is_that_of_scipy_when_the_sample_is_random() -> None:
    values = np.random.default_rng(1).exponential(size=997)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999):
        wanted = np.quantile(values, share, method="inverted_cdf")
        assert quantile(values, share) == wanted


def test_quantile_is_not_a_number_when_there_are_no_values() -> None:
    assert math.isnan(quantile(np.array([]), 0.5))


@pytest.mark.parametrize("n", [1, 10, 299, 3_000, 30_000])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_clopper_pearson_is_the_beta_quantile_when_computed_by_scipy(
    n: int, confidence: float
) -> None:
    for n_good in {1, n // 3 + 1, n - n // 100, n - 1, n} - {0}:
        wanted = stats.beta.ppf(1 - confidence, n_good, n - n_good + 1)
        assert clopper_pearson_lower(n_good, n, confidence) == pytest.approx(wanted, abs=1e-9)


def test_clopper_pearson_is_zero_when_none_is_good() -> None:
    assert clopper_pearson_lower(0, 100) == 0


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 10, 29, 100])
def test_student_is_that_of_scipy_when_degrees_are_odd_or_even(degrees: int) -> None:
    for share in (0.5, 0.6, 0.9, 0.95, 0.999):
        wanted = stats.t.ppf(share, degrees)
        assert student_quantile(share, degrees) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    for t in (-3.0, -0.1, 0.0, 1.5, 40.0):
        assert student_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)


def test_batch_means_are_students_interval_of_the_means_when_batches_are_equal() -> None:
    values = np.random.default_rng(2).normal(size=3000)
    means = values.reshape(30, 100).mean(axis=1)
    wanted = stats.t.interval(0.9, 29, means.mean(), stats.sem(means))[0]
    assert batch_means_lower(values, 0.95) == pytest.approx(wanted, rel=1e-9)


def test_batch_means_have_no_bound_when_there_are_too_few() -> None:
    assert batch_means_lower(np.ones(59)) == -math.inf
    assert batch_means_lower(np.ones(60)) == 1


def test_correlation_time_is_the_known_one_when_the_series_is_autoregressive() -> None:
    rng = np.random.default_rng(3)
    series, value = np.empty(100_000), 0.0
    for index, noise in enumerate(rng.standard_normal(len(series))):
        value = 0.8 * value + noise
        series[index] = value
    assert correlation_time(series) == pytest.approx((1 + 0.8) / (1 - 0.8), rel=0.1)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.ones(100), id="constant"),
        pytest.param(np.array([1.0]), id="a single one"),
        pytest.param(np.tile([0.0, 1.0], 500), id="alternating, below one"),
    ],
)
def test_correlation_time_is_one_when_nothing_hangs_together(
    values: npt.NDArray[np.float64],
) -> None:
    assert correlation_time(values) == 1


@pytest.mark.parametrize(
    ("share", "confidence", "n"), [(0.99, 0.95, 299), (0.99, 0.99, 459), (0.95, 0.95, 59)]
)
def test_min_requests_is_that_of_mlperf_when_all_are_good(
    share: float, confidence: float, n: int
) -> None:
    assert min_requests(share, confidence) == n
    assert clopper_pearson_lower(n, n, confidence) >= share
    assert clopper_pearson_lower(n - 1, n - 1, confidence) < share


def test_good_share_counts_fewer_requests_when_bad_ones_come_in_bursts() -> None:
    spread, burst = np.full(6000, 0.01), np.full(6000, 0.01)
    spread[::200] = 1.0
    burst[3000:3030] = 1.0
    alone, together = good_share(spread, 0.1, 0.99), good_share(burst, 0.1, 0.99)
    assert alone.estimate == together.estimate == 0.995
    assert alone.lower > 0.99 > together.lower
    assert together.effective_n < alone.effective_n / 10


def test_good_share_ignores_drifts_when_they_stay_far_below_the_threshold() -> None:
    drift = 0.01 + 0.005 * np.sin(np.arange(3000) / 200)
    far, near = good_share(drift, 0.1, 0.99), good_share(drift, 0.02, 0.99)
    assert far.effective_n == 3000
    assert near.effective_n < 299
