"""Histograms that stream, and the ranges that are chosen by them, on distributions whose best
range is known."""

import math

import numpy as np
import pytest

from optimizer.quantization.histogram import N_BINS, Histogram, NotFinite
from optimizer.quantization.ranges import (
    METHODS,
    N_LEVELS,
    Range,
    entropy,
    minmax,
    mse,
    percentile,
)

RNG = np.random.default_rng(0)
UNIFORM = RNG.uniform(-1, 3, 200_000).astype(np.float32)
GAUSSIAN = RNG.normal(size=200_000).astype(np.float32)
RECTIFIED = np.maximum(GAUSSIAN, 0)
# Two values of a thousand times the spread of the others.
OUTLYING = np.concatenate([GAUSSIAN[:50_000], np.float32([1000, -900])])


def histogram_of(*pieces: np.ndarray) -> Histogram:
    histogram = Histogram()
    for piece in pieces:
        histogram.add(piece)
    return histogram


def rounding_error(values: np.ndarray, span: Range) -> float:
    """Mean squared error, written down plainly."""
    zero = round(-span.low / span.step)
    total = 0.0
    for value in values.astype(float):
        level = min(max(round(value / span.step) + zero, 0), N_LEVELS - 1)
        total += (value - (level - zero) * span.step) ** 2
    return total / len(values)


# --- histogram


def test_histogram_counts_every_value_in_its_bin() -> None:
    histogram = histogram_of(GAUSSIAN)
    edges = histogram.edges()
    expected, _ = np.histogram(GAUSSIAN.astype(float), edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    assert (histogram.low, histogram.high) == (GAUSSIAN.min(), GAUSSIAN.max())
    assert histogram.n == len(GAUSSIAN)


def test_histogram_is_the_same_when_values_come_in_other_pieces() -> None:
    values = np.concatenate([GAUSSIAN * 1e-3, RECTIFIED, OUTLYING, np.zeros(10, np.float32)])
    whole = histogram_of(values)
    pieces = histogram_of(*np.array_split(values, 7))
    backwards = histogram_of(*np.array_split(values[::-1], 13))
    for other in (pieces, backwards):
        assert other.width == whole.width
        np.testing.assert_array_equal(other.counts, whole.counts)


def test_histogram_uses_half_of_a_side_at_least() -> None:
    for largest in (0.9, 1.0, 1.1, 1e-6, 3e7):
        histogram = histogram_of(np.linspace(0, largest, 100, dtype=np.float32))
        assert N_BINS / 2 <= largest / histogram.width < N_BINS


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_histogram_refuses_values_when_they_are_not_finite(bad: float) -> None:
    histogram = histogram_of(GAUSSIAN[:10])
    with pytest.raises(NotFinite, match="1 of 3 values are NaN or infinite"):
        histogram.add(np.array([0.0, bad, 1.0], np.float32))
    assert histogram.n == 10


# --- ranges


def test_minmax_clips_nothing() -> None:
    span = minmax(histogram_of(UNIFORM))
    assert (span.low, span.high) == (UNIFORM.min(), UNIFORM.max())


def test_minmax_takes_zero_in_when_all_values_are_on_one_side() -> None:
    span = minmax(histogram_of(np.float32([5, 6])))
    assert (span.low, span.high) == (0, 6)


@pytest.mark.parametrize("percent", [99.0, 99.9])
@pytest.mark.parametrize("values", [GAUSSIAN, RECTIFIED], ids=["Gaussian", "rectified"])
def test_percentile_is_the_quantile_of_the_values(percent: float, values: np.ndarray) -> None:
    histogram = histogram_of(values)
    span = percentile(histogram, percent)
    tail = (100 - percent) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    assert span.low == pytest.approx(low, abs=histogram.width * 1.01)
    assert span.high == pytest.approx(high, abs=histogram.width * 1.01)


def test_percentile_is_everything_when_it_is_a_hundred() -> None:
    histogram = histogram_of(UNIFORM)
    assert percentile(histogram, 100) == minmax(histogram)


def test_mse_keeps_all_when_values_are_uniform() -> None:
    span = mse(histogram_of(UNIFORM))
    assert span.low == pytest.approx(-1, abs=0.05)
    assert span.high == pytest.approx(3, abs=0.05)


def test_mse_is_where_theory_says_when_values_are_gaussian() -> None:
    """The best 8-bit threshold of a Gaussian is 3.94 σ (Banner et al. 2019, section 3, by
    minimizing their equation 6), which is flat around it."""
    span = mse(histogram_of(RNG.normal(size=2_000_000).astype(np.float32)))
    assert span.high == pytest.approx(3.94, abs=0.25)
    assert span.low == pytest.approx(-3.94, abs=0.25)


@pytest.mark.parametrize(
    "values", [UNIFORM, GAUSSIAN, RECTIFIED], ids=["uniform", "Gaussian", "rectified"]
)
def test_mse_is_the_best_of_a_plain_search(values: np.ndarray) -> None:
    values = values[:1000]
    found = rounding_error(values, mse(histogram_of(values)))
    full = minmax(histogram_of(values))
    plain = min(
        rounding_error(values, Range(full.low * low, full.high * high))
        for low in np.linspace(0.7, 1, 4)
        for high in np.linspace(0.7, 1, 4)
    )
    assert found <= plain * 1.02


def test_mse_clips_outliers_as_far_as_their_own_error_allows() -> None:
    values = np.concatenate([GAUSSIAN[:50_000], np.float32([12, -12])])
    span = mse(histogram_of(values))
    steps = [(2 * end / 255) ** 2 / 12 for end in np.linspace(6, 12, 61)]
    clipped = [2 * (12 - end) ** 2 / len(values) for end in np.linspace(6, 12, 61)]
    best = float(np.linspace(6, 12, 61)[np.argmin(np.add(steps, clipped))])
    assert 9 < best < 11.5
    assert span.high == pytest.approx(best, abs=0.4)
    assert span.low == pytest.approx(-best, abs=0.4)


def test_entropy_gives_outliers_up_when_they_are_few() -> None:
    assert entropy(histogram_of(OUTLYING)).high < 200
    assert minmax(histogram_of(OUTLYING)).high == 1000


def plain_divergence(histogram: Histogram, n_kept: int, n_levels: int) -> float:
    """Of a distribution on the positive side cut behind `n_kept` bins, written down plainly."""
    counts = [int(count) for count in histogram.counts[N_BINS:]]
    true = counts[:n_kept]
    true[0] = counts[1]
    members: dict[int, list[int]] = {}
    for index in range(n_kept):
        if true[index]:
            members.setdefault(index * n_levels // n_kept, []).append(index)
    rounded = [0.0] * n_kept
    for indices in members.values():
        for index in indices:
            rounded[index] = sum(true[one] for one in indices) / len(indices)
    true[-1] += sum(counts[n_kept:])
    total, total_rounded = sum(true), sum(rounded)
    return sum(
        count / total * math.log(count / total / max(other / total_rounded, 1e-9))
        for count, other in zip(true, rounded, strict=True)
        if count
    )


def test_entropy_has_the_least_divergence_of_plainly_computed_ones() -> None:
    values = np.abs(RNG.laplace(size=20_000)).astype(np.float32)
    histogram = histogram_of(np.concatenate([values, np.float32([40, 41])]))
    found = round(entropy(histogram).high / histogram.width)
    best = plain_divergence(histogram, found, N_LEVELS)
    for n_kept in (300, 500, 1000, 1500, 2000, 2600):
        assert best <= plain_divergence(histogram, n_kept, N_LEVELS) + 1e-4
    assert entropy(histogram).high < 20


def test_entropy_keeps_all_when_values_are_uniform() -> None:
    span = entropy(histogram_of(UNIFORM))
    assert span.high == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_range_has_one_level_for_zero_when_the_tensor_is_constant(name: str) -> None:
    zeros = METHODS[name](histogram_of(np.zeros(100, np.float32)))
    assert (zeros.low, zeros.high, zeros.step) == (0, 0, 1)
    fours = METHODS[name](histogram_of(np.full(100, 4.0, np.float32)))
    assert (fours.low, fours.high) == (0, pytest.approx(4, rel=0.06))
    minus = METHODS[name](histogram_of(np.full(100, -4.0, np.float32)))
    assert (minus.low, minus.high) == (pytest.approx(-4, rel=0.06), 0)


def test_ranges_are_refused_when_they_make_no_sense() -> None:
    with pytest.raises(ValueError, match="want it around zero"):
        Range(1, 2)
    with pytest.raises(ValueError, match="got no values"):
        minmax(Histogram())
    with pytest.raises(ValueError, match="percentile 101"):
        percentile(histogram_of(UNIFORM), 101)
