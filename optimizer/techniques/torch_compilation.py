"""Compilation from torch: a torch model to an engine of torch's own, without ONNX in between."""

# ruff: noqa: ARG002  every technique takes what the contract passes

from collections.abc import Mapping
from pathlib import Path

from optimizer.recipe import Traits
from optimizer.space import Parameters, Space
from optimizer.targets import ENGINE, Target, available, joint_space, missing
from optimizer.targets.aotinductor import CPU, CUDA
from optimizer.targets.torch import TorchTarget
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Kind, Model, Stage, TorchModel

_TARGETS: tuple[Target, ...] = (TorchTarget(), CPU, CUDA)


class TorchCompilation:
    traits = Traits(
        name="torch_compilation",
        version="1",
        stage=Stage.COMPILE,
        accepts=Kind.TORCH,
        gives=Kind.ENGINE,
        packages=("torch",),
        optional=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        if not available(_TARGETS, context):
            return "torch isn't installed: pip install 'trimserve[torch]'"
        return None

    def space(self, model: Model, context: Context) -> Space:
        return joint_space(available(_TARGETS, context), model, context)

    def missing(self, model: Model, context: Context) -> Mapping[str, str]:
        return missing(_TARGETS, context)

    def describe(self, parameters: Parameters) -> str:
        return _target(parameters).describe(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> EngineModel:
        assert isinstance(model, TorchModel)
        return _target(parameters).compile(model, parameters, directory)


def _target(parameters: Parameters) -> Target:
    return next(target for target in _TARGETS if target.name == parameters[ENGINE])
