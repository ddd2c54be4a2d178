"""Whether the bound keeps its promise on M/D/1 queues, whose distribution is known exactly.

Each run begins with an empty queue, as a measurement does after the warm-up has drained.
"""

from decimal import Decimal

import numpy as np
import pytest

from loadtest.statistics import GoodShare, good_share
from tests.loadtest.queues import share_within, sojourns

WANTED = 0.99
MAX_WRONG = 0.07
MIN_CERTIFIED = 0.8


def p99(utilization: str) -> float:
    low, high = 1.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if share_within(middle, utilization) < Decimal(str(WANTED))
            else (low, middle)
        )
    return low


def certified(shares: list[GoodShare]) -> float:
    return float(np.mean([one.lower >= WANTED for one in shares]))


def test_p99_is_that_of_a_long_simulation_when_the_series_is_summed() -> None:
    times = sojourns(0.7, 50_000, 20, seed=1)
    assert p99("0.7") == pytest.approx(np.quantile(times, 0.99), rel=0.03)


def test_good_share_seldom_certifies_a_queue_when_its_p99_is_on_the_limit() -> None:
    """The true share is just the wanted one, so each certificate is a wrong one."""
    limit = p99("0.7")
    runs = sojourns(0.7, 6000, 500, seed=4)
    shares = [good_share(run, limit, WANTED) for run in runs]
    assert np.mean([one.lower_if_independent >= WANTED for one in shares]) > 0.25
    assert certified(shares) <= MAX_WRONG


@pytest.mark.full
@pytest.mark.parametrize(("utilization", "n"), [("0.7", 20_000), ("0.9", 60_000)])
def test_good_share_seldom_certifies_a_queue_when_the_run_is_long(utilization: str, n: int) -> None:
    limit = p99(utilization)
    runs = sojourns(float(utilization), n, 500, seed=5)
    assert certified([good_share(run, limit, WANTED) for run in runs]) <= MAX_WRONG


@pytest.mark.full
@pytest.mark.parametrize(
    ("utilization", "n", "n_runs"), [("0.7", 25_000, 500), ("0.9", 300_000, 100)]
)
def test_good_share_certifies_a_queue_when_its_p99_is_a_fifth_below_the_limit(
    utilization: str, n: int, n_runs: int
) -> None:
    """The numbers of requests are those of the table in docs/loadtest.md."""
    limit = p99(utilization) / 0.8
    runs = sojourns(float(utilization), n, n_runs, seed=6)
    assert certified([good_share(run, limit, WANTED) for run in runs]) >= MIN_CERTIFIED
