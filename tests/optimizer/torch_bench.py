"""A workbench without the ONNX model, whose export takes longest: for techniques of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optimizer.data.splits import load_splits
from optimizer.model_source import source_digest
from optimizer.spec import read_spec
from optimizer.techniques import Context
from optimizer.variant import TorchModel, source_model
from serve.machine import this_machine
from tests.optimizer.tiny_study import write_study
from tests.optimizer.workbench import MAX_BATCH_SIZE, TINY, replace_network


@dataclass(frozen=True, eq=False)
class TorchBench:
    context: Context
    inputs: Mapping[str, np.ndarray]
    torch: TorchModel


def make_torch_bench(directory: Path, network: str = TINY) -> TorchBench:
    """As `make_workbench`."""
    spec = read_spec(write_study(directory))
    if network != TINY:
        replace_network(directory, network)
    splits = load_splits(spec.data, ["image"], seed=0)
    context = Context(splits.calibration, this_machine(), 0, MAX_BATCH_SIZE, splits.train)
    model = source_model(spec.model, source_digest(spec.model))
    assert isinstance(model, TorchModel)
    return TorchBench(context, splits.validation.read(range(MAX_BATCH_SIZE)).inputs, model)
