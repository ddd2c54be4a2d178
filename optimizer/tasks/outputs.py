"""Outputs of a model as a task reads them: which one, and whether it has the shape it needs.

It knows nothing of what is made of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import SpecInvalid
from serve.tensor import Array


def chosen(name: str | None, output_names: Sequence[str]) -> str:
    """The output that `task.output` names, or the first. Raises SpecInvalid."""
    if name is None:
        return output_names[0]
    if name not in output_names:
        known = ", ".join(output_names)
        raise SpecInvalid("task", [f"task.output: got '{name}', want an output of {known}"])
    return name


class OneOutput:
    """What tasks have in common that read a single output."""

    metric: str
    output: str | None
    """None for the model's first."""

    @property
    def identity(self) -> Mapping[str, str]:
        return {"task": self.metric, "version": "1", "output": self.output or ""}

    def wanted(self, output_names: Sequence[str]) -> tuple[str, ...]:
        return (chosen(self.output, output_names),)


def rows_of(name: str | None, outputs: Mapping[str, Array], axis: str) -> NDArray[np.float64]:
    """The chosen output, [n, `axis`], as floats. Raises SpecInvalid for another shape."""
    found = chosen(name, list(outputs))
    array = np.asarray(outputs[found])
    # bfloat16 is of a kind that NumPy doesn't know, but converts.
    is_numeric = array.dtype.kind in "fiu" or array.dtype.name == "bfloat16"
    if array.ndim != 2 or array.shape[1] < 1 or not is_numeric:
        got = f"{array.dtype} {list(array.shape)}"
        raise SpecInvalid(
            "task",
            [f"task.output: '{found}' is {got}, want numbers [n, {axis}]: name another output"],
        )
    return array.astype(np.float64)


def sound(*arrays: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples have no NaN in any of the arrays, [n, axis] each."""
    found: NDArray[np.bool_] = np.all([~np.isnan(one).any(axis=1) for one in arrays], axis=0)
    return found
