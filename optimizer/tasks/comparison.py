"""The comparison of a variant's scores with its base's: the drop, its interval and its bound.

Two kinds: what both scored on the same samples (`Paired`), and how faithfully a variant answers
what its base does (`Faithful`). They don't know what was scored.
"""

# ruff: noqa: ARG002  every comparison takes what the contract passes

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.bounds import mean_upper_bound, share_lower_bound, share_upper_bound
from optimizer.stats import drop_upper_bound, paired_drop
from optimizer.tasks.scores import Scores
from serve.artifact import Quality

Guarantee = Literal["labels", "fidelity", "metric"]
_MOST_SAMPLES = 2**22
"""More aren't looked for: with them a bound is below 0.0001 points."""


@dataclass(frozen=True)
class Drop:
    """The estimate, its two-sided interval and its one-sided upper bound."""

    estimate: float
    lower: float
    upper: float
    bound: float


@dataclass(frozen=True)
class Paired:
    """Both are scored on the same samples, and the drop is the difference of the means.

    Of booleans the bound and interval are Tango's (`optimizer.stats`), of shares those of
    `bounds.mean_upper_bound` on the differences, which lie from -1 to 1: no distribution of them
    is assumed, and where all are equal the bound stays above them.
    """

    guarantee: Guarantee = "labels"

    def differences(self, variant: Scores, base: Scores) -> NDArray[np.float64]:
        """The drop of each sample, [n]; their mean is the drop."""
        _check(variant, base)
        return base.judged.astype(np.float64) - variant.judged.astype(np.float64)

    def drop(self, variant: Scores, base: Scores, confidence: float) -> Drop:
        differences = self.differences(variant, base)
        two_sided = (1 + confidence) / 2
        if variant.judged.dtype == np.bool_:
            n10, n01 = _counts(variant, base)
            n = len(variant)
            return Drop(
                (n10 - n01) / n,
                # A loss is a negative gain: the lower end is the upper bound of roles swapped.
                -drop_upper_bound(n, n01, n10, two_sided),
                drop_upper_bound(n, n10, n01, two_sided),
                drop_upper_bound(n, n10, n01, confidence),
            )
        return Drop(
            float(differences.mean()),
            -mean_upper_bound(-differences, two_sided, low=-1),
            mean_upper_bound(differences, two_sided, low=-1),
            mean_upper_bound(differences, confidence, low=-1),
        )

    def min_samples(self, max_drop: float, confidence: float, booleans: bool) -> int:
        """The fewest samples with which a variant that never differs from its base can pass."""
        if booleans:
            z = NormalDist().inv_cdf(confidence)
            return max(1, math.ceil(z * z * (1 - max_drop) / max_drop))
        return _fewest(lambda n: mean_upper_bound(np.zeros(n), confidence, low=-1) <= max_drop)


@dataclass(frozen=True)
class Faithful:
    """The variant is scored against the base, which would score 1: the drop is what is missing.

    Of booleans (agree or not) the bound is Clopper and Pearson's, which is exact. Tango's with a
    base that is always right would be Wilson's score bound, which for shares near 0, where all
    that pass are, errs more often than it says: without a disagreement 6.7 times in a hundred at
    95%. A guarantee must not. Of shares it is `bounds.mean_upper_bound`'s.
    """

    guarantee: Guarantee = "fidelity"

    def differences(self, variant: Scores, base: Scores) -> NDArray[np.float64]:
        """What each sample lacks, [n]; `base` has no say."""
        return 1.0 - variant.judged.astype(np.float64)

    def drop(self, variant: Scores, base: Scores, confidence: float) -> Drop:
        lacks = self.differences(variant, base)
        two_sided = (1 + confidence) / 2
        if variant.judged.dtype == np.bool_:
            n, n_wrong = len(lacks), int(np.count_nonzero(~variant.judged))
            return Drop(
                n_wrong / n,
                share_lower_bound(n_wrong, n, two_sided),
                share_upper_bound(n_wrong, n, two_sided),
                share_upper_bound(n_wrong, n, confidence),
            )
        return Drop(
            float(lacks.mean()),
            1 - mean_upper_bound(1 - lacks, two_sided),
            mean_upper_bound(lacks, two_sided),
            mean_upper_bound(lacks, confidence),
        )

    def min_samples(self, max_drop: float, confidence: float, booleans: bool) -> int:
        """The fewest samples with which a variant that always answers as its base can pass."""
        if booleans:
            if max_drop >= 1:
                return 1
            # The quotient may be whole but for its rounding.
            return max(1, math.ceil(math.log(1 - confidence) / math.log1p(-max_drop) - 1e-9))
        return _fewest(lambda n: mean_upper_bound(np.zeros(n), confidence) <= max_drop)


Comparison = Paired | Faithful


class ComparedTask:
    """What every task does with scores, however it makes them."""

    metric: str
    comparison: Comparison
    has_boolean_scores: bool

    @property
    def guarantee(self) -> Guarantee:
        return self.comparison.guarantee

    def differences(self, variant: Scores, base: Scores) -> NDArray[np.float64]:
        return self.comparison.differences(variant, base)

    def quality(
        self, variant: Scores, base: Scores, confidence: float, split_name: str, data_digest: str
    ) -> Quality:
        drop = self.comparison.drop(variant, base, confidence)
        return Quality(
            metric=self.metric,
            value=variant.mean,
            drop=drop.estimate,
            drop_lower=drop.lower,
            drop_upper=drop.upper,
            drop_bound=drop.bound,
            confidence=confidence,
            n_samples=len(variant),
            split=split_name,
            data_digest=data_digest,
            guarantee=self.guarantee,
            figures=variant.mean_figures(),
        )

    def min_samples(self, max_drop: float, confidence: float) -> int:
        return self.comparison.min_samples(max_drop, confidence, self.has_boolean_scores)


def _counts(variant: Scores, base: Scores) -> tuple[int, int]:
    drop = paired_drop(base.judged, variant.judged)
    return drop.n10, drop.n01


def _check(variant: Scores, base: Scores) -> None:
    got = [f"{scores.judged.dtype} {list(scores.judged.shape)}" for scores in (base, variant)]
    if got[0] != got[1]:
        raise ValueError(f"got scores {got[0]} of the base and {got[1]} of the variant, want equal")


def _fewest(suffices: Callable[[int], bool]) -> int:
    """The least n that suffices, where more always do; at most `_MOST_SAMPLES`."""
    most = 1
    while most < _MOST_SAMPLES and not suffices(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if suffices(middle) else (middle, most)
    return most
