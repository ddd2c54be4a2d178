"""Sensitivity: by how much the network's outputs change when one part of it alone computes in
8 bits, and which layers to keep in fp32 for it.

A part is what stays in 8 bits or leaves them together: the tensors that 8-bit operators pass on to
each other, as all of a residual stream, with the weights of the layers that read them. Rating
layers alone, as Wu et al. 2020 do ("Integer quantization for deep learning inference", section
5.2), charges nobody with the rounding of a stream: a layer that leaves 8 bits reads what others
have rounded. All parts are simulated in one graph with a switch for each, so that the cost is one
run of the network a part, without building or loading anything anew. Which accuracy is enough is
for others to say.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.quantization.calibration import CalibrationFailed, Observed, Session
from optimizer.quantization.graph import Graph, renamed
from optimizer.quantization.layout import Layout, cut_behind, weight_axis
from optimizer.quantization.qdq import Arithmetic, levels_of
from optimizer.quantization.ranges import Range
from optimizer.quantization.weights import quantize

if TYPE_CHECKING:
    import onnx

N_SAMPLES = 32
_BATCH_SIZE = 8
MAX_RUNS = 96
"""Parts of a deeper network are switched in groups of neighbours."""


@dataclass(frozen=True)
class Part:
    """`tensors` that are in 8 bits together, and the layers that read or make them, as indices
    into the layout's."""

    tensors: frozenset[str]
    layers: frozenset[int]


def parts_of(graph: Graph, layout: Layout) -> tuple[Part, ...]:
    """Each of the layout's tensors in one part, in the order in which the graph comes by them."""
    heads = {tensor: tensor for tensor in layout.tensors}

    def head(tensor: str) -> str:
        while heads[tensor] != tensor:
            tensor = heads[tensor]
        return tensor

    for name in layout.others:
        node = graph.node(name)
        joined = [*node.input, _result(graph, node)]
        known = [head(tensor) for tensor in joined if tensor in heads]
        heads.update(dict.fromkeys(known, known[0]))
    tensors: dict[str, set[str]] = {}
    for tensor in layout.tensors:
        tensors.setdefault(head(tensor), set()).add(tensor)
    layers: dict[str, set[int]] = {one: set() for one in tensors}
    for index, name in enumerate(layout.layers):
        node = graph.node(name)
        layers[head(node.input[0])].add(index)
        result = _result(graph, node)
        if result in layout.made:
            layers[head(result)].add(index)
    return tuple(Part(frozenset(tensors[one]), frozenset(layers[one])) for one in tensors)


def sensitivities(
    graph: Graph,
    layout: Layout,
    parts: Sequence[Part],
    ranges: Mapping[str, Range],
    arithmetic: Arithmetic,
    split: Split,
) -> tuple[float, ...]:
    """For each part the mean squared error of the outputs when it is in 8 bits and nothing else is,
    relative to the outputs' variance.

    Raises CalibrationFailed for no samples.
    """
    if not len(split):
        raise CalibrationFailed("got no calibration samples, want at least one")
    n_parts = len(parts)
    groups = np.array_split(np.arange(n_parts), min(n_parts, MAX_RUNS)) if n_parts else []
    switched = _switched(graph, layout, parts, ranges, arithmetic)
    session = Session(switched, graph.outputs)
    batches = _batches(split, graph.inputs)
    off = np.zeros(n_parts, bool)
    reference = [session.run({**batch, _SWITCHES: off}) for batch in batches]
    variances = _variances(reference)
    errors = np.zeros(n_parts)
    for group in groups:
        switches = off.copy()
        switches[group] = True
        error = 0.0
        for batch, wanted in zip(batches, reference, strict=True):
            given = session.run({**batch, _SWITCHES: switches})
            error += _error(given, wanted, variances)
        errors[group] = error / (len(batches) * len(group))
    return tuple(errors.tolist())


def costs(graph: Graph, layout: Layout, observed: Mapping[str, Observed]) -> tuple[float, ...]:
    """Multiply-accumulates of each layer for one sample."""
    found = []
    for name in layout.layers:
        node = graph.node(name)
        weights = graph.weight(node.input[1])
        if node.op_type == "Conv":
            cut = cut_behind(graph, node)
            n_outputs = observed[(cut or node).output[0]].size
            n_rows = n_outputs / weights.shape[0]
        else:
            n_rows = observed[node.input[0]].size / weights.shape[1 - weight_axis(node)]
        found.append(n_rows * weights.size)
    return tuple(found)


def ranked(
    parts: Sequence[Part], errors: Sequence[float], of_costs: Sequence[float]
) -> tuple[int, ...]:
    """The parts by the error that each multiply-accumulate in fp32 would save, most first; what
    layers cost that are in fp32 for an earlier part isn't counted again."""
    left = list(range(len(parts)))
    order: list[int] = []
    kept: set[int] = set()
    while left:
        best = max(left, key=lambda one: (_gain(parts[one], errors[one], of_costs, kept), -one))
        left.remove(best)
        order.append(best)
        kept |= parts[best].layers
    return tuple(order)


def kept_within(
    parts: Sequence[Part], errors: Sequence[float], of_costs: Sequence[float], share: float
) -> tuple[int, ...]:
    """The layers to keep in fp32 where `share` of the multiply-accumulates may stay there: those of
    the parts by rank, without parts that no longer fit. In the order of the graph."""
    left = share * sum(of_costs) * (1 + 1e-9)
    kept: set[int] = set()
    for index in ranked(parts, errors, of_costs):
        new = parts[index].layers - kept
        cost = sum(of_costs[layer] for layer in new)
        if cost <= left and errors[index] > 0:
            kept |= new
            left -= cost
    return tuple(sorted(kept))


def _gain(part: Part, error: float, of_costs: Sequence[float], kept: Collection[int]) -> float:
    return error / max(1.0, sum(of_costs[layer] for layer in part.layers if layer not in kept))


def fewest(n: int, is_enough: Callable[[int], bool], max_evaluations: int) -> int:
    """The smallest number of parts, 0 to n, in fp32 that is enough, as far as so many calls of
    `is_enough` tell; n, all of them, is enough without asking.

    Halves the distance on a logarithmic scale, since as a rule few parts do the harm. Where
    more isn't always better the answer is one that was enough, but maybe not the least.
    """
    if max_evaluations < 1:
        raise ValueError(f"max_evaluations: got {max_evaluations}, want at least 1")
    if n == 0 or is_enough(0):
        return 0
    too_few, enough = 0, n
    for _ in range(max_evaluations - 1):
        if enough - too_few <= 1:
            break
        middle = round(math.sqrt((too_few + 1) * (enough + 1))) - 1
        middle = min(max(middle, too_few + 1), enough - 1)
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    return enough


_SWITCHES = "trimserve_switches"


def _switched(
    graph: Graph,
    layout: Layout,
    parts: Sequence[Part],
    ranges: Mapping[str, Range],
    arithmetic: Arithmetic,
) -> Graph:
    """The graph with an input more: for each part whether it is in 8 bits."""
    import onnx
    from onnx import helper

    copy = graph.copy()
    added: list[onnx.NodeProto] = []
    switches: dict[str, str] = {}

    def node(operator: str, *inputs: str) -> str:
        output = copy.fresh(f"switched_{operator}")
        added.append(helper.make_node(operator, list(inputs), [output], name=f"{output}_node"))
        return output

    def rounded(tensor: str) -> str:
        levels = levels_of(ranges[layout.tensors[tensor]], arithmetic.signed)
        scale, zero = copy.fresh("switched_scale"), copy.fresh("switched_zero")
        copy.set_weight(scale, np.array(levels.scale, np.float32))
        copy.set_weight(zero, np.array(levels.zero, levels.dtype))
        return node("DequantizeLinear", node("QuantizeLinear", tensor, scale, zero), scale, zero)

    for index, part in enumerate(parts):
        position = copy.fresh("switched_index")
        copy.set_weight(position, np.array(index, np.int64))
        switches |= dict.fromkeys(part.tensors, node("Gather", _SWITCHES, position))
    for name in layout.layers:
        layer = copy.node(name)
        found = quantize(
            copy.weight(layer.input[1]),
            weight_axis(layer),
            pairs_saturate=arithmetic.pairs_saturate,
            least_error=arithmetic.least_error,
        )
        weight = copy.fresh("switched_weight")
        copy.set_weight(weight, found.restored())
        layer.input[1] = node("Where", switches[layer.input[0]], weight, layer.input[1])
    computing = {*layout.layers, *layout.others}
    for tensor in layout.tensors:
        given = node("Where", switches[tensor], rounded(tensor), tensor)
        for user in graph.users(tensor):
            if tensor in layout.made or user.name in computing:
                renamed(copy.node(user.name), {tensor: given})
    copy.replace_nodes([*copy.nodes, *added])
    wanted = helper.make_tensor_value_info(_SWITCHES, onnx.TensorProto.BOOL, [len(parts)])
    copy.model.graph.input.append(wanted)
    return Graph(copy.model)


def _result(graph: Graph, node: "onnx.NodeProto") -> str:
    """The tensor in which what the node gives is first needed: behind its rectifier."""
    found: str = (cut_behind(graph, node) or node).output[0]
    return found


def _batches(split: Split, names: Sequence[str]) -> list[dict[str, NDArray[Any]]]:
    """Samples from all over the split."""
    n = min(N_SAMPLES, len(split))
    indices = np.linspace(0, len(split) - 1, n).astype(int)
    found = []
    for start in range(0, n, _BATCH_SIZE):
        inputs = split.read(indices[start : start + _BATCH_SIZE]).inputs
        found.append({name: inputs[name] for name in names})
    return found


def _variances(reference: Sequence[Sequence[NDArray[Any]]]) -> list[float]:
    """Of each output over all samples."""
    outputs = zip(*reference, strict=True)
    return [float(np.concatenate([one.ravel() for one in output]).var()) for output in outputs]


def _error(
    given: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]], variances: Sequence[float]
) -> float:
    """Mean squared error relative to the variance, over all outputs of floats."""
    errors = [
        float(np.mean((got.astype(np.float64) - want) ** 2)) / max(variance, 1e-12)
        for got, want, variance in zip(given, wanted, variances, strict=True)
        if np.issubdtype(want.dtype, np.floating)
    ]
    return sum(errors)
