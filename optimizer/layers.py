"""Layers: the heavy operators of two ONNX graphs side by side, with their times in an engine.

It reads graphs, not their weights, and an engine's own profile; which nodes an engine fused, it
can only tell by the names that the engine gives them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.kernels import is_heavy
from optimizer.result import Layer
from serve.engines import KernelTime

if TYPE_CHECKING:
    import onnx

_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger",
          "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits", "Attention",
          "MultiHeadAttention")  # fmt: skip
# Operators that engines fuse into the heavy one before them, so that a kernel bears their name.
_FUSED = ("Relu", "Clip", "Sigmoid", "Mul", "Add", "Tanh", "Gelu", "HardSwish", "HardSigmoid",
          "LeakyRelu", "BatchNormalization", "QuantizeLinear", "DequantizeLinear")  # fmt: skip
_MAX_FUSED = 12
"""Operators looked through behind a heavy one."""
# What engines and onnxruntime.quantization append to the names of nodes and weights.
_NODE_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_quant|/WithoutBiases.*|/DequantizationMultiply.*)$")
_WEIGHT_SUFFIX = re.compile(r"(_quantized|_DequantizeLinear_Output|_dequantized|_scaled)+$")
_PRECISIONS = {1: "fp32", 2: "int8", 3: "int8", 10: "fp16", 11: "fp64", 16: "bf16",
               21: "int4", 22: "int4"}  # fmt: skip
"""By the number of ONNX's TensorProto.DataType."""
_UNTOLD = "unknown"
"""As engines say it: of a layer without weights that no kernel was found for."""
_PREPARES = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Identity", "Cast")
_NUMBERED = re.compile(r"(val|onnx::\w+|[A-Za-z]+)?_?\d+|[\w.]*transpose[\w.]*")
"""Names of weights that say nothing of the layer."""


@dataclass(frozen=True)
class _Node:
    """A heavy operator. `aliases` are names that a kernel which computes it may have."""

    name: str
    key: str
    operator: str
    shape: tuple[int, ...]
    precision: str
    own: frozenset[str]
    fused: frozenset[str]


def layers_of(
    base_onnx: Path,
    variant_onnx: Path,
    base_kernels: Sequence[KernelTime],
    variant_kernels: Sequence[KernelTime],
) -> tuple[Layer, ...]:
    """The layers of the base in its order, then those that only the variant has.

    Layers are the same if their weights have the same name, or their nodes where the weights have
    none of their own. Pairs of QuantizeLinear and DequantizeLinear are seen through. The precision
    is the kernel's where the profile tells it, else that of the weights.
    """
    base, variant = _nodes(base_onnx), _nodes(variant_onnx)
    base_times, times = _times(base, base_kernels), _times(variant, variant_kernels)
    before, after = {node.key: node for node in base}, {node.key: node for node in variant}
    return tuple(
        _layer(before.get(key), after.get(key), base_times, times)
        for key in dict.fromkeys([*before, *after])
    )


def kernels_by_node(path: Path, kernels: Sequence[KernelTime]) -> dict[str, KernelTime]:
    """Heavy node of the ONNX graph → the kernel that computed it, as far as names tell."""
    return _times(_nodes(path), kernels)


def _layer(
    before: _Node | None,
    after: _Node | None,
    base_times: Mapping[str, KernelTime],
    times: Mapping[str, KernelTime],
) -> Layer:
    node = before or after
    assert node is not None
    base_time = base_times.get(before.name) if before else None
    time = times.get(after.name) if after else None
    return Layer(
        name=node.key,
        operator=node.operator,
        base_shape=before.shape if before else (),
        shape=after.shape if after else (),
        base_precision=_precision(before, base_time),
        precision=_precision(after, time),
        base_s=base_time.duration_s if base_time else None,
        seconds=time.duration_s if time else None,
    )


def _precision(node: _Node | None, time: KernelTime | None) -> str:
    if node is None:
        return ""
    return time.precision if time is not None and time.precision != _UNTOLD else node.precision


def _nodes(path: Path) -> list[_Node]:
    """The heavy operators in the order of the graph, each key once."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    reader = _Reader(graph)
    nodes: dict[str, _Node] = {}
    for index, node in enumerate(graph.node):
        if node.op_type in _HEAVY:
            name = node.name or f"{node.op_type}_{index}"
            weight = reader.weight(node)
            key = _key(weight.name) if weight is not None else ""
            # Weights that two layers share have one name: the nodes' own tell them apart.
            key = key if key and key not in nodes else name
            nodes[key] = reader.read(node, name, key, weight)
    return list(nodes.values())


class _Reader:
    """Looks things up in one graph."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self._weights = {one.name: one for one in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for tensor in node.input:
                self._users.setdefault(tensor, []).append(node)

    def read(
        self, node: "onnx.NodeProto", name: str, key: str, weight: "onnx.TensorProto | None"
    ) -> _Node:
        return _Node(
            name=name,
            key=key,
            operator=node.op_type,
            shape=tuple(weight.dims) if weight is not None else (),
            precision=_PRECISIONS.get(weight.data_type, _UNTOLD) if weight else _UNTOLD,
            own=frozenset({name, *node.output}),
            fused=frozenset(self._behind(node)),
        )

    def weight(self, node: "onnx.NodeProto") -> "onnx.TensorProto | None":
        """The first input that is stored, of two axes at least, seen through what prepares it."""
        for tensor in node.input:
            stored = self._stored(tensor)
            if stored is not None and len(stored.dims) > 1:
                return stored
        return None

    def _stored(self, tensor: str) -> "onnx.TensorProto | None":
        for _ in range(_MAX_FUSED):
            if tensor in self._weights:
                return self._weights[tensor]
            maker = self._makers.get(tensor)
            if maker is None or maker.op_type not in _PREPARES:
                return None
            tensor = maker.input[0]
        return None

    def _behind(self, node: "onnx.NodeProto") -> Iterator[str]:
        """Names of the operators after it, as far as an engine might fuse them, and of what they
        give."""
        for _ in range(_MAX_FUSED):
            users = self._users.get(node.output[0], [])
            if len(users) != 1 or users[0].op_type not in _FUSED:
                return
            node = users[0]
            yield from (node.name, *node.output)


def _key(weight: str) -> str:
    """The layer's name by that of its weight; empty where an exporter only numbered it."""
    name = _WEIGHT_SUFFIX.sub("", weight)
    return "" if _NUMBERED.fullmatch(name) else name.removesuffix(".weight")


def _times(nodes: Sequence[_Node], kernels: Sequence[KernelTime]) -> dict[str, KernelTime]:
    """By name of the node, the kernel that computes it.

    A kernel that bears a node's own name, or that of its output, is that node's. The others go
    by the names of what may be fused into it: the last such node that has none yet, since a sum
    is computed with the later of its terms.
    """
    found: dict[str, KernelTime] = {}
    left = []
    for kernel in kernels:
        if is_heavy(kernel.operator):
            name = _NODE_SUFFIX.sub("", kernel.node)
            named = {name, *kernel.sources}
            owner = next((node for node in nodes if not named.isdisjoint(node.own)), None)
            if owner is not None and owner.name not in found:
                found[owner.name] = kernel
            else:
                left.append((name, kernel))
    for name, kernel in left:
        for node in reversed(nodes):
            if node.name not in found and _bears(name, node):
                found[node.name] = kernel
                break
    return found


def _bears(name: str, node: _Node) -> bool:
    """Whether the kernel's name is that of a fused operator, or has the node's name as a part."""
    return name in node.fused or node.name in re.split(r"[\s+,&()]+", name)
