"""The recovered accuracy: what drop a variant will end with when it is trained in full.

It learns from variants of the same base that went all the way, in this study and before: a linear
model from what the lower rungs see to the final drop, with an interval from its own errors. Pure
functions of records; where they are kept is others' matter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_RECORDS = 6
"""Fewer say nothing: there are up to three coefficients."""
COVERAGE = 0.9
"""Of the interval: so many variants should end within it or above its lower end."""
_RIDGE = 1e-3
"""Relative to the features' variance. Keeps coefficients finite where all drops are alike."""
PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class RecoveryRecord:
    """One variant that was trained in full. Drops are shares, base minus variant; `size` is the
    share of the base's bytes that it keeps."""

    size: float
    untrained: float
    final: float
    short: float | None = None
    """After short training; None where that rung was passed over."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "RecoveryRecord":
        return cls(**stored)


@dataclass(frozen=True)
class Recovered:
    """The drop to expect after full training, and the end of its interval that favours the
    variant, by `n` others."""

    low: float
    estimate: float
    n: int


def expected_drop(
    records: Sequence[RecoveryRecord], size: float, untrained: float, short: float | None = None
) -> Recovered | None:
    """What to expect of a variant that shows these drops, None where too little is known.

    Ridge regression of the final drop on the drops seen so far and the logarithm of the size.
    The lower end is the estimate less the `COVERAGE` quantile of the errors of predicting each
    record from the others (split by leave-one-out, "jackknife+" without its refits' spread:
    Barber et al. 2021, Annals of Statistics 49), and never above it. Estimates are kept to what
    a drop can be, -1 to 1.
    """
    known = [record for record in records if short is None or record.short is not None]
    if len(known) < MIN_RECORDS:
        return None
    with_short = short is not None
    features = np.array(
        [_features(r.size, r.untrained, r.short if with_short else None) for r in known]
    )
    final = np.array([record.final for record in known])
    estimate = _predict(features, final, np.array(_features(size, untrained, short)))
    errors = [
        _predict(np.delete(features, i, 0), np.delete(final, i), features[i]) - final[i]
        for i in range(len(known))
    ]
    # The quantile of n errors with the correction for a finite sample.
    rank = min(len(errors), math.ceil((len(errors) + 1) * COVERAGE))
    margin = max(0.0, float(np.sort(errors)[rank - 1]))
    estimate = float(np.clip(estimate, -1.0, 1.0))
    return Recovered(estimate - margin, estimate, len(known))


def _features(size: float, untrained: float, short: float | None) -> list[float]:
    seen = untrained if short is None else short
    return [seen, math.log(max(size, 1e-6))]


def _predict(
    features: NDArray[np.float64], final: NDArray[np.float64], at: NDArray[np.float64]
) -> float:
    centre, level = features.mean(axis=0), final.mean()
    centred = features - centre
    gram = centred.T @ centred
    ridge = _RIDGE * max(float(np.trace(gram)) / len(gram), 1e-12)
    slope = np.linalg.solve(gram + ridge * np.eye(len(gram)), centred.T @ (final - level))
    return float(level + (at - centre) @ slope)
