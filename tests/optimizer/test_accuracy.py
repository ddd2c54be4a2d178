"""Accuracy in an engine, and its comparison with the base."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from optimizer.accuracy import Correctness, measure_correctness, quality
from optimizer.data.splits import Samples
from serve.engines import Signature
from serve.tensor import Array, TensorSpec


class Echo:
    """An engine whose logits are its input; counts the rows of its batches."""

    signature = Signature(
        (TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("logits", "FP32", (-1, 3)),)
    )

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.rows.append(len(inputs["x"]))
        return {"logits": inputs["x"]}

    def close(self) -> None: ...


class Rows:
    """A split held in memory."""

    name = "validation"
    digest = "rows"

    def __init__(self, values: Array, labels: Array) -> None:
        self._values = values
        self.labels = labels

    def __len__(self) -> int:
        return len(self._values)

    def read(self, indices: Sequence[int] | Array | None = None) -> Samples:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        return Samples({"x": self._values[chosen]}, self.labels[chosen], "rows")


def test_correctness_covers_every_sample_when_the_last_batch_is_short() -> None:
    values = np.eye(3, dtype=np.float32)[np.arange(301) % 3]
    engine = Echo()
    found = measure_correctness(engine, Rows(values, np.arange(301) % 3), batch_size=8)
    assert found.correct.shape == (301,)
    assert found.accuracy == 1.0
    assert sum(engine.rows) == 301
    assert max(engine.rows) == 8


def test_correctness_counts_nan_as_wrong_and_a_tie_as_the_lower_class() -> None:
    values = np.array([[np.nan, 1, 0], [1, 1, 0], [0, 1, 1]], dtype=np.float32)
    found = measure_correctness(Echo(), Rows(values, np.array([0, 0, 2])), batch_size=2)
    assert found.correct.tolist() == [False, True, False]


@pytest.mark.parametrize("n", [1, 7, 8, 9])
def test_correctness_survives_a_round_trip(n: int) -> None:
    found = Correctness(np.random.default_rng(n).random(n) < 0.5)
    again = Correctness.from_dict(found.to_dict())
    assert again.correct.tolist() == found.correct.tolist()


def test_quality_has_no_drop_but_a_bound_when_nothing_differs() -> None:
    right = Correctness(np.ones(100, dtype=np.bool_))
    found = quality(right, right, 0.95, "validation", "digest")
    assert found.drop == 0.0
    assert found.drop_lower == -found.drop_upper
    assert 0 < found.drop_bound < found.drop_upper


def test_quality_is_mirrored_when_base_and_variant_change_places() -> None:
    rng = np.random.default_rng(0)
    one = Correctness(rng.random(400) < 0.9)
    other = Correctness(rng.random(400) < 0.8)
    loss = quality(other, one, 0.95, "validation", "digest")
    gain = quality(one, other, 0.95, "validation", "digest")
    assert loss.drop == -gain.drop
    assert loss.drop_lower == pytest.approx(-gain.drop_upper)
    assert loss.drop_lower < loss.drop < loss.drop_bound < loss.drop_upper
