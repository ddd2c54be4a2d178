"""Statistics against scipy, slow references and their own promise of coverage."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from loadtest.slo import AccuracyObjective
from optimizer.stats import (
    PairedDrop,
    drop_upper_bound,
    paired_drop,
    quantile_interval,
    quantile_ranks,
    ratio_interval,
    wilson_interval,
)


def slow_tango_bound(n: int, n10: int, n01: int, confidence: float) -> float:
    """The score bound with the likelihood maximized numerically instead of in closed form."""

    def score(delta: float) -> float:
        def negative_log_likelihood(p01: float) -> float:
            rest = 1 - 2 * p01 - delta
            terms = ((n10, p01 + delta), (n01, p01), (n - n10 - n01, rest))
            return -sum(count * math.log(share) for count, share in terms if count)

        ceiling = (1 - delta) / 2
        found = optimize.minimize_scalar(
            negative_log_likelihood,
            bounds=(max(0.0, -delta) + 1e-13, ceiling - 1e-13),
            method="bounded",
            options={"xatol": 1e-12},
        )
        variance = n * (2 * found.x + delta * (1 - delta))
        return (n10 - n01 - n * delta) / math.sqrt(variance)

    z = stats.norm.ppf(confidence)
    return optimize.brentq(lambda delta: score(delta) + z, (n10 - n01) / n + 1e-9, 1 - 1e-9)


@pytest.mark.parametrize(
    ("n", "n10", "n01", "confidence"),
    [
        pytest.param(500, 8, 3, 0.95, id="more lost than gained"),
        pytest.param(500, 3, 8, 0.95, id="more gained than lost"),
        pytest.param(500, 5, 5, 0.99, id="as many lost as gained"),
        pytest.param(300, 6, 0, 0.95, id="nothing gained"),
        pytest.param(300, 0, 6, 0.9, id="nothing lost"),
        pytest.param(40, 15, 10, 0.975, id="few samples that often disagree"),
    ],
)
def test_drop_bound_equals_numerical_maximum_likelihood(
    n: int, n10: int, n01: int, confidence: float
) -> None:
    expected = slow_tango_bound(n, n10, n01, confidence)
    assert drop_upper_bound(n, n10, n01, confidence) == pytest.approx(expected, abs=1e-5)


def test_drop_bound_is_closed_form_when_nothing_disagrees() -> None:
    z = stats.norm.ppf(0.95)
    assert drop_upper_bound(400, 0, 0, 0.95) == pytest.approx(z**2 / (400 + z**2), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "p10", "p01"),
    [(200, 0.03, 0.02), (200, 0.02, 0.01), (500, 0.01, 0.01), (300, 0.03, 0.0)],
)
def test_drop_bound_covers_as_often_as_it_promises(n: int, p10: float, p01: float) -> None:
    """Exact: summed over the whole distribution of the counts, not simulated."""
    covered = 0.0
    for n10 in range(n + 1):
        p_n10 = stats.binom.pmf(n10, n, p10)
        if p_n10 < 1e-6:
            continue
        gains = np.arange(n - n10 + 1)
        for n01, p_n01 in enumerate(stats.binom.pmf(gains, n - n10, p01 / (1 - p10))):
            if p_n01 > 1e-6 and drop_upper_bound(n, n10, n01, 0.95) >= p10 - p01:
                covered += p_n10 * p_n01
    assert 0.94 < covered < 0.98


def test_drop_bound_is_one_when_everything_is_lost() -> None:
    assert drop_upper_bound(10, 10, 0, 0.95) == 1


def test_drop_bound_rises_when_confidence_or_losses_rise() -> None:
    by_confidence = [drop_upper_bound(500, 8, 3, c) for c in (0.5, 0.9, 0.95, 0.99)]
    by_losses = [drop_upper_bound(500, lost, 3, 0.95) for lost in (3, 8, 20, 100)]
    assert by_confidence == sorted(by_confidence)
    assert by_confidence[0] == pytest.approx(5 / 500)
    assert by_losses == sorted(by_losses)


@pytest.mark.parametrize("max_drop_points", [0.1, 0.5, 1, 2, 7.5])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_slo_min_samples_is_the_fewest_that_the_bound_lets_pass(
    max_drop_points: float, confidence: float
) -> None:
    objective = AccuracyObjective(max_drop_points=max_drop_points, confidence=confidence)
    n = objective.min_samples()
    assert drop_upper_bound(n, 0, 0, confidence) <= objective.max_drop + 1e-12
    assert n == 1 or drop_upper_bound(n - 1, 0, 0, confidence) > objective.max_drop


def test_paired_drop_counts_disagreements() -> None:
    base = np.array([True, True, True, False, False])
    variant = np.array([True, False, False, True, False])
    drop = paired_drop(base, variant)
    assert drop == PairedDrop(n=5, n10=2, n01=1)
    assert drop.estimate == pytest.approx(0.2)
    assert drop.upper_bound(0.95) == drop_upper_bound(5, 2, 1, 0.95)


@pytest.mark.parametrize(
    ("base", "variant"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([True], [True, False], id="unequal lengths"),
        pytest.param([1, 0], [1, 1], id="labels instead of right or wrong"),
    ],
)
def test_paired_drop_refuses_when_arrays_are_no_pairs(base: list, variant: list) -> None:
    with pytest.raises(ValueError, match="got"):
        paired_drop(base, variant)


def test_paired_drop_refuses_counts_when_they_exceed_the_samples() -> None:
    with pytest.raises(ValueError, match="n10 3, n01 3"):
        PairedDrop(n=5, n10=3, n01=3)


@pytest.mark.parametrize(("n_correct", "n"), [(0, 20), (20, 20), (1, 20), (897, 1000), (1, 1)])
def test_wilson_interval_equals_scipy(n_correct: int, n: int) -> None:
    expected = stats.binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
    interval = wilson_interval(n_correct, n, 0.95)
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert interval.estimate == n_correct / n


@pytest.mark.parametrize("n", [1, 20, 367, 368, 500, 1000, 100_000])
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_quantile_ranks_are_the_tightest_within_the_binomial_tails(n: int, quantile: float) -> None:
    low, high = quantile_ranks(n, quantile, 0.95)
    below = stats.binom(n, quantile)
    if low is not None:
        assert below.cdf(low - 1) <= 0.025
    assert below.cdf(low or 0) > 0.025
    if high is not None:
        assert below.sf(high - 1) <= 0.025
    assert high == 1 or below.sf((high or n + 1) - 2) > 0.025


def test_quantile_interval_is_open_when_samples_are_too_few() -> None:
    values = np.arange(1, 369, dtype=float)
    assert quantile_interval(values[:367], 0.99).high == math.inf
    assert quantile_interval(values, 0.99).high == 368
    assert quantile_interval(values[:1], 0.5).low == -math.inf


def test_quantile_interval_does_not_depend_on_order_and_keeps_ties() -> None:
    values = np.repeat([1.0, 2.0, 3.0], 400)
    shuffled = np.random.default_rng(0).permutation(values)
    interval = quantile_interval(shuffled, 0.5)
    assert interval == quantile_interval(values, 0.5)
    assert (interval.low, interval.estimate, interval.high) == (2, 2, 2)


def test_quantile_estimate_is_the_hundredth_worst_of_ten_thousand() -> None:
    assert quantile_interval(np.arange(1, 10_001), 0.99).estimate == 9_900


def test_quantile_interval_refuses_nan() -> None:
    with pytest.raises(ValueError, match="without NaN"):
        quantile_interval([1.0, math.nan], 0.5)


def test_quantile_interval_covers_as_often_as_it_promises() -> None:
    generator = np.random.default_rng(1)
    truth = -math.log(0.01)
    hits = 0
    for _ in range(1000):
        interval = quantile_interval(generator.exponential(size=600), 0.99)
        hits += interval.low <= truth <= interval.high
    assert hits >= 935


@pytest.mark.parametrize(
    ("drift", "at_most"),
    [
        pytest.param(0.0, 0.985, id="a steady machine"),
        pytest.param(0.05, 0.985, id="drift as large as the noise"),
        pytest.param(0.3, 1.0, id="drift far above the noise, where it is wider than needed"),
    ],
)
def test_ratio_interval_covers_as_often_as_it_promises_when_there_is(
    drift: float, at_most: float
) -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for seed in range(400):
        shared = generator.lognormal(sigma=drift, size=101)
        a = 1.5 * shared * generator.lognormal(sigma=0.05, size=101)
        b = shared * generator.lognormal(sigma=0.05, size=101)
        interval = ratio_interval(a, b, seed=seed, n_resamples=300)
        hits += interval.low <= 1.5 <= interval.high
    assert 0.93 <= hits / 400 <= at_most


def test_ratio_interval_is_narrower_when_drift_is_shared_by_pairs() -> None:
    generator = np.random.default_rng(3)
    drift = generator.lognormal(sigma=0.3, size=200)
    paired = ratio_interval(1.5 * drift, drift)
    unpaired = ratio_interval(1.5 * drift, generator.permutation(drift))
    assert paired.high - paired.low < 0.01
    assert unpaired.high - unpaired.low > 0.05


def test_ratio_interval_is_the_same_when_seed_and_timings_are() -> None:
    a, b = np.random.default_rng(4).lognormal(size=(2, 50))
    assert ratio_interval(a, b, seed=7) == ratio_interval(a, b, seed=7)
    assert ratio_interval(a, b, seed=7) != ratio_interval(a, b, seed=8)


def test_ratio_interval_is_the_same_when_resampled_in_chunks() -> None:
    """More timings than fit a chunk: the number of resamples must still be as asked for."""
    a = np.full(600_000, 3.0)
    b = np.full(600_000, 2.0)
    interval = ratio_interval(a, b, n_resamples=3)
    assert (interval.low, interval.estimate, interval.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param([1.0, 2.0], [1.0], id="no pairs"),
        pytest.param([], [], id="empty"),
        pytest.param([1.0, 0.0], [1.0, 1.0], id="a timing of zero"),
        pytest.param([1.0, math.nan], [1.0, 1.0], id="NaN"),
    ],
)
def test_ratio_interval_refuses_when_timings_are_unusable(a: list, b: list) -> None:
    with pytest.raises(ValueError, match="want"):
        ratio_interval(a, b)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, 95.0])
def test_drop_bound_refuses_confidence_when_it_is_no_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"got the confidence {confidence}"):
        drop_upper_bound(100, 1, 1, confidence)
