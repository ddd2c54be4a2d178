"""Ranges: which part of a tensor's values 8 bits are spread over, by its distribution.

What lies outside is clipped, what lies inside is rounded to one of 256 levels: the methods weigh
the two differently. It doesn't know where distributions come from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization.histogram import N_BINS, Histogram

N_LEVELS = 256
_N_CANDIDATES = 96
"""Ends of a range that the divergence is computed for."""
_SHARES = (np.linspace(1.0, 0.05, 20), np.linspace(-0.045, 0.045, 19))
"""Of the full range: those that the search for the least squared error tries first, and then around
the best of them."""
_ROUNDS = 3
"""In which the two ends take turns."""


@dataclass(frozen=True)
class Range:
    """Closed, and around zero: zero has to be one of the levels, since padding is made of it."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high:
            raise ValueError(f"got the range {self.low} to {self.high}, want it around zero")

    @property
    def step(self) -> float:
        """Between levels; 1 for the range that has only zero."""
        width = self.high - self.low
        return width / (N_LEVELS - 1) if width > 0 else 1.0


def minmax(histogram: Histogram) -> Range:
    """All values: nothing is clipped."""
    if not histogram.n:
        raise ValueError("got no values, want at least one")
    return Range(min(histogram.low, 0.0), max(histogram.high, 0.0))


def percentile(histogram: Histogram, percent: float) -> Range:
    """All but `100 - percent` percent of the values, half of those at either end, to a bin's
    width. `percent` is above 0 and at most 100."""
    if not 0 < percent <= 100:
        raise ValueError(f"got the percentile {percent}, want it above 0 and at most 100")
    full = minmax(histogram)
    tail = (1 - percent / 100) / 2 * histogram.n
    below = np.cumsum(histogram.counts)
    edges = histogram.edges()
    # The lowest bin that isn't wholly in the tail, and the highest likewise.
    first = int(np.searchsorted(below, tail, side="right"))
    last = int(np.searchsorted(below, histogram.n - tail, side="left"))
    return Range(max(full.low, min(edges[first], 0.0)), min(full.high, max(edges[last + 1], 0.0)))


def mse(histogram: Histogram) -> Range:
    """The least mean squared error of rounding and clipping together (Banner et al. 2019,
    "Post training 4-bit quantization", solve it for assumed distributions; here it is the
    histogram's own, and both ends are searched in turns)."""
    values, weights = _used(histogram)
    return _searched(minmax(histogram), lambda ends: _squared_errors(values, weights, ends))


def entropy(histogram: Histogram) -> Range:
    """The least divergence of the rounded and clipped distribution from the true one (Migacz
    2017, "8-bit inference with TensorRT"), with the levels that the range really has: of values
    on one side of zero all 256, where the original keeps to 128.

    The original cuts both ends at once; so does this where values lie on both sides.
    """
    full = minmax(histogram)
    largest = max(-full.low, full.high)
    if not histogram.width or not largest:
        return full
    n_used = min(N_BINS, int(np.ceil(largest / histogram.width)))
    both = full.low < 0 < full.high
    counts = histogram.counts.astype(np.float64)
    side = counts[N_BINS : N_BINS + n_used] if full.high > 0 else np.zeros(n_used)
    if full.low < 0:
        side = side + counts[N_BINS - n_used : N_BINS][::-1]
    # The zeros that rectifiers make are exact at any scale, and would drown what isn't.
    side[0] = side[1] if n_used > 1 else side[0]
    levels = N_LEVELS // 2 if both else N_LEVELS
    if n_used <= levels:
        return full
    candidates = np.unique(np.linspace(levels, n_used, _N_CANDIDATES).astype(int))[::-1]
    divergences = [_divergence(side, int(end), levels) for end in candidates]
    threshold = float(candidates[int(np.argmin(divergences))] * histogram.width)
    return Range(max(full.low, -threshold), min(full.high, threshold))


METHODS: Mapping[str, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    "mse": mse,
    "entropy": entropy,
}
"""Those without a parameter; `percentile` is the one with."""


Array = NDArray[np.float64]
Ends = tuple[Array, Array]


def _used(histogram: Histogram) -> tuple[Array, Array]:
    """Centres of the bins that aren't empty, and how many values are in them."""
    filled = np.flatnonzero(histogram.counts)
    centres = histogram.centres()[filled]
    # A bin beside zero holds the zeros themselves, most of all after a rectifier.
    centres[filled == N_BINS] = 0.0
    # No value lies beyond the exact ends.
    return np.clip(centres, histogram.low, histogram.high), histogram.counts[filled].astype(float)


def _searched(full: Range, errors: Callable[[Ends], Array]) -> Range:
    """The best ends within the full range: one is searched while the other stays."""
    low, high = full.low, full.high

    def with_highs(ends: Array) -> Array:
        return errors((np.full_like(ends, low), ends))

    def with_lows(ends: Array) -> Array:
        return errors((ends, np.full_like(ends, high)))

    for _ in range(_ROUNDS):
        before = (low, high)
        if full.high > 0:
            high = _best_end(full.high, with_highs)
        if full.low < 0:
            low = _best_end(full.low, with_lows)
        if (low, high) == before:
            break
    return Range(low, high)


def _best_end(full: float, errors: Callable[[Array], Array]) -> float:
    """The best share of the full end, coarsely and then finely."""
    coarse, around = _SHARES
    best = float(coarse[int(np.argmin(errors(full * coarse)))])
    fine = np.clip(best + around, coarse[-1], 1.0)
    return full * float(fine[int(np.argmin(errors(full * fine)))])


def _squared_errors(values: Array, weights: Array, ends: Ends) -> Array:
    """The sum of squared errors for each pair of ends, [n candidates]."""
    lows, highs = ends[0][:, None], ends[1][:, None]
    steps = np.maximum(highs - lows, np.finfo(float).tiny) / (N_LEVELS - 1)
    offsets = np.round(-lows / steps)
    levels = np.clip(np.round(values / steps) + offsets, 0, N_LEVELS - 1)
    errors: Array = ((levels - offsets) * steps - values) ** 2 @ weights
    return errors


def _divergence(counts: Array, end: int, n_levels: int) -> float:
    """Kullback-Leibler divergence of the first `end` bins, with what lies beyond in the last of
    them, from the same at `n_levels` levels."""
    kept = counts[:end]
    true = kept.copy()
    true[-1] += counts[end:].sum()
    level = np.arange(end) * n_levels // end
    filled = kept > 0
    sums = np.bincount(level, weights=kept, minlength=n_levels)
    n_filled = np.bincount(level, weights=filled, minlength=n_levels)
    rounded = np.where(filled, sums[level] / np.maximum(n_filled[level], 1), 0.0)
    p, q = true / max(true.sum(), 1), rounded / max(rounded.sum(), 1)
    # A bin of the clipped that is empty at the levels: as if it had a little, not infinitely bad.
    smallest = 1e-9
    has = p > 0
    return float(np.sum(p[has] * np.log(p[has] / np.maximum(q[has], smallest))))
