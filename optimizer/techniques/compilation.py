"""Compilation: an ONNX model to the files and options of an engine.

ONNX Runtime keeps the ONNX file and optimizes it on load. OpenVINO gets its own IR, with weights
as they are; it compiles one model for each batch size that the serving configuration names,
since it plans anew whenever a dynamic shape changes.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from importlib import util
from pathlib import Path

from optimizer.recipe import Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Kind, Model, OnnxModel, Stage, engine_model
from serve.engines import EngineSpec, engine_module

_ONNX_FILE = "model.onnx"
_IR_FILE = "model.xml"
_SHOWN = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class Compilation:
    traits = Traits(
        name="compilation",
        version="1",
        stage=Stage.COMPILE,
        accepts=Kind.ONNX,
        gives=Kind.ENGINE,
        packages=("onnxruntime", "openvino", "onnx"),
        optional=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        if not _installed_engines():
            return "no engine is installed: pip install 'trimserve[cpu,openvino]'"
        return None

    def space(self, model: Model, context: Context) -> Space:
        engines = _installed_engines()
        space: dict[str, Categorical] = {"engine": Categorical(engines, is_baseline=True)}
        if "onnxruntime" in engines:
            # Less than all leaves out the layouts that its fast kernels need: int8 at
            # "extended" was slower than fp32 (docs/experiments.md).
            space["optimization"] = Categorical(("all",), when={"engine": ("onnxruntime",)})
        if "openvino" in engines:
            space["precision"] = Categorical(
                _openvino_precisions(model, context),
                when={"engine": ("openvino",)},
                is_baseline=True,
            )
        return space

    def describe(self, parameters: Parameters) -> str:
        name = _SHOWN[str(parameters["engine"])]
        return f"{name} bf16" if parameters.get("precision") == "bf16" else name

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> EngineModel:
        assert isinstance(model, OnnxModel)
        if parameters["engine"] == "openvino":
            return _to_openvino(model, str(parameters["precision"]), directory)
        return _to_onnxruntime(model, str(parameters["optimization"]), directory)


def _installed_engines() -> tuple[str, ...]:
    return tuple(name for name in _SHOWN if util.find_spec(name) is not None)


def _openvino_precisions(model: Model, context: Context) -> tuple[str, ...]:
    """bf16 only where the CPU has it: emulated, it is slower than fp32."""
    if model.precision != "fp32":
        return (model.precision,)
    has_bf16 = bool(_BF16_FLAGS & set(context.machine.flags))
    return ("fp32", "bf16") if has_bf16 else ("fp32",)


def _to_onnxruntime(model: OnnxModel, optimization: str, directory: Path) -> EngineModel:
    import onnx

    # Through onnx and not copied, so that weights in separate files come along.
    loaded = onnx.load(model.path)
    (directory / _ONNX_FILE).write_bytes(loaded.SerializeToString(deterministic=True))
    spec = EngineSpec(
        "onnxruntime", _ONNX_FILE, model.precision, options={"optimization": optimization}
    )
    return engine_model(directory, spec, model.notes)


def _to_openvino(model: OnnxModel, precision: str, directory: Path) -> EngineModel:
    engine_module("openvino")  # first, since it keeps OpenVINO from reporting to its makers
    import openvino

    converted = openvino.Core().read_model(model.path)
    for index, operation in enumerate(converted.get_ordered_ops()):
        # Nodes without a name are numbered through the whole life of the process.
        if operation.get_friendly_name() == operation.get_name():
            operation.set_friendly_name(f"{operation.get_type_name()}_unnamed_{index}")
    # By default it would halve the weights to fp16 without a word.
    openvino.save_model(converted, directory / _IR_FILE, compress_to_fp16=False)
    return engine_model(directory, EngineSpec("openvino", _IR_FILE, precision), model.notes)
