"""Dynamic int8: matrix products whose activations get their range anew in every call.

Nothing is calibrated, and a range fits its own input; finding it costs time in every call. Made
of ONNX's own operators in the pattern that ONNX Runtime fuses (DynamicQuantizeMatMul); an engine
that doesn't know the pattern computes it in fp32. Convolutions stay as they are.
"""

from typing import TYPE_CHECKING

import numpy as np

from optimizer.quantization.graph import Graph
from optimizer.quantization.layout import layers_of, weight_axis
from optimizer.quantization.weights import quantize

if TYPE_CHECKING:
    import onnx


def dynamic_layers(graph: Graph) -> tuple[str, ...]:
    """Names of the layers that can do it, in the order of the graph."""
    return tuple(node.name for node in layers_of(graph) if node.op_type != "Conv")


def quantize_dynamic(
    graph: Graph, *, pairs_saturate: bool, least_error: bool, kept: tuple[str, ...] = ()
) -> Graph:
    """The graph with its matrix products in 8 bits, but for those named in `kept`."""
    graph = graph.copy()
    added: list[onnx.NodeProto] = []
    dropped = set()
    inputs: dict[str, tuple[str, str, str]] = {}
    for name in dynamic_layers(graph):
        if name in kept:
            continue
        node = graph.node(name)
        tensor = node.input[0]
        if tensor not in inputs:
            inputs[tensor] = _rounded_input(graph, tensor, added)
        _rewrite(graph, node, inputs[tensor], added, pairs_saturate, least_error)
        dropped.add(name)
    graph.replace_nodes([*(one for one in graph.nodes if one.name not in dropped), *added])
    graph.drop_unused()
    return graph


def _rounded_input(
    graph: Graph, tensor: str, added: "list[onnx.NodeProto]"
) -> tuple[str, str, str]:
    """8-bit values, scale and zero point of a tensor, for all that take it."""
    from onnx import helper

    names = tuple(graph.fresh(f"{tensor}_{what}") for what in ("quantized", "scale", "zero_point"))
    node = helper.make_node("DynamicQuantizeLinear", [tensor], list(names), name=f"{names[0]}_node")
    added.append(node)
    return names[0], names[1], names[2]


def _rewrite(
    graph: Graph,
    node: "onnx.NodeProto",
    rounded: tuple[str, str, str],
    added: "list[onnx.NodeProto]",
    pairs_saturate: bool,
    least_error: bool,
) -> None:
    """Add what takes the node's place, under its name where it multiplies."""
    import onnx
    from onnx import helper

    weights, stored = graph.weight(node.input[1]), node.input[1]
    if weight_axis(node) == 0:
        weights = np.ascontiguousarray(weights.T)
    found = quantize(weights, 1, pairs_saturate=pairs_saturate, least_error=least_error)
    values, scale = graph.fresh(f"{stored}_quantized"), graph.fresh(f"{stored}_scale")
    zero = graph.fresh(f"{stored}_zero_point")
    graph.set_weight(values, found.values)
    graph.set_weight(scale, found.scales)
    graph.set_weight(zero, np.zeros(len(found.scales), np.int8))
    result, bias = node.output[0], graph.constant(node, 2) if node.op_type == "Gemm" else None
    product = result if bias is None else graph.fresh(f"{result}_product")
    sums, as_float = graph.fresh(f"{result}_sums"), graph.fresh(f"{result}_float")
    scales = graph.fresh(f"{result}_scales")
    x, x_scale, x_zero = rounded
    added += [
        helper.make_node("MatMulInteger", [x, values, x_zero, zero], [sums], name=node.name),
        helper.make_node(
            "Cast", [sums], [as_float], name=f"{as_float}_node", to=onnx.TensorProto.FLOAT
        ),
        helper.make_node("Mul", [x_scale, scale], [scales], name=f"{scales}_node"),
        helper.make_node("Mul", [as_float, scales], [product], name=f"{product}_node"),
    ]
    if bias is not None:
        added.append(
            helper.make_node("Add", [product, node.input[2]], [result], name=f"{result}_node")
        )
