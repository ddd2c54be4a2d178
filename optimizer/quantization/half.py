"""Half precision: an fp32 graph in fp16, but for the operators whose values fp16 can't hold.

The conversion is `onnxruntime.transformers.float16`'s, which puts casts around what stays in fp32
and leaves inputs and outputs as they are. What stays is decided here, by calibration: fp16 ends at
65,504, where fp32 and bf16 go on to 3e38, and below 6e-8 nothing is left of a value. It helps on
GPUs alone: no CPU kernel of ONNX Runtime computes in it (docs/experiments.md has OpenVINO's).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.quantization.calibration import observe
from optimizer.quantization.graph import Graph, attribute, renamed

if TYPE_CHECKING:
    import onnx

LARGEST, SMALLEST = 65504.0, 6e-8
"""Of fp16's finite values, and of what it doesn't take for zero."""
HEADROOM = 4.0
"""What other samples than those of calibration may be larger by."""


def kept_in_fp32(graph: Graph, split: Split) -> tuple[str, ...]:
    """Names of the nodes that fp16 would break, in the graph's order: those that take or give a
    value above fp16's largest by `HEADROOM`, in any of the split's samples, or a stored one that it
    would make infinite or, of a single number such as an epsilon, zero.

    Raises CalibrationFailed for no samples, and for a tensor with NaN or infinities.
    """
    computed = _computed_floats(graph)
    observed = observe(graph, dict.fromkeys([*_float_inputs(graph), *computed], -1), split)
    too_large = {
        name
        for name, one in observed.items()
        if max(-one.histogram.low, one.histogram.high) * HEADROOM > LARGEST
    }
    too_large |= {name for name in _weights(graph) if _is_lost(graph.weight(name))}
    return tuple(
        node.name for node in graph.nodes if too_large.intersection([*node.input, *node.output])
    )


def to_half(graph: Graph, kept: tuple[str, ...]) -> Graph:
    """The graph in fp16, but for the nodes of these names. Raises ValueError where all are kept."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if len(kept) == len(graph.nodes):
        raise ValueError("fp16 can't hold what any of the operators takes or gives")
    converted = convert_float_to_float16(
        graph.copy().model, keep_io_types=True, node_block_list=list(kept)
    )
    half = Graph(converted)
    _join(half)
    return half


def _join(graph: Graph) -> None:
    """Take out the casts to fp16 and back between two operators that stay in fp32, by which the
    converter would lose what they are kept for."""
    import onnx

    def is_cast(node: "onnx.NodeProto | None", to: int) -> bool:
        return node is not None and node.op_type == "Cast" and attribute(node, "to", 0) == to

    joined = {}
    for node in graph.nodes:
        before = graph.maker(node.input[0]) if len(node.input) else None
        if is_cast(node, onnx.TensorProto.FLOAT) and is_cast(before, onnx.TensorProto.FLOAT16):
            assert before is not None
            joined[node.output[0]] = before.input[0]
    kept = [node for node in graph.nodes if not set(joined).intersection(node.output)]
    # An output of the graph keeps its name, which its maker is given.
    outputs = {joined[name]: name for name in graph.outputs if name in joined}
    for node in kept:
        renamed(node, joined)
        renamed(node, outputs)
        for index, name in enumerate(node.output):
            node.output[index] = outputs.get(name, name)
    taken = {name for node in kept for name in node.input} | set(graph.outputs)
    graph.replace_nodes([node for node in kept if taken.intersection(node.output)])
    graph.drop_unused()


def _is_lost(values: NDArray[Any]) -> bool:
    if not np.issubdtype(values.dtype, np.floating) or not values.size:
        return False
    sizes = np.abs(values)
    return bool(sizes.max() > LARGEST) or bool(values.size == 1 and 0 < sizes.max() < SMALLEST)


def _weights(graph: Graph) -> list[str]:
    return [one.name for one in graph.model.graph.initializer]


def _float_inputs(graph: Graph) -> list[str]:
    given = {one.name: one for one in graph.model.graph.input}
    return [name for name in graph.inputs if _is_float(given[name])]


def _computed_floats(graph: Graph) -> list[str]:
    """What nodes give that is fp32, by ONNX's inference of types."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(graph.model).graph
    known = {one.name for one in [*inferred.value_info, *inferred.output] if _is_float(one)}
    return [name for node in graph.nodes for name in node.output if name in known]


def _is_float(value: "onnx.ValueInfoProto") -> bool:
    import onnx

    return bool(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT)
