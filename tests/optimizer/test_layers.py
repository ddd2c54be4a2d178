"""Layers of two graphs side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.layers import layers_of
from optimizer.result import Layer
from serve.engines import KernelTime


def weight(name: str, *shape: int, datatype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros(shape, datatype), name)


def save(path: Path, nodes: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto]) -> Path:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    logits = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [image], [logits], weights)
    onnx.save(helper.make_model(graph), path)
    return path


def base(directory: Path) -> Path:
    """conv1 → relu, then a sum of conv2 and a short cut → relu, then a linear layer."""
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight"], ["a"], "node_1"),
        helper.make_node("Relu", ["a"], ["b"], "node_2"),
        helper.make_node("Conv", ["b", "short.weight"], ["s"], "node_3"),
        helper.make_node("Conv", ["b", "conv2.weight"], ["c"], "node_4"),
        helper.make_node("Add", ["c", "s"], ["d"], "node_5"),
        helper.make_node("Relu", ["d"], ["e"], "node_6"),
        helper.make_node("MatMul", ["e", "val_7"], ["f"], "node_7"),
    ]
    weights = [
        weight("conv1.weight", 8, 3, 3, 3), weight("short.weight", 8, 8, 1, 1),
        weight("conv2.weight", 8, 8, 3, 3), weight("val_7", 8, 10),
    ]  # fmt: skip
    return save(directory / "base.onnx", nodes, weights)


def quantized(directory: Path) -> Path:
    """conv1 in int8 between its pairs, conv2 of fewer channels, the short cut gone, one new."""
    nodes = [
        helper.make_node("DequantizeLinear", ["conv1.weight_quantized", "q", "z"],
                         ["conv1.weight_DequantizeLinear_Output"], "dq"),
        helper.make_node("Conv", ["x", "conv1.weight_DequantizeLinear_Output"], ["a"], "node_11"),
        helper.make_node("Conv", ["a", "conv2.weight"], ["c"], "node_12"),
        helper.make_node("Conv", ["c", "extra.weight"], ["d"], "node_13"),
        helper.make_node("MatMul", ["d", "val_9"], ["f"], "node_7"),
    ]  # fmt: skip
    weights = [
        weight("conv1.weight_quantized", 8, 3, 3, 3, datatype=np.int8), weight("q", 8),
        weight("z", 8, datatype=np.int8), weight("conv2.weight", 4, 8, 3, 3),
        weight("extra.weight", 4, 4, 1, 1), weight("val_9", 8, 10),
    ]  # fmt: skip
    return save(directory / "quantized.onnx", nodes, weights)


def kernel(node: str, operator: str, seconds: float, precision: str = "fp32") -> KernelTime:
    return KernelTime(node, operator, operator, precision, seconds)


def test_layers_are_matched_by_their_weights_when_nodes_are_numbered(tmp_path: Path) -> None:
    layers = layers_of(base(tmp_path), quantized(tmp_path), (), ())

    assert [(one.name, one.base_shape, one.shape) for one in layers] == [
        ("conv1", (8, 3, 3, 3), (8, 3, 3, 3)),
        ("short", (8, 8, 1, 1), ()),
        ("conv2", (8, 8, 3, 3), (4, 8, 3, 3)),
        ("node_7", (8, 10), (8, 10)),
        ("extra", (), (4, 4, 1, 1)),
    ]
    assert [(one.base_precision, one.precision) for one in layers[:2]] == [
        ("fp32", "int8"),
        ("fp32", ""),
    ]


@pytest.mark.parametrize(
    ("names", "times"),
    [
        pytest.param(
            ["b_nchwc", "s_nchwc", "e_nchwc", "node_7"], [1, 2, 3, 4], id="ONNX Runtime's blocked"
        ),
        pytest.param(
            ["node_1_token_1", "node_3_token_2", "node_4_token_5", "node_7_quant"],
            [1, 2, 3, 4],
            id="ONNX Runtime's int8",
        ),
        pytest.param(
            ["node_1/WithoutBiases", "node_3/WithoutBiases", "node_4/WithoutBiases", "f"],
            [1, 2, 3, 4],
            id="OpenVINO's",
        ),
        pytest.param(
            ["node_1 + node_2", "s", "d", "unheard"], [1, 2, 3, None], id="lists of names"
        ),
    ],
)
def test_times_are_those_of_the_kernel_that_computes_the_layer(
    names: list[str], times: list[float | None], tmp_path: Path
) -> None:
    kernels = [kernel(name, "Conv", n + 1.0) for n, name in enumerate(names)]
    reorder = kernel("b", "ReorderOutput", 9.0)

    layers = layers_of(base(tmp_path), base(tmp_path), [reorder, *kernels], [])

    assert [one.base_s for one in layers] == times
    assert {one.seconds for one in layers} == {None}


def test_precision_is_the_kernels_when_the_profile_tells_it(tmp_path: Path) -> None:
    fallen_back = kernel("node_11", "Conv", 1.0, "fp32")

    [conv1, *_] = layers_of(base(tmp_path), quantized(tmp_path), (), [fallen_back])

    assert conv1 == Layer(
        "conv1", "Conv", (8, 3, 3, 3), (8, 3, 3, 3), "fp32", "fp32", None, 1.0
    )  # fmt: skip


def test_layers_that_share_weights_are_told_apart_by_their_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w.weight"], ["a"], "first"),
        helper.make_node("Conv", ["a", "w.weight"], ["b"], "second"),
    ]
    path = save(tmp_path / "shared.onnx", nodes, [weight("w.weight", 3, 3, 3, 3)])

    assert [one.name for one in layers_of(path, path, (), ())] == ["w", "second"]
