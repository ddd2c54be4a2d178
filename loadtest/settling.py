"""Where a run's warm-up ends, found in its latencies, and how many requests a verdict would take.

Both look at the numbers of one run only, and neither decides anything: `loadtest.statistics` and
`loadtest.verdict` do.
"""

import math
from statistics import NormalDist

import numpy as np

from loadtest.samples import FloatArray

BATCH = 5
MAX_CUT = 0.5
"""A rule that wants to cut more than this share has found a drift, not a warm-up."""
POWER = 0.8
"""How likely the number of requests asked for is to be enough."""


def warmup_requests(latency_s: FloatArray) -> int:
    """How many requests at the start of a series, [n] of finite seconds, aren't like the rest.

    MSER-5 (White 1997, Simulation 69; White, Cobb and Spratt 2000): of the means of five in
    turn, leave out as many as make the squared standard error of the others' mean smallest, at
    most half of them. 0 below 100 requests, and where the best cut is the largest that is
    allowed, which says that no steady state was reached.
    """
    m = len(latency_s) // BATCH
    if m < 20:
        return 0
    means = latency_s[: m * BATCH].reshape(m, BATCH).mean(axis=1)
    # From the median, so that a series that doesn't move has sums without rounding errors.
    means -= np.median(means)
    left = np.arange(m, 0, -1)
    total = np.cumsum(means[::-1])[::-1]
    squares = np.cumsum((means**2)[::-1])[::-1]
    error = (squares - total**2 / left) / left.astype(float) ** 2
    longest = int(m * MAX_CUT)
    best = int(np.argmin(error[: longest + 1]))
    return 0 if best == longest else best * BATCH


def requests_to_show(
    n: int, n_good: int, correlation_requests: float, wanted: float, confidence: float
) -> int | None:
    """How many requests of this kind show a good share of `wanted`, with probability `POWER`.

    The sample size of a one-sided test of a share against a fixed one (Chow, Shao and Wang,
    Sample Size Calculations in Clinical Research, section 4.1), times the correlation time.
    The share is taken from the effective numbers with half a request added to good and bad
    (Jeffreys), since the few bad ones of a short run flatter it. None where that share isn't
    above `wanted`: no number would show it.
    """
    effective_n = n / correlation_requests
    effective_bad = (n - n_good) / correlation_requests
    share = 1 - (effective_bad + 0.5) / (effective_n + 1)
    if share <= wanted:
        return None
    normal = NormalDist()
    spread = normal.inv_cdf(confidence) * math.sqrt(wanted * (1 - wanted)) + normal.inv_cdf(
        POWER
    ) * math.sqrt(share * (1 - share))
    return math.ceil((spread / (share - wanted)) ** 2 * correlation_requests)
