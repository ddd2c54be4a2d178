"""Multiply-accumulates of an ONNX graph's heavy operators, for one row of a batch.

Shapes are ONNX's own inference; it runs nothing. Lengths that vary are taken as `LENGTH`, which
matters for shares where operators depend on it differently.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.kernels import PACKED
from optimizer.layers import kernels_by_node
from serve.engines import KernelTime

if TYPE_CHECKING:
    import onnx

LENGTH = 16
"""Of axes that vary, but for the batch."""
_CONVOLUTIONS = ("Conv", "QLinearConv", "ConvInteger")
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "QGemm")
_WEIGHT_PLACES = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
"""Of the second factor among the inputs, where it isn't 1."""


def macs_of(path: Path) -> dict[str, int]:
    """By name of the node, in the order of the graph; nodes whose shapes can't be told are left
    out. Weights in separate files aren't read."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    _unpack(model.graph)
    for value in model.graph.input:
        for place, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.HasField("dim_value"):
                axis.dim_value = LENGTH if place else 1
    for value in [*model.graph.output, *model.graph.value_info]:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = _shapes(inferred.graph)
    found = {}
    for index, node in enumerate(inferred.graph.node):
        macs = _macs(node, shapes)
        if macs:
            found[node.name or f"{node.op_type}_{index}"] = macs
    return found


def _unpack(graph: "onnx.GraphProto") -> None:
    """Put plain products in the place of those with packed weights, whose shapes ONNX's inference
    doesn't know. The weights become inputs without values."""
    from onnx import TensorProto, helper

    for index, node in enumerate(graph.node):
        if node.op_type == PACKED:
            sizes = {one.name: one.i for one in node.attribute}
            name = f"{node.input[1]}_unpacked_{index}"
            shape = [sizes["K"], sizes["N"]]
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            plain = helper.make_node("MatMul", [node.input[0], name], node.output, node.name)
            node.CopyFrom(plain)


def _shapes(graph: "onnx.GraphProto") -> dict[str, tuple[int, ...]]:
    """Of tensors whose every axis is known."""
    shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        if axes and all(axis.HasField("dim_value") for axis in axes):
            shapes[value.name] = tuple(axis.dim_value for axis in axes)
    return shapes


def _macs(node: "onnx.NodeProto", shapes: Mapping[str, Sequence[int]]) -> int:
    """0 for what isn't heavy, or isn't told."""
    output = shapes.get(node.output[0]) if node.output else None
    place = _WEIGHT_PLACES.get(node.op_type, 1)
    if output is None or len(node.input) <= place:
        return 0
    if node.op_type in _CONVOLUTIONS:
        weight = shapes.get(node.input[place])
        return math.prod(output) * math.prod(weight[1:]) if weight else 0
    if node.op_type == "ConvTranspose":
        data, weight = shapes.get(node.input[0]), shapes.get(node.input[1])
        return math.prod(data) * math.prod(weight[1:]) if data and weight else 0
    if node.op_type in _PRODUCTS:
        factor = shapes.get(node.input[0])
        transposed = any(one.name == "transA" and one.i for one in node.attribute)
        return math.prod(output) * factor[-2 if transposed else -1] if factor else 0
    return 0


def shares_by_precision(path: Path, kernels: Sequence[KernelTime]) -> dict[str, float]:
    """Precision → share of the graph's multiply-accumulates that kernels of it ran. Those of
    nodes whose kernel isn't known by its name are in none of them."""
    macs = macs_of(path)
    ran = kernels_by_node(path, kernels)
    total = sum(macs.values())
    shares: dict[str, float] = {}
    for node, kernel in ran.items():
        share = macs.get(node, 0) / total if total else 0.0
        shares[kernel.precision] = shares.get(kernel.precision, 0.0) + share
    return shares


def share_of(path: Path, nodes: Collection[str]) -> float:
    """Of the multiply-accumulates, that of these nodes."""
    macs = macs_of(path)
    total = sum(macs.values())
    return sum(macs.get(node, 0) for node in nodes) / total if total else 0.0
