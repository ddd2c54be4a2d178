"""Accuracy of a variant in the engine that serves it, compared with its base sample by sample.

The same file can have another accuracy on another CPU, so it is measured where it is served.
The measure is top-1; ties go to the lower class, as numpy's argmax does.
"""

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.stats import drop_upper_bound, paired_drop
from serve.artifact import Quality
from serve.engines import Engine

PROTOCOL_VERSION = 1
METRIC = "top1"
_CHUNK = 256
"""Samples decoded at a time."""


@dataclass(frozen=True, eq=False)
class Correctness:
    """Which samples of a split an engine gets right: all that comparisons need."""

    correct: NDArray[np.bool_]
    """[n], in the order of the split."""

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def to_dict(self) -> dict[str, object]:
        packed = np.packbits(self.correct).tobytes()
        return {"n": len(self.correct), "bits": base64.b85encode(packed).decode()}

    @classmethod
    def from_dict(cls, stored: dict[str, object]) -> "Correctness":
        packed = np.frombuffer(base64.b85decode(str(stored["bits"])), np.uint8)
        count = stored["n"]
        assert isinstance(count, int)
        return cls(np.unpackbits(packed, count=count).astype(np.bool_))


def measure_correctness(engine: Engine, split: Split, batch_size: int) -> Correctness:
    """Run the whole split in batches of `batch_size`; the first output holds the logits.

    The split must have labels. NaN among a sample's logits counts as wrong.
    """
    output = engine.signature.outputs[0].name
    parts = []
    for start in range(0, len(split), _CHUNK):
        samples = split.read(np.arange(start, min(start + _CHUNK, len(split))))
        assert samples.labels is not None
        for row in range(0, len(samples.labels), batch_size):
            batch = {name: array[row : row + batch_size] for name, array in samples.inputs.items()}
            logits = np.asarray(engine.run(batch)[output], dtype=np.float64)  # [n, class]
            wanted = samples.labels[row : row + batch_size]
            sound = ~np.isnan(logits).any(axis=1)
            parts.append((logits.argmax(axis=1) == wanted) & sound)
    return Correctness(np.concatenate(parts))


def quality(
    variant: Correctness, base: Correctness, confidence: float, split: str, data_digest: str
) -> Quality:
    """The drop against the base with its interval and one-sided bound, both Tango's."""
    drop = paired_drop(base.correct, variant.correct)
    two_sided = (1 + confidence) / 2
    return Quality(
        metric=METRIC,
        value=variant.accuracy,
        drop=drop.estimate,
        # A loss is a negative gain: the lower end is the upper bound with the roles swapped.
        drop_lower=-drop_upper_bound(drop.n, drop.n01, drop.n10, two_sided),
        drop_upper=drop_upper_bound(drop.n, drop.n10, drop.n01, two_sided),
        drop_bound=drop.upper_bound(confidence),
        confidence=confidence,
        n_samples=drop.n,
        split=split,
        data_digest=data_digest,
    )
