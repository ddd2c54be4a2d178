"""What tests of techniques work on: a tiny base model, data, and a model of each kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from optimizer.data.splits import load_splits
from optimizer.importable import Importable
from optimizer.model_source import source_digest
from optimizer.spec import read_spec
from optimizer.techniques import Context, load_technique
from optimizer.variant import Kind, Model, OnnxModel, TorchModel, source_model
from serve.machine import this_machine
from tests.optimizer.tiny_study import write_study

MAX_BATCH_SIZE = 8
TINY = ""
"""The network of the tiny study."""


@dataclass(frozen=True, eq=False)
class Workbench:
    context: Context
    inputs: Mapping[str, np.ndarray]
    torch: TorchModel
    directory: Path

    @cached_property
    def onnx(self) -> OnnxModel:
        """Exported when it is first asked for: that takes seconds, and many ask for torch only."""
        folder = self.directory / "exported"
        folder.mkdir()
        made = load_technique("export").apply(self.torch, {}, self.context, folder)
        assert isinstance(made, OnnxModel)
        return made

    @property
    def models(self) -> Mapping[Kind, Model]:
        return {Kind.TORCH: self.torch, Kind.ONNX: self.onnx}


def make_workbench(directory: Path, network: str = TINY) -> Workbench:
    """Writes a tiny study to `directory`, and later its model as ONNX to a folder there. `network`
    is the expression that builds another model than the usual one."""
    spec = read_spec(write_study(directory))
    if network != TINY:
        replace_network(directory, network)
    splits = load_splits(spec.data, ["image"], seed=0)
    context = Context(splits.calibration, this_machine(), 0, MAX_BATCH_SIZE, splits.train)
    model = source_model(spec.model, source_digest(spec.model))
    assert isinstance(model, TorchModel)
    inputs = splits.validation.read(range(MAX_BATCH_SIZE)).inputs
    return Workbench(context, inputs, model, directory)


def replace_network(directory: Path, expression: str) -> None:
    """Make the study's model another one, with random weights."""
    code = f"from torch import nn\n\ndef build():\n    return {expression}\n"
    (directory / "tiny.py").write_text(code)
    torch.manual_seed(0)
    module = Importable("tiny", "build", directory).call()
    save_file(module.state_dict(), directory / "tiny.safetensors")
