"""Static int8: a graph with ranges of activations that are fixed by calibration.

It puts the pieces together: what each of them does is in the module of its name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from optimizer.data.splits import Split
from optimizer.quantization import ranges
from optimizer.quantization.calibration import Observed, observe
from optimizer.quantization.correction import correct_biases
from optimizer.quantization.equalization import equalize, pairs_of
from optimizer.quantization.graph import Graph
from optimizer.quantization.layout import Layout, channel_axis, lay_out
from optimizer.quantization.qdq import Arithmetic, quantized
from optimizer.quantization.ranges import Range
from optimizer.quantization.sensitivity import (
    Part,
    costs,
    kept_within,
    parts_of,
    ranked,
    sensitivities,
)
from optimizer.quantization.smoothing import smooth, smoothable


@dataclass(frozen=True)
class Settings:
    """`method` is one of `ranges.METHODS`, or "percentile" of `percent`; `equalize` is "none",
    "weights" or "activations"; `smoothing` is SmoothQuant's α, None for none."""

    arithmetic: Arithmetic
    method: str = "mse"
    percent: float = 100.0
    equalize: str = "none"
    smoothing: float | None = None
    kept_share: float = 0.0
    """Of multiply-accumulates that may stay in fp32: those of the most sensitive layers."""
    corrects_biases: bool = True


@dataclass(frozen=True, eq=False)
class Prepared:
    """A graph that computes what it did, with all that is known of it before a layer is chosen
    to stay in fp32."""

    graph: Graph
    layout: Layout
    """With every layer in 8 bits."""
    observed: Mapping[str, Observed]
    ranges: Mapping[str, Range]
    settings: Settings

    def quantized(self, kept: Collection[str] = ()) -> Graph:
        """In 8 bits, but for the layers named in `kept`."""
        graph, settings = self.graph.copy(), self.settings
        layout = lay_out(graph, kept)
        if settings.corrects_biases:
            correct_biases(
                graph,
                layout.layers,
                self.observed,
                pairs_saturate=settings.arithmetic.pairs_saturate,
                least_error=settings.arithmetic.least_error,
            )
        return quantized(graph, layout, self.ranges, settings.arithmetic)

    def ranking(self, split: Split) -> "Ranking":
        """How much each part would lose in 8 bits, and what layers cost in fp32."""
        parts = parts_of(self.graph, self.layout)
        errors = sensitivities(
            self.graph, self.layout, parts, self.ranges, self.settings.arithmetic, split
        )
        of_costs = costs(self.graph, self.layout, self.observed)
        return Ranking(self.layout.layers, of_costs, parts, errors)


@dataclass(frozen=True)
class Ranking:
    """Layers by name, in the order of the graph, with the cost of each; and the parts that are in
    8 bits together, with the error of each."""

    layers: tuple[str, ...]
    costs: tuple[float, ...]
    parts: tuple[Part, ...]
    errors: tuple[float, ...]

    def within(self, share: float) -> tuple[str, ...]:
        """The layers to keep where `share` of the multiply-accumulates may stay in fp32."""
        kept = kept_within(self.parts, self.errors, self.costs, share)
        return tuple(self.layers[index] for index in kept)

    def first(self, n: int) -> tuple[str, ...]:
        """The layers of the `n` parts that are most worth keeping, in the order of the graph."""
        order = ranked(self.parts, self.errors, self.costs)[:n]
        kept = {layer for index in order for layer in self.parts[index].layers}
        return tuple(self.layers[index] for index in sorted(kept))


def prepare(graph: Graph, split: Split, settings: Settings) -> Prepared:
    """Equalize, smooth and calibrate; the given graph stays as it is. Raises CalibrationFailed."""
    graph = graph.copy()
    if settings.equalize != "none":
        pairs = pairs_of(graph)
        tensors = dict.fromkeys((pair.tensor for pair in pairs), 1)
        equalize(graph, pairs, observe(graph, tensors, split), settings.equalize)
    graph = smoothed(graph, split, settings.smoothing)
    layout = lay_out(graph)
    observed = observe(graph, axes_of(graph, layout), split)
    return Prepared(graph, layout, observed, choose_ranges(observed, layout, settings), settings)


def smoothed(graph: Graph, split: Split, alpha: float | None) -> Graph:
    """A graph that computes the same with smoothed activations; the same graph for no α. Raises
    CalibrationFailed."""
    if alpha is None:
        return graph
    graph = graph.copy()
    smooth(graph, observe(graph, dict.fromkeys(smoothable(graph), -1), split), alpha)
    return graph


def quantize_static(graph: Graph, split: Split, settings: Settings) -> tuple[Graph, int]:
    """The graph in 8 bits, and how many layers of it stay in fp32. Raises CalibrationFailed."""
    prepared = prepare(graph, split, settings)
    kept: tuple[str, ...] = ()
    if settings.kept_share > 0:
        kept = prepared.ranking(split).within(settings.kept_share)
    return prepared.quantized(kept), len(kept)


def axes_of(graph: Graph, layout: Layout) -> dict[str, int]:
    """The tensors whose ranges the layout needs, with the axis that their channels are on."""
    axes = dict.fromkeys(layout.tensors.values(), 1)
    for name in layout.layers:
        node = graph.node(name)
        axes[node.input[0]] = channel_axis(node)
    return axes


def choose_ranges(
    observed: Mapping[str, Observed], layout: Layout, settings: Settings
) -> dict[str, Range]:
    """By the method, for each tensor that a range is taken from."""
    found = {}
    for name in dict.fromkeys(layout.tensors.values()):
        histogram = observed[name].histogram
        if settings.method == "percentile":
            found[name] = ranges.percentile(histogram, settings.percent)
        else:
            found[name] = ranges.METHODS[settings.method](histogram)
    return found
