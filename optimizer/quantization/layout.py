"""Layout: which operators of a graph compute in 8 bits, and which tensors between them are kept
in 8 bits for it.

Layers are convolutions and matrix products with stored weights. What lies between two of them
joins in where it has 8-bit kernels or only moves values, so that activations aren't converted
back and forth; what follows no 8-bit tensor stays as it was. It decides nothing about numbers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimizer.quantization.graph import Graph, attribute

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "Gemm", "MatMul")
_JOINING = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu")
"""With 8-bit kernels of their own, which take any scale in and out."""
_MOVING = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad",
           "Identity")  # fmt: skip
"""Only move values: what they give has the range of what they take."""
_CUT = ("Relu", "Clip")
"""Activations that a range of levels can do by itself."""


@dataclass(frozen=True)
class Layout:
    """`tensors` are those in 8 bits, each with the tensor that its range is taken from."""

    layers: tuple[str, ...]
    """Names of the nodes, in the order of the graph."""
    others: tuple[str, ...]
    tensors: Mapping[str, str]
    made: frozenset[str]
    """Tensors that an 8-bit operator gives: nobody can have them in fp32."""


def layers_of(graph: Graph) -> "list[onnx.NodeProto]":
    """The nodes that can compute in 8 bits with stored weights, in the order of the graph."""
    return [node for node in graph.nodes if is_layer(graph, node)]


def is_layer(graph: Graph, node: "onnx.NodeProto") -> bool:
    if node.op_type not in LAYERS or node.domain or len(node.input) < 2:
        return False
    x, weight = node.input[:2]
    if graph.is_weight(x) or not graph.is_weight(weight):
        return False
    if len(node.input) > 2 and node.input[2] and not graph.is_weight(node.input[2]):
        return False
    if node.op_type == "Gemm":
        bias = graph.constant(node, 2)
        per_channel = bias is None or bias.size in (
            1,
            graph.weight(weight).shape[weight_axis(node)],
        )
        plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
        return per_channel and plain and not attribute(node, "transA", 0)
    return node.op_type == "Conv" or graph.weight(weight).ndim == 2


def weight_axis(node: "onnx.NodeProto") -> int:
    """The axis of a layer's weights that its output channels are on."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def channel_axis(node: "onnx.NodeProto") -> int:
    """The axis of a layer's input and output that channels are on."""
    return 1 if node.op_type == "Conv" else -1


def lay_out(graph: Graph, kept: Collection[str] = ()) -> Layout:
    """The layout with the layers named in `kept` in fp32."""
    tensors: dict[str, str] = {}
    made: set[str] = set()
    layers, others = [], []
    for node in graph.nodes:
        if is_layer(graph, node):
            if node.name not in kept:
                layers.append(node.name)
                tensors.setdefault(node.input[0], node.input[0])
                if node.op_type == "Conv":  # which has no kernel from 8 bits to fp32
                    made.add(_gives(graph, node, tensors))
        elif node.op_type in _MOVING and node.input[0] in made and len(node.output) == 1:
            others.append(node.name)
            tensors[node.output[0]] = tensors[node.input[0]]
            made.add(node.output[0])
        elif _joins(graph, node, made):
            others.append(node.name)
            for name in node.input:
                tensors.setdefault(name, name)
            made.add(_gives(graph, node, tensors))
    return Layout(tuple(layers), tuple(others), tensors, frozenset(made))


def cut_behind(graph: Graph, node: "onnx.NodeProto") -> "onnx.NodeProto | None":
    """The rectifier (Relu, or Clip from zero) that alone takes what the node gives."""
    user = graph.sole_user(node.output[0])
    if user is None or user.op_type not in _CUT or user.input[0] != node.output[0]:
        return None
    if user.op_type == "Clip":
        low = graph.constant(user, 1)
        if low is None or float(low) != 0:
            return None
    return user


def _gives(graph: Graph, node: "onnx.NodeProto", tensors: dict[str, str]) -> str:
    """Note the tensor in which the node's result is first needed: behind its rectifier."""
    cut = cut_behind(graph, node)
    name: str = (cut or node).output[0]
    tensors[name] = name
    return name


def _joins(graph: Graph, node: "onnx.NodeProto", made: Collection[str]) -> bool:
    """All it takes are activations, of which one is in 8 bits already."""
    return (
        node.op_type in _JOINING
        and not node.domain
        and any(name in made for name in node.input)
        and not any(graph.is_weight(name) for name in node.input)
    )
