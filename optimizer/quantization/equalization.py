"""Equalization: channels between two layers scaled to what 8 bits need, without changing what the
network computes.

A positive factor passes a rectifier, so what the first layer's weights are divided by the second's
can be multiplied with (Nagel et al. 2019, "Data-free quantization through weight equalization and
bias correction", section 4.1). By "weights" is theirs: the two layers' weights of each channel get
the same range, which is what scales per tensor want. By "activations" is for weights with a scale
for each output channel, to which only the activations between the layers still have one in common.

A Clip has an upper bound, which no factor passes: channels that calibration saw at the bound stay
as they are, and others are kept away from it. For values beyond what calibration saw the function
can differ there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization.calibration import Observed
from optimizer.quantization.graph import Graph
from optimizer.quantization.layout import cut_behind, is_layer, weight_axis
from optimizer.quantization.qdq import groups_of

if TYPE_CHECKING:
    import onnx

_MAX_ROUNDS = 20
_SETTLED = 1e-3
"""Relative change of a factor below which the rounds end."""
_HEADROOM = 1.25
"""Of a Clip's bound over what calibration saw."""
_AT_BOUND = 0.999
_MAX_FACTOR = 1e3
"""Of a channel in a round, either way: dead channels have nothing to equalize."""


@dataclass(frozen=True)
class Pair:
    """Two layers, by name, with nothing but a rectifier between; `tensor` is what the second
    takes, `bound` that of a Clip (else infinite)."""

    first: str
    second: str
    tensor: str
    bound: float


def pairs_of(graph: Graph) -> tuple[Pair, ...]:
    """All pairs of convolutions, or of Gemm, of which nobody else sees the tensor between."""
    found = []
    for node in graph.nodes:
        if not is_layer(graph, node) or node.op_type == "MatMul":
            continue
        cut = cut_behind(graph, node)
        tensor = (cut or node).output[0]
        second = graph.sole_user(tensor)
        if second is None or second.op_type != node.op_type or not is_layer(graph, second):
            continue
        is_depthwise = groups_of(second) == graph.weight(second.input[1]).shape[0]
        if groups_of(second) == 1 or is_depthwise:
            found.append(Pair(node.name, second.name, tensor, _bound(graph, cut)))
    return tuple(found)


def equalize(
    graph: Graph, pairs: Sequence[Pair], observed: Mapping[str, Observed], by: str
) -> None:
    """Scale the channels of the pairs in place. `observed` has the pairs' tensors; `by` is
    "weights" or "activations"."""
    highest = {pair.tensor: observed[pair.tensor].highest.copy() for pair in pairs}
    largest = {pair.tensor: observed[pair.tensor].largest.copy() for pair in pairs}
    for _ in range(_MAX_ROUNDS if by == "weights" else 1):
        change = 0.0
        for pair in pairs:
            first, second = graph.node(pair.first), graph.node(pair.second)
            if by == "weights":
                factors = _by_weights(graph, first, second)
            else:
                factors = _by_activations(graph, second, largest[pair.tensor])
            factors = _passing(factors, highest[pair.tensor], pair.bound)
            _scale(graph, first, second, factors)
            highest[pair.tensor] /= factors
            largest[pair.tensor] /= factors
            change = max(change, float(np.abs(np.log(factors)).max(initial=0.0)))
        if change < _SETTLED:
            return


def _by_weights(
    graph: Graph, first: "onnx.NodeProto", second: "onnx.NodeProto"
) -> NDArray[np.float64]:
    """√(range of the first / range of the second), [channels]: equation 11."""
    return _ratio(_outgoing(graph, first), _incoming(graph, second), 0.5)


def _by_activations(
    graph: Graph, second: "onnx.NodeProto", largest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Channels of a depthwise convolution have scales of their own, so activations alone count;
    any other shares the difficulty between activations and weights, as SmoothQuant does."""
    if groups_of(second) > 1:
        return _ratio(largest, np.full_like(largest, largest.max(initial=0.0)), 1.0)
    incoming = _incoming(graph, second)
    factors = _ratio(largest, incoming, 0.5)
    # Only differences between channels matter: the largest activation stays where it is.
    top = int(np.argmax(largest / factors)) if len(largest) else 0
    reference = (largest / factors)[top] / largest.max(initial=1e-30) if len(largest) else 1.0
    return np.asarray(factors * max(reference, 1e-30))


def _ratio(
    above: NDArray[np.float64], below: NDArray[np.float64], power: float
) -> NDArray[np.float64]:
    """1 where one of the two is zero."""
    usable = (above > 0) & (below > 0)
    ratio = np.divide(above, below, out=np.ones_like(above), where=usable)
    return np.asarray(np.clip(ratio**power, 1 / _MAX_FACTOR, _MAX_FACTOR))


def _passing(
    factors: NDArray[np.float64], highest: NDArray[np.float64], bound: float
) -> NDArray[np.float64]:
    """The factors as far as the rectifier lets them pass."""
    if np.isinf(bound):
        return factors
    least = np.minimum(1.0, _HEADROOM * np.maximum(highest, 0.0) / bound)
    return np.where(highest >= _AT_BOUND * bound, 1.0, np.maximum(factors, least))


def _scale(
    graph: Graph,
    first: "onnx.NodeProto",
    second: "onnx.NodeProto",
    factors: NDArray[np.float64],
) -> None:
    one = graph.weight(first.input[1])
    graph.own_weight(first, 1, _along(one, weight_axis(first), 1 / factors))
    bias = graph.constant(first, 2)
    if bias is not None:
        graph.own_weight(first, 2, (bias.reshape(-1) / factors).astype(np.float32))
    two = graph.weight(second.input[1])
    graph.own_weight(second, 1, _along(two, _input_axis(second), factors))


def _along(
    weights: NDArray[np.float32], axis: int, factors: NDArray[np.float64]
) -> NDArray[np.float32]:
    shape = [1] * weights.ndim
    shape[axis] = -1
    return (weights * factors.reshape(shape)).astype(np.float32)


def _outgoing(graph: Graph, node: "onnx.NodeProto") -> NDArray[np.float64]:
    return _largest(graph.weight(node.input[1]), weight_axis(node))


def _incoming(graph: Graph, node: "onnx.NodeProto") -> NDArray[np.float64]:
    return _largest(graph.weight(node.input[1]), _input_axis(node))


def _input_axis(node: "onnx.NodeProto") -> int:
    """Of weights; a depthwise convolution's input channels are its output channels."""
    return weight_axis(node) if groups_of(node) > 1 else 1 - weight_axis(node)


def _largest(weights: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    others = tuple(one for one in range(weights.ndim) if one != axis)
    return np.asarray(np.abs(weights).max(axis=others).astype(np.float64))


def _bound(graph: Graph, cut: "onnx.NodeProto | None") -> float:
    if cut is None or cut.op_type != "Clip":
        return np.inf
    high = graph.constant(cut, 2)
    if high is not None:
        return float(high)
    given = len(cut.input) > 2 and cut.input[2]
    return 0.0 if given else np.inf  # a bound that is computed: nothing passes
