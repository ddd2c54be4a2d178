"""OpenVINO: executes an IR (`model.xml`) or ONNX file on the CPU.

OpenVINO re-plans a dynamic shape whenever it changes (milliseconds), so one model is compiled
for each of `EngineSpec.batch_sizes` (and each bucket of lengths where the model pads); a batch is
padded to the next of them, or cut into pieces of the largest. Without sizes shapes stay dynamic.
"""

import itertools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serve.engines import EngineSpec, KernelTime, Signature
from serve.errors import ArtifactInvalid
from serve.padding import Padding
from serve.tensor import DATATYPES, Array, TensorSpec

# Importing OpenVINO starts a thread that reports the use to its makers, unless that part is
# missing: a server calls nobody.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

_log = logging.getLogger(__name__)
# Declared precision -> the hint; without it OpenVINO takes bf16 on its own where the CPU has it.
INFERENCE_PRECISIONS: dict[str, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32",
                                          "int4": "f32"}  # fmt: skip
# "streams" "threads": each thread takes its part of the batch, instead of all sharing each kernel.
# "rest": what operators of an int8 or int4 model compute in that aren't quantized.
OPTIONS: dict[str, tuple[str, ...]] = {
    "hint": ("LATENCY", "THROUGHPUT"),
    "streams": ("one", "threads"),
    "rest": ("fp32", "bf16"),
}
_WITH_REST = ("int8", "int4")


# Batch size (0 without a batch dimension) and bucket of lengths (0 without padding).
Shape = tuple[int, int]


class OpenVinoEngine:
    """Inference requests for each compiled shape, one for each stream. OpenVINO releases the GIL.

    With several streams a batch is cut into as many parts, which run at once.
    """

    def __init__(
        self,
        signature: Signature,
        compiled: Mapping[Shape, Any],
        padding: Padding | None,
        n_streams: int = 1,
    ) -> None:
        self.signature = signature
        self._sizes = sorted({size for size, _ in compiled})
        self._length_axis = padding.inputs[0] if padding is not None else None
        self._requests = {
            shape: [model.create_infer_request() for _ in range(n_streams)]
            for shape, model in compiled.items()
        }
        self._n_streams = n_streams
        self._output_names = [spec.name for spec in signature.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (0, 0) in self._requests:
            return self._run_at_once([inputs], is_dynamic=True)[0]
        n_rows = len(next(iter(inputs.values())))
        size = min(math.ceil(n_rows / min(self._n_streams, n_rows)), self._sizes[-1])
        parts = [
            {name: array[start : start + size] for name, array in inputs.items()}
            for start in range(0, n_rows, size)
        ]
        results = [
            result
            for start in range(0, len(parts), self._n_streams)
            for result in self._run_at_once(parts[start : start + self._n_streams])
        ]
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([one[name] for one in results]) for name in self._output_names}

    def close(self) -> None:
        self._requests.clear()

    def request_for(self, inputs: Mapping[str, Array]) -> Any:
        """The request that runs a batch of these shapes, where there is one stream."""
        shape = self._shape_for(inputs) if (0, 0) not in self._requests else (0, 0)
        return self._requests[shape][0]

    def _shape_for(self, inputs: Mapping[str, Array]) -> Shape:
        n_rows = len(next(iter(inputs.values())))
        size = next(size for size in self._sizes if size >= n_rows)
        axis = self._length_axis
        return size, inputs[axis.tensor].shape[axis.axis] if axis is not None else 0

    def _run_at_once(
        self, parts: Sequence[Mapping[str, Array]], is_dynamic: bool = False
    ) -> list[dict[str, Array]]:
        """Parts of a batch, no more than there are streams."""
        running = []
        for stream, part in enumerate(parts):
            shape = (0, 0) if is_dynamic else self._shape_for(part)
            request, size = self._requests[shape][stream], shape[0]
            feeds = {name: _padded(array, size) for name, array in part.items()}
            if len(parts) == 1:
                request.infer(feeds, share_inputs=True)
            else:
                request.start_async(feeds, share_inputs=True)
            running.append((request, size, len(next(iter(part.values()))) if size else 0))
        return [self._results(*one) for one in running]

    def _results(self, request: Any, size: int, n_rows: int) -> dict[str, Array]:
        request.wait()
        return {
            name: np.array(request.get_output_tensor(index).data[:n_rows] if size
                           else request.get_output_tensor(index).data)
            for index, name in enumerate(self._output_names)
        }  # fmt: skip


def load(directory: Path, spec: EngineSpec, padding: Padding | None = None) -> OpenVinoEngine:
    """Compile the model for every batch size and bucket. Raises ArtifactInvalid for a broken model
    or an unknown option."""
    path = directory / spec.file
    compiled = _compiled(path, spec, padding, counters=False)
    return OpenVinoEngine(*compiled, padding, _n_streams(spec))


def profile(
    directory: Path, spec: EngineSpec, inputs: Mapping[str, Array], n_runs: int
) -> tuple[KernelTime, ...]:
    """The executed kernels from OpenVINO's performance counters; see `EngineModule.profile`."""
    spec = replace(spec, options={**spec.options, "streams": "one"})
    engine = OpenVinoEngine(*_compiled(directory / spec.file, spec, None, counters=True), None)
    request = engine.request_for(inputs)
    sources = _sources(request.get_compiled_model())
    durations: dict[tuple[str, str, str], float] = {}
    for _ in range(n_runs):
        engine.run(inputs)
        for info in request.get_profiling_info():
            if info.status == openvino.ProfilingInfo.Status.EXECUTED:
                key = (info.node_name, info.node_type, info.exec_type)
                seconds = info.real_time.total_seconds()
                durations[key] = durations.get(key, 0.0) + seconds
    return tuple(_kernel_times(durations, sources, n_runs))


def _sources(compiled: Any) -> dict[str, tuple[str, ...]]:
    """Executed node → the nodes of the model that it computes, by the execution graph."""
    named = (
        (node.get_friendly_name(), node.get_rt_info()["originalLayersNames"].astype(str))
        for node in compiled.get_runtime_model().get_ordered_ops()
    )
    return {name: tuple(filter(None, names.split(","))) for name, names in named}


def _compiled(
    path: Path, spec: EngineSpec, padding: Padding | None, counters: bool
) -> tuple[Signature, dict[Shape, Any]]:
    config = _config(path, spec, counters)
    core = openvino.Core()
    try:
        model = core.read_model(path)
        signature = _signature(model)
        if not signature.batched or not spec.batch_sizes:
            return signature, {(0, 0): _compile(core, model, config, path)}
        shapes = itertools.product(spec.batch_sizes, padding.buckets if padding else (0,))
        return signature, {
            shape: _compile(core, _with_shape(model, shape, padding), config, path)
            for shape in shapes
        }
    except RuntimeError as error:
        raise ArtifactInvalid(str(path), f"OpenVINO can't load it: {error}") from error


def _compile(core: Any, model: Any, config: Mapping[str, Any], path: Path) -> Any:
    """Raises ArtifactInvalid where it would compute in less than fp32 unasked: OpenVINO takes
    bf16 on its own where the CPU has it. Where the CPU lacks bf16, it computes in fp32 instead:
    right, and slower than was measured elsewhere."""
    compiled = core.compile_model(model, "CPU", config)
    wanted = config["INFERENCE_PRECISION_HINT"]
    got = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if got != wanted and wanted == "f32":
        raise ArtifactInvalid(str(path), f"engine.precision: OpenVINO took {got}, want {wanted}")
    if got != wanted:
        _log.warning("%s: this processor computes in %s, not in %s", path.name, got, wanted)
    return compiled


def _n_streams(spec: EngineSpec) -> int:
    return spec.threads if spec.options.get("streams") == "threads" else 1


def _config(path: Path, spec: EngineSpec, counters: bool) -> dict[str, Any]:
    for name, value in spec.options.items():
        if name not in OPTIONS or value not in OPTIONS[name]:
            allowed = ", ".join(f"{key}: {values}" for key, values in OPTIONS.items())
            raise ArtifactInvalid(
                str(path), f"engine.options.{name}: got {value!r}, want one of {allowed}"
            )
    if spec.precision not in INFERENCE_PRECISIONS:
        raise ArtifactInvalid(
            str(path),
            f"engine.precision: got {spec.precision!r}, want one of "
            f"{', '.join(INFERENCE_PRECISIONS)}",
        )
    rest = spec.options.get("rest")
    if rest is not None and spec.precision not in _WITH_REST:
        raise ArtifactInvalid(
            str(path),
            f"engine.options.rest: got {rest!r} for the precision {spec.precision}, want it only "
            f"for {' and '.join(_WITH_REST)}",
        )
    precision = spec.precision if rest is None else str(rest)
    return {
        "PERFORMANCE_HINT": spec.options.get("hint", "LATENCY"),
        "INFERENCE_NUM_THREADS": spec.threads,
        "NUM_STREAMS": _n_streams(spec),
        "INFERENCE_PRECISION_HINT": INFERENCE_PRECISIONS[precision],
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": counters,
    }


def _with_shape(model: Any, shape: Shape, padding: Padding | None) -> Any:
    """The model with its batch dimension and, where it pads, its lengths fixed."""
    size, bucket = shape
    fixed = model.clone()
    axes = {one.tensor: one.axis for one in padding.inputs} if padding else {}
    shapes = {}
    for port in fixed.inputs:
        name = port.get_any_name()
        dimensions = [size, *list(port.partial_shape)[1:]]
        if name in axes:
            dimensions[axes[name]] = bucket
        shapes[name] = openvino.PartialShape(dimensions)
    fixed.reshape(shapes)
    return fixed


def _signature(model: Any) -> Signature:
    inputs = tuple(_tensor_spec(port) for port in model.inputs)
    outputs = tuple(_tensor_spec(port) for port in model.outputs)
    batched = all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))
    return Signature(inputs, outputs, batched)


def _tensor_spec(port: Any) -> TensorSpec:
    shape = tuple(-1 if size.is_dynamic else size.get_length() for size in port.partial_shape)
    datatype = DATATYPES.get(np.dtype(port.element_type.to_dtype()))
    if datatype is None:
        raise ArtifactInvalid(
            f"tensor {port.get_any_name()!r}",
            f"type {port.element_type}, want one of {', '.join(DATATYPES.values())}",
        )
    return TensorSpec(port.get_any_name(), datatype, shape)


def _padded(array: Array, size: int) -> Array:
    """To `size` rows; 0 leaves it as it is."""
    if not size or len(array) == size:
        return np.asarray(array, order="C")  # which leaves scalars without an axis
    padded = np.zeros((size, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded


def _kernel_times(
    durations: Mapping[tuple[str, str, str], float],
    sources: Mapping[str, tuple[str, ...]],
    n_runs: int,
) -> Iterator[KernelTime]:
    for (node, operator, kernel), total_s in durations.items():
        suffix = kernel.rsplit("_", 1)[-1].lower()
        precision = {"i8": "int8", "u8": "int8", "f32": "fp32", "f16": "fp16"}.get(suffix, suffix)
        of_model = sources.get(node, ())
        yield KernelTime(node, operator, kernel, precision, total_s / n_runs, of_model)
