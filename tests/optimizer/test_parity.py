"""Parity at batch 1, 2, 3 and the largest."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import ParityMismatch
from optimizer.measuring.local import LocalMeasurer
from optimizer.parity import batch_sizes, check_engine_parity, compare, one_by_one
from optimizer.variant import engine_model, onnx_model
from serve.engines import EngineSpec
from serve.tensor import Array
from tests.serve.onnx_models import linear

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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engine_passes_when_it_computes_what_its_parent_does(
    engine: str, precision: str, tmp_path: Path
) -> None:
    parent = onnx_model(linear(tmp_path / "model.onnx").parent, "model.onnx")
    child = engine_model(tmp_path, EngineSpec(engine, "model.onnx", precision))
    check_engine_parity(LocalMeasurer(), child, parent, INPUTS, 8)


def test_engine_is_refused_when_it_computes_something_else_than_its_parent(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        linear(tmp_path / name / "model.onnx", seed)
    parent = onnx_model(tmp_path / "a", "model.onnx")
    child = engine_model(tmp_path / "b", EngineSpec("onnxruntime", "model.onnx"))
    with pytest.raises(ParityMismatch, match="the engine model against the onnx model"):
        check_engine_parity(LocalMeasurer(), child, parent, INPUTS, 8)
