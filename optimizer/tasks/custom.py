"""A metric of the user's: a function of outputs and labels that scores each sample.

It is the user's code and runs in this process. What it returns is checked, not what it means.
"""

# ruff: noqa: ARG002  every task takes what the contract passes

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.table import Labels
from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.tasks.comparison import ComparedTask, Comparison, Paired
from optimizer.tasks.outputs import chosen, sound
from optimizer.tasks.scores import Scores
from serve.tensor import Array


@dataclass(frozen=True)
class CustomMetric(ComparedTask):
    """`function(outputs, labels)` returns a score for each sample, [n], higher is better.

    `outputs` maps every output of the model, or the one that `output` names, to its array
    [n, ...]; `labels` are int64 [n], or None. Booleans are right or wrong; numbers lie within
    `range` and are taken as shares of it, so that a drop is one too: from 0 to 10, 7 is 0.7. It is
    called with a few hundred samples at a time, so a score must not depend on the other samples.
    """

    function: Importable
    output: str | None
    range: tuple[float, float]
    has_labels: bool
    needs_reference = False
    needs_whole_split = False
    has_boolean_scores = True
    """They may be: the fewest samples that can do are those of booleans."""
    metric: str = field(init=False)
    comparison: Comparison = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", str(self.function))
        object.__setattr__(self, "comparison", Paired("labels" if self.has_labels else "metric"))

    @property
    def identity(self) -> Mapping[str, str]:
        """With the source of the function's module, where that lies beside the spec."""
        return {
            "task": "custom",
            "version": "1",
            "output": self.output or "",
            "metric": self.metric,
            "source": hashlib.sha256(self.function.source_bytes()).hexdigest(),
            "range": f"{self.range[0]!r} {self.range[1]!r}",
        }

    def wanted(self, output_names: Sequence[str]) -> tuple[str, ...]:
        if self.output is None:
            return tuple(output_names)
        return (chosen(self.output, output_names),)

    def scores(
        self,
        outputs: Mapping[str, Array],
        labels: Labels | None,
        reference: Mapping[str, Array] | None,
    ) -> Scores:
        wanted = {name: outputs[name] for name in self.wanted(list(outputs))}
        n = len(next(iter(wanted.values())))
        is_sound = np.all([_has_no_nan(array) for array in wanted.values()], axis=0)
        found = self._called(wanted, labels)
        problem = self._problem(found, n, is_sound)
        if problem is not None:
            raise SpecInvalid(
                self.metric,
                [f"task.metric: {self.metric} returned {problem[0]}, want {problem[1]}"],
            )
        if found.dtype == np.bool_:
            return Scores(found & is_sound)
        low, high = self.range
        shares = (np.where(is_sound, found, low).astype(np.float64) - low) / (high - low)
        return Scores(shares.astype(np.float32))

    def _called(self, outputs: Mapping[str, Array], labels: Labels | None) -> NDArray[Any]:
        try:
            return np.asarray(self.function.call(outputs, labels))
        except Exception as error:
            raise SpecInvalid(
                self.metric,
                [f"task.metric: {self.metric} failed: {type(error).__name__}: {error}"],
            ) from error

    def _problem(
        self, found: NDArray[Any], n: int, is_sound: NDArray[np.bool_]
    ) -> tuple[str, str] | None:
        """What came and what is wanted, where that isn't the same."""
        if found.shape != (n,) or found.dtype.kind not in "biuf":
            return f"{found.dtype} {list(found.shape)} for {n} samples", f"numbers [{n}]"
        if found.dtype == np.bool_:
            return None
        low, high = self.range
        outside = is_sound & ~((found >= low) & (found <= high))
        if outside.any():
            index = int(outside.argmax())
            return (
                f"{found[index]} for sample {index} of {n}",
                f"{low:g} to {high:g}: correct it, or set task.range",
            )
        return None


def _has_no_nan(array: Array) -> NDArray[np.bool_]:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return np.ones(len(array), dtype=np.bool_)
    return sound(array.reshape(len(array), -1))
