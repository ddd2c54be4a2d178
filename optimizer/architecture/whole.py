"""Whole networks: the model and some of a space's as the target times them, to correct its table.

A sum over layers misses what an engine fuses, what lies between them and what each call costs, and
it misses more of one network than of another. A line through the networks' sums and seconds is the
correction (`optimizer.search.block_table`); the model's own seconds stand in for its sum.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from optimizer.architecture.networks import build
from optimizer.architecture.plan import plan_json
from optimizer.architecture.setting import Setting
from optimizer.architecture.space import Choices
from optimizer.block_times import TABLE_ENGINE
from optimizer.data.splits import Samples, Split
from optimizer.data.table import Labels
from optimizer.quantization.graph import folded
from optimizer.quantization.processor import kernel_layout
from optimizer.quantization.qdq import Arithmetic
from optimizer.quantization.static import Settings, quantize_static
from optimizer.techniques import Restructuring, TimedNetwork, load_technique
from optimizer.torch_variant import torch_model
from optimizer.variant import EngineModel, OnnxModel, TorchModel, engine_model
from serve.engines import EngineSpec

_N_CALIBRATED = 32
"""Samples that an int8 network's ranges are taken from: they make no difference to its time."""


def whole_networks(
    setting: Setting, model: TorchModel, technique: Restructuring
) -> Iterator[TimedNetwork]:
    """The model, and networks of each of the setting's precisions; none while their layers aren't
    timed. `technique` is whose plans build them again."""
    found = [(setting.at(one), setting.at(one).whole()) for one in setting.spec.precisions]
    if not all(networks for _, networks in found):
        return
    yield TimedNetwork(setting.base_key, partial(_write, setting, model, "fp32"))
    # In turns, so that what there is time for is of each precision.
    for group in zip_longest(*(networks.items() for _, networks in found)):
        for (at, _), one in zip(found, group, strict=True):
            if one is not None:
                key, choices = one
                yield TimedNetwork(key, partial(_write_network, at, model, technique, choices))


def _write_network(
    setting: Setting,
    model: TorchModel,
    technique: Restructuring,
    choices: Choices,
    directory: Path,
) -> EngineModel:
    """With random weights, which make no difference to its time either."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.context.seed)
        network = build(setting.space.plan(choices), setting.factories).eval()
    precision = setting.precision(choices)
    operations = {"plan": plan_json(setting.space.plan(choices)), "precision": precision}
    base = TorchModel(setting.source, model.digest)
    with tempfile.TemporaryDirectory() as scratch:
        made = torch_model(Path(scratch), base, network, technique, operations)
        return _write(setting, made, precision, directory)


def _write(setting: Setting, model: TorchModel, precision: str, directory: Path) -> EngineModel:
    context = setting.context
    exported = load_technique("export").apply(model, {}, context, directory)
    assert isinstance(exported, OnnxModel)
    if precision != "fp32":
        activations, pairs_saturate = kernel_layout(context.machine)
        arithmetic = Arithmetic(activations == "int8", pairs_saturate, least_error=False)
        settings = Settings(arithmetic, method="minmax", corrects_biases=False)
        made, _ = quantize_static(folded(exported.path), _Few(context.calibration), settings)
        exported.path.write_bytes(made.to_bytes())
    return engine_model(directory, EngineSpec(TABLE_ENGINE, exported.file, precision))


@dataclass(frozen=True, eq=False)
class _Few:
    """Samples of a split, as a split."""

    of: Split
    name: str = "calibration"
    digest: str = ""
    labels: Labels | None = None

    def __len__(self) -> int:
        return min(_N_CALIBRATED, len(self.of))

    def read(self, indices: Sequence[int] | NDArray[np.integer] | None = None) -> Samples:
        return self.of.read(np.arange(len(self)) if indices is None else indices)
