"""OpenVINO as a target: its own IR, with weights as they are.

The engine compiles one model for each batch size that the serving configuration names, since
OpenVINO plans anew whenever a dynamic shape changes.
"""

from collections.abc import Mapping
from importlib import util
from pathlib import Path

from optimizer.space import Categorical, Parameters
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Model, OnnxModel, engine_model
from serve.engines import EngineSpec, engine_module

_FILE = "model.xml"
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_REST = "rest"
"""What a quantized model computes in where it isn't."""
_QUANTIZED = ("int8", "int4")


class OpenVinoTarget:
    name = "openvino"
    shown = "OpenVINO"

    def why_not(self, context: Context) -> str | None:
        del context
        if util.find_spec("openvino") is None:
            return "it isn't installed: pip install 'trimserve[openvino]'"
        return None

    def space(self, model: Model, context: Context) -> Mapping[str, Categorical]:
        space = {"precision": Categorical(_precisions(model, context), is_baseline=True)}
        if model.precision in _QUANTIZED and _has_bf16(context):
            space[_REST] = Categorical(("fp32", "bf16"))
        return space

    def describe(self, parameters: Parameters) -> str:
        if parameters.get(_REST) == "bf16":
            return f"{self.shown}, the rest bf16"
        return f"{self.shown} bf16" if parameters.get("precision") == "bf16" else self.shown

    def compile(self, model: Model, parameters: Parameters, directory: Path) -> EngineModel:
        assert isinstance(model, OnnxModel)
        engine_module(self.name)  # first, since it keeps OpenVINO from reporting to its makers
        import openvino

        converted = openvino.Core().read_model(model.path)
        for index, operation in enumerate(converted.get_ordered_ops()):
            # Nodes without a name are numbered through the whole life of the process.
            if operation.get_friendly_name() == operation.get_name():
                operation.set_friendly_name(f"{operation.get_type_name()}_unnamed_{index}")
        # By default it would halve the weights to fp16 without a word.
        openvino.save_model(converted, directory / _FILE, compress_to_fp16=False)
        options = {_REST: "bf16"} if parameters.get(_REST) == "bf16" else {}
        spec = EngineSpec(self.name, _FILE, str(parameters["precision"]), options=options)
        return engine_model(directory, spec, model.notes)


def _precisions(model: Model, context: Context) -> tuple[str, ...]:
    """bf16 only where the CPU has it: emulated, it is slower than fp32."""
    if model.precision != "fp32":
        return (model.precision,)
    return ("fp32", "bf16") if _has_bf16(context) else ("fp32",)


def _has_bf16(context: Context) -> bool:
    return bool(_BF16_FLAGS & set(context.machine.flags))
