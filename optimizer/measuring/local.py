"""The measurer of this process: what others carry elsewhere runs here in the end.

An engine that crashes takes the process with it; `optimizer.measuring.child` keeps it apart.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property

from optimizer import timing
from optimizer.measuring import Batch
from optimizer.measuring.child import ChildMeasurer
from optimizer.measuring.cores import building, measuring_cores
from optimizer.measuring.energy import MAX_SECONDS, read_counters, spent_joules
from optimizer.timing import Contender, Effort, Instances, Places, Timing
from serve.engines import Engine, EngineSpec, KernelTime, engine_module, load_engine
from serve.machine import Machine, allowed_cpus, this_machine


@dataclass(frozen=True)
class LocalMeasurer:
    """Without `takes_cores` the caller holds the machine's cores (`optimizer.measuring.cores`)."""

    takes_cores: bool = True

    @cached_property
    def machine(self) -> Machine:
        return this_machine()

    def outputs(self, contender: Contender, batches: Iterable[Batch]) -> Iterator[Batch]:
        with (
            self._sharing(),
            closing(load_engine(contender.directory, contender.spec)) as engine,
        ):
            for batch in batches:
                yield engine.run(batch)

    def kernels(self, contender: Contender, batch: Batch, n_runs: int) -> Sequence[KernelTime]:
        spec = contender.spec
        with self._alone(spec):
            return engine_module(spec.name).profile(contender.directory, spec, batch, n_runs)

    def time(
        self,
        variant: Contender,
        baseline: Contender | None,
        inputs: Batch,
        batch_sizes: Sequence[int],
        *,
        effort: Effort,
        seed: int,
    ) -> Timing:
        with self._alone(variant.spec):
            return timing.measure(
                variant,
                baseline,
                inputs,
                batch_sizes,
                effort=effort,
                seed=seed,
                places=places(variant.spec, allowed_cpus()),
            )

    def memory_bytes(self, contender: Contender, batch: Batch) -> int:
        with self._sharing(), ChildMeasurer(takes_cores=False) as child:
            return child.memory_bytes(contender, batch)

    def joules(self, contender: Contender, batch: Batch, seconds: float) -> float | None:
        if not read_counters():
            return None
        spec = contender.spec
        with self._alone(spec), Instances(contender, places(spec, allowed_cpus())) as instances:
            before = read_counters()
            n_runs = run_for(instances, batch, min(seconds, MAX_SECONDS))
            spent = spent_joules(before, read_counters())
        return None if spent is None else spent / n_runs

    def _alone(self, spec: EngineSpec) -> AbstractContextManager[object]:
        n_cores = min(spec.instances * spec.threads, len(allowed_cpus()))
        return measuring_cores(n_cores) if self.takes_cores else nullcontext()

    def _sharing(self) -> AbstractContextManager[object]:
        return building() if self.takes_cores else nullcontext()


def places(spec: EngineSpec, cpus: Sequence[int]) -> Places:
    """The processors of each instance, none shared; empty where there are too few, or the system
    knows no such bound."""
    threads = spec.threads
    if spec.instances * threads > len(cpus) or not hasattr(os, "sched_setaffinity"):
        return ()
    return [frozenset(cpus[i * threads : (i + 1) * threads]) for i in range(spec.instances)]


def run_for(
    instances: Instances,
    batch: Batch,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Keep all instances busy with the batch for so long; returns how often they ran it, at
    least once each."""
    end_s = clock() + seconds

    def run(engine: Engine) -> int:
        n_runs = 0
        while not n_runs or clock() < end_s:
            engine.run(batch)
            n_runs += 1
        return n_runs

    return sum(instances.each(run))
