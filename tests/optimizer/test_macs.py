"""Multiply-accumulates of graphs, and which of them ran in 8 bits, by the engines' own profiles."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.kernels import fallback_reason, quantized_nodes, sum_up
from optimizer.macs import macs_of, share_of, shares_by_precision
from serve.engines import EngineSpec, engine_module

ENGINES = (EngineSpec("onnxruntime", "model.onnx"), EngineSpec("openvino", "model.onnx"))
Arrays = dict[str, np.ndarray]


def save(path: Path, nodes: list[onnx.NodeProto], shape: list[object], stored: Arrays) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", TensorProto.FLOAT, ["batch", *shape])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(made), path)
    return path


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_macs_are_those_of_the_formulas_when_shapes_are_known(tmp_path: Path) -> None:
    path = save(
        tmp_path / "model.onnx",
        [
            node("Conv", ["x", "dense"], "a", pads=[1, 1, 1, 1], strides=[2, 2]),
            node("Conv", ["a", "depthwise"], "b", pads=[1, 1, 1, 1], group=8),
            node("ConvTranspose", ["b", "up"], "c", strides=[2, 2]),
            node("Flatten", ["c"], "d"),
            node("Gemm", ["d", "linear"], "e", transB=1),
            node("MatMul", ["e", "product"], "f"),
            node("Relu", ["f"], "y"),
        ],
        [3, 8, 8],
        {
            "dense": weights(8, 3, 3, 3),
            "depthwise": weights(8, 1, 3, 3),
            "up": weights(8, 2, 2, 2),
            "linear": weights(5, 128),
            "product": weights(5, 7),
        },
    )
    assert macs_of(path) == {
        "Conv_a": 8 * 4 * 4 * 27,
        "Conv_b": 8 * 4 * 4 * 9,
        "ConvTranspose_c": 8 * 4 * 4 * 2 * 4,
        "Gemm_e": 5 * 128,
        "MatMul_f": 5 * 7,
    }


def test_macs_leave_out_nodes_when_shapes_are_not_known(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "to"], "r"), node("MatMul", ["r", "r"], "y")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", TensorProto.FLOAT, ["batch", 4]), value("to", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, None)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    assert macs_of(path) == {}


def quantized(path: Path, *, falls_back: bool) -> Path:
    """Two convolutions with 8-bit inputs. Where it falls back a division lies between the second,
    which has most of the work, and its DequantizeLinear of weights, so that no engine can fuse."""

    def pair(tensor: str, axis: int | None = None, zero: str = "zero") -> list[onnx.NodeProto]:
        given = {} if axis is None else {"axis": axis}
        scale = "scale" if axis is None else f"{tensor}_scale"
        return [
            node("QuantizeLinear", [tensor, scale, zero], f"{tensor}_q", **given),
            node("DequantizeLinear", [f"{tensor}_q", scale, zero], f"{tensor}_d", **given),
        ]

    def stored(name: str, n: int) -> tuple[onnx.NodeProto, Arrays]:
        values = np.clip(np.round(weights(n, 4 if n == 8 else 8, 3, 3) * 20), -64, 64)
        arrays = {
            f"{name}_q": values.astype(np.int8),
            f"{name}_s": np.full(n, 0.05, np.float32),
            f"{name}_z": np.zeros(n, np.int8),
        }
        made = node(
            "DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], f"{name}_w", axis=0
        )
        return made, arrays

    first, first_arrays = stored("a", 8)
    second, second_arrays = stored("b", 32)
    nodes = [*pair("x"), first, node("Conv", ["x_d", "a_w"], "c", pads=[1, 1, 1, 1]), *pair("c")]
    if falls_back:
        nodes += [second, node("Cos", ["c_d"], "e"), node("Conv", ["e", "b_w"], "y")]
    else:
        nodes += [
            second,
            node("Conv", ["c_d", "b_w"], "o"),
            *pair("o"),
            node("Identity", ["o_d"], "y"),
        ]
    constants = {"scale": np.float32(0.05), "zero": np.uint8(128)}
    constants = {name: np.asarray(value) for name, value in constants.items()}
    return save(path, nodes, [4, 16, 16], {**constants, **first_arrays, **second_arrays})


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_profile_proves_the_share_of_work_in_int8_when_a_part_of_it_fell_back(
    spec: EngineSpec, tmp_path: Path
) -> None:
    x = {"x": np.random.default_rng(1).normal(size=(2, 4, 16, 16)).astype(np.float32)}
    for falls_back in (False, True):
        path = quantized(tmp_path / "model.onnx", falls_back=falls_back)
        kernels = engine_module(spec.name).profile(tmp_path, spec, x, 1)
        shares = shares_by_precision(path, kernels)
        assert sum(shares.values()) == pytest.approx(1.0)
        proof = sum_up(kernels, shares)
        # What the whole graph says it is: both convolutions quantized.
        expected = 1.0
        reason = fallback_reason(proof, proof.n_int8, expected)
        assert (reason is not None) is falls_back, (spec.name, shares)
        if falls_back:
            assert shares["fp32"] > 0.7
            assert share_of(path, quantized_nodes(path)) < 0.3
