"""Bounds that hold for every sample size: against scipy, and their own promise of coverage."""

import numpy as np
import pytest
from scipy import stats

from optimizer.bounds import mean_upper_bound, share_lower_bound, share_upper_bound


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("n_hits", "n"), [(0, 1), (0, 299), (3, 100), (50, 100), (99, 100), (4_900, 50_000)]
)
def test_share_bounds_are_quantiles_of_a_beta_by_scipy(
    n_hits: int, n: int, confidence: float
) -> None:
    upper = stats.beta.ppf(confidence, n_hits + 1, n - n_hits)
    assert share_upper_bound(n_hits, n, confidence) == pytest.approx(upper, rel=1e-9)
    lower = stats.beta.ppf(1 - confidence, n_hits, n - n_hits + 1) if n_hits else 0.0
    assert share_lower_bound(n_hits, n, confidence) == pytest.approx(lower, rel=1e-6, abs=1e-12)


def test_share_bound_is_one_when_all_are_hits() -> None:
    assert share_upper_bound(7, 7, 0.95) == 1.0


@pytest.mark.parametrize(("n_hits", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_share_bound_is_refused_when_counts_are_impossible(n_hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="want 0 to n"):
        share_upper_bound(n_hits, n, 0.95)


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("value", [0.0, 0.5, 0.9])
def test_mean_bound_stays_above_when_all_values_are_equal(n: int, value: float) -> None:
    bound = mean_upper_bound(np.full(n, value), 0.95)
    assert value < bound <= 1.0


def test_mean_bound_falls_with_samples_and_rises_with_confidence() -> None:
    bounds = [mean_upper_bound(np.zeros(n), 0.95, low=-1) for n in (10, 100, 1000, 10_000)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[2] == pytest.approx(0.0041, abs=1e-4)
    values = np.random.default_rng(0).random(200)
    levels = [mean_upper_bound(values, confidence) for confidence in (0.5, 0.9, 0.95, 0.99)]
    assert levels == sorted(levels)


def test_mean_bound_is_scaled_with_its_values() -> None:
    values = np.random.default_rng(0).random(200)
    unscaled = mean_upper_bound(values, 0.95)
    scaled = mean_upper_bound(10 * values - 3, 0.95, low=-3, high=7)
    assert scaled == pytest.approx(10 * unscaled - 3)


def test_mean_bound_is_near_students_when_values_vary() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(30):
        values = rng.random(1000)
        student = stats.t.ppf(0.95, 999) * values.std(ddof=1) / np.sqrt(1000)
        ratios.append((mean_upper_bound(values, 0.95) - values.mean()) / student)
    assert 1 < np.mean(ratios) < 1.35


@pytest.mark.parametrize(
    ("name", "mean"), [("rare and large", 0.02), ("uniform", 0.5), ("mostly good", 0.9)]
)
def test_mean_bound_errs_as_seldom_as_it_says(name: str, mean: float) -> None:
    """Student's interval errs 39 times in a hundred on the first."""
    rng = np.random.default_rng(0)
    draws = {
        "rare and large": lambda: (rng.random(50) < 0.02).astype(float),
        "uniform": lambda: rng.random(50),
        "mostly good": lambda: rng.beta(9, 1, 50),
    }[name]
    wrong = sum(mean_upper_bound(draws(), 0.95) < mean for _ in range(1000))
    assert wrong <= 0.05 * 1000 + 3 * np.sqrt(0.05 * 0.95 * 1000)


def test_mean_bound_errs_as_seldom_as_it_says_when_values_are_sorted() -> None:
    """Taken in that order the mean seems to be below 0.5 halfway, and 0.5 is ruled out."""
    rng = np.random.default_rng(0)
    wrong = sum(mean_upper_bound(np.sort(rng.random(60)), 0.95) < 0.5 for _ in range(300))
    assert wrong <= 0.05 * 300 + 3 * np.sqrt(0.05 * 0.95 * 300)


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [np.nan], [[0.5]]])
def test_mean_bound_is_refused_when_values_are_out_of_range(values: list[float]) -> None:
    with pytest.raises(ValueError, match="want an array"):
        mean_upper_bound(values, 0.95)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_bounds_are_refused_when_the_confidence_is_no_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        mean_upper_bound([0.5], confidence)
    with pytest.raises(ValueError, match="confidence"):
        share_upper_bound(0, 1, confidence)
