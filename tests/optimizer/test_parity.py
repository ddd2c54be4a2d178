"""Parity at batch 1, 2, 3 and the largest."""

from collections.abc import Mapping

import numpy as np
import pytest

from optimizer.errors import ParityMismatch
from optimizer.parity import batch_sizes, compare, one_by_one
from serve.tensor import Array

INPUTS = {"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}


def double(batch: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"y": 2 * batch["x"]}


def test_sizes_are_one_two_three_and_the_largest() -> None:
    assert batch_sizes(32) == (1, 2, 3, 32)
    assert batch_sizes(2) == (1, 2)


def test_equal_outputs_pass() -> None:
    compare("x", double, double, INPUTS, 8, 1e-6)


def wrong_at_three(batch: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"y": (2.5 if len(batch["x"]) == 3 else 2) * batch["x"]}


def fixed_batch(batch: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"y": np.resize(2 * batch["x"], (1, 4))}


def not_a_number(batch: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"y": np.full_like(batch["x"], np.nan)}


@pytest.mark.parametrize(
    ("broken", "batch_size"),
    [
        pytest.param(wrong_at_three, 3, id="one batch size computes something else"),
        pytest.param(fixed_batch, 2, id="the batch is fixed"),
        pytest.param(not_a_number, 1, id="NaN"),
    ],
)
def test_mismatch_names_the_batch_size(broken: object, batch_size: int) -> None:
    assert callable(broken)
    with pytest.raises(ParityMismatch) as caught:
        compare("a form against another", broken, double, INPUTS, 8, 1e-3)
    assert caught.value.batch_size == batch_size
    assert not caught.value.max_difference <= caught.value.tolerance


def test_rows_one_by_one_show_a_row_that_depends_on_its_neighbours() -> None:
    def leaking(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"y": batch["x"] - batch["x"].mean(axis=0)}

    with pytest.raises(ParityMismatch):
        compare("a batch", leaking, one_by_one(leaking), INPUTS, 8, 1e-3)
    compare("a batch", double, one_by_one(double), INPUTS, 8, 1e-6)
