"""Sensitivity: by how much the network's outputs change when one layer alone computes in 8 bits,
and which layers to keep in fp32 for it.

All layers are simulated in one graph with a switch for each, so that the cost is one run of the
network a layer, without building or loading anything anew (the ranking is that of Wu et al. 2020,
"Integer quantization for deep learning inference", section 5.2). Which accuracy is enough is for
others to say.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.quantization.calibration import CalibrationFailed, Observed, Session
from optimizer.quantization.graph import Graph, renamed
from optimizer.quantization.layout import Layout, cut_behind, weight_axis
from optimizer.quantization.qdq import Arithmetic, levels_of
from optimizer.quantization.ranges import Range
from optimizer.quantization.weights import quantize

N_SAMPLES = 32
_BATCH_SIZE = 8
MAX_RUNS = 96
"""Layers of a deeper network are switched in groups of neighbours."""


def sensitivities(
    graph: Graph,
    layout: Layout,
    ranges: Mapping[str, Range],
    arithmetic: Arithmetic,
    split: Split,
) -> tuple[float, ...]:
    """For each layer of the layout the mean squared error of the outputs when it computes in 8
    bits and nothing else does, relative to the outputs' variance.

    Raises CalibrationFailed for no samples.
    """
    if not len(split):
        raise CalibrationFailed("got no calibration samples, want at least one")
    n_layers = len(layout.layers)
    groups = np.array_split(np.arange(n_layers), min(n_layers, MAX_RUNS)) if n_layers else []
    switched = _switched(graph, layout, ranges, arithmetic)
    session = Session(switched, graph.outputs)
    batches = _batches(split, graph.inputs)
    off = np.zeros(n_layers, bool)
    reference = [session.run({**batch, _SWITCHES: off}) for batch in batches]
    variances = _variances(reference)
    errors = np.zeros(n_layers)
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


def ranked(errors: Sequence[float], of_costs: Sequence[float]) -> tuple[int, ...]:
    """The layers by the error that each multiply-accumulate in fp32 would save, most first."""
    gains = [error / max(cost, 1.0) for error, cost in zip(errors, of_costs, strict=True)]
    return tuple(sorted(range(len(gains)), key=lambda index: (-gains[index], index)))


def kept_within(
    errors: Sequence[float], of_costs: Sequence[float], share: float
) -> tuple[int, ...]:
    """The layers to keep in fp32 where `share` of the multiply-accumulates may stay there: by
    rank, without those that no longer fit. In the order of the graph."""
    left = share * sum(of_costs) * (1 + 1e-9)
    kept = []
    for index in ranked(errors, of_costs):
        if of_costs[index] <= left and errors[index] > 0:
            kept.append(index)
            left -= of_costs[index]
    return tuple(sorted(kept))


def fewest(n: int, is_enough: Callable[[int], bool], max_evaluations: int) -> int:
    """The smallest number of layers, 0 to n, in fp32 that is enough, as far as so many calls of
    `is_enough` tell; n, all of them, is enough without asking.

    Halves the distance on a logarithmic scale, since as a rule few layers do the harm. Where
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
    graph: Graph, layout: Layout, ranges: Mapping[str, Range], arithmetic: Arithmetic
) -> Graph:
    """The graph with an input more: for each layer whether it computes in 8 bits."""
    import onnx
    from onnx import helper

    copy = graph.copy()
    added: list[onnx.NodeProto] = []

    def node(operator: str, *inputs: str) -> str:
        output = copy.fresh(f"switched_{operator}")
        added.append(helper.make_node(operator, list(inputs), [output], name=f"{output}_node"))
        return output

    def rounded(tensor: str, source: str) -> str:
        levels = levels_of(ranges[source], arithmetic.signed)
        scale, zero = copy.fresh("switched_scale"), copy.fresh("switched_zero")
        copy.set_weight(scale, np.array(levels.scale, np.float32))
        copy.set_weight(zero, np.array(levels.zero, levels.dtype))
        return node("DequantizeLinear", node("QuantizeLinear", tensor, scale, zero), scale, zero)

    for index, name in enumerate(layout.layers):
        layer, before = copy.node(name), graph.node(name)
        position = copy.fresh("switched_index")
        copy.set_weight(position, np.array(index, np.int64))
        switch = node("Gather", _SWITCHES, position)
        found = quantize(
            copy.weight(layer.input[1]),
            weight_axis(layer),
            pairs_saturate=arithmetic.pairs_saturate,
            least_error=arithmetic.least_error,
        )
        weight = copy.fresh("switched_weight")
        copy.set_weight(weight, found.restored())
        layer.input[1] = node("Where", switch, weight, layer.input[1])
        # What it takes may have a switch of its own already: layers come in order.
        taken, source = layer.input[0], layout.tensors[before.input[0]]
        layer.input[0] = node("Where", switch, rounded(taken, source), taken)
        result = (cut_behind(graph, before) or before).output[0]
        if result in layout.made and result not in copy.outputs:
            replaced = node("Where", switch, rounded(result, layout.tensors[result]), result)
            for user in graph.users(result):
                renamed(copy.node(user.name), {result: replaced})
    copy.replace_nodes([*copy.nodes, *added])
    switches = helper.make_tensor_value_info(_SWITCHES, onnx.TensorProto.BOOL, [len(layout.layers)])
    copy.model.graph.input.append(switches)
    return Graph(copy.model)


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
