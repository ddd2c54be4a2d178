"""The models that the clients' tests ask: tiny ONNX files, published as manifests or as for Triton.

Those of `tests.serve.onnx_models`, and here what only clients make visible: a datatype without a
numpy dtype, outputs without an element, class names, several versions.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from serve.artifact import write_version
from serve.tensor import Array
from tests.serve import onnx_models
from tests.serve.versions import manifest_of, publish

LABELS = ("cat", "dog", "bird")
LABELLED_CONFIG = """\
max_batch_size: 4
input { name: "scores" data_type: TYPE_FP32 dims: 3 }
output { name: "best" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }
"""
SEVERAL_SEEDS = {"1": 0, "2": 1}  # version of the model `several` -> seed of its weights
MODELS = (
    "bfloat16", "fixed", "labelled", "linear", "pair", "positive", "ragged", "several", "text",
    "work",
)  # fmt: skip


def bfloat16(path: Path) -> Path:
    """x BF16[-1, 3] -> y BF16[-1, 3], the same."""
    return _save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["batch", 3])],
    )


def positive(path: Path) -> Path:
    """x FP32[n] -> kept FP32[m], the positive ones; negated FP32[n]: no axis is the batch."""
    return _save(
        path,
        [
            helper.make_node("Neg", ["x"], ["negated"]),
            helper.make_node("Less", ["negated", "x"], ["chosen"]),
            helper.make_node("Compress", ["x", "chosen"], ["kept"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["m"]),
            helper.make_tensor_value_info("negated", TensorProto.FLOAT, ["n"]),
        ],
    )


def scores(path: Path) -> Path:
    """scores FP32[-1, 3] -> best FP32[-1, 3], the same."""
    return _save(
        path,
        [helper.make_node("Identity", ["scores"], ["best"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("best", TensorProto.FLOAT, ["batch", 3])],
    )


def several_by_hand(x: Array, version: str) -> Array:
    """What that version of `several` computes, in doubles."""
    return onnx_models.linear_by_hand(x, SEVERAL_SEEDS[version])


def publish_all(root: Path, scratch: Path) -> None:
    """Write every model of `MODELS` below `root`; `labelled` in Triton's layout."""
    for builder in (
        bfloat16,
        onnx_models.fixed,
        onnx_models.linear,
        onnx_models.pair,
        positive,
        onnx_models.ragged,
        onnx_models.text,
        onnx_models.work,
    ):
        publish(root, builder, scratch)
    for version, seed in SEVERAL_SEEDS.items():
        model = onnx_models.linear(scratch / "model.onnx", seed)
        manifest = manifest_of(model, "several", version=version)
        write_version(root, manifest, {"model.onnx": model})
    folder = root / "labelled" / "1"
    folder.mkdir(parents=True)
    scores(folder / "model.onnx")
    (root / "labelled" / "config.pbtxt").write_text(LABELLED_CONFIG)
    (root / "labelled" / "labels.txt").write_text("\n".join(LABELS))


def text_rows() -> Array:
    """BYTES[2, 2]: ASCII, UTF-8, nothing, and something long."""
    return np.array([[b"a", "é".encode()], [b"", b"long " * 50]], object)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx_models.Value],
    outputs: list[onnx_models.Value],
) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
