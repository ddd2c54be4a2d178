import numpy as np
import pytest

from loadtest.settling import requests_to_show, warmup_requests
from loadtest.statistics import clopper_pearson_lower, good_share


@pytest.mark.parametrize("n_slow", [100, 400, 1000])
def test_warmup_is_found_when_the_start_is_slower(n_slow: int) -> None:
    latency_s = np.random.default_rng(1).exponential(0.01, 6000)
    latency_s[:n_slow] += 0.05
    assert warmup_requests(latency_s) == pytest.approx(n_slow, abs=25)


@pytest.mark.parametrize(
    "latency_s",
    [
        pytest.param(np.full(3000, 0.01), id="nothing moves"),
        pytest.param(np.linspace(0.01, 0.1, 3000), id="it rises until the end"),
        pytest.param(np.array([1.0] * 50 + [0.01] * 40), id="there are too few"),
    ],
)
def test_warmup_is_none_when_there_is_no_steady_state_after_it(
    latency_s: np.ndarray,
) -> None:
    assert warmup_requests(latency_s) == 0


def test_good_share_is_bounded_without_the_start_when_a_queue_began_empty() -> None:
    rng = np.random.default_rng(2)
    latency_s = np.concatenate([rng.exponential(0.002, 2000), rng.exponential(0.02, 4000)])
    share = good_share(latency_s, 0.1, 0.99)
    alone = good_share(latency_s[2000:], 0.1, 0.99)
    assert share.n_settling == pytest.approx(2000, abs=50)
    assert share.lower == pytest.approx(alone.lower, abs=5e-4)
    assert share.lower < share.lower_if_independent


def test_good_share_keeps_a_bad_start_when_the_rest_is_good() -> None:
    latency_s = np.full(3000, 0.01)
    latency_s[:300] = np.inf
    share = good_share(latency_s, 0.1, 0.95)
    assert share.n_settling == 300
    assert share.lower < 0.9


def test_requests_to_show_are_enough_in_four_of_five_runs_when_independent() -> None:
    """The share that the pilot gives, half a request added to either side, is taken as true."""
    n = requests_to_show(1000, 996, 1.0, 0.99, 0.95)
    assert n is not None
    share = 1 - 4.5 / 1001
    drawn = np.random.default_rng(3).binomial(n, share, 400)
    shown = np.mean([clopper_pearson_lower(int(one), n) >= 0.99 for one in drawn])
    assert 0.72 < shown < 0.9


def test_requests_to_show_grow_with_the_correlation_when_it_is_longer() -> None:
    alone, together = (requests_to_show(6000, 5990, time, 0.99, 0.95) for time in (1.0, 10.0))
    assert alone is not None
    assert together is not None
    assert together > 10 * alone


def test_requests_to_show_are_none_when_the_share_may_be_the_one_wanted() -> None:
    assert requests_to_show(1000, 990, 1.0, 0.99, 0.95) is None
