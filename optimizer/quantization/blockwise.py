"""Blockwise: weights alone in 4 bits, with a scale for each block of inputs of each output.

For products whose weights are so many that reading them is the work. ONNX Runtime multiplies them
packed (MatMulNBits), with activations rounded to 8 bits block by block as they come; other engines
have to know that operator. Level 8 stands for zero, and the largest value of a block is at an end
of the levels, as in llama.cpp's Q4_0; the scale is the one with the least squared error around it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization.graph import Floats, Graph
from optimizer.quantization.layout import layers_of, weight_axis

if TYPE_CHECKING:
    import onnx

DOMAIN = "com.microsoft"
BLOCK = 32
"""Inputs that share a scale: what the kernels of ONNX Runtime are fastest with."""
MIN_WEIGHTS = 2**16
"""Of a layer that is worth it."""
_ZERO = 8
_SHARES = np.linspace(1.0, 0.7, 31)
_INT8 = 4
"""MatMulNBits' accuracy level: activations in 8 bits."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """`packed` [outputs, blocks, BLOCK / 2] has two levels a byte, the earlier in the lower bits;
    a level stands for (level − 8) × its block's scale."""

    packed: NDArray[np.uint8]
    scales: Floats
    """[outputs, blocks]."""

    def restored(self, n_inputs: int) -> Floats:
        """The weights that they stand for, [inputs, outputs]."""
        levels = np.stack([self.packed & 15, self.packed >> 4], axis=-1).astype(np.float32) - _ZERO
        levels = levels.reshape(*self.scales.shape, BLOCK) * self.scales[..., None]
        return np.ascontiguousarray(levels.reshape(len(levels), -1)[:, :n_inputs].T)


def to_blocks(weights: Floats) -> Blocks:
    """Of weights [inputs, outputs]. Raises ValueError for weights that aren't finite."""
    if not np.isfinite(weights).all():
        raise ValueError("the weights have values that are NaN or infinite")
    n_inputs, n_outputs = weights.shape
    n_blocks = -(-n_inputs // BLOCK)
    padded = np.zeros((n_outputs, n_blocks * BLOCK), np.float32)
    padded[:, :n_inputs] = weights.T
    rows = padded.reshape(n_outputs, n_blocks, BLOCK)
    scales = _best_scales(rows)
    levels = (_levels(rows, scales) + _ZERO).astype(np.uint8)
    packed = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return Blocks(np.ascontiguousarray(packed), scales)


def blockwise_layers(graph: Graph) -> tuple[str, ...]:
    """Names of the layers that are large enough, in the order of the graph."""
    return tuple(
        node.name
        for node in layers_of(graph)
        if node.op_type != "Conv" and graph.weight(node.input[1]).size >= MIN_WEIGHTS
    )


def quantize_blockwise(graph: Graph) -> Graph:
    """The graph with the weights of its large matrix products in 4 bits."""
    from onnx import helper

    graph = graph.copy()
    added: list[onnx.NodeProto] = []
    names = blockwise_layers(graph)
    for name in names:
        added += _product(graph, graph.node(name))
    kept = [node for node in graph.nodes if node.name not in names]
    if all(one.domain != DOMAIN for one in graph.model.opset_import):
        graph.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    graph.replace_nodes([*kept, *added])
    graph.drop_unused()
    return graph


def _product(graph: Graph, node: "onnx.NodeProto") -> "list[onnx.NodeProto]":
    """What takes the node's place, under its name."""
    from onnx import helper

    weights, stored = graph.weight(node.input[1]), node.input[1]
    if weight_axis(node) == 0:
        weights = weights.T
    blocks = to_blocks(weights)
    packed, scales = graph.fresh(f"{stored}_quantized"), graph.fresh(f"{stored}_scale")
    graph.set_weight(packed, blocks.packed)
    graph.set_weight(scales, blocks.scales.reshape(-1))
    bias = graph.constant(node, 2)
    result = node.output[0]
    product = result if bias is None else graph.fresh(f"{result}_product")
    found = [
        helper.make_node(
            "MatMulNBits",
            [node.input[0], packed, scales],
            [product],
            name=node.name,
            domain=DOMAIN,
            K=weights.shape[0],
            N=weights.shape[1],
            bits=4,
            block_size=BLOCK,
            accuracy_level=_INT8,
        )
    ]
    if bias is not None:
        found.append(
            helper.make_node("Add", [product, node.input[2]], [result], name=f"{result}_node")
        )
    return found


def _best_scales(rows: Floats) -> Floats:
    """With the largest value at level 0 or 15, whichever is its side: 8 levels below zero, 7
    above; the side is the scale's sign."""
    index = np.abs(rows).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(rows, index, axis=-1)[..., 0]
    full = np.where(largest == 0, 1.0, -largest / _ZERO).astype(np.float32)
    best, least = full.copy(), np.full(full.shape, np.inf, np.float32)
    for share in _SHARES:
        scales = full * np.float32(share)
        errors = (_levels(rows, scales) * scales[..., None] - rows) ** 2
        total = errors.sum(axis=-1)
        better = total < least
        best[better], least[better] = scales[better], total[better]
    return best


def _levels(rows: Floats, scales: Floats) -> Floats:
    return np.clip(np.round(rows / scales[..., None]), -_ZERO, _ZERO - 1)
