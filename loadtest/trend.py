"""Whether a series goes up or down, how fast, and how sure that is. Knows not of what.

The slope is Theil's and Sen's, the median of the slopes between all pairs of points, with the
interval that inverts Mann's and Kendall's test: neither minds outliers nor asks for a
distribution. Both take the points for independent.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from loadtest.samples import FloatArray

CONFIDENCE = 0.95
"""Two-sided."""
MIN_POINTS = 10
MAX_POINTS = 400
"""More are taken together, since the pairs grow with the square."""


@dataclass(frozen=True)
class Trend:
    """A straight line through a series; times in seconds from the series' zero."""

    n: int
    """points"""
    per_s: float
    low_per_s: float
    high_per_s: float
    """bounds of the slope with CONFIDENCE"""
    start: float
    end: float
    """the line at the first point and at the last"""
    grows: bool
    """all of the series grows with CONFIDENCE, and so does its second half alone"""


def trend(time_s: FloatArray, values: FloatArray) -> Trend | None:
    """The trend of values, [n] finite, at ascending times, [n]; None below MIN_POINTS.

    `grows` asks the second half too, so that a step or a start that fills caches, which is over,
    isn't taken for what goes on.
    """
    if len(values) < MIN_POINTS:
        return None
    time_s, values = thinned(time_s), thinned(values)
    slope, low, high = theil_sen(time_s, values)
    half = len(values) // 2
    _, later_low, _ = theil_sen(time_s[half:], values[half:])
    # The line goes through the medians of both (Conover, Practical Nonparametric Statistics, 5.5).
    middle_s, middle = float(np.median(time_s)), float(np.median(values))
    return Trend(
        n=len(values),
        per_s=slope,
        low_per_s=low,
        high_per_s=high,
        start=middle + slope * (float(time_s[0]) - middle_s),
        end=middle + slope * (float(time_s[-1]) - middle_s),
        grows=low > 0 and later_low > 0,
    )


def theil_sen(
    time_s: FloatArray, values: FloatArray, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Slope and its bounds, of at least two points at different times.

    Sen 1968 (Journal of the American Statistical Association 63), equations 2.6 and 3.3, with
    the variance for ties in the values.
    """
    first, second = np.triu_indices(len(values), 1)
    apart_s = time_s[second] - time_s[first]
    slopes = np.sort((values[second] - values[first])[apart_s > 0] / apart_s[apart_s > 0])
    n, n_slopes = len(values), len(slopes)
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(float(variance))
    below = max(0, round((n_slopes - reach) / 2) - 1)
    above = min(n_slopes - 1, round((n_slopes + reach) / 2))
    return float(np.median(slopes)), float(slopes[below]), float(slopes[above])


def thinned(values: FloatArray) -> FloatArray:
    """[m] means of so many neighbours that at most MAX_POINTS are left; a rest is left out."""
    each = -(-len(values) // MAX_POINTS)
    m = len(values) // each
    means: FloatArray = values[: m * each].reshape(m, each).mean(axis=1)
    return means
