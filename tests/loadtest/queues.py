"""Queues of one server with constant service: M/D/1, whose distribution is known exactly, and one
that stalls, simulated."""

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


def stalled_sojourns(
    arrivals_s: FloatArray, service_s: float, every_s: float, stall_s: float, first_s: float
) -> FloatArray:
    """[n] times in a queue that serves nothing in the last `stall_s` of each `every_s`; the first
    stall ends `first_s` after time 0. Service that a stall interrupts begins after it."""
    free_s, times = 0.0, np.empty(len(arrivals_s))
    for index, arrival_s in enumerate(arrivals_s.tolist()):
        start_s = max(free_s, arrival_s)
        left_s = (first_s - start_s) % every_s
        if left_s < stall_s + service_s:
            start_s += left_s
        free_s = start_s + service_s
        times[index] = free_s - arrival_s
    return times
