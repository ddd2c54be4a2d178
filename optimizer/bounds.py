"""Upper confidence bounds of a share and of a bounded mean that hold for every sample size.

Pure functions of samples; `optimizer.stats` has those that rest on a normal approximation. They
know nothing of what is decided by them.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BISECTIONS = 60
"""Halvings of [0, 1]: more than a double resolves."""
_MAX_STAKE = 0.75
"""Share of the capital that one sample can lose. Of 0.5, 0.75 and 0.9 the one with the lowest
bounds where samples hardly vary that isn't far off where they do."""

_ORDER_SEED = 0
"""Of the order in which `mean_upper_bound` takes samples: equal samples give an equal bound."""


def share_upper_bound(n_hits: int, n: int, confidence: float) -> float:
    """One-sided upper bound of a share: the largest p for which `n_hits` or fewer of n come up
    with a probability of at least 1 - confidence.

    Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of
    the binomial", Biometrika 26. Exact: it errs with a probability of at most 1 - confidence for
    every n and p, where score bounds err more often for shares near 0. Without a hit it is
    1 - (1 - confidence)^(1/n), about 3/n at 95%. Raises ValueError.
    """
    _check_confidence(confidence)
    if not 0 <= n_hits <= n or n < 1:
        raise ValueError(f"got {n_hits} of {n}, want 0 to n of at least 1")
    if n_hits == n:
        return 1.0
    logs = _log_binomials(n, n_hits)
    hits = np.arange(n_hits + 1)
    low, high = n_hits / n, 1.0
    for _ in range(_BISECTIONS):
        p = (low + high) / 2
        if p in (low, high):
            break
        terms = logs + hits * math.log(p) + (n - hits) * math.log1p(-p)
        if np.logaddexp.reduce(terms) > math.log(1 - confidence):
            low = p
        else:
            high = p
    return high


def share_lower_bound(n_hits: int, n: int, confidence: float) -> float:
    """The same from below: one less the upper bound of the share of misses."""
    return 1.0 - share_upper_bound(n - n_hits, n, confidence)


def mean_upper_bound(
    values: ArrayLike, confidence: float, *, low: float = 0.0, high: float = 1.0
) -> float:
    """One-sided upper bound of the mean of independent values [n], each within [low, high].

    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting",
    Journal of the Royal Statistical Society B 86(1), section 4. With the values scaled to [0, 1],
    a gambler who bets that the mean is below m has after t samples the capital

        K_t(m) = ∏ (1 + λ_i (m - x_i)),  λ_i = min(sqrt(2 log(1/α) / (n σ²_{i-1})), c / (1 - m))

    where σ²_{i-1} is a running variance of the samples before i (their equation 15) and
    α = 1 - confidence. If the mean is m or more it is a supermartingale of at most 1, so by
    Ville's inequality it reaches 1/α with a probability of at most α; it rises with m, and the
    bound is the m at which it does. Only that values are independent and bounded is assumed, not
    their distribution: with n equal values the width is about 4 (high - low) / (2 n) where they
    lie in the middle, twice that at `low`, and never 0. Where they vary it is on average about
    1.25 times as wide as Student's interval, whose promise is only asymptotic.

    The samples are taken in an order drawn by a fixed seed, since data that are sorted, by class
    for instance, would let the gambler see what comes. Not below the values' mean. Raises
    ValueError for values out of range or none.
    """
    _check_confidence(confidence)
    given = np.asarray(values, dtype=np.float64)
    fits = given.ndim == 1 and len(given) > 0
    if not fits or not ((given >= low) & (given <= high)).all():
        raise ValueError(f"want an array [n] of values from {low:g} to {high:g}, n > 0")
    order = np.random.default_rng(_ORDER_SEED).permutation(len(given))
    scaled = (given[order] - low) / (high - low)
    goal = math.log(1 / (1 - confidence))
    stakes = np.sqrt(2 * goal / (len(scaled) * _running_variance(scaled)))
    least, most = float(scaled.mean()), 1.0
    for _ in range(_BISECTIONS):
        middle = (least + most) / 2
        if middle in (least, most):
            break
        if _log_capital(scaled, stakes, middle) < goal:
            least = middle
        else:
            most = middle
    return low + (high - low) * most


def _log_capital(scaled: NDArray[np.float64], stakes: NDArray[np.float64], m: float) -> float:
    """The logarithm of the largest capital on the way."""
    bounded = np.minimum(stakes, _MAX_STAKE / (1 - m))
    return float(np.cumsum(np.log1p(bounded * (m - scaled))).max())


def _running_variance(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each sample that of those before it, regularized by one sample of variance 1/4."""
    counts = np.arange(1, len(scaled) + 1)
    means = (0.5 + np.cumsum(scaled)) / (counts + 1)
    variances = (0.25 + np.cumsum((scaled - means) ** 2)) / (counts + 1)
    return np.concatenate(([0.25], variances[:-1]))


def _log_binomials(n: int, last: int) -> NDArray[np.float64]:
    """log C(n, k) for k = 0 to `last`."""
    k = np.arange(1, last + 1, dtype=np.float64)
    return np.concatenate(([0.0], np.cumsum(np.log((n - k + 1) / k))))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"got the confidence {confidence}, want above 0 and below 1")
