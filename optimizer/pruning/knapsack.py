"""Knapsack: one choice from each set, so that least is lost and what is kept fits.

The multiple-choice knapsack (Sinha and Zoltners 1979) by dynamic programming over the budget in
bins. It knows neither channels nor seconds.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Amounts = NDArray[np.float64]
N_BINS = 2000


def choose(
    losses: Sequence[Amounts], sizes: Sequence[Amounts], budget: float, n_bins: int = N_BINS
) -> list[int] | None:
    """For each set the index of its choice: the sum of `losses` is least among those whose sum of
    `sizes` is within the budget; None where there are none. Of equal ones the earlier index.

    Sizes are rounded up to bins, so what is chosen fits, and is the best for a budget that is
    smaller by at most a bin for each set. Sizes may be negative.
    """
    least = [float(one.min()) for one in sizes]
    room = budget - sum(least)
    if room < 0:
        return None
    bins = [_bins(one - low, room, n_bins) for one, low in zip(sizes, least, strict=True)]
    best = np.zeros(n_bins + 1)  # least loss of the sets so far, within so many bins
    taken: list[NDArray[np.int64]] = []
    for loss, steps in zip(losses, bins, strict=True):
        tried = np.full((len(loss), n_bins + 1), np.inf)
        for index, step in enumerate(steps):
            if step <= n_bins:
                tried[index, step:] = best[: n_bins + 1 - step] + loss[index]
        taken.append(tried.argmin(axis=0))
        best = tried.min(axis=0)
    return _traced(taken, bins, n_bins)


def _bins(span: Amounts, room: float, n_bins: int) -> NDArray[np.int64]:
    """How many bins of the room each takes; more than there are where it doesn't fit."""
    if room == 0:
        return np.where(span > 0, n_bins + 1, 0)
    # What is a whole number of bins but for rounding isn't one more.
    bins = np.ceil(np.minimum(span, 2 * room) / room * n_bins - 1e-9)
    return np.asarray(bins, dtype=np.int64)


def _traced(
    taken: Sequence[NDArray[np.int64]], bins: Sequence[NDArray[np.int64]], n_bins: int
) -> list[int]:
    """The choices, from the last set back to the first."""
    left, chosen = n_bins, []
    for choices, steps in zip(reversed(taken), reversed(bins), strict=True):
        index = int(choices[left])
        chosen.append(index)
        left -= int(steps[index])
    return chosen[::-1]
