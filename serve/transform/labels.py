"""Labels: the names of the classes that score highest.

It doesn't know what the scores are of, nor who declares.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.errors import ArtifactInvalid
from serve.tensor import FLOATING, Array, TensorSpec
from serve.transform.checks import Check, Problem, first_problem

MAX_LABELS_BYTES = 16_000_000
MAX_TOP = 1_000


@dataclass(frozen=True, kw_only=True)
class LabelOutput:
    """Of the engine's output `tensor`, scores [row, class], the public output `name` has the
    labels of the `top` classes, BYTES [row, top], highest first, and the public output `scores`
    their scores in FP32. `file` has a label a line. Without `keep`, `tensor` is no public output.
    """

    tensor: str
    file: str
    name: str
    top: int = 1
    scores: str | None = None
    keep: bool = True
    kind: Literal["labels"] = "labels"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)

    @property
    def public(self) -> tuple[TensorSpec, ...]:
        """The public outputs that are made."""
        names = TensorSpec(self.name, "BYTES", (-1, self.top))
        if self.scores is None:
            return (names,)
        return (names, TensorSpec(self.scores, "FP32", (-1, self.top)))

    def problem(self) -> Problem | None:
        """What is out of bounds by itself."""
        return first_problem(self._checks())

    def misfit(self, outputs: Mapping[str, TensorSpec]) -> Problem | None:
        """What doesn't fit the engine's outputs."""
        return first_problem(self._fits(outputs))

    def _checks(self) -> Iterator[Check]:
        yield "file", self.file, bool(self.file), "the name of a file with a label a line"
        yield "top", self.top, 1 <= self.top <= MAX_TOP, f"1 to {MAX_TOP}"

    def _fits(self, outputs: Mapping[str, TensorSpec]) -> Iterator[Check]:
        yield "tensor", self.tensor, self.tensor in outputs, f"one of {', '.join(outputs)}"
        spec = outputs[self.tensor]
        known = spec.datatype in FLOATING
        yield "tensor", spec.datatype, known, f"an output of one of {', '.join(sorted(FLOATING))}"
        yield "tensor", list(spec.shape), len(spec.shape) == 2, "an output of [-1, classes]"


@dataclass(frozen=True, eq=False)
class LabelStep:
    """Declared labels at work; from any number of threads at a time."""

    spec: LabelOutput
    labels: tuple[str, ...]
    encoded: NDArray[np.object_]
    """The labels in UTF-8, [class]."""

    def outputs(self, scores: Array) -> dict[str, Array]:
        """The public outputs for `scores` [row, class]. Of equal scores the first class counts as
        the higher; NaN as the lowest. Raises ArtifactInvalid where the engine gives other than one
        score for each label."""
        if scores.shape[1:] != self.encoded.shape:
            raise ArtifactInvalid(
                self.spec.file,
                f"has {len(self.labels)} labels, output {self.spec.tensor!r} has "
                f"{list(scores.shape)} scores",
            )
        exact: NDArray[np.float64] = scores.astype(np.float64)
        best = np.argsort(-exact, axis=1, kind="stable")[:, : self.spec.top]
        made: dict[str, Array] = {self.spec.name: self.encoded[best]}
        if self.spec.scores is not None:
            with np.errstate(over="ignore"):  # beyond FP32 is infinity
                made[self.spec.scores] = np.take_along_axis(exact, best, 1).astype(np.float32)
        return made


def load_labels(directory: Path, spec: LabelOutput, outputs: Mapping[str, TensorSpec]) -> LabelStep:
    """Make ready what `spec` declares, which fits `outputs`. Raises ArtifactInvalid for a file of
    too few labels for `top`, or not one for each class."""
    path = directory / spec.file
    labels = read_labels(path)
    n_classes = outputs[spec.tensor].shape[1]
    if n_classes not in (-1, len(labels)):
        raise ArtifactInvalid(
            str(path), f"has {len(labels)} labels, want {n_classes} for output {spec.tensor!r}"
        )
    if spec.top > len(labels):
        raise ArtifactInvalid(str(path), f"has {len(labels)} labels, want at least top {spec.top}")
    encoded = np.array([label.encode() for label in labels], object)
    return LabelStep(spec, labels, encoded)


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels in `path`, UTF-8, one a line. Raises ArtifactInvalid where a line is empty, or the
    file isn't text of bounded size."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LABELS_BYTES + 1)
    except OSError as error:
        raise ArtifactInvalid(str(path), error.strerror or str(error)) from error
    if len(content) > MAX_LABELS_BYTES:
        raise ArtifactInvalid(str(path), f"over {MAX_LABELS_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactInvalid(str(path), f"not UTF-8: {error.reason} at {error.start}") from error
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:
            raise ArtifactInvalid(str(path), f"line {number}: got none, want a label")
    return tuple(lines)
