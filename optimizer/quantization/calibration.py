"""Calibration: what the tensors of a graph hold while it computes samples.

The graph runs in fp32, in batches as large as the memory bound allows, and nothing but statistics
is kept of what it computes: memory doesn't grow with the number of samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.quantization.graph import Graph
from optimizer.quantization.histogram import Histogram, NotFinite
from serve.machine import allowed_cores

MAX_BYTES = 256 * 2**20
"""Of activations at a time."""
MAX_BATCH_SIZE = 32


class CalibrationFailed(ValueError):
    """No samples, or a tensor of which no range can be made."""


@dataclass(eq=False)
class Observed:
    """What a float tensor held. Channels are along the axis that it was watched on."""

    histogram: Histogram = field(default_factory=Histogram)
    n_samples: int = 0
    n_values: int = 0
    largest: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Largest absolute value, [channels]."""
    highest: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Largest value, [channels]."""
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def means(self) -> NDArray[np.float64]:
        """Over samples and positions, [channels]."""
        return self._sums * (max(len(self._sums), 1) / max(self.n_values, 1))

    @property
    def size(self) -> float:
        """Values of one sample, on average."""
        return self.n_values / max(self.n_samples, 1)

    def add(self, values: NDArray[Any], axis: int) -> None:
        self.histogram.add(values)
        axis = axis % values.ndim if values.ndim else 0
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1) if values.ndim else None
        self.n_samples += len(values) if values.ndim else 1
        self.n_values += values.size
        if rows is None or not rows.size:
            return
        high, low = rows.max(axis=1).astype(float), rows.min(axis=1).astype(float)
        if len(self._sums) != len(rows):
            if len(self._sums):  # an axis that varies is no axis of channels
                return
            self._sums, self.largest = np.zeros(len(rows)), np.zeros(len(rows))
            self.highest = np.full(len(rows), -np.inf)
        self._sums += rows.sum(axis=1, dtype=np.float64)
        self.largest = np.maximum(self.largest, np.maximum(high, -low))
        self.highest = np.maximum(self.highest, high)


def observe(
    graph: Graph, axes: Mapping[str, int], split: Split, max_bytes: int = MAX_BYTES
) -> dict[str, Observed]:
    """Run the graph on all of the split and watch the tensors named, each along its axis of
    channels. Raises CalibrationFailed for no samples, and for a tensor with NaN or infinities."""
    if not len(split):
        raise CalibrationFailed("got no calibration samples, want at least one")
    found = {name: Observed() for name in axes}
    session = Session(graph, [*axes])
    for inputs in _batches(split, session, max_bytes):
        for name, values in zip(axes, session.run(inputs), strict=True):
            try:
                found[name].add(values, axes[name])
            except NotFinite as error:
                raise CalibrationFailed(
                    f"tensor {name!r} can't be calibrated: {error} in the fp32 model"
                ) from error
    return found


class Session:
    """The graph ready to run, giving the tensors named in place of its own outputs."""

    def __init__(self, graph: Graph, tensors: Sequence[str]) -> None:
        import onnx
        import onnxruntime

        self.given = set(graph.inputs)
        self._tensors = list(tensors)
        self._computed = [name for name in dict.fromkeys(tensors) if name not in self.given]
        # A session has to compute something, were it only inputs that are watched.
        self._computed = self._computed or graph.outputs
        copy = onnx.ModelProto()
        copy.CopyFrom(graph.model)
        declared = {one.name: one for one in graph.model.graph.output}
        del copy.graph.output[:]
        for name in self._computed:
            # Types that are left open are inferred on load.
            copy.graph.output.append(declared.get(name, onnx.ValueInfoProto(name=name)))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = allowed_cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        outputs = self._session.run(self._computed, dict(inputs))
        found = dict(zip(self._computed, outputs, strict=True))
        return [found[name] if name in found else inputs[name] for name in self._tensors]


def _batches(
    split: Split, session: Session, max_bytes: int
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """All samples, as many at once as a trial of the first one says that memory allows."""
    first = _inputs(split, session, 0, 1)
    n_bytes = sum(values.nbytes for values in session.run(first))
    size = max(1, min(MAX_BATCH_SIZE, max_bytes // max(n_bytes, 1)))
    for start in range(0, len(split), size):
        yield _inputs(split, session, start, min(start + size, len(split)))


def _inputs(split: Split, session: Session, start: int, end: int) -> dict[str, NDArray[Any]]:
    inputs = split.read(np.arange(start, end)).inputs
    return {name: values for name, values in inputs.items() if name in session.given}
