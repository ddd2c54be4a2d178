"""Histogram: the distribution of a tensor's values, kept in bounded memory while they stream by.

Bins are a power of two wide and begin at zero, and pairs of them are merged when larger values
come. So the result is the same in whatever pieces and order the values come, and a value is never
counted in the wrong bin. It doesn't know what the distribution is for.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_BINS = 4096
"""Each side of zero. At least half of those of the side with the largest value are used."""


class NotFinite(ValueError):
    """Values that are NaN or infinite, of which no distribution can be made."""


class Histogram:
    """Counts by bin. `counts[N_BINS + i]` holds the values in [i, i + 1) × `width`."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(2 * N_BINS, np.int64)
        self.width = 0.0
        """0 as long as all values are zero."""
        self.low = math.inf
        self.high = -math.inf
        """The exact smallest and largest value; inf and -inf without any."""

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def add(self, values: NDArray[Any]) -> None:
        """Count the values. Raises NotFinite, and counts none of them then."""
        values = values.ravel()
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise NotFinite(f"{bad} of {values.size} values are NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high, 0.0))
        if not self.width:
            self.counts[N_BINS] += values.size
            return
        # Exact in the values' own precision too: the width is a power of two.
        exact = values.dtype if 1e-30 < self.width < 1e30 else np.dtype(np.float64)
        bins = np.floor(values * exact.type(1 / self.width)).astype(np.int32)
        bins += N_BINS
        self.counts += np.bincount(bins, minlength=2 * N_BINS)

    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin, [2 · N_BINS]."""
        return np.asarray((np.arange(-N_BINS, N_BINS) + 0.5) * self.width, np.float64)

    def edges(self) -> NDArray[np.float64]:
        """Where bins begin and the last ends, [2 · N_BINS + 1]."""
        return np.asarray(np.arange(-N_BINS, N_BINS + 1) * self.width, np.float64)

    def _widen(self, largest: float) -> None:
        """Let the bins reach beyond `largest`."""
        if largest == 0:
            return
        # frexp gives a power of two above the value: values lie below it, never on it.
        wanted = math.ldexp(1.0, max(math.frexp(largest)[1], -1000)) / N_BINS
        if not self.width:
            self.width = wanted
        while self.width < wanted:
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros_like(self.counts)
            self.counts[N_BINS // 2 : N_BINS // 2 + N_BINS] = half
            self.width *= 2
