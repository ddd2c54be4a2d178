import numpy as np
import pytest
from scipy import stats

from loadtest.arrivals import draw_arrivals


def test_poisson_gaps_are_exponential_when_many_are_drawn() -> None:
    arrivals = draw_arrivals("poisson", 500, 60, 1, 1, np.random.default_rng(1))
    gaps_s = np.diff(arrivals.intended_s)
    assert stats.kstest(gaps_s, stats.expon(scale=1 / 500).cdf).pvalue > 0.01


def test_poisson_counts_have_the_variance_of_their_mean_when_binned() -> None:
    arrivals = draw_arrivals("poisson", 500, 60, 1, 1, np.random.default_rng(2))
    counts = np.histogram(arrivals.intended_s, bins=3000, range=(0, 60))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("process", ["poisson", "constant"])
def test_arrivals_are_ascending_and_as_many_as_planned_when_drawn(process: str) -> None:
    arrivals = draw_arrivals(process, 120, 10, 3, 5, np.random.default_rng(3))  # type: ignore[arg-type]
    assert len(arrivals) == 1200
    assert (np.diff(arrivals.intended_s) >= 0).all()
    assert arrivals.intended_s[0] >= 0
    assert arrivals.intended_s[-1] < 10
    assert set(arrivals.target.tolist()) == {0, 1, 2}
    assert set(arrivals.payload.tolist()) == {0, 1, 2, 3, 4}


def test_constant_gaps_are_equal_when_drawn() -> None:
    arrivals = draw_arrivals("constant", 50, 2, 1, 1, np.random.default_rng(4))
    np.testing.assert_allclose(np.diff(arrivals.intended_s), 0.02)


def test_arrivals_are_the_same_when_the_seed_is() -> None:
    first, again, other = (
        draw_arrivals("poisson", 100, 5, 2, 2, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.intended_s, again.intended_s)
    np.testing.assert_array_equal(first.target, again.target)
    assert not np.array_equal(first.intended_s, other.intended_s)


def test_arrivals_are_none_when_the_duration_is_zero() -> None:
    assert len(draw_arrivals("poisson", 100, 0, 1, 1, np.random.default_rng(7))) == 0
