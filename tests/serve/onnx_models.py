"""Tiny ONNX models, one for each shape of signature that the server must handle."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serve.tensor import Array

Value = onnx.ValueInfoProto
Builder = Callable[[Path], Path]
INVALID_INDEX = 1000  # of the model `pick`: the engine fails on it


def linear(path: Path, seed: int = 0) -> Path:
    """x FP32[-1, 4] -> y FP32[-1, 3], an affine map and a sigmoid."""
    random = np.random.default_rng(seed)
    return _save(
        path,
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["z"]),
            helper.make_node("Sigmoid", ["z"], ["y"]),
        ],
        [_value("x", TensorProto.FLOAT, ["batch", 4])],
        [_value("y", TensorProto.FLOAT, ["batch", 3])],
        {
            "w": random.normal(size=(4, 3)).astype(np.float32),
            "b": random.normal(size=3).astype(np.float32),
        },
    )


def linear_by_hand(x: Array, seed: int = 0) -> Array:
    """What `linear` computes, in doubles."""
    random = np.random.default_rng(seed)
    w, b = random.normal(size=(4, 3)), random.normal(size=3)
    return np.asarray(1 / (1 + np.exp(-(np.asarray(x, np.float64) @ w + b))))


def pair(path: Path) -> Path:
    """a FP32[-1, 2], b INT64[-1, 2] -> sum FP32[-1, 2], doubled INT64[-1, 2]."""
    return _save(
        path,
        [
            helper.make_node("Cast", ["b"], ["b_real"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["a", "b_real"], ["sum"]),
            helper.make_node("Add", ["b", "b"], ["doubled"]),
        ],
        [
            _value("a", TensorProto.FLOAT, ["batch", 2]),
            _value("b", TensorProto.INT64, ["batch", 2]),
        ],
        [
            _value("sum", TensorProto.FLOAT, ["batch", 2]),
            _value("doubled", TensorProto.INT64, ["batch", 2]),
        ],
    )


def fixed(path: Path) -> Path:
    """x FP32[3] -> y FP32[3], the negation: no axis is the batch."""
    return _save(
        path,
        [helper.make_node("Neg", ["x"], ["y"])],
        [_value("x", TensorProto.FLOAT, [3])],
        [_value("y", TensorProto.FLOAT, [3])],
    )


def text(path: Path) -> Path:
    """words BYTES[-1, 2] -> echo BYTES[-1, 2]."""
    return _save(
        path,
        [helper.make_node("Identity", ["words"], ["echo"])],
        [_value("words", TensorProto.STRING, ["batch", 2])],
        [_value("echo", TensorProto.STRING, ["batch", 2])],
    )


def ragged(path: Path) -> Path:
    """x FP32[-1, -1] -> total FP32[-1, 1], the sum of each row, whatever its length."""
    return _save(
        path,
        [helper.make_node("ReduceSum", ["x", "axes"], ["total"])],
        [_value("x", TensorProto.FLOAT, ["batch", "length"])],
        [_value("total", TensorProto.FLOAT, ["batch", 1])],
        {"axes": np.array([1], np.int64)},
    )


def logarithm(path: Path) -> Path:
    """x FP32[-1, 2] -> y FP32[-1, 2]: NaN and infinities where x isn't positive."""
    return _save(
        path,
        [helper.make_node("Log", ["x"], ["y"])],
        [_value("x", TensorProto.FLOAT, ["batch", 2])],
        [_value("y", TensorProto.FLOAT, ["batch", 2])],
    )


def pick(path: Path) -> Path:
    """index INT64[-1] -> y FP32[-1]: an index of `INVALID_INDEX` makes the engine fail."""
    return _save(
        path,
        [helper.make_node("Gather", ["table", "index"], ["y"])],
        [_value("index", TensorProto.INT64, ["batch"])],
        [_value("y", TensorProto.FLOAT, ["batch"])],
        {"table": np.arange(10, dtype=np.float32)},
    )


def work(path: Path) -> Path:
    """n INT64[] -> done INT64[]: as much work as its caller asks for, n turns of a loop."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["more_out"]),
            helper.make_node("MatMul", ["state", "matrix"], ["product"]),
            helper.make_node("Tanh", ["product"], ["state_out"]),
            helper.make_node("Add", ["count", "one"], ["count_out"]),
        ],
        "turn",
        [
            _value("turn", TensorProto.INT64, []),
            _value("more", TensorProto.BOOL, []),
            _value("state", TensorProto.FLOAT, [64, 64]),
            _value("count", TensorProto.INT64, []),
        ],
        [
            _value("more_out", TensorProto.BOOL, []),
            _value("state_out", TensorProto.FLOAT, [64, 64]),
            _value("count_out", TensorProto.INT64, []),
        ],
    )
    return _save(
        path,
        [helper.make_node("Loop", ["n", "yes", "matrix", "zero"], ["end", "done"], body=body)],
        [_value("n", TensorProto.INT64, [])],
        [_value("done", TensorProto.INT64, [])],
        {
            "matrix": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
            "yes": np.array(True),
            "zero": np.array(0, np.int64),
            "one": np.array(1, np.int64),
        },
    )


def _value(name: str, kind: int, shape: list[int | str]) -> Value:
    return helper.make_tensor_value_info(name, kind, shape)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[Value],
    outputs: list[Value],
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    weights = [numpy_helper.from_array(array, n) for n, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
