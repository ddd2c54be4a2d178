"""Selection: what having picked the best of many variants costs in confidence.

The lowest of many measured drops is low by luck too. Pure functions of per-sample differences;
they know neither variants nor what their bounds are computed by.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_N_DRAWS = 20_000
"""Of the joint maximum. The quantile's own error is about 0.01 standard normals at 95%."""
_MAX_DRAWN = 2_000_000
"""Normals drawn at a time, which bounds the memory to some 16 MB."""


def critical_confidence(
    differences: Sequence[NDArray[np.floating]], confidence: float, seed: int
) -> float:
    """The confidence to give each upper bound so that all hold at once with `confidence`.

    `differences` are base less variant of each sample, [n] for each of k variants, over the same
    samples in the same order. If all bounds hold at once, so does that of whichever variant is
    picked, by whatever rule. The single-step max-T adjustment of Westfall and Young 1993,
    "Resampling-Based Multiple Testing", section 2.5, by the Gaussian multiplier bootstrap of
    Chernozhukov, Chetverikov and Kato 2013, "Gaussian approximations and multiplier bootstrap for
    maxima of sums of high-dimensional random vectors", Annals of Statistics 41: given the samples
    that is the maximum of k normals with the correlations of the differences. Variants that err
    on the same samples therefore cost less than independent ones, whose price is Šidák's
    confidence^(1/k); the result is never above it and never below `confidence`. It is Šidák's
    for variants that pull in opposite directions too, for which Bonferroni's would be needed:
    0.9949 in place of 0.9950 at k = 10.

    Variants whose differences are all equal, above all those that never differ from the base,
    have no say. Equal arguments give equal results. Raises ValueError for unequal lengths.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"got the confidence {confidence}, want at least 0.5 and below 1")
    lengths = sorted({len(one) for one in differences})
    if len(lengths) > 1:
        raise ValueError(f"got differences of {lengths[0]} and {lengths[-1]} samples, want equal")
    standardized = [one for one in map(_standardized, differences) if one is not None]
    if len(standardized) < 2:
        return confidence
    correlation = np.stack(standardized) @ np.stack(standardized).T / lengths[0]
    critical = float(np.quantile(_maxima(correlation, seed), confidence))
    sidak: float = confidence ** (1 / len(standardized))
    return min(sidak, max(confidence, NormalDist().cdf(critical)))


def _standardized(differences: NDArray[np.floating]) -> NDArray[np.float64] | None:
    """With mean 0 and variance 1; None where nothing varies."""
    values = np.asarray(differences, dtype=np.float64)
    centred = values - values.mean() if len(values) else values
    deviation = float(np.sqrt(np.mean(centred**2))) if len(values) else 0.0
    return centred / deviation if deviation > 1e-12 else None


def _maxima(correlation: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Draws of the maximum of normals with that correlation."""
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.maximum(values, 0))  # [k, k]
    generator = np.random.default_rng(seed)
    k = len(correlation)
    parts, left = [], _N_DRAWS
    while left > 0:
        n_now = min(left, max(1, _MAX_DRAWN // k))
        parts.append((generator.standard_normal((n_now, k)) @ root.T).max(axis=1))
        left -= n_now
    return np.concatenate(parts)
