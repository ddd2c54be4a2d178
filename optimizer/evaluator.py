"""The evaluator: the evidence about one engine, measured once and kept in the store.

In rising cost: parity and the kernels that ran (`check`), times, accuracy; memory and energy for
who asks. Each step can be taken alone. It decides only whether a variant is what it says; whether
it is good enough is `optimizer.choice`'s matter, and where engines run is the measurer's.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from optimizer import fusion, kernels, parity, timing
from optimizer.builder import blamed
from optimizer.data.splits import Samples, Split
from optimizer.errors import ParityMismatch, TechniqueFailed
from optimizer.fusion import fusions_of
from optimizer.kernels import (
    KernelProof,
    fallback_reason,
    precision_reason,
    quantized_nodes,
    sum_up,
)
from optimizer.macs import share_of, shares_by_precision
from optimizer.measuring import Measurer
from optimizer.parity import check_engine_parity, fixed_sizes
from optimizer.result import Fusion
from optimizer.store import Key, Store, StoredVariant
from optimizer.timing import Contender, Effort, Timing
from optimizer.tracing import span
from optimizer.variant import EngineModel, Model, OnnxModel
from serve.engines import EngineSpec
from serve.machine import Machine
from serve.tensor import Array

PROMISING = 0.5
"""Of the best speedup so far: a variant below it is timed in the first configuration only."""
MEMORY_PROTOCOL_VERSION = 1
ENERGY_PROTOCOL_VERSION = 1
ENERGY_SECONDS = 5.0
"""Of running; the counters move every millisecond or so."""


@dataclass(frozen=True)
class Configuration:
    """Instances that run at once, and threads of each."""

    instances: int
    threads: int


def configurations(cores: int) -> tuple[Configuration, ...]:
    """What is timed on so many cores; the first is the one that variants are compared in."""
    found = [Configuration(cores, 1), Configuration(1, 1), Configuration(1, cores)]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures engines by `measurer`. `inputs` are samples to time with, at least the largest
    batch of them. Every step gives what the store has, and measures what it doesn't have."""

    store: Store
    measurer: Measurer
    cores: int
    batch_sizes: tuple[int, ...]
    inputs: Mapping[str, Array]
    seed: int
    effort: Effort = field(default_factory=Effort)
    clock: Callable[[], float] = time.monotonic
    spent_s: dict[str, float] = field(default_factory=dict)
    """Seconds of measuring by metric, failures included; grows with use."""
    saved_s: dict[str, float] = field(default_factory=dict)
    """Likewise: what the measurements took that were in the store already."""

    @property
    def machine(self) -> Machine:
        return self.measurer.machine

    def check(self, variant: StoredVariant, parent: Model) -> KernelProof:
        """Whether it computes what it should in the kernels that it should. Raises ParityMismatch,
        or TechniqueFailed for an engine that fails, or fell back from int8."""
        with blamed(variant.step.technique):
            self._check_parity(variant, parent)
            proof = self._proof(variant, parent)
            reason = precision_reason(proof, _engine(variant).precision)
            if parent.precision == "int8" and isinstance(parent, OnnxModel):
                nodes = quantized_nodes(parent.path)
                reason = fallback_reason(proof, len(nodes), share_of(parent.path, nodes))
            if reason is not None:
                raise TechniqueFailed(variant.step.technique, reason)
        return proof

    def timings(
        self, variant: StoredVariant, baseline: StoredVariant, best_speedup: float
    ) -> tuple[Timing, ...]:
        """Service times by configuration. Only the first is timed against the baseline, for the
        comparison; the others say how to serve the variant, and aren't timed for one that is far
        from `best_speedup`. Raises TechniqueFailed."""
        first, *others = configurations(self.cores)
        with blamed(variant.step.technique):
            timings = [self._timing(variant, first, baseline)]
            speedup = timings[0].speedup
            if speedup is None or speedup.high >= PROMISING * best_speedup:
                timings += [self._timing(variant, other) for other in others]
        return tuple(timings)

    def outputs(
        self, variant: StoredVariant, split: Split
    ) -> Iterator[tuple[Samples, Mapping[str, Array]]]:
        """Run the whole split, in its order: samples with their outputs, by name in the order of
        the engine's signature, a batch of the largest size at a time. Nothing is kept. Raises
        TechniqueFailed."""
        largest = self.batch_sizes[-1]
        contender = self._contender(variant, Configuration(1, self.cores), (largest,))
        sent: deque[Samples] = deque()  # the measurer may take several batches at a time

        def batches() -> Iterator[Mapping[str, Array]]:
            for start in range(0, len(split), largest):
                sent.append(split.read(np.arange(start, min(start + largest, len(split)))))
                yield sent[-1].inputs

        with blamed(variant.step.technique):
            for outputs in self.measurer.outputs(contender, batches()):
                yield sent.popleft(), outputs

    def memory_bytes(self, variant: StoredVariant, instances: int, threads: int) -> int:
        """Resident memory of its instances, each of which ran a batch of the largest size. Raises
        TechniqueFailed."""
        served = {"instances": instances, "threads": threads, "batch_sizes": [*self.batch_sizes]}
        key = self._key(variant, "memory", MEMORY_PROTOCOL_VERSION, **served)
        contender = self._contender(variant, Configuration(instances, threads), self.batch_sizes)
        with blamed(variant.step.technique):
            measure = self.measurer.memory_bytes
            return int(self._kept(key, lambda: measure(contender, self._largest_batch())))

    def joules(self, variant: StoredVariant, instances: int, threads: int) -> float | None:
        """Energy of one inference (row) in batches of the largest size, all instances busy; None
        where the machine doesn't say. Raises TechniqueFailed."""
        largest = self.batch_sizes[-1]
        served = {"instances": instances, "threads": threads, "batch_size": largest}
        key = self._key(variant, "energy", ENERGY_PROTOCOL_VERSION, **served)
        contender = self._contender(variant, Configuration(instances, threads), (largest,))

        def measure() -> object:
            spent = self.measurer.joules(contender, self._largest_batch(), ENERGY_SECONDS)
            return {"joules": None if spent is None else spent / largest}

        with blamed(variant.step.technique):
            found: float | None = self._kept(key, measure)["joules"]
        return found

    def fusions(self, variant: StoredVariant, graph: OnnxModel) -> tuple[Fusion, ...]:
        """Which operators of the graph that it was made of ended in which kernel, a batch of the
        largest size on one thread. Raises TechniqueFailed."""
        largest = self.batch_sizes[-1]
        key = self._key(variant, "fusion", fusion.PROTOCOL_VERSION, batch_size=largest)
        plain = EngineSpec("onnxruntime", graph.file, options={"optimization": "none"})
        made = self._contender(variant, Configuration(1, 1), (largest,))

        def measure() -> object:
            before, after = (
                self.measurer.kernels(contender, self._largest_batch(), kernels.N_RUNS)
                for contender in (Contender(graph.directory, plain), made)
            )
            return [asdict(one) for one in fusions_of(graph.path, before, after)]

        with blamed(variant.step.technique):
            return fusion.from_stored(self._kept(key, measure))

    def _check_parity(self, variant: StoredVariant, parent: Model) -> None:
        largest = self.batch_sizes[-1]

        def measure() -> object:
            try:
                check_engine_parity(self.measurer, _engine(variant), parent, self.inputs, largest)
                return {}
            except ParityMismatch as error:
                return {
                    "what": error.what,
                    "batch_size": error.batch_size,
                    # JSON has no infinity.
                    "max_difference": min(error.max_difference, 1e308),
                    "tolerance": error.tolerance,
                }

        key = self._key(variant, "parity", parity.PROTOCOL_VERSION, max_batch_size=largest)
        found = self._kept(key, measure)
        if found:
            raise ParityMismatch(**found)

    def _proof(self, variant: StoredVariant, parent: Model) -> KernelProof:
        largest = self.batch_sizes[-1]
        key = self._key(variant, "kernels", kernels.PROTOCOL_VERSION, batch_size=largest)
        contender = self._contender(variant, Configuration(1, 1), (largest,))

        def measure() -> object:
            batch = self._largest_batch()
            ran = self.measurer.kernels(contender, batch, kernels.N_RUNS)
            if not isinstance(parent, OnnxModel):
                return sum_up(ran).to_dict()
            return sum_up(ran, shares_by_precision(parent.path, ran)).to_dict()

        return KernelProof.from_dict(self._kept(key, measure))

    def _timing(
        self,
        variant: StoredVariant,
        configuration: Configuration,
        baseline: StoredVariant | None = None,
    ) -> Timing:
        sizes = self.batch_sizes
        key = self._key(
            variant,
            "timing",
            timing.PROTOCOL_VERSION,
            instances=configuration.instances,
            threads=configuration.threads,
            batch_sizes=list(sizes),
            baseline=baseline.id if baseline else "",
        )

        def measure() -> object:
            return self.measurer.time(
                self._contender(variant, configuration, sizes),
                self._contender(baseline, configuration, sizes) if baseline else None,
                self.inputs,
                sizes,
                effort=self.effort,
                seed=self.seed,
            ).to_dict()

        return Timing.from_dict(self._kept(key, measure))

    def _kept(self, key: Key, measure: Callable[[], object]) -> Any:
        """What the store has, or what `measure` gives it now, and how long that took."""
        wall_key = replace(key, metric=f"{key.metric}.wall_s")
        stored = self.store.recorded(key)
        if stored is not None:
            seconds = self.store.recorded(wall_key)
            _add(self.saved_s, key.metric, float(seconds or 0.0))
            return stored
        start_s = self.clock()
        about = {"trimserve.metric": key.metric, "trimserve.variant.id": key.variant_id}
        try:
            with span(f"measure {key.metric}", about):
                stored = measure()
        finally:
            seconds = self.clock() - start_s
            _add(self.spent_s, key.metric, seconds)
        self.store.record(wall_key, seconds)
        self.store.record(key, stored)
        return stored

    def _contender(
        self, variant: StoredVariant, configuration: Configuration, sizes: tuple[int, ...]
    ) -> Contender:
        model = _engine(variant)
        fixed = fixed_sizes(model.spec.name, sizes)
        spec = model.served(configuration.instances, configuration.threads, fixed)
        return Contender(model.directory, spec)

    def _largest_batch(self) -> dict[str, Array]:
        return {name: array[: self.batch_sizes[-1]] for name, array in self.inputs.items()}

    def _key(
        self, variant: StoredVariant, metric: str, protocol_version: int, **serving: Any
    ) -> Key:
        return Key(variant.id, self.machine, metric, protocol_version, serving)


def _engine(variant: StoredVariant) -> EngineModel:
    assert isinstance(variant.model, EngineModel)
    return variant.model


def _add(seconds: dict[str, float], metric: str, more: float) -> None:
    seconds[metric] = seconds.get(metric, 0.0) + more
