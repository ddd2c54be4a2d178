"""ONNX Runtime: executes `model.onnx` on the CPU, CUDA or TensorRT provider.

Batches of any size run as they are: the CPU provider plans per call and does not recompile for
a new batch size. The GPU's providers haven't been run yet by who wrote them: their tests skip
where there is no NVIDIA GPU.
"""

import contextlib
import ctypes
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from serve.engines import EngineSpec, KernelTime, Signature
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.padding import Padding
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
OPTIMIZATION_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# option name -> values allowed; anything else in EngineSpec.options is refused.
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "provider": tuple(PROVIDERS),
    "optimization": tuple(OPTIMIZATION_LEVELS),
    "arena": (True, False),
    "spinning": (True, False),
    "layout": ("blocked", "plain"),
    "memory_pattern": (True, False),
    "cuda_graph": (True, False),
}
# option -> the providers that have it; the others of OPTIONS are every provider's.
OPTIONS_OF: dict[str, tuple[str, ...]] = {"cuda_graph": ("cuda",)}
# ONNX Runtime's type -> OIP datatype.
DATATYPES: dict[str, str] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
BFLOAT16 = NUMPY_DTYPES["BF16"]
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16 of the ONNX format
# Kernels whose arithmetic is 8-bit whatever the types at their edges. MatMulNBits' is where the
# graph asks for it (accuracy level 4), as the optimizer's do; the profile doesn't tell.
INT8_OPERATORS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearSigmoid",
    }
)


class OnnxRuntimeEngine:
    """One session. ONNX Runtime releases the GIL while it runs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.signature = _signature(session)
        self._output_names = [output.name for output in self.signature.outputs]
        self._text = frozenset(
            spec.name
            for spec in (*self.signature.inputs, *self.signature.outputs)
            if spec.datatype == "BYTES"
        )
        tensors = (*self.signature.inputs, *self.signature.outputs)
        self._has_bfloat16 = any(spec.datatype == "BF16" for spec in tensors)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._text:
            inputs = {n: _decoded(n, a) if n in self._text else a for n, a in inputs.items()}
        run = self._run_values if self._has_bfloat16 else self._session.run
        outputs = dict(zip(self._output_names, run(self._output_names, inputs), strict=True))
        if self._text:
            outputs = {n: _encoded(a) if n in self._text else a for n, a in outputs.items()}
        return outputs

    def close(self) -> None:
        del self._session

    def _run_values(self, names: list[str], inputs: Mapping[str, Array]) -> list[Array]:
        """`session.run` by ONNX Runtime's own values: its numpy interface knows no bfloat16."""
        feeds = {name: _to_value(array) for name, array in inputs.items()}
        return [_from_value(value) for value in self._session.run_with_ort_values(names, feeds)]


class CudaGraphEngine(OnnxRuntimeEngine):
    """A session whose kernels are launched as one CUDA graph, recorded for each set of shapes at
    its first run. A graph reads and writes at the addresses that it was recorded with, so inputs
    are copied to buffers on the GPU that stay. Not yet run on a GPU."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        super().__init__(session)
        self._bound: dict[tuple[tuple[int, ...], ...], tuple[Any, dict[str, Any], Any]] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        shapes = tuple(inputs[spec.name].shape for spec in self.signature.inputs)
        if shapes not in self._bound:
            self._bound[shapes] = self._bind(inputs, len(self._bound) + 1)
        binding, buffers, options = self._bound[shapes]
        for name, buffer in buffers.items():
            buffer.update_inplace(np.asarray(inputs[name], order="C"))
        self._session.run_with_iobinding(binding, options)
        values = [np.array(value) for value in binding.copy_outputs_to_cpu()]
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        self._bound.clear()
        super().close()

    def _bind(
        self, inputs: Mapping[str, Array], graph_id: int
    ) -> tuple[Any, dict[str, Any], onnxruntime.RunOptions]:
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        buffers = {n: value(np.asarray(a, order="C"), "cuda", 0) for n, a in inputs.items()}
        binding = self._session.io_binding()
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        # Shapes of outputs are known from a run without a graph; their buffers stay from then on.
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")
        for name in self._output_names:
            binding.bind_output(name, "cuda")
        self._session.run_with_iobinding(binding, options)
        outputs = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, output in zip(self._output_names, outputs, strict=True):
            binding.bind_ortvalue_output(name, output)
        recorded = onnxruntime.RunOptions()
        recorded.add_run_config_entry("gpu_graph_id", str(graph_id))
        return binding, buffers, recorded


def load(directory: Path, spec: EngineSpec, padding: Padding | None = None) -> OnnxRuntimeEngine:
    """Load a session of `spec.threads` threads, which takes any length. Raises ArtifactInvalid for
    a broken model, an unknown option, or a provider that this build or machine lacks."""
    del padding
    path = directory / spec.file
    session = _session(path, spec, _session_options(path, spec))
    if spec.options.get("cuda_graph"):
        return CudaGraphEngine(session)
    return OnnxRuntimeEngine(session)


def profile(
    directory: Path, spec: EngineSpec, inputs: Mapping[str, Array], n_runs: int
) -> tuple[KernelTime, ...]:
    """The executed kernels from ONNX Runtime's own profiler; see `EngineModule.profile`."""
    path = directory / spec.file
    options = _session_options(path, spec)
    with tempfile.TemporaryDirectory() as scratch:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        engine = OnnxRuntimeEngine(_session(path, spec, options))
        for _ in range(n_runs):
            engine.run(inputs)
        events = json.loads(Path(engine._session.end_profiling()).read_text())
    return tuple(_kernel_times(events, n_runs))


def _session(
    path: Path, spec: EngineSpec, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    provider = str(spec.options.get("provider", "cpu"))
    wanted = PROVIDERS[provider]
    for name, holders in OPTIONS_OF.items():
        if spec.options.get(name) and provider not in holders:
            raise ArtifactInvalid(
                str(path), f"engine.options.{name}: want provider {', '.join(holders)} with it"
            )
    if wanted not in onnxruntime.get_available_providers():
        raise ArtifactInvalid(
            str(path),
            f"engine.options.provider: {provider!r} needs {wanted}, this build of ONNX Runtime "
            f"has {', '.join(onnxruntime.get_available_providers())}",
        )
    if provider != "cpu":
        _load_cuda()
    providers = {wanted: _provider_options(provider, spec), PROVIDERS["cpu"]: {}}
    # Convolutions in blocks of channels are what its fast fp32 kernels work on.
    off = ["NchwcTransformer"] if spec.options.get("layout") == "plain" else []
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers.items()), disabled_optimizers=off
        )
    except Exception as error:
        raise ArtifactInvalid(str(path), f"ONNX Runtime can't load it: {error}") from error
    if session.get_providers()[0] != wanted:
        raise ArtifactInvalid(str(path), f"ONNX Runtime fell back to {session.get_providers()}")
    return session


def _load_cuda() -> None:
    """CUDA's and cuDNN's libraries, from the packages that pip installed or from where the system
    has them. ONNX Runtime says on stdout what it can't find, which is no place for it here."""
    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls(directory="")


def _provider_options(provider: str, spec: EngineSpec) -> dict[str, str]:
    """As ONNX Runtime spells them: text."""
    if provider == "cuda":
        return {"enable_cuda_graph": "1" if spec.options.get("cuda_graph") else "0"}
    if provider == "tensorrt":
        return {
            "trt_fp16_enable": "1" if spec.precision == "fp16" else "0",
            "trt_int8_enable": "1" if spec.precision == "int8" else "0",
        }
    return {}


def _session_options(path: Path, spec: EngineSpec) -> onnxruntime.SessionOptions:
    for name, value in spec.options.items():
        if name not in OPTIONS:
            raise ArtifactInvalid(
                str(path), f"engine.options.{name}: unknown, want one of {', '.join(OPTIONS)}"
            )
        if value not in OPTIONS[name]:
            raise ArtifactInvalid(
                str(path), f"engine.options.{name}: got {value!r}, want one of {OPTIONS[name]}"
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = OPTIMIZATION_LEVELS[
        str(spec.options.get("optimization", "all"))
    ]
    options.enable_cpu_mem_arena = bool(spec.options.get("arena", True))
    options.enable_mem_pattern = bool(spec.options.get("memory_pattern", True))
    # Spinning threads win microseconds and burn the cores that the front end needs.
    spinning = "1" if spec.options.get("spinning", False) else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    options.log_severity_level = 3
    return options


def _signature(session: onnxruntime.InferenceSession) -> Signature:
    inputs = tuple(_tensor_spec(node) for node in session.get_inputs())
    outputs = tuple(_tensor_spec(node) for node in session.get_outputs())
    batched = bool(inputs) and all(
        spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs)
    )
    nodes = (*session.get_inputs(), *session.get_outputs())
    return Signature(inputs, outputs, batched and _first_axis_is_shared(nodes))


def _first_axis_is_shared(nodes: Sequence[Any]) -> bool:
    """Whether all first axes may be the same one, the batch: two names are two axes. Names that
    ONNX Runtime made up ("unk__3") say nothing."""
    names = {node.shape[0] for node in nodes if isinstance(node.shape[0], str)}
    return len({name for name in names if name and not name.startswith("unk__")}) <= 1


def _to_value(array: Array) -> onnxruntime.OrtValue:
    array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    if array.dtype == BFLOAT16:
        bits = array.view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _from_value(value: onnxruntime.OrtValue) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = value.shape()
    raw = ctypes.string_at(value.data_ptr(), 2 * math.prod(shape)) if math.prod(shape) else b""
    return np.frombuffer(bytearray(raw), BFLOAT16).reshape(shape)


def _tensor_spec(node: Any) -> TensorSpec:
    if node.type not in DATATYPES:
        raise ArtifactInvalid(
            f"tensor {node.name!r}", f"type {node.type}, want one of {', '.join(DATATYPES)}"
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return TensorSpec(node.name, DATATYPES[node.type], shape)


def _decoded(name: str, array: Array) -> Array:
    try:
        flat = [bytes(item).decode() for item in array.ravel()]  # type: ignore[call-overload]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"inputs.{name}", "bytes that are no UTF-8", "UTF-8 text") from error
    return np.array(flat, object).reshape(array.shape)


def _encoded(array: Array) -> Array:
    flat = np.empty(array.size, object)
    flat[:] = [str(item).encode() for item in array.ravel()]
    return flat.reshape(array.shape)


def _kernel_times(events: list[dict[str, Any]], n_runs: int) -> Iterator[KernelTime]:
    durations: dict[tuple[str, str, str, str], float] = {}
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operator = arguments["op_name"]
        node = event["name"].removesuffix("_kernel_time")
        key = (node, operator, arguments["provider"], _precision(operator, arguments))
        durations[key] = durations.get(key, 0.0) + event["dur"] * 1e-6
    for (node, operator, provider, precision), total_s in durations.items():
        yield KernelTime(node, operator, f"{operator} ({provider})", precision, total_s / n_runs)


def _precision(operator: str, arguments: Mapping[str, Any]) -> str:
    """Of the arithmetic: 8-bit by the operator, otherwise the first input's type."""
    if operator in INT8_OPERATORS:
        return "int8"
    shapes = arguments.get("input_type_shape") or []
    first = next(iter(shapes[0]), "") if shapes else ""
    return {"float": "fp32", "float16": "fp16", "uint8": "int8"}.get(first, first or "unknown")
