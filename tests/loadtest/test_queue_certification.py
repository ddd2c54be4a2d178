"""Whether the bound keeps its promise on M/D/1 queues, whose distribution is known exactly.

Each run begins with an empty queue, as a measurement does after the warm-up has drained.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from loadtest.samples import FloatArray
from loadtest.statistics import GoodShare, good_share

WANTED = 0.99
MAX_WRONG = 0.07
MIN_CERTIFIED = 0.8


def sojourns(utilization: float, n: int, n_runs: int, seed: int) -> FloatArray:
    """[n_runs, n] times in an M/D/1 queue with service time 1, by Lindley's recursion."""
    rng = np.random.default_rng(seed)
    times = np.empty((n, n_runs))
    wait = np.zeros(n_runs)
    for index in range(n):
        times[index] = wait + 1
        wait = np.maximum(0, wait + 1 - rng.exponential(1 / utilization, n_runs))
    return times.T


def share_within(time: float, utilization: str) -> Decimal:
    """Share of sojourns up to `time` (Erlang 1909; Crommelin 1932).

    The terms alternate and are far larger than their sum: 80 digits, where a float has 16.
    """
    with localcontext() as context:
        context.prec = 80
        load, wait, total = Decimal(utilization), Decimal(time) - 1, Decimal(0)
        for k in range(int(wait) + 1):
            x = load * (k - wait)
            power = x**k if k else Decimal(1)
            total += power / math.factorial(k) * (-x).exp()
        return (1 - load) * total


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
