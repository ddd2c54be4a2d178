"""The table of blocks: how long a network takes, from the measured times of its parts.

A sum over parts misses what an engine fuses and what lies between them, so it is corrected by the
variants that were timed whole, for each engine and precision apart. Pure functions of the table;
measuring parts is `optimizer.blocks`' matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_PAIRS = 4
"""Variants timed whole, of different sums, before a correction is believed: it has two
coefficients, and its errors are to be seen."""
SLACK = 0.05
"""Relative, kept below the fastest that the correction allows, for what timings drift by."""

Counts = Mapping[str, int]
"""Block's key → how often it is in a network."""
Times = Mapping[tuple[str, int], float]
"""(block's key, batch size) → seconds."""


@dataclass(frozen=True)
class Pair:
    """A variant of which both are known: its blocks' sum, and its seconds measured whole."""

    sum_s: float
    whole_s: float


@dataclass(frozen=True)
class Correction:
    """whole = `fixed_s` + `factor` * sum, at most `error` (relative) too high in the pairs."""

    fixed_s: float
    factor: float
    error: float

    def estimate(self, sum_s: float) -> float:
        return self.fixed_s + self.factor * sum_s

    def fastest(self, sum_s: float) -> float:
        """Seconds that the network will hardly stay below."""
        return max(0.0, self.estimate(sum_s) * (1 - self.error) * (1 - SLACK))


def block_sum(counts: Counts, times: Times, batch_size: int) -> float | None:
    """Seconds of all blocks for a batch, None where one wasn't measured."""
    total = 0.0
    for key, count in counts.items():
        seconds = times.get((key, batch_size))
        if seconds is None:
            return None
        total += count * seconds
    return total


def correction(pairs: Sequence[Pair]) -> Correction | None:
    """Fitted to the pairs by least squares of relative errors, both coefficients at least 0;
    None while they are too few or all alike."""
    sums = np.array([pair.sum_s for pair in pairs])
    whole = np.array([pair.whole_s for pair in pairs])
    if len(np.unique(sums)) < MIN_PAIRS:
        return None
    # Minimizing |(a + b x - y) / y|² is least squares of 1 on 1/y and x/y.
    columns = np.stack([1 / whole, sums / whole], axis=1)
    (fixed_s, factor), *_ = np.linalg.lstsq(columns, np.ones(len(whole)), rcond=None)
    if fixed_s < 0:
        fixed_s, factor = 0.0, _one_coefficient(sums / whole)
    if factor < 0:
        fixed_s, factor = _one_coefficient(1 / whole), 0.0
    relative = (fixed_s + factor * sums) / whole - 1
    return Correction(float(fixed_s), float(factor), min(0.9, max(0.0, float(relative.max()))))


@dataclass(frozen=True)
class Trust:
    """How far estimates can be trusted: Spearman's rank correlation with the truth and the mean
    relative error, of `n_networks` each of which its own correction hadn't seen."""

    rank_correlation: float
    relative_error: float
    n_networks: int


def trust(pairs: Sequence[Pair]) -> Trust | None:
    """By leaving out one network at a time; None where that leaves too few to correct by, or all
    take equally long."""
    estimates = []
    for index, pair in enumerate(pairs):
        found = correction([*pairs[:index], *pairs[index + 1 :]])
        if found is None:
            return None
        estimates.append(found.estimate(pair.sum_s))
    given, wanted = np.array(estimates), np.array([pair.whole_s for pair in pairs])
    if len(pairs) == 0 or np.ptp(given) == 0 or np.ptp(wanted) == 0:
        return None
    ranks = float(np.corrcoef(_ranks(given), _ranks(wanted))[0, 1])
    return Trust(ranks, float(np.abs(given / wanted - 1).mean()), len(pairs))


def _ranks(
    values: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means = ends - (counts + 1) / 2
    return np.asarray(means[inverse], dtype=np.float64)


def _one_coefficient(column: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    return float(column.sum() / (column @ column))
