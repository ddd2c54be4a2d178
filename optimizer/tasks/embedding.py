"""Embeddings: whether samples still find the same neighbours.

Outputs are [n, axis], compared by cosine. A sample is judged by its place among the others, so
the whole split is needed at once.
"""

# ruff: noqa: ARG002  every task takes what the contract passes

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.data.table import Labels
from optimizer.errors import SpecInvalid
from optimizer.tasks.comparison import ComparedTask, Faithful, Paired
from optimizer.tasks.outputs import OneOutput, rows_of, sound
from optimizer.tasks.scores import Scores
from optimizer.tasks.similarity import (
    Embeddings,
    cosines,
    directions,
    nearest,
    rank_correlations,
)
from serve.tensor import Array

MIN_SAMPLES = 3
"""Fewer have no order of others."""


@dataclass(frozen=True)
class RankCorrelation(OneOutput, ComparedTask):
    """Without labels: how well a sample's ranking of the others is kept.

    The score is Spearman's correlation between the base's and the variant's cosines to the other
    samples (`similarity.rank_correlations`), and 0 where that is negative. It is what is judged,
    rather than the figure `cosine` (the mean cosine to the base's embedding), since retrieval
    uses nothing but the order, and since the cosine says little: a rotation of all embeddings
    changes no answer and may have any cosine, while embeddings that share a large common part
    have a cosine near 1 however their order is shuffled.

    Scores share the samples that they are ranked by, so the bound holds given those.
    """

    output: str | None = None
    metric = "rank_correlation"
    comparison = Faithful()
    has_boolean_scores = False
    needs_reference = True
    needs_whole_split = True

    def scores(
        self,
        outputs: Mapping[str, Array],
        labels: Labels | None,
        reference: Mapping[str, Array] | None,
    ) -> Scores:
        assert reference is not None
        variant, base, is_sound = _read(self.output, outputs, reference)
        ranks = np.where(is_sound, rank_correlations(base, variant), 0.0)
        cosine = _cosines(base, variant, is_sound)
        return Scores(np.maximum(ranks, 0.0).astype(np.float32), {"cosine": cosine})


@dataclass(frozen=True)
class NearestNeighbour(OneOutput, ComparedTask):
    """With labels: the share of samples whose nearest other by cosine has the same label.

    Leave-one-out accuracy of the nearest neighbour (Cover and Hart 1967, "Nearest neighbor
    pattern classification"). `rank_correlation` and `cosine` to the base are figures.
    """

    output: str | None = None
    metric = "nearest_neighbour"
    comparison = Paired()
    has_boolean_scores = True
    needs_reference = True
    needs_whole_split = True

    def scores(
        self,
        outputs: Mapping[str, Array],
        labels: Labels | None,
        reference: Mapping[str, Array] | None,
    ) -> Scores:
        assert labels is not None
        assert reference is not None
        variant, base, is_sound = _read(self.output, outputs, reference)
        # Only what the variant itself couldn't compute is wrong here.
        computed = sound(rows_of(self.output, outputs, "axis"))
        right = (labels[nearest(variant, computed)] == labels) & computed
        ranks = np.where(is_sound, rank_correlations(base, variant), 0.0).astype(np.float32)
        figures = {"cosine": _cosines(base, variant, is_sound), "rank_correlation": ranks}
        return Scores(right, figures)


def _read(
    output: str | None, outputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> tuple[Embeddings, Embeddings, NDArray[np.bool_]]:
    """The directions of variant and base, and which samples have them in both."""
    variant, base = rows_of(output, outputs, "axis"), rows_of(output, reference, "axis")
    if len(variant) < MIN_SAMPLES:
        raise SpecInvalid(
            "data", [f"data: got a split of {len(variant)} samples, want at least {MIN_SAMPLES}"]
        )
    return directions(variant), directions(base), sound(variant, base)


def _cosines(
    base: Embeddings, variant: Embeddings, is_sound: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """NaN where there is none: of samples that weren't computed, and of all where the variant has
    another number of axes than its base."""
    if base.shape != variant.shape:
        return np.full(len(base), np.nan, dtype=np.float32)
    return np.where(is_sound, cosines(base, variant), np.nan).astype(np.float32)
