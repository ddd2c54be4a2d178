"""Accuracy under load, for a report: shown, not judged."""

import numpy as np

from loadtest.document import Strict
from loadtest.session import Result


class AccuracyFacts(Strict):
    """Rows of successful answers whose highest score is that of their class.

    Shown and not judged: an SLO's accuracy is a drop from the base model, which isn't here.
    """

    labels: str
    output: str
    n_rows: int
    """graded, repeated rows included"""
    n_right: int
    n_payloads: int
    """distinct requests that were answered; their rows repeat"""

    @property
    def accuracy(self) -> float:
        return self.n_right / self.n_rows


def accuracy_facts(result: Result) -> AccuracyFacts | None:
    """Of the measured window; none where no answer was graded."""
    key, samples = result.plan.key, result.played.samples
    if key is None or samples.n_right is None:
        return None
    graded = samples.graded
    if not graded.any():
        return None
    order = result.plan.window.payload
    return AccuracyFacts(
        labels=result.settings.labels or "",
        output=key.output,
        n_rows=int(graded.sum()) * key.classes.shape[1],
        n_right=int(samples.n_right[graded].sum()),
        n_payloads=len(np.unique(order[np.flatnonzero(graded) % len(order)])),
    )
