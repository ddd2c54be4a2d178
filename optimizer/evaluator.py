"""The evaluator: the evidence about one engine, measured once and kept in the store.

In rising cost: parity, the kernels that ran, times, accuracy. It decides only whether a variant
is what it says; whether it is good enough is `optimizer.choice`'s matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimizer import accuracy, kernels, parity, timing
from optimizer.accuracy import Correctness, measure_correctness
from optimizer.builder import blamed
from optimizer.data.splits import Split
from optimizer.errors import ParityMismatch, TechniqueFailed
from optimizer.kernels import KernelProof, fallback_reason, n_quantized, prove
from optimizer.parity import check_parity, fixed_sizes
from optimizer.store import Key, Store, StoredVariant
from optimizer.timing import Contender, Effort, Timing, measure
from optimizer.variant import EngineModel, Model, OnnxModel
from serve.engines import load_engine
from serve.machine import Machine
from serve.tensor import Array

PROMISING = 0.5
"""Of the best speedup so far: a variant below it is timed in the first configuration only."""


@dataclass(frozen=True)
class Configuration:
    """Instances that run at once, and threads of each."""

    instances: int
    threads: int


def configurations(cores: int) -> tuple[Configuration, ...]:
    """What is timed on so many cores; the first is the one that variants are compared in."""
    found = [Configuration(cores, 1), Configuration(1, 1), Configuration(1, cores)]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Evidence:
    """What is known of a variant. `correct` is None where the data has no labels."""

    proof: KernelProof
    timings: tuple[Timing, ...]
    correct: Correctness | None


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures engines on this machine. `inputs` are samples to time with."""

    store: Store
    machine: Machine
    cores: int
    batch_sizes: tuple[int, ...]
    inputs: Mapping[str, Array]
    validation: Split
    seed: int
    effort: Effort = field(default_factory=Effort)

    def evidence(
        self,
        variant: StoredVariant,
        parent: Model,
        baseline: StoredVariant,
        best_speedup: float,
    ) -> Evidence:
        """Measure what the store doesn't have. Raises ParityMismatch, or TechniqueFailed for an
        engine that fell back from int8."""
        with blamed(variant.step.technique):
            return self._evidence(variant, parent, baseline, best_speedup)

    def _evidence(
        self, variant: StoredVariant, parent: Model, baseline: StoredVariant, best_speedup: float
    ) -> Evidence:
        self._check_parity(variant, parent)
        proof = self._proof(variant)
        if parent.precision == "int8" and isinstance(parent, OnnxModel):
            reason = fallback_reason(proof, n_quantized(parent.path))
            if reason is not None:
                raise TechniqueFailed(variant.step.technique, reason)
        first, *others = configurations(self.cores)
        timings = [self._timing(variant, first, baseline)]
        speedup = timings[0].speedup
        if speedup is None or speedup.high >= PROMISING * best_speedup:
            timings += [self._timing(variant, other) for other in others]
        correct = (
            None if self.validation.labels is None else self.correctness(variant, self.validation)
        )
        return Evidence(proof, tuple(timings), correct)

    def correctness(self, variant: StoredVariant, split: Split) -> Correctness:
        key = self._key(variant, "correct", accuracy.PROTOCOL_VERSION, split=split.digest)
        stored = self.store.recorded(key)
        if stored is None:
            largest = self.batch_sizes[-1]
            sizes = fixed_sizes(_engine(variant).spec.name, (largest,))
            model = _engine(variant)
            engine = load_engine(model.directory, model.served(1, self.cores, sizes))
            try:
                stored = measure_correctness(engine, split, largest).to_dict()
            finally:
                engine.close()
            self.store.record(key, stored)
        return Correctness.from_dict(stored)

    def _check_parity(self, variant: StoredVariant, parent: Model) -> None:
        largest = self.batch_sizes[-1]
        key = self._key(variant, "parity", parity.PROTOCOL_VERSION, max_batch_size=largest)
        stored = self.store.recorded(key)
        if stored is None:
            try:
                check_parity(variant.model, parent, self.inputs, largest)
                stored = {}
            except ParityMismatch as error:
                stored = {
                    "what": error.what,
                    "batch_size": error.batch_size,
                    # JSON has no infinity.
                    "max_difference": min(error.max_difference, 1e308),
                    "tolerance": error.tolerance,
                }
            self.store.record(key, stored)
        if stored:
            raise ParityMismatch(**stored)

    def _proof(self, variant: StoredVariant) -> KernelProof:
        largest = self.batch_sizes[-1]
        key = self._key(variant, "kernels", kernels.PROTOCOL_VERSION, batch_size=largest)
        stored = self.store.recorded(key)
        if stored is None:
            model = _engine(variant)
            spec = model.served(1, 1, fixed_sizes(model.spec.name, (largest,)))
            batch = {name: array[:largest] for name, array in self.inputs.items()}
            stored = prove(model.directory, spec, batch).to_dict()
            self.store.record(key, stored)
        return KernelProof.from_dict(stored)

    def _timing(
        self,
        variant: StoredVariant,
        configuration: Configuration,
        baseline: StoredVariant | None = None,
    ) -> Timing:
        """Only the first configuration is timed against the baseline, for the comparison: the
        others say how to serve the variant."""
        key = self._key(
            variant,
            "timing",
            timing.PROTOCOL_VERSION,
            instances=configuration.instances,
            threads=configuration.threads,
            batch_sizes=list(self.batch_sizes),
            baseline=baseline.id if baseline else "",
        )
        stored = self.store.recorded(key)
        if stored is None:
            stored = measure(
                self._contender(variant, configuration),
                self._contender(baseline, configuration) if baseline else None,
                self.inputs,
                self.batch_sizes,
                effort=self.effort,
                seed=self.seed,
            ).to_dict()
            self.store.record(key, stored)
        return Timing.from_dict(stored)

    def _contender(self, variant: StoredVariant, configuration: Configuration) -> Contender:
        model = _engine(variant)
        sizes = fixed_sizes(model.spec.name, self.batch_sizes)
        spec = model.served(configuration.instances, configuration.threads, sizes)
        return Contender(model.directory, spec)

    def _key(
        self, variant: StoredVariant, metric: str, protocol_version: int, **serving: Any
    ) -> Key:
        return Key(variant.id, self.machine, metric, protocol_version, serving)


def _engine(variant: StoredVariant) -> EngineModel:
    assert isinstance(variant.model, EngineModel)
    return variant.model
