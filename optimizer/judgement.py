"""Judgement: how well variants do on a split, against the base, by the measure of the task.

Scores are taken in the engine on the target, sample by sample, and kept in the store. It decides
nothing; that is `optimizer.choice`'s matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.data.table import Labels
from optimizer.errors import SpecInvalid
from optimizer.evaluator import Evaluator
from optimizer.selection import critical_confidence
from optimizer.store import Key, StoredVariant
from optimizer.tasks import Scores, Task, concatenated
from serve.artifact import Quality
from serve.tensor import Array

PROTOCOL_VERSION = 1
MAX_WHOLE_BYTES = 2 * 2**30
"""Of the outputs of a whole split, where a task needs all of them at once."""
Outputs = Mapping[str, Array]


@dataclass(eq=False)
class Judgement:
    """`confidence` is that of bounds and intervals."""

    evaluator: Evaluator
    task: Task
    confidence: float
    seed: int
    _references: dict[tuple[str, str], dict[str, Array]] = field(default_factory=dict)
    """(base's id, split's digest) → its outputs."""
    _scores: dict[tuple[str, str, str], Scores] = field(default_factory=dict)

    def quality(self, variant: StoredVariant, base: StoredVariant, split: Split) -> Quality:
        """The drop against the base. Raises TechniqueFailed for an engine that fails."""
        ours, theirs = self.scores(variant, base, split), self.scores(base, base, split)
        return self.task.quality(ours, theirs, self.confidence, split.name, split.digest)

    def bounds_among_all(
        self, variants: Sequence[StoredVariant], base: StoredVariant, split: Split
    ) -> dict[str, float]:
        """Upper bounds of the drops of all variants, which hold at once with `confidence`: so
        does that of whichever is picked. By id."""
        theirs = self.scores(base, base, split)
        scores = {one.id: self.scores(one, base, split) for one in variants}
        differences = [self.task.differences(ours, theirs) for ours in scores.values()]
        confidence = critical_confidence(differences, self.confidence, self.seed)
        return {
            name: self.task.quality(ours, theirs, confidence, split.name, split.digest).drop_bound
            for name, ours in scores.items()
        }

    def scores(self, variant: StoredVariant, base: StoredVariant, split: Split) -> Scores:
        """Of each sample of the split; `base` is what fidelity is measured against."""
        against = base.id if self.task.needs_reference else ""
        name = (variant.id, against, split.digest)
        if name not in self._scores:
            key = self._key(variant, against, split)
            stored = self.evaluator.store.recorded(key)
            if stored is None:
                stored = self._measured(variant, base, split).to_dict()
                self.evaluator.store.record(key, stored)
            self._scores[name] = Scores.from_dict(stored)
        return self._scores[name]

    def _key(self, variant: StoredVariant, against: str, split: Split) -> Key:
        what = {"split": split.digest, "against": against, **self.task.identity}
        return Key(variant.id, self.evaluator.machine, "scores", PROTOCOL_VERSION, what)

    def _measured(self, variant: StoredVariant, base: StoredVariant, split: Split) -> Scores:
        reference = self._reference(base, split) if self.task.needs_reference else None
        if self.task.needs_whole_split:
            outputs, labels = self._whole(variant, split)
            return self.task.scores(outputs, labels, reference)
        parts, start = [], 0
        for outputs, labels in self._chunks(variant, split):
            n = len(next(iter(outputs.values())))
            chunk = None if reference is None else _rows(reference, start, start + n)
            parts.append(self.task.scores(outputs, labels, chunk))
            start += n
        return concatenated(parts)

    def _reference(self, base: StoredVariant, split: Split) -> dict[str, Array]:
        """The base's outputs, kept for the next variant."""
        name = (base.id, split.digest)
        if name not in self._references:
            self._references[name], _ = self._whole(base, split)
        return self._references[name]

    def _whole(
        self, variant: StoredVariant, split: Split
    ) -> tuple[dict[str, Array], Labels | None]:
        kept: list[tuple[dict[str, Array], Labels | None]] = []
        n_bytes = 0
        for outputs, labels in self._chunks(variant, split):
            kept.append((outputs, labels))
            n_bytes += sum(array.nbytes for array in outputs.values())
            if n_bytes > MAX_WHOLE_BYTES:
                problem = (
                    f"data.{split.name}: the outputs of its {len(split)} samples take more than "
                    f"{MAX_WHOLE_BYTES / 2**30:g} GiB, which the task needs at once: "
                    "want fewer, by rows"
                )
                raise SpecInvalid("data", [problem])
        return _joined(kept)

    def _chunks(
        self, variant: StoredVariant, split: Split
    ) -> Iterator[tuple[dict[str, Array], Labels | None]]:
        """Those outputs that the task reads, with labels, a batch at a time."""
        for samples, outputs in self.evaluator.outputs(variant, split):
            wanted = self.task.wanted(tuple(outputs))
            yield {name: np.asarray(outputs[name]) for name in wanted}, samples.labels


def _joined(
    chunks: Sequence[tuple[Mapping[str, Array], Labels | None]],
) -> tuple[dict[str, Array], Labels | None]:
    outputs = {name: np.concatenate([chunk[name] for chunk, _ in chunks]) for name in chunks[0][0]}
    labels: list[NDArray[np.int64]] = [one for _, one in chunks if one is not None]
    return outputs, np.concatenate(labels) if labels else None


def _rows(outputs: Outputs, start: int, stop: int) -> dict[str, Array]:
    return {name: array[start:stop] for name, array in outputs.items()}
