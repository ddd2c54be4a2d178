"""Classification: top-1 against labels, or against the base's answers where there are none.

Outputs are logits [n, class]; ties go to the lower class, as numpy's argmax does. It doesn't know
which classes there are.
"""

# ruff: noqa: ARG002  every task takes what the contract passes

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.data.table import Labels
from optimizer.tasks.comparison import ComparedTask, Faithful, Paired
from optimizer.tasks.outputs import OneOutput, rows_of, sound
from optimizer.tasks.scores import Scores
from serve.tensor import Array


@dataclass(frozen=True)
class Top1(OneOutput, ComparedTask):
    """With labels: the share of samples whose largest logit is the label's."""

    output: str | None = None
    metric = "top1"
    comparison = Paired()
    has_boolean_scores = True
    needs_reference = False
    needs_whole_split = False

    def scores(
        self,
        outputs: Mapping[str, Array],
        labels: Labels | None,
        reference: Mapping[str, Array] | None,
    ) -> Scores:
        assert labels is not None
        logits = rows_of(self.output, outputs, "class")
        return Scores((logits.argmax(axis=1) == labels) & sound(logits))


@dataclass(frozen=True)
class Agreement(OneOutput, ComparedTask):
    """Without labels: the share of samples on which the variant answers as its base does.

    Where they agree both are right or both wrong, so the accuracy can't have changed by more than
    the share of disagreement, whatever the labels are: |drop| <= 1 - agreement. The figure `kl`
    is the mean Kullback-Leibler divergence of the variant's softmax from the base's, in nats.
    """

    output: str | None = None
    metric = "agreement"
    comparison = Faithful()
    has_boolean_scores = True
    needs_reference = True
    needs_whole_split = False

    def scores(
        self,
        outputs: Mapping[str, Array],
        labels: Labels | None,
        reference: Mapping[str, Array] | None,
    ) -> Scores:
        assert reference is not None
        logits = rows_of(self.output, outputs, "class")
        base = rows_of(self.output, reference, "class")
        agrees = (logits.argmax(axis=1) == base.argmax(axis=1)) & sound(logits, base)
        return Scores(agrees, {"kl": divergence(base, logits).astype(np.float32)})


def divergence(base: NDArray[np.float64], variant: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(base || variant) of the softmax of logits [n, class] each, in nats, [n], 0 or more; NaN
    where logits are NaN or infinite."""
    finite = np.isfinite(base).all(axis=1) & np.isfinite(variant).all(axis=1)
    found = np.full(len(base), np.nan)
    p, q = _log_softmax(base[finite]), _log_softmax(variant[finite])
    # Rounding may leave the sum an ulp below 0 where both are equal.
    found[finite] = np.maximum(0.0, (np.exp(p) * (p - q)).sum(axis=1))
    return found


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
