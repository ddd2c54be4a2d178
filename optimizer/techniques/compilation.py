"""Compilation: an ONNX model to the files and options of an engine (`optimizer.targets`)."""

# ruff: noqa: ARG002  every technique takes what the contract passes

from collections.abc import Mapping
from pathlib import Path

from optimizer.recipe import Traits
from optimizer.space import Parameters, Space
from optimizer.targets import ENGINE, Target, available, joint_space, missing
from optimizer.targets.onnxruntime import COMPUTING_IN_HALF, CPU, CUDA, TENSORRT
from optimizer.targets.openvino import OpenVinoTarget
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Kind, Model, OnnxModel, Stage

_TARGETS: tuple[Target, ...] = (CPU, OpenVinoTarget(), CUDA, TENSORRT)


class Compilation:
    traits = Traits(
        name="compilation",
        version="3",
        stage=Stage.COMPILE,
        accepts=Kind.ONNX,
        gives=Kind.ENGINE,
        packages=("onnxruntime", "openvino", "onnx"),
        optional=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        if not available(_TARGETS, context):
            return "no engine is installed: pip install 'trimserve[cpu,openvino]'"
        if not _takers(model, context):
            return f"no target here computes in {model.precision}"
        return None

    def space(self, model: Model, context: Context) -> Space:
        return joint_space(_takers(model, context), model, context)

    def missing(self, model: Model, context: Context) -> Mapping[str, str]:
        return missing(_TARGETS, context)

    def describe(self, parameters: Parameters) -> str:
        return _target(parameters).describe(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> EngineModel:
        assert isinstance(model, OnnxModel)
        return _target(parameters).compile(model, parameters, directory)


def _takers(model: Model, context: Context) -> list[Target]:
    found = available(_TARGETS, context)
    if model.precision == "fp16":
        return [target for target in found if target in COMPUTING_IN_HALF]
    return found


def _target(parameters: Parameters) -> Target:
    return next(target for target in _TARGETS if target.name == parameters[ENGINE])
