"""Small ONNX networks for tests of quantization, built node by node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from optimizer.data.splits import Samples
from optimizer.quantization.graph import Graph

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Samples in memory."""

    inputs: Mapping[str, Array]
    name: str = "calibration"
    labels: None = None
    digest: str = "samples"

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def read(self, indices: Sequence[int] | Array | None = None) -> Samples:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        return Samples({name: array[chosen] for name, array in self.inputs.items()}, None, "")


@dataclass(eq=False)
class Network:
    """Adds nodes one behind the other; the input is `x`, the output the last node's."""

    shape: tuple[int | str, ...]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    last: str = "x"

    def add(self, operator: str, *inputs: str | Array, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self.nodes)}"
        names = []
        for index, one in enumerate(inputs):
            if isinstance(one, str):
                names.append(one)
            else:
                names.append(f"{name}.input{index}")
                self.weights[names[-1]] = one
        self.nodes.append(helper.make_node(operator, names, [f"{name}_out"], name, **attributes))
        self.last = f"{name}_out"
        return self.last

    def conv(self, weights: Array, bias: Array | None = None, **attributes: Any) -> str:
        given = (self.last, weights) if bias is None else (self.last, weights, bias)
        return self.add("Conv", *given, **attributes)

    def graph(self, opset: int = 18) -> Graph:
        return Graph(self.model(opset))

    def model(self, opset: int = 18) -> onnx.ModelProto:
        weights = [numpy_helper.from_array(np.asarray(w), n) for n, w in self.weights.items()]
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)],
            weights,
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(graph: Graph, inputs: Array) -> Array:
    """The first output, as ONNX Runtime computes it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph.to_bytes(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": inputs})[0])


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def residual_network(cut: str = "Relu", n_channels: int = 8) -> Network:
    """A convolution, a block with a residual sum, pooling and a linear layer: [n, 3, 8, 8]."""
    network = Network(("n", 3, 8, 8))

    def activation() -> str:
        if cut == "Clip":
            return network.add("Clip", network.last, np.float32(0), np.float32(6))
        return network.add(cut, network.last)

    n = n_channels
    network.conv(random(n, 3, 3, 3, scale=0.3), random(n, seed=1), pads=[1, 1, 1, 1])
    shortcut = activation()
    network.conv(random(n, 1, 3, 3, seed=2, scale=0.4), random(n, seed=3), pads=[1] * 4, group=n)
    activation()
    network.conv(random(n, n, 1, 1, seed=4, scale=0.4), random(n, seed=5))
    network.add("Add", network.last, shortcut)
    activation()
    network.add("GlobalAveragePool", network.last)
    network.add("Flatten", network.last)
    network.add("Gemm", network.last, random(4, n, seed=6), random(4, seed=7), transB=1)
    return network


def images(n: int = 16, seed: int = 9) -> Array:
    return random(n, 3, 8, 8, seed=seed)
