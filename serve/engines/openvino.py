"""OpenVINO: executes an IR (`model.xml`) or ONNX file on the CPU.

OpenVINO re-plans a dynamic shape whenever it changes (milliseconds), so one model is compiled
for each of `EngineSpec.batch_sizes` (and each bucket of lengths where the model pads); a batch is
padded to the next of them, or cut into pieces of the largest. Without sizes shapes stay dynamic.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping
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

# Declared precision -> the hint; without it OpenVINO takes bf16 on its own where the CPU has it.
INFERENCE_PRECISIONS: dict[str, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
OPTIONS: dict[str, tuple[str, ...]] = {"hint": ("LATENCY", "THROUGHPUT")}


# Batch size (0 without a batch dimension) and bucket of lengths (0 without padding).
Shape = tuple[int, int]


class OpenVinoEngine:
    """One inference request for each compiled shape. OpenVINO releases the GIL."""

    def __init__(
        self, signature: Signature, compiled: Mapping[Shape, Any], padding: Padding | None
    ) -> None:
        self.signature = signature
        self._sizes = sorted({size for size, _ in compiled})
        self._length_axis = padding.inputs[0] if padding is not None else None
        self._requests = {shape: model.create_infer_request() for shape, model in compiled.items()}
        self._output_names = [spec.name for spec in signature.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (0, 0) in self._requests:
            return self._run_padded((0, 0), inputs, 0)
        n_rows = len(next(iter(inputs.values())))
        largest = self._sizes[-1]
        if n_rows <= largest:
            return self._run_padded(self._shape_for(inputs, n_rows), inputs, n_rows)
        pieces = [
            self.run({name: array[start : start + largest] for name, array in inputs.items()})
            for start in range(0, n_rows, largest)
        ]
        return {n: np.concatenate([piece[n] for piece in pieces]) for n in self._output_names}

    def close(self) -> None:
        self._requests.clear()

    def _shape_for(self, inputs: Mapping[str, Array], n_rows: int) -> Shape:
        size = next(size for size in self._sizes if size >= n_rows)
        axis = self._length_axis
        return size, inputs[axis.tensor].shape[axis.axis] if axis is not None else 0

    def _run_padded(
        self, shape: Shape, inputs: Mapping[str, Array], n_rows: int
    ) -> dict[str, Array]:
        request, size = self._requests[shape], shape[0]
        feeds = {name: _padded(array, size, n_rows) for name, array in inputs.items()}
        results = request.infer(feeds, share_inputs=True)
        return {
            name: np.array(results[index][:n_rows] if size else results[index])
            for index, name in enumerate(self._output_names)
        }


def load(directory: Path, spec: EngineSpec, padding: Padding | None = None) -> OpenVinoEngine:
    """Compile the model for every batch size and bucket. Raises ArtifactInvalid for a broken model
    or an unknown option."""
    path = directory / spec.file
    return OpenVinoEngine(*_compiled(path, spec, padding, counters=False), padding)


def profile(
    directory: Path, spec: EngineSpec, inputs: Mapping[str, Array], n_runs: int
) -> tuple[KernelTime, ...]:
    """The executed kernels from OpenVINO's performance counters; see `EngineModule.profile`."""
    engine = OpenVinoEngine(*_compiled(directory / spec.file, spec, None, counters=True), None)
    is_dynamic = (0, 0) in engine._requests
    n_rows = 0 if is_dynamic else len(next(iter(inputs.values())))
    request = engine._requests[(0, 0) if is_dynamic else engine._shape_for(inputs, n_rows)]
    durations: dict[tuple[str, str, str], float] = {}
    for _ in range(n_runs):
        engine.run(inputs)
        for info in request.get_profiling_info():
            if info.status == openvino.ProfilingInfo.Status.EXECUTED:
                key = (info.node_name, info.node_type, info.exec_type)
                seconds = info.real_time.total_seconds()
                durations[key] = durations.get(key, 0.0) + seconds
    return tuple(_kernel_times(durations, n_runs))


def _compiled(
    path: Path, spec: EngineSpec, padding: Padding | None, counters: bool
) -> tuple[Signature, dict[Shape, Any]]:
    config = _config(path, spec, counters)
    core = openvino.Core()
    try:
        model = core.read_model(path)
        signature = _signature(model)
        if not signature.batched or not spec.batch_sizes:
            return signature, {(0, 0): core.compile_model(model, "CPU", config)}
        shapes = itertools.product(spec.batch_sizes, padding.buckets if padding else (0,))
        return signature, {
            shape: core.compile_model(_with_shape(model, shape, padding), "CPU", config)
            for shape in shapes
        }
    except RuntimeError as error:
        raise ArtifactInvalid(str(path), f"OpenVINO can't load it: {error}") from error


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
    return {
        "PERFORMANCE_HINT": spec.options.get("hint", "LATENCY"),
        "INFERENCE_NUM_THREADS": spec.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": INFERENCE_PRECISIONS[spec.precision],
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


def _padded(array: Array, size: int, n_rows: int) -> Array:
    if n_rows == size:
        return np.asarray(array, order="C")  # which leaves scalars without an axis
    padded = np.zeros((size, *array.shape[1:]), array.dtype)
    padded[:n_rows] = array
    return padded


def _kernel_times(
    durations: Mapping[tuple[str, str, str], float], n_runs: int
) -> Iterator[KernelTime]:
    for (node, operator, kernel), total_s in durations.items():
        suffix = kernel.rsplit("_", 1)[-1].lower()
        precision = {"i8": "int8", "u8": "int8", "f32": "fp32", "f16": "fp16"}.get(suffix, suffix)
        yield KernelTime(node, operator, kernel, precision, total_s / n_runs)
