"""Eager torch as a target: a program of `torch.export`, which the engine runs node by node.

What every speedup is told against, and the way out for models that can't become ONNX.
"""

from collections.abc import Mapping
from importlib import util
from pathlib import Path

from optimizer.space import Categorical, Parameters
from optimizer.targets.archive import write_archive
from optimizer.targets.torch_program import export_program, quiet
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Model, TorchModel, engine_model
from serve.engines import EngineSpec
from serve.machine import this_machine

_FILE = "model.pt2"


class TorchTarget:
    name = "torch"
    shown = "eager torch"

    def why_not(self, context: Context) -> str | None:
        if util.find_spec("torch") is None:
            return "it isn't installed: pip install 'trimserve[torch]'"
        if context.machine.differences(this_machine()):
            return "its programs can carry code, which the measuring agent doesn't take"
        return None

    def space(self, model: Model, context: Context) -> Mapping[str, Categorical]:
        del model, context
        return {}

    def describe(self, parameters: Parameters) -> str:
        del parameters
        return self.shown

    def compile(self, model: Model, parameters: Parameters, directory: Path) -> EngineModel:
        import torch

        del parameters
        assert isinstance(model, TorchModel)
        program = export_program(model, directory)
        program.example_inputs = None  # they would be pickled
        path = directory / _FILE
        with quiet():
            torch.export.save(program, path)
        write_archive(path, path)
        return engine_model(directory, EngineSpec(self.name, _FILE), model.notes)
