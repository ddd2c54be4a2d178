"""What building needs of a study: made the same way by the study and by its workers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from optimizer.block_times import StoredTimes
from optimizer.builder import Builder
from optimizer.data.generated import GeneratedSplit, generated_split
from optimizer.data.splits import DataSplits, Samples, Split, load_splits
from optimizer.errors import SpecInvalid
from optimizer.kernels import precision_of
from optimizer.model_source import check_model, read_signature, source_digest
from optimizer.spec import OnnxSource, Spec
from optimizer.store import Store
from optimizer.techniques import TECHNIQUES, Context, Technique, Training, load_technique
from optimizer.techniques.architecture import ArchitectureSearch
from optimizer.techniques.student import Student
from optimizer.techniques.supernet import SupernetTraining
from optimizer.telling import Tell, untold
from optimizer.variant import Model, Stage, source_model
from serve.machine import Machine
from serve.tensor import Array

MAX_BATCH_SIZE = 32
"""The largest batch that is measured and served. Throughput is flat beyond it on CPUs."""
N_TIMED_SAMPLES = 256
_N_CHECKED = 8
_ALWAYS = ("export",)
"""Techniques that are steps of every recipe and no optimization, so a spec can't leave them out."""


@dataclass(frozen=True)
class Surroundings:
    """What every builder of a study shares."""

    spec: Spec
    splits: DataSplits
    machine: Machine
    """The one that will serve."""
    techniques: Mapping[str, Technique]

    @property
    def base(self) -> Model:
        model = self.spec.model
        return source_model(model, source_digest(model), _precision(self.spec))

    @property
    def context(self) -> Context:
        splits, spec = self.splits, self.spec
        return Context(
            splits.calibration, self.machine, spec.seed, MAX_BATCH_SIZE, splits.train,
            spec.training, spec.task,
        )  # fmt: skip

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Samples to time and compare with."""
        return first(self.splits.validation, N_TIMED_SAMPLES).inputs

    def builder(self, store: Store, tell: Tell = untold) -> Builder:
        cores = self.spec.target.cores or self.machine.cores
        calibration = self.splits.calibration
        if isinstance(calibration, GeneratedSplit):
            calibration = replace(calibration, folder=store.checkpoints)
        times = StoredTimes(store, self.machine, cores)
        context = replace(
            self.context,
            calibration=calibration,
            checkpoints=store.checkpoints,
            block_seconds=times,
            network_seconds=times.network,
            tell=tell,
        )
        return Builder(store, self.base, self.techniques, context, self.inputs)

    def check(self) -> None:
        """Raises SpecInvalid where the model doesn't fit the data."""
        splits, task = self.splits, self.spec.task
        # Only logits have an axis of classes, and only the first output is looked at for it.
        is_logits = task.kind == "classification" and task.output is None
        n_classes = splits.n_classes if is_logits else 0
        check_model(self.spec.model, first(splits.validation, _N_CHECKED), n_classes)
        if isinstance(splits.calibration, GeneratedSplit):
            splits.calibration.check(str(self.spec.source))


def read_data(spec: Spec) -> DataSplits:
    """The spec's data. Raises SpecInvalid."""
    generated = None
    if spec.data.train is None:
        wanted = spec.data.calibration_samples
        generated = generated_split(spec.model, str(spec.source), wanted, spec.seed)
    return load_splits(spec.data, read_signature(spec.model).input_names, spec.seed, generated)


def enabled_techniques(spec: Spec) -> dict[str, Technique]:
    """Those of the table that the spec enables, those that every recipe needs, and the user's
    own. Raises SpecInvalid for a plugin that can't be had."""
    names = [name for name in TECHNIQUES if name in (*_ALWAYS, *spec.techniques.enabled)]
    found = {name: load_technique(name) for name in names}
    if spec.techniques.student is not None:
        found["student"] = Student(spec.techniques.student)
    if spec.techniques.architecture is not None:
        given = spec.techniques.architecture
        if given.weights == "shared":
            found["supernet"] = SupernetTraining(given)
        found["architecture"] = ArchitectureSearch(given)
    for plugin in spec.techniques.plugins:
        try:
            technique: Technique = plugin.load()()
            name = technique.traits.name
        except Exception as error:
            problem = f"techniques.plugins: {plugin}: {type(error).__name__}: {error}"
            raise SpecInvalid(str(spec.source), [problem]) from error
        if name in TECHNIQUES or name in found:
            problem = f"techniques.plugins: {plugin}: the name {name} is taken, want another"
            raise SpecInvalid(str(spec.source), [problem])
        trains = technique.traits.stage in (Stage.SPARSIFY, Stage.RECOVER)
        if trains and not isinstance(technique, Training):
            problem = f"techniques.plugins: {plugin}: want a method epochs, for it trains"
            raise SpecInvalid(str(spec.source), [problem])
        found[name] = technique
    return found


def first(split: Split, n: int) -> Samples:
    """The first `n` samples, over and over where there are fewer."""
    return split.read(np.arange(n) % len(split))


def make_builder(
    spec: Spec, store: str | Path, artifacts: Path | None, machine: Machine, tell: Tell
) -> Builder:
    """A worker's builder, with a store of its own that is open as long as the process. Raises
    SpecInvalid where model or data can't be used."""
    surroundings = Surroundings(spec, read_data(spec), machine, enabled_techniques(spec))
    surroundings.check()
    return surroundings.builder(Store(store, artifacts), tell)


def _precision(spec: Spec) -> str:
    """Of the model as it is given: an ONNX file may be quantized already."""
    given = spec.model
    return precision_of(given.path) if isinstance(given, OnnxSource) else "fp32"
