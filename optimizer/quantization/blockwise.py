"""Blockwise: weights alone in 4 or 8 bits, with a scale for each block of inputs of each output.

For products whose weights are so many that reading them is the work. ONNX Runtime multiplies them
packed (MatMulNBits), with activations rounded to 8 bits block by block as they come; other engines
have to know that operator. The middle level stands for zero, and the largest value of a block is
at an end of the levels, as in llama.cpp's Q4_0; the scale is the one with the least squared error
around it.
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
BITS = (4, 8)
"""That the kernels know."""
_SHARES = np.linspace(1.0, 0.7, 31)
_INT8 = 4
"""MatMulNBits' accuracy level: activations in 8 bits. The levels below leave them in fp32, for
which there is no fast kernel of 8-bit weights."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """`packed` [outputs, blocks, BLOCK · bits / 8] has a level a byte, or of 4 bits two, the
    earlier in the lower bits; a level stands for (level − 2^(bits − 1)) × its block's scale."""

    packed: NDArray[np.uint8]
    scales: Floats
    """[outputs, blocks]."""
    bits: int

    def restored(self, n_inputs: int) -> Floats:
        """The weights that they stand for, [inputs, outputs]."""
        levels = self.packed
        if self.bits == 4:
            levels = np.stack([levels & 15, levels >> 4], axis=-1)
        levels = levels.reshape(*self.scales.shape, BLOCK).astype(np.float32)
        values = (levels - np.float32(2 ** (self.bits - 1))) * self.scales[..., None]
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, :n_inputs].T)


def to_blocks(weights: Floats, bits: int) -> Blocks:
    """Of weights [inputs, outputs], in 4 or 8 bits. Raises ValueError for weights that aren't
    finite, and for other bits."""
    if bits not in BITS:
        raise ValueError(f"got {bits} bits, want {' or '.join(map(str, BITS))}")
    if not np.isfinite(weights).all():
        raise ValueError("the weights have values that are NaN or infinite")
    n_inputs, n_outputs = weights.shape
    n_blocks = -(-n_inputs // BLOCK)
    padded = np.zeros((n_outputs, n_blocks * BLOCK), np.float32)
    padded[:, :n_inputs] = weights.T
    rows = padded.reshape(n_outputs, n_blocks, BLOCK)
    zero = 2 ** (bits - 1)
    scales = _best_scales(rows, zero)
    levels = (_levels(rows, scales, zero) + zero).astype(np.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return Blocks(np.ascontiguousarray(levels), scales, bits)


def blockwise_layers(graph: Graph) -> tuple[str, ...]:
    """Names of the layers that are large enough, in the order of the graph."""
    return tuple(
        node.name
        for node in layers_of(graph)
        if node.op_type != "Conv" and graph.weight(node.input[1]).size >= MIN_WEIGHTS
    )


def quantize_blockwise(graph: Graph, bits: int) -> Graph:
    """The graph with the weights of its large matrix products in 4 or 8 bits."""
    from onnx import helper

    graph = graph.copy()
    added: list[onnx.NodeProto] = []
    names = blockwise_layers(graph)
    for name in names:
        added += _product(graph, graph.node(name), bits)
    kept = [node for node in graph.nodes if node.name not in names]
    if all(one.domain != DOMAIN for one in graph.model.opset_import):
        graph.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    graph.replace_nodes([*kept, *added])
    graph.drop_unused()
    return graph


def _product(graph: Graph, node: "onnx.NodeProto", bits: int) -> "list[onnx.NodeProto]":
    """What takes the node's place, under its name."""
    from onnx import helper

    weights, stored = graph.weight(node.input[1]), node.input[1]
    if weight_axis(node) == 0:
        weights = weights.T
    blocks = to_blocks(weights, bits)
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
            bits=bits,
            block_size=BLOCK,
            accuracy_level=_INT8,
        )
    ]
    if bias is not None:
        found.append(
            helper.make_node("Add", [product, node.input[2]], [result], name=f"{result}_node")
        )
    return found


def _best_scales(rows: Floats, zero: int) -> Floats:
    """With the largest value at the first or the last level, whichever is its side: there is one
    more below `zero` than above; the side is the scale's sign."""
    index = np.abs(rows).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(rows, index, axis=-1)[..., 0]
    full = np.where(largest == 0, 1.0, -largest / zero).astype(np.float32)
    best, least = full.copy(), np.full(full.shape, np.inf, np.float32)
    for share in _SHARES:
        scales = full * np.float32(share)
        errors = (_levels(rows, scales, zero) * scales[..., None] - rows) ** 2
        total = errors.sum(axis=-1)
        better = total < least
        best[better], least[better] = scales[better], total[better]
    return best


def _levels(rows: Floats, scales: Floats, zero: int) -> Floats:
    """Around zero, `-zero` to `zero - 1`."""
    return np.clip(np.round(rows / scales[..., None]), -zero, zero - 1)
