"""Scores: how well an engine did on each sample of a split.

All that comparisons of a variant with its base need, small enough for a store. It doesn't know
what they measure.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORED = np.dtype("<f4")


@dataclass(frozen=True, eq=False)
class Scores:
    """In the order of the split; higher is better."""

    judged: NDArray[Any]
    """[n], bool: right or wrong, or float32: shares from 0 to 1. What the drop is measured in."""
    figures: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Further measures by name, [n] each; NaN where a sample has none."""

    def __len__(self) -> int:
        return len(self.judged)

    @property
    def mean(self) -> float:
        return float(self.judged.mean(dtype=np.float64))

    def mean_figures(self) -> dict[str, float]:
        """Of each figure over the samples where it is finite; without those that never are."""
        finite = {name: values[np.isfinite(values)] for name, values in self.figures.items()}
        return {
            name: float(values.mean(dtype=np.float64))
            for name, values in finite.items()
            if len(values)
        }

    def to_dict(self) -> dict[str, object]:
        """As JSON: booleans packed to bits, shares as float32, both in base 85."""
        stored: dict[str, object] = {"n": len(self)}
        if self.judged.dtype == np.bool_:
            stored["bits"] = base64.b85encode(np.packbits(self.judged).tobytes()).decode()
        else:
            stored["shares"] = _encoded(self.judged)
        if self.figures:
            stored["figures"] = {name: _encoded(values) for name, values in self.figures.items()}
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Scores":
        figures = {name: _decoded(text) for name, text in stored.get("figures", {}).items()}
        if "shares" in stored:
            return cls(_decoded(stored["shares"]), figures)
        packed = np.frombuffer(base64.b85decode(stored["bits"]), np.uint8)
        return cls(np.unpackbits(packed, count=stored["n"]).astype(np.bool_), figures)


def concatenated(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive chunks as those of one; there is at least one."""
    return Scores(
        np.concatenate([part.judged for part in parts]),
        {name: np.concatenate([part.figures[name] for part in parts]) for name in parts[0].figures},
    )


def _encoded(values: NDArray[np.float32]) -> str:
    return base64.b85encode(values.astype(_STORED).tobytes()).decode()


def _decoded(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b85decode(text), _STORED).astype(np.float32)
