"""ONNX Runtime as a target, on one of its providers: the ONNX file stays, optimized on load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

from optimizer.space import Categorical, Parameters
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Model, OnnxModel, engine_model
from serve.engines import EngineSpec, engine_module
from serve.machine import this_machine

_FILE = "model.onnx"
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@dataclass(frozen=True)
class OnnxRuntimeTarget:
    """`provider` is one of the engine's: cpu, cuda or tensorrt."""

    provider: str = "cpu"
    name: str = "onnxruntime"
    shown: str = "ONNX Runtime"
    options: Mapping[str, Categorical] = field(default_factory=dict)

    def why_not(self, context: Context) -> str | None:
        if util.find_spec("onnxruntime") is None:
            return "it isn't installed: pip install 'trimserve[cpu]'"
        if self.provider == "cpu":
            return None
        if context.machine.differences(this_machine()):
            return "GPUs of another machine aren't looked for"
        return _why_no_provider(_PROVIDERS[self.provider])

    def space(self, model: Model, context: Context) -> Mapping[str, Categorical]:
        del model, context
        return self.options

    def describe(self, parameters: Parameters) -> str:
        chosen = [
            f"{name} {_shown(parameters[name])}"
            for name, one in self.options.items()
            if name in parameters and parameters[name] != one.default
        ]
        return ", ".join([self.shown, *chosen])

    def compile(self, model: Model, parameters: Parameters, directory: Path) -> EngineModel:
        import onnx

        assert isinstance(model, OnnxModel)
        # Through onnx and not copied, so that weights in separate files come along.
        loaded = onnx.load(model.path)
        (directory / _FILE).write_bytes(loaded.SerializeToString(deterministic=True))
        chosen = {name: parameters[name] for name in self.options if name in parameters}
        if self.provider != "cpu":
            chosen["provider"] = self.provider
        spec = EngineSpec("onnxruntime", _FILE, model.precision, options=chosen)
        return engine_model(directory, spec, model.notes)


CPU = OnnxRuntimeTarget()
CUDA = OnnxRuntimeTarget(
    "cuda",
    "onnxruntime_cuda",
    "ONNX Runtime CUDA",
    {"cuda_graph": Categorical((False, True), is_baseline=True)},
)
TENSORRT = OnnxRuntimeTarget("tensorrt", "onnxruntime_tensorrt", "ONNX Runtime TensorRT")
COMPUTING_IN_HALF = (CUDA, TENSORRT)
"""Targets for which fp16 is worth it: on CPUs ONNX Runtime has no kernels for it, and OpenVINO's
were slower than fp32 where they were measured (docs/experiments.md)."""


def why_no_half(context: Context) -> str | None:
    """Why no target computes in fp16; None where one does."""
    if any(one.why_not(context) is None for one in COMPUTING_IN_HALF):
        return None
    return f"it wants {' or '.join(one.shown for one in COMPUTING_IN_HALF)}"


def _why_no_provider(provider: str) -> str | None:
    engine_module("onnxruntime")
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return f"no {provider} in this build of ONNX Runtime (onnxruntime-gpu, NVIDIA GPU)"
    return None


def _shown(value: object) -> str:
    return (
        {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )
