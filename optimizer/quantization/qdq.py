"""QDQ: a graph in 8 bits, as QuantizeLinear and DequantizeLinear around what computes in them.

Activations have one scale a tensor, weights one a channel (Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"). An operator that
stays in fp32 takes a tensor in fp32 wherever it exists so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization import weights as weight_math
from optimizer.quantization.graph import Floats, Graph, attribute, renamed
from optimizer.quantization.layout import Layout, cut_behind, weight_axis
from optimizer.quantization.ranges import N_LEVELS, Range

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Levels:
    """Of an activation: `scale` × (level − `zero`), with 256 levels from the type's smallest."""

    scale: float
    zero: int
    signed: bool

    @property
    def dtype(self) -> type[np.uint8] | type[np.int8]:
        return np.int8 if self.signed else np.uint8

    @property
    def starts_at_zero(self) -> bool:
        """Whether the smallest level stands for zero, so that it rectifies."""
        return self.zero == (-N_LEVELS // 2 if self.signed else 0)


@dataclass(frozen=True)
class Arithmetic:
    """How the processor wants it."""

    signed: bool
    """Activations; weights always are."""
    pairs_saturate: bool
    least_error: bool
    """Of weights: clip the largest where that makes the squared error less."""


def levels_of(span: Range, signed: bool) -> Levels:
    """256 levels over the range, one of them zero."""
    scale = float(np.float32(span.step))
    scale = max(scale, float(np.finfo(np.float32).tiny))
    zero = int(np.clip(round(-span.low / scale), 0, N_LEVELS - 1))
    return Levels(scale, zero - (N_LEVELS // 2 if signed else 0), signed)


def quantized(
    graph: Graph,
    layout: Layout,
    ranges: Mapping[str, Range],
    arithmetic: Arithmetic,
) -> Graph:
    """The graph in 8 bits as laid out; `ranges` has those that the layout's tensors take theirs
    from. The given graph stays as it is."""
    writer = _Writer(graph.copy(), layout, ranges, arithmetic)
    return writer.write()


class _Writer:
    def __init__(
        self, graph: Graph, layout: Layout, ranges: Mapping[str, Range], arithmetic: Arithmetic
    ) -> None:
        self._graph = graph
        self._layout = layout
        self._arithmetic = arithmetic
        self._levels = {
            tensor: levels_of(ranges[source], arithmetic.signed)
            for tensor, source in layout.tensors.items()
        }
        self._added: list[onnx.NodeProto] = []
        self._dropped: set[str] = set()

    def write(self) -> Graph:
        graph = self._graph
        for name in self._layout.layers:
            self._quantize_weights(graph.node(name))
        for name in (*self._layout.layers, *self._layout.others):
            self._drop_cut(graph.node(name))
        for tensor in self._layout.tensors:
            self._quantize_tensor(tensor)
        kept = [node for node in graph.nodes if node.name not in self._dropped]
        graph.replace_nodes([*kept, *self._added])
        graph.drop_unused()
        return graph

    def _quantize_weights(self, node: "onnx.NodeProto") -> None:
        graph, axis = self._graph, weight_axis(node)
        weights = graph.weight(node.input[1])
        input_scale = self._levels[node.input[0]].scale
        bias = graph.constant(node, 2)
        if bias is not None:
            channels = np.zeros(weights.shape[axis], np.float32)
            bias = np.ascontiguousarray(channels + bias.reshape(-1))
        smallest = None if bias is None else weight_math.smallest_scales(bias, input_scale)
        found = weight_math.quantize(
            weights,
            axis,
            pairs_saturate=self._arithmetic.pairs_saturate,
            least_error=self._arithmetic.least_error,
            smallest=smallest,
        )
        node.input[1] = self._stored(node.input[1], found.values, found.scales, axis)
        if bias is not None:
            values = weight_math.quantize_bias(bias, input_scale, found.scales)
            scales = (np.float64(input_scale) * found.scales).astype(np.float32)
            node.input[2] = self._stored(node.input[2], values, scales, 0)

    def _stored(
        self,
        name: str,
        values: NDArray[np.int8] | NDArray[np.int32],
        scales: Floats,
        axis: int,
    ) -> str:
        """Store the values, to be dequantized; the name of what that gives."""
        from onnx import helper

        graph = self._graph
        stored, scale = graph.fresh(f"{name}_quantized"), graph.fresh(f"{name}_scale")
        zero = graph.fresh(f"{name}_zero_point")
        restored = graph.fresh(f"{name}_DequantizeLinear_Output")
        graph.set_weight(stored, values)
        graph.set_weight(scale, scales)
        graph.set_weight(zero, np.zeros(len(scales), values.dtype))
        self._added.append(
            helper.make_node(
                "DequantizeLinear",
                [stored, scale, zero],
                [restored],
                name=f"{restored}_node",
                axis=axis,
            )
        )
        return restored

    def _drop_cut(self, node: "onnx.NodeProto") -> None:
        """Remove the rectifier behind the node where the levels of its result do the same."""
        cut = cut_behind(self._graph, node)
        if cut is None or cut.output[0] not in self._layout.tensors:
            return
        result = cut.output[0]
        # What takes the rectified tensor in fp32 still needs it rectified.
        only_levels = result in self._layout.made or self._only_in_levels(result)
        if self._levels[result].starts_at_zero and only_levels:
            node.output[0] = result
            self._dropped.add(cut.name)

    def _only_in_levels(self, tensor: str) -> bool:
        computing = {*self._layout.layers, *self._layout.others}
        users = self._graph.users(tensor)
        return tensor not in self._graph.outputs and all(one.name in computing for one in users)

    def _quantize_tensor(self, tensor: str) -> None:
        from onnx import helper

        graph = self._graph
        source, restored = tensor, graph.fresh(f"{tensor}_DequantizeLinear_Output")
        stored = graph.fresh(f"{tensor}_quantized")
        computing = {*self._layout.layers, *self._layout.others}
        everyone = tensor in self._layout.made
        for user in graph.users(tensor):
            if user.name not in self._dropped and (everyone or user.name in computing):
                renamed(user, {tensor: restored})
        if everyone and tensor in graph.outputs:
            source, restored = self._behind_output(tensor, restored)
        levels = self._levels[tensor]
        scale, zero = graph.fresh(f"{tensor}_scale"), graph.fresh(f"{tensor}_zero_point")
        graph.set_weight(scale, np.array(levels.scale, np.float32))
        graph.set_weight(zero, np.array(levels.zero, levels.dtype))
        quantize, restore = f"{stored}_node", f"{restored}_node"
        self._added += [
            helper.make_node("QuantizeLinear", [source, scale, zero], [stored], name=quantize),
            helper.make_node("DequantizeLinear", [stored, scale, zero], [restored], name=restore),
        ]

    def _behind_output(self, tensor: str, restored: str) -> tuple[str, str]:
        """An output of the graph keeps its name: the tensor itself gets another."""
        graph = self._graph
        inner = graph.fresh(f"{tensor}_inner")
        for node in graph.nodes:
            for index, name in enumerate(node.output):
                if name == tensor and node.name not in self._dropped:
                    node.output[index] = inner
            renamed(node, {restored: tensor})
        return inner, tensor


def groups_of(node: "onnx.NodeProto") -> int:
    """Of a layer: 1 but for grouped convolutions."""
    return int(attribute(node, "group", 1)) if node.op_type == "Conv" else 1
