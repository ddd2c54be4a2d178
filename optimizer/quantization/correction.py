"""Correction: biases that take back by how much rounding the weights moves a layer's mean output
(Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", with
means from calibration instead of from batch normalization).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from optimizer.quantization.calibration import Observed
from optimizer.quantization.graph import Floats, Graph
from optimizer.quantization.layout import weight_axis
from optimizer.quantization.qdq import groups_of
from optimizer.quantization.weights import mean_error, quantize

if TYPE_CHECKING:
    import onnx


def correct_biases(
    graph: Graph,
    layers: tuple[str, ...],
    observed: Mapping[str, Observed],
    *,
    pairs_saturate: bool,
    least_error: bool,
) -> None:
    """Change the biases of the layers in place, for weights that will be rounded so. A layer
    without one gets one, except for a MatMul that no sum with a stored tensor follows."""
    for name in layers:
        node = graph.node(name)
        axis = weight_axis(node)
        weights = graph.weight(node.input[1])
        found = quantize(weights, axis, pairs_saturate=pairs_saturate, least_error=least_error)
        means = observed[node.input[0]].means.astype(np.float32)
        moved = np.moveaxis(weights, axis, 0)
        groups = groups_of(node)
        if len(means) != moved.shape[1] * groups:
            continue  # channels that aren't where layers of this kind have them
        as_first = type(found)(np.moveaxis(found.values, axis, 0), found.scales, 0)
        _add(graph, node, -mean_error(moved, as_first, means, groups))


def _add(graph: Graph, node: "onnx.NodeProto", change: Floats) -> None:
    if node.op_type == "MatMul":
        behind = bias_behind(graph, node)
        if behind is not None:
            user, index = behind
            graph.own_weight(user, index, graph.weight(user.input[index]) + change)
        return
    bias = graph.constant(node, 2)
    graph.own_weight(node, 2, change if bias is None else (bias.reshape(-1) + change))


def bias_behind(graph: Graph, node: "onnx.NodeProto") -> "tuple[onnx.NodeProto, int] | None":
    """The sum that adds a stored vector of channels to what a MatMul gives, and the index of the
    vector among its inputs."""
    user = graph.sole_user(node.output[0])
    if user is None or user.op_type != "Add":
        return None
    index = 1 if user.input[0] == node.output[0] else 0
    if not graph.is_weight(user.input[index]):
        return None
    n_channels = graph.weight(node.input[1]).shape[1]
    return (user, index) if graph.weight(user.input[index]).shape == (n_channels,) else None
