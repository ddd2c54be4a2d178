"""Tasks: what accuracy means for a model.

This module holds the contract and makes the task that a spec asks for. A task is pure functions
of outputs and labels; it knows neither engines nor files.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.data.table import Labels
from optimizer.spec import TaskSpec
from optimizer.tasks.classification import Agreement, Top1
from optimizer.tasks.comparison import Guarantee
from optimizer.tasks.custom import CustomMetric
from optimizer.tasks.embedding import NearestNeighbour, RankCorrelation
from optimizer.tasks.scores import Scores, concatenated
from serve.artifact import Quality
from serve.tensor import Array

__all__ = ["Scores", "Task", "concatenated", "make_task"]


class Task(Protocol):
    @property
    def metric(self) -> str:
        """The name of what `Quality.value` measures."""

    @property
    def guarantee(self) -> Guarantee:
        """What a drop says: see `Quality.guarantee`."""

    @property
    def needs_reference(self) -> bool:
        """Whether `scores` compares with the base's outputs on the same samples."""

    @property
    def needs_whole_split(self) -> bool:
        """Whether `scores` compares samples with each other, so that chunks won't do."""

    @property
    def identity(self) -> Mapping[str, str]:
        """All that decides scores beside engine and data: for the key of stored ones."""

    def wanted(self, output_names: Sequence[str]) -> tuple[str, ...]:
        """Those of the engine's outputs that `scores` reads. Raises SpecInvalid where the one
        that the spec names isn't among them."""

    def scores(
        self,
        outputs: Mapping[str, Array],
        labels: Labels | None,
        reference: Mapping[str, Array] | None,
    ) -> Scores:
        """Score n samples. `outputs` are the engine's, [n, ...] each, in its order; `reference`
        are the base's where they are needed. Samples with NaN among their outputs score 0.

        Raises SpecInvalid where outputs have a shape that can't be scored.
        """

    def differences(self, variant: Scores, base: Scores) -> NDArray[np.float64]:
        """The drop of each sample, [n], whose mean is `Quality.drop`: for
        `optimizer.selection`."""

    def quality(
        self, variant: Scores, base: Scores, confidence: float, split_name: str, data_digest: str
    ) -> Quality:
        """The drop against the base with interval and bound. `base` are the base's own scores,
        made with itself as reference."""

    def min_samples(self, max_drop: float, confidence: float) -> int:
        """The fewest samples with which any variant can pass by its bound; both shares."""


def make_task(spec: TaskSpec, has_labels: bool) -> Task:
    """The task that a spec asks for, on data with labels or without."""
    if spec.kind == "custom":
        assert spec.metric is not None
        return CustomMetric(spec.metric, spec.output, spec.range, has_labels)
    if spec.kind == "embedding":
        return NearestNeighbour(spec.output) if has_labels else RankCorrelation(spec.output)
    return Top1(spec.output) if has_labels else Agreement(spec.output)
