"""Confidence intervals for accuracy, accuracy drop, ratios of timings and latency quantiles.

Pure functions of arrays and counts; they know nothing of models or of what is decided by them.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BISECTIONS = 60
"""Halvings of [0, 1]: more than a double resolves."""

_MAX_RESAMPLED = 1_000_000
"""Values drawn at a time by the bootstrap, which bounds its memory to some 20 MB."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval around an estimate; ends may be infinite."""

    low: float
    estimate: float
    high: float


@dataclass(frozen=True)
class PairedDrop:
    """How much accuracy a variant lost against its base on the same samples.

    Only samples on which the two disagree carry information: McNemar's n10 and n01.
    """

    n: int
    """Samples."""
    n10: int
    """Base right, variant wrong."""
    n01: int
    """Base wrong, variant right."""

    def __post_init__(self) -> None:
        if self.n < 1 or min(self.n10, self.n01) < 0 or self.n10 + self.n01 > self.n:
            raise ValueError(
                f"got n {self.n}, n10 {self.n10}, n01 {self.n01}, want n of at least 1 and "
                "counts of at least 0 that together don't exceed it"
            )

    @property
    def estimate(self) -> float:
        """The drop as a share, -1 to 1; negative where the variant is better."""
        return (self.n10 - self.n01) / self.n

    def upper_bound(self, confidence: float) -> float:
        """See `drop_upper_bound`."""
        return drop_upper_bound(self.n, self.n10, self.n01, confidence)


def paired_drop(base_correct: ArrayLike, variant_correct: ArrayLike) -> PairedDrop:
    """Count the disagreements of two boolean arrays [n], in the same order of samples.

    Raises ValueError where they are empty, of unequal shape or not boolean.
    """
    base, variant = np.asarray(base_correct), np.asarray(variant_correct)
    if base.ndim != 1 or base.shape != variant.shape or len(base) == 0:
        raise ValueError(
            f"got shapes {list(base.shape)} and {list(variant.shape)}, want the same [n], n > 0"
        )
    if base.dtype != np.bool_ or variant.dtype != np.bool_:
        raise ValueError(f"got {base.dtype} and {variant.dtype}, want booleans: right or wrong")
    return PairedDrop(
        n=len(base),
        n10=int(np.count_nonzero(base & ~variant)),
        n01=int(np.count_nonzero(~base & variant)),
    )


def drop_upper_bound(n: int, n10: int, n01: int, confidence: float) -> float:
    """One-sided upper confidence bound of the drop p10 - p01: Tango's score bound.

    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design", Statistics in Medicine 17, equations 6 and 7. With the drop held
    at δ, the maximum-likelihood estimate of p01 is the larger root q of

        2n q² + B q + C = 0,  B = (2n - n10 + n01) δ - n10 - n01,  C = -n01 δ (1 - δ)

    and the bound is the δ at which the score

        T(δ) = (n10 - n01 - n δ) / sqrt(n (2q + δ (1 - δ)))

    has fallen to -z. Unlike Wald's, it doesn't collapse to 0 where nothing disagrees: it is
    z²/(n + z²) then. Tango's interval is two-sided; this is its upper end at 2 confidence - 1.
    Not below the estimate, since confidence is at least a half.
    """
    drop = PairedDrop(n, n10, n01)
    z = _z_one_sided(confidence)
    low, high = drop.estimate, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _tango_score(drop, middle) > -z:
            low = middle
        else:
            high = middle
    return high


def wilson_interval(n_correct: int, n: int, confidence: float) -> Interval:
    """Two-sided score interval of a share (Wilson 1927, JASA 22, page 209)."""
    if not 0 <= n_correct <= n or n < 1:
        raise ValueError(f"got {n_correct} of {n}, want 0 to n of at least 1")
    z = _z_one_sided((1 + _checked(confidence)) / 2)
    share = n_correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding may leave the ends by an ulp where all or none is correct.
    low = 0.0 if n_correct == 0 else max(0.0, centre - half)
    high = 1.0 if n_correct == n else min(1.0, centre + half)
    return Interval(low, share, high)


def ratio_interval(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = 0.95,
    *,
    seed: int = 0,
    n_resamples: int = 2000,
) -> Interval:
    """Interval of median(a) / median(b) by the paired percentile bootstrap.

    `a` and `b` are positive timings [n], taken in turns: a[i] next to b[i], so that what slows
    the machine slows both. Pairs are resampled together (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", section 13.3), so that what they share largely cancels; where
    drift is many times the noise, the interval is wider than it need be. Pairs must be
    independent of each other: of bursts of timings give each burst's median. Equal arguments
    give equal results. Raises ValueError for what are no pairs of finite positive timings.
    """
    first, second = _timings("a", a), _timings("b", b)
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} timings, want pairs")
    tail = 100 * (1 - _checked(confidence)) / 2
    generator = np.random.default_rng(seed)
    ratios: list[NDArray[np.float64]] = []
    left = n_resamples
    while left > 0:
        n_now = min(left, max(1, _MAX_RESAMPLED // len(first)))
        chosen = generator.integers(len(first), size=(n_now, len(first)))
        ratios.append(np.median(first[chosen], axis=1) / np.median(second[chosen], axis=1))
        left -= n_now
    low, high = np.percentile(np.concatenate(ratios), [tail, 100 - tail])
    return Interval(float(low), float(np.median(first) / np.median(second)), float(high))


def quantile_interval(values: ArrayLike, quantile: float, confidence: float = 0.95) -> Interval:
    """Distribution-free interval of a quantile between two order statistics.

    The number of values below the quantile is binomial (David and Nagaraja 2003, "Order
    Statistics", section 7.1); each end errs with a probability of at most (1 - confidence) / 2,
    so the interval is at least as wide as asked for. An end is infinite where the sample is too
    small to bound it: p99 at 95% has an upper end from 368 values on. The estimate is the value
    of rank ceil(n quantile), which is one that occurred. Values must be independent.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or len(ordered) == 0 or np.isnan(ordered).any():
        raise ValueError("want an array [n] without NaN, n > 0")
    if not 0 < quantile < 1:
        raise ValueError(f"got the quantile {quantile}, want one above 0 and below 1")
    low, high = quantile_ranks(len(ordered), quantile, confidence)
    rank = min(len(ordered), max(1, math.ceil(len(ordered) * quantile - 1e-9)))
    return Interval(
        low=float(ordered[low - 1]) if low is not None else -math.inf,
        estimate=float(ordered[rank - 1]),
        high=float(ordered[high - 1]) if high is not None else math.inf,
    )


def quantile_ranks(n: int, quantile: float, confidence: float) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics that bound a quantile; None where none does.

    The lower rank r is the largest with P(X < r) <= tail, the upper one the smallest with
    P(X >= r) <= tail, where X, the number of n values below the quantile, is binomial.
    """
    tail = (1 - _checked(confidence)) / 2
    below = np.cumsum(_binomial(n, quantile))  # P(X <= k), k = 0 to n
    n_low = int(np.searchsorted(below, tail, side="right"))  # P(X <= n_low - 1) <= tail
    n_high = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # P(X >= n_high) <= tail
    return (n_low if n_low >= 1 else None), (n_high if n_high <= n else None)


def _tango_score(drop: PairedDrop, delta: float) -> float:
    n, n10, n01 = drop.n, drop.n10, drop.n01
    b = (2 * n - n10 + n01) * delta - n10 - n01
    c = -n01 * delta * (1 - delta)
    root = math.sqrt(max(0.0, b * b - 8 * n * c))
    # The larger root, by the form that doesn't cancel.
    q = (root - b) / (4 * n) if b <= 0 else (-2 * c / (b + root))
    variance = n * (2 * max(0.0, q) + delta * (1 - delta))
    difference = n10 - n01 - n * delta
    if variance <= 0:
        return 0.0 if difference >= 0 else -math.inf
    return difference / math.sqrt(variance)


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """P(X = k) for k = 0 to n, from logarithms of the ratios of neighbours."""
    k = np.arange(n, dtype=np.float64)
    steps = np.log(n - k) - np.log(k + 1) + math.log(p) - math.log1p(-p)
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _timings(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name}: want an array [n] of finite timings above 0, n > 0")
    return array


def _z_one_sided(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"got the confidence {confidence}, want at least 0.5 and below 1")
    return NormalDist().inv_cdf(confidence)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"got the confidence {confidence}, want above 0 and below 1")
    return confidence
