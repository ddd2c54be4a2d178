"""What a sample of requests says about the share of requests that are good.

Quantiles are those of the raw samples, never of a histogram. Lower bounds come in three kinds,
since the fates of requests that share a queue hang together, and a bound for independent ones
certifies such a queue wrongly many times more often than it says. Nothing here knows what an
objective is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from loadtest.samples import FloatArray
from loadtest.settling import warmup_requests

CONFIDENCE = 0.95
"""One-sided, of every bound."""
N_BATCHES = 30
SLOWEST_PER_BAD = 4
MAX_SLOWEST = 0.5
NEAR = 0.5
SEEN_UP_TO = 10
"""Latencies are cut at this many thresholds where the warm-up is looked for."""
WINDOW_PER_CORRELATION = 5
BISECTIONS = 100


@dataclass(frozen=True)
class GoodShare:
    """The share of good requests: measured, and at least, with `confidence`."""

    n: int
    n_good: int
    confidence: float
    lower_if_independent: float
    """Clopper-Pearson with n requests"""
    lower_if_correlated: float
    """Clopper-Pearson with the effective number of requests"""
    lower_by_batch_means: float
    """minus infinity where there are too few requests for it"""
    correlation_requests: float
    """integrated autocorrelation time, in requests; 1 where they are independent"""
    n_settling: int = 0
    """requests at the start that aren't like the rest"""
    lower_when_settled: float = 1.0
    """the least of the same three bounds without those; 1 where nothing is left out"""

    @property
    def estimate(self) -> float:
        return self.n_good / self.n

    @property
    def lower(self) -> float:
        """The bound to judge by, the lowest.

        Each sees what another is blind to: batch means see no spread in a sample without a bad
        request, however small it is; Clopper-Pearson needs the right number of requests. Leaving
        the start out can only lower the bound: a queue that begins empty flatters, and a start
        that was bad mustn't be forgotten.
        """
        return min(
            self.lower_if_independent,
            self.lower_if_correlated,
            self.lower_by_batch_means,
            self.lower_when_settled,
        )

    @property
    def effective_n(self) -> int:
        """How many independent requests say as much as these."""
        return int(self.n / self.correlation_requests)


def good_share(
    latency_s: FloatArray, threshold_s: float, wanted: float, confidence: float = CONFIDENCE
) -> GoodShare:
    """Estimate the share of requests within `threshold_s`, to be compared with `wanted`.

    `latency_s`, [n] in the order of sending, is infinite for a failed request; n at least 1.

    The effective number of requests is n over their correlation time, as with a design effect
    in surveys (Korn and Graubard 1998, Survey Methodology 24). The few bad requests of a run
    that looks good tell little of that time, so it is the longer of theirs and of those near
    the limit: the slowest 4 (1 - `wanted`) of the run that took over half the threshold. The 4
    and the half are our own, found on simulated M/D/1 queues: with 1 in place of 4, up to 15 %
    of the runs at the limit are certified, not 5 %; the half changes nothing there, and keeps
    harmless drifts far below the threshold from costing a fast server its certificate.
    """
    whole = _good_share(latency_s, threshold_s, wanted, confidence)
    n_settling = warmup_requests(np.minimum(latency_s, SEEN_UP_TO * threshold_s))
    if n_settling == 0:
        return whole
    settled = _good_share(latency_s[n_settling:], threshold_s, wanted, confidence)
    return replace(whole, n_settling=n_settling, lower_when_settled=settled.lower)


def _good_share(
    latency_s: FloatArray, threshold_s: float, wanted: float, confidence: float
) -> GoodShare:
    good = latency_s <= threshold_s
    n, n_good = len(good), int(good.sum())
    slowest_share = min(MAX_SLOWEST, SLOWEST_PER_BAD * (1 - wanted))
    near = latency_s >= max(quantile(latency_s, 1 - slowest_share), NEAR * threshold_s)
    time = max(correlation_time(good.astype(float)), correlation_time(near.astype(float)))
    effective_n = int(n / time)
    effective_bad = math.ceil((n - n_good) / time)
    return GoodShare(
        n=n,
        n_good=n_good,
        confidence=confidence,
        lower_if_independent=clopper_pearson_lower(n_good, n, confidence),
        lower_if_correlated=clopper_pearson_lower(
            effective_n - effective_bad, effective_n, confidence
        ),
        lower_by_batch_means=batch_means_lower(good.astype(float), confidence),
        correlation_requests=time,
    )


def quantile(values: FloatArray, share: float) -> float:
    """The least of `values`, [n], that at least `share` of them don't exceed; NaN if empty.

    An observed value, so infinite ones are no trouble. 0 < share <= 1.
    """
    n = len(values)
    if n == 0:
        return math.nan
    # n * share is 99.00000000000001 where 99 is meant: such excess is no further request.
    rank = max(1, math.ceil(n * share * (1 - 1e-12)))
    return float(np.partition(values, rank - 1)[rank - 1])


def min_requests(share: float, confidence: float = CONFIDENCE) -> int:
    """The fewest requests, all good, that show a good share of `share`: 299 for 0.99 at 95 %."""
    return math.ceil(math.log(1 - confidence) / math.log(share))


def clopper_pearson_lower(n_good: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Exact one-sided lower bound of a binomial share (Clopper and Pearson 1934, Biometrika 26).

    The share at which `n_good` or more of `n` have just the probability 1 - confidence. Found
    by bisection on the sum itself, so that no incomplete beta function is needed.
    """
    if n_good <= 0:
        return 0.0
    log_choose = _log_choose(n, n - n_good)
    return _bisect(
        lambda share: _at_most_bad(share, n, log_choose) < 1 - confidence, 0.0, n_good / n
    )


def batch_means_lower(values: FloatArray, confidence: float = CONFIDENCE) -> float:
    """Lower bound of the mean of a stationary series, [n], by non-overlapping batch means.

    Law, Simulation Modeling and Analysis, section 9.5.3: cut the series into 30 batches, whose
    means are nearly independent where a batch is much longer than the correlation, and take
    Student's interval of them. What is left over by the division joins the last batch. Below
    two values a batch there is no bound: minus infinity.
    """
    if len(values) < 2 * N_BATCHES:
        return -math.inf
    size = len(values) // N_BATCHES
    starts = np.arange(N_BATCHES) * size
    sizes = np.diff([*starts.tolist(), len(values)])
    means = np.add.reduceat(values, starts) / sizes
    half = student_quantile(confidence, N_BATCHES - 1) * means.std(ddof=1) / math.sqrt(N_BATCHES)
    return float(values.mean() - half)


def correlation_time(values: FloatArray) -> float:
    """Integrated autocorrelation time of a series, [n], in its own steps; at least 1.

    1 + 2 times the sum of the autocorrelations, up to the first lag that is five times the sum
    so far (Sokal 1997, Monte Carlo Methods in Statistical Mechanics, section 3).
    """
    n = len(values)
    centred = values - values.mean() if n else values
    if n < 2 or not centred.any():
        return 1.0
    n_transform = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, n_transform)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), n_transform)[:n]
    times = 2 * np.cumsum(covariance / covariance[0]) - 1
    wide = np.flatnonzero(np.arange(n) >= WINDOW_PER_CORRELATION * times)
    return max(1.0, float(times[wide[0] if len(wide) else n - 1]))


def student_cdf(t: float, degrees: int) -> float:
    """Student's distribution for whole `degrees` of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cos2, sine = math.cos(angle) ** 2, math.sin(angle)
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        term *= cos2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + 0.5 * central


def student_quantile(share: float, degrees: int) -> float:
    """The t that `share` of Student's distribution lies below; 0.5 <= share < 1."""
    high = 1.0
    while student_cdf(high, degrees) < share:
        high *= 2
    return _bisect(lambda t: student_cdf(t, degrees) < share, 0.0, high)


def _log_choose(n: int, n_bad: int) -> FloatArray:
    """log of n over i, for i = 0 to n_bad."""
    i = np.arange(1, n_bad + 1)
    return np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))])


def _at_most_bad(share: float, n: int, log_choose: FloatArray) -> float:
    """Probability of len(log_choose) - 1 or fewer bad ones among n, each good with `share`."""
    if share <= 0 or share >= 1:
        return float(share >= 1 or len(log_choose) > n)
    i = np.arange(len(log_choose))
    return float(np.exp(log_choose + i * math.log1p(-share) + (n - i) * math.log(share)).sum())


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """The point between `low` and `high` up to which `below` holds."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if below(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2
