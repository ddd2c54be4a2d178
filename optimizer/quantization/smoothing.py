"""Smoothing: outlying channels of activations moved into the weights that they are multiplied
with (Xiao et al. 2022, "SmoothQuant", equation 4), without changing what the network computes.

Encoders have a few channels whose activations are a hundred times the others', after layer
normalization above all; with one scale for the tensor the others would keep a handful of levels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization.calibration import Observed
from optimizer.quantization.graph import Graph
from optimizer.quantization.layout import is_layer, weight_axis

if TYPE_CHECKING:
    import onnx

_MAX_FACTOR = 1e4


def smoothable(graph: Graph) -> tuple[str, ...]:
    """The tensors that matrix products with stored weights take, in the order of the graph."""
    found = [
        node.input[0]
        for node in graph.nodes
        if node.op_type in ("MatMul", "Gemm") and is_layer(graph, node)
    ]
    return tuple(dict.fromkeys(found))


def smooth(graph: Graph, observed: Mapping[str, Observed], alpha: float) -> None:
    """Divide each smoothable tensor's channels by factors that its products' weights are
    multiplied with, in place. `alpha`, 0 to 1, is the share of the difficulty that goes to the
    weights; `observed` has the tensors, watched on their last axis."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, want 0 to 1")
    for tensor in smoothable(graph):
        products = [
            node
            for node in graph.users(tensor)
            if node.op_type in ("MatMul", "Gemm")
            and is_layer(graph, node)
            and node.input[0] == tensor
        ]
        largest = observed[tensor].largest
        if all(graph.weight(one.input[1]).shape[_input_axis(one)] == len(largest)
               for one in products):  # fmt: skip
            factors = _factors(graph, products, largest, alpha)
            for node in products:
                _multiply(graph, node, factors)
            _divide(graph, tensor, products, factors)


def _factors(
    graph: Graph, products: "list[onnx.NodeProto]", largest: NDArray[np.float64], alpha: float
) -> NDArray[np.float64]:
    """activations^α / weights^(1 − α), [channels]; 1 for a channel without either."""
    weights = np.zeros(len(largest))
    for node in products:
        values = np.abs(graph.weight(node.input[1])).max(axis=1 - _input_axis(node))
        weights = np.maximum(weights, values)
    usable = (largest > 0) & (weights > 0)
    factors = np.ones(len(largest))
    factors[usable] = largest[usable] ** alpha / weights[usable] ** (1 - alpha)
    # Only differences count: around 1, so that numbers stay near where they were.
    if usable.any():
        factors[usable] /= np.exp(np.log(factors[usable]).mean())
    return np.asarray(np.clip(factors, 1 / _MAX_FACTOR, _MAX_FACTOR))


def _multiply(graph: Graph, node: "onnx.NodeProto", factors: NDArray[np.float64]) -> None:
    shape = [1, 1]
    shape[_input_axis(node)] = -1
    weights = graph.weight(node.input[1]) * factors.reshape(shape)
    graph.own_weight(node, 1, weights.astype(np.float32))


def _divide(
    graph: Graph, tensor: str, products: "list[onnx.NodeProto]", factors: NDArray[np.float64]
) -> None:
    """In the layer normalization that gives the tensor, where nobody else takes it; else by a
    multiplication before the products."""
    from onnx import helper

    maker = graph.maker(tensor)
    names = {node.name for node in products}
    alone = tensor not in graph.outputs and {one.name for one in graph.users(tensor)} == names
    if maker is not None and maker.op_type == "LayerNormalization" and alone:
        for index in (1, 2):
            values = graph.constant(maker, index)
            if values is not None:
                graph.own_weight(maker, index, (values / factors).astype(np.float32))
        if graph.constant(maker, 1) is not None:
            return
    smoothed, by = graph.fresh(f"{tensor}_smoothed"), graph.fresh(f"{tensor}_smoothing")
    graph.set_weight(by, (1 / factors).astype(np.float32))
    for node in products:
        node.input[0] = smoothed
    added = helper.make_node("Mul", [tensor, by], [smoothed], name=f"{smoothed}_node")
    graph.replace_nodes([*graph.nodes, added])


def _input_axis(node: "onnx.NodeProto") -> int:
    return 1 - weight_axis(node)
