"""Batches: the rows of a split as tensors, in the order of the model's inputs.

Samples are decoded when they are asked for and not kept. It neither shuffles nor augments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from optimizer.data.splits import Split

Rows = NDArray[np.intp]
MASK, _MASK_NDIM = "attention_mask", 2
"""The input that tells which positions of a text are padding, by the name that encoders give it."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a split. `labels` are int64 [n], None where the data has none."""

    rows: Rows
    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    kept: torch.Tensor | None = None
    """Of texts, bool [n, length]: the positions that aren't padding. Padding's features don't
    matter to what a network gives, so nothing is to be learned of them."""

    def unpadded(self, features: torch.Tensor) -> torch.Tensor:
        """[positions, channel] of features [n, length, channel] of texts, without their padding;
        any others as they are."""
        kept = self.kept
        if kept is None or features.ndim != kept.ndim + 1 or features.shape[:-1] != kept.shape:
            return features
        return features[kept]


@dataclass(frozen=True, eq=False)
class Batches:
    """A split as a model with these inputs reads it."""

    split: Split
    input_names: Sequence[str]

    def __len__(self) -> int:
        """Samples."""
        return len(self.split)

    def read(self, rows: Rows) -> Batch:
        samples = self.split.read(rows)
        inputs = tuple(
            torch.from_numpy(np.ascontiguousarray(samples.inputs[name]))
            for name in self.input_names
        )
        labels = None if samples.labels is None else torch.from_numpy(samples.labels)
        return Batch(rows, inputs, labels, self._kept(inputs))

    def _kept(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        for name, values in zip(self.input_names, inputs, strict=True):
            if name == MASK and values.ndim == _MASK_NDIM:
                return values != 0
        return None

    def each(self, rows: Rows, size: int, whole: bool = False) -> Iterator[Batch]:
        """The rows in batches of `size`, the last one smaller, or left out if `whole` and it isn't
        the only one."""
        stop = len(rows) - len(rows) % size if whole and len(rows) >= size else len(rows)
        for start in range(0, stop, size):
            yield self.read(rows[start : min(start + size, stop)])
