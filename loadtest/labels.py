"""Labels of a data set: which answers to the recorded inputs are right, and what is shown of it.

An answer is right where the highest score of the chosen output, along its last axis, is that of
the row's class. Knows no transport and no clock.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.document import nearest
from loadtest.signature import VARIABLE, Signature, TensorSpec

SCORES = ("FP16", "BF16", "FP32", "FP64", *(f"INT{n}" for n in (8, 16, 32, 64)), "UINT8")
"""Datatypes that have a highest value worth asking for."""
UNGRADED = -1
"""In place of a number of right rows: not asked, no answer, or an answer without the output."""


class LabelsInvalid(ValueError):
    """Labels, or an output to hold them against, that don't fit; `str()` says what is wanted."""


@dataclass(frozen=True)
class AnswerKey:
    """The right answers to a plan's payloads."""

    output: str
    """the output that holds the scores, [rows, classes]"""
    classes: npt.NDArray[np.int64]
    """[payloads, rows] by the index of the payload"""

    def n_right(self, payload: int, scores: npt.NDArray[np.float64] | None) -> int:
        """How many rows of an answer are right; UNGRADED where it isn't [rows, classes].

        A row whose scores hold NaN is wrong; of equal highest scores the first counts.
        """
        wanted = self.classes[payload]
        if scores is None or scores.ndim != 2 or len(scores) != len(wanted) or not scores.size:
            return UNGRADED
        right = (scores.argmax(axis=1) == wanted) & ~np.isnan(scores).any(axis=1)
        return int(right.sum())


def choose_output(signature: Signature, name: str | None) -> TensorSpec:
    """The output that holds the scores: the one named, or the only one. Raises LabelsInvalid."""
    known = [spec.name for spec in signature.outputs]
    listed = ", ".join(known) or "none, so it can't be graded"
    if name is None and len(known) != 1:
        raise LabelsInvalid(
            f"--label-output: missing, and the model's outputs are {listed}: want one of them"
        )
    for spec in signature.outputs:
        if name in (None, spec.name):
            return _checked(spec)
    close = nearest(name or "", known)
    hint = f" (did you mean '{close}'?)" if close else ""
    raise LabelsInvalid(
        f"--label-output: got '{name}', which is no output of the model{hint}, want one of {listed}"
    )


def _checked(spec: TensorSpec) -> TensorSpec:
    if len(spec.shape) != 2 or spec.datatype not in SCORES:
        raise LabelsInvalid(
            f"--label-output: output '{spec.name}' is {spec.datatype} {list(spec.shape)}, "
            "want numbers [rows, classes]"
        )
    return spec


def check_labels(
    where: str, labels: npt.NDArray[np.generic], n: int, output: TensorSpec
) -> npt.NDArray[np.int64]:
    """Labels as classes, [n]. Raises LabelsInvalid for another shape, kind or range."""
    if labels.shape != (n,):
        raise LabelsInvalid(f"{where}: got shape {list(labels.shape)}, want [{n}], one for a row")
    if labels.dtype.kind not in "iu":
        raise LabelsInvalid(f"{where}: got {labels.dtype}, want integers, the index of the class")
    n_classes = output.shape[1]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (n_classes != VARIABLE and high >= n_classes):
        most = " or more" if n_classes == VARIABLE else f" to {n_classes - 1} of '{output.name}'"
        raise LabelsInvalid(f"{where}: got classes {low} to {high}, want 0{most}")
    return labels.astype(np.int64)
