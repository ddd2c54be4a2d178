"""M/D/1 queues, of which the distribution is known exactly."""

import math
from decimal import Decimal, localcontext

import numpy as np

from loadtest.samples import FloatArray


def sojourns(utilization: float, n: int, n_runs: int, seed: int) -> FloatArray:
    """[n_runs, n] times in an M/D/1 queue with service time 1 that begins empty.

    Lindley's recursion, w' = max(0, w + 1 - gap), is a walk less its lowest point so far.
    """
    rng = np.random.default_rng(seed)
    times = np.empty((n_runs, n))
    for run in times:
        walk = np.concatenate([[0.0], np.cumsum(1 - rng.exponential(1 / utilization, n - 1))])
        run[:] = 1 + walk - np.minimum.accumulate(walk)
    return times


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
