"""Timing: how long an engine takes for a batch, the way it is served.

All instances run at once, each in its thread. Batch sizes and inputs change from call to call,
since some engines plan anew for a new shape and caches flatter a repeated input. Variant and
baseline take turns (A B A B), so that what slows the machine slows both, and their ratio can be
trusted where seconds can't: these machines drift by a factor of two within the hour. It measures;
it stores nothing and judges nothing, and who else is on the cores is `optimizer.measuring.cores`'
matter.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from optimizer.result import LEVELS, InstanceTimes, Speedup
from optimizer.stats import ratio_interval
from optimizer.surroundings import Surroundings, observe
from serve.artifact import ServiceTime
from serve.engines import Engine, EngineSpec, load_engine
from serve.tensor import Array

PROTOCOL_VERSION = 2
CONFIDENCE = 0.95
_WINDOW = 5
"""Passes of the rolling median by which the warm-up is judged."""
_STEADY = 0.05
"""Largest relative change of that median from one window to the next when warm."""

Result = TypeVar("Result")
Places = Sequence[frozenset[int]]
"""For each instance the processors that its threads are kept to; empty for no such bound."""


@dataclass(frozen=True)
class Effort:
    """How much is measured. A pass runs every batch size once."""

    min_passes: int = 24
    max_passes: int = 200
    seconds: float = 3.0
    """Passes go on until this much was spent, within the bounds."""
    max_warmup_passes: int = 30
    max_warmup_s: float = 1.5
    max_retries: int = 2
    """Times that a noisy result is measured on."""
    noisy_width: float = 0.2
    """Width of the ratio's interval, relative to the ratio, above which it is noisy."""


@dataclass(frozen=True)
class Contender:
    """An engine to time: its files and its spec in the serving configuration."""

    directory: Path
    spec: EngineSpec


@dataclass(frozen=True)
class Timing:
    """Service times of the variant, and by how much it is faster than the baseline, where it
    was timed against one."""

    times: InstanceTimes
    speedup: Speedup | None = None
    surroundings: Surroundings = field(default_factory=Surroundings)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Timing":
        times = dict(stored["times"])
        times["times"] = tuple(ServiceTime(**one) for one in times["times"])
        times["quantiles"] = tuple(tuple(one) for one in times.get("quantiles", ()))
        speedup = stored["speedup"]
        return cls(
            InstanceTimes(**times),
            Speedup(**speedup) if speedup else None,
            Surroundings(**stored.get("surroundings", {})),
        )


@dataclass
class _Samples:
    """Seconds by batch size: `calls` of every call, `passes` the mean over instances of each
    pass, which pairs with the same pass of the other contender."""

    calls: dict[int, list[float]] = field(default_factory=dict)
    passes: dict[int, list[float]] = field(default_factory=dict)

    def add(self, of_instances: Sequence[Mapping[int, float]]) -> None:
        for size in of_instances[0]:
            seconds = [instance[size] for instance in of_instances]
            self.calls.setdefault(size, []).extend(seconds)
            self.passes.setdefault(size, []).append(sum(seconds) / len(seconds))


def measure(
    variant: Contender,
    baseline: Contender | None,
    inputs: Mapping[str, Array],
    batch_sizes: Sequence[int],
    *,
    effort: Effort | None = None,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
    places: Places = (),
) -> Timing:
    """Time the variant, against the baseline where there is one, both in the configuration that
    their specs name.

    `inputs` are at least as many different samples as the largest batch. The speedup is at the
    largest batch size, where throughput is decided. Raises what loading or running raises.
    """
    effort = effort or Effort()
    sizes = sorted(batch_sizes)
    calls = _Calls(inputs, sizes, seed)
    measured = [_Samples() for _ in range(1 if baseline is None else 2)]
    speedup = None
    surroundings = observe()
    with ExitStack() as stack:
        given = [variant] if baseline is None else [variant, baseline]
        contenders = [stack.enter_context(Instances(one, places)) for one in given]
        stack.enter_context(_no_collection())
        for instances in contenders:
            _warm_up(instances, calls, effort, clock)
        for _ in range(1 + effort.max_retries):
            _take_turns(contenders, measured, calls, effort, clock)
            if baseline is not None:
                speedup = _speedup(measured, sizes[-1], effort, seed)
            if speedup is None or not speedup.noisy:
                break
    times = tuple(_service_time(size, measured[0].calls[size]) for size in sizes)
    spec = variant.spec
    padded = bool(spec.batch_sizes)
    quantiles = tuple(_quantiles(measured[0].calls[size]) for size in sizes)
    instance_times = InstanceTimes(spec.instances, spec.threads, times, padded, quantiles)
    return Timing(instance_times, speedup, surroundings())


class _Calls:
    """What each instance runs in a pass: every size once, shuffled, on other samples each time."""

    def __init__(self, inputs: Mapping[str, Array], sizes: Sequence[int], seed: int) -> None:
        self._inputs = inputs
        self._sizes = sizes
        self._n = len(next(iter(inputs.values())))
        self._random = np.random.default_rng(seed)
        if self._n < sizes[-1]:
            raise ValueError(f"got {self._n} samples, want at least {sizes[-1]}")

    def next_pass(self) -> list[tuple[int, dict[str, Array]]]:
        calls = []
        for size in self._random.permutation(self._sizes):
            start = int(self._random.integers(self._n - size + 1))
            batch = {name: array[start : start + size] for name, array in self._inputs.items()}
            calls.append((int(size), batch))
        return calls


class Instances:
    """All instances of a contender, each with its thread, and a barrier that starts them.

    An instance is loaded in its thread and under its place, since the threads that engines make
    then inherit it.
    """

    def __init__(self, contender: Contender, places: Places = ()) -> None:
        """Raises ValueError where there are places, but not one for each instance."""
        self._contender = contender
        self._places = places
        self.n = contender.spec.instances
        if places and len(places) < self.n:
            raise ValueError(f"got {len(places)} places, want one for each of {self.n} instances")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._threads = [
                stack.enter_context(ThreadPoolExecutor(1, "instance")) for _ in range(self.n)
            ]
            for thread, place in zip(self._threads, self._places, strict=False):
                thread.submit(os.sched_setaffinity, 0, place).result()
            self._engines: list[Engine] = []
            for thread in self._threads:
                engine = thread.submit(
                    load_engine, self._contender.directory, self._contender.spec
                ).result()
                stack.callback(engine.close)
                self._engines.append(engine)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def each(self, work: Callable[[Engine], Result]) -> list[Result]:
        """Do the work with every engine at once, each in its thread."""
        pairs = zip(self._threads, self._engines, strict=True)
        futures = [thread.submit(work, engine) for thread, engine in pairs]
        return [future.result() for future in futures]

    def run(
        self, passes: Sequence[list[tuple[int, dict[str, Array]]]], clock: Callable[[], int]
    ) -> list[dict[int, float]]:
        """Run a pass in each instance at once: seconds by batch size, by instance."""
        barrier = threading.Barrier(self.n)
        work = zip(self._threads, self._engines, passes, strict=True)
        futures = [
            thread.submit(_run_pass, engine, calls, barrier, clock)
            for thread, engine, calls in work
        ]
        return [future.result() for future in futures]


def _run_pass(
    engine: Engine,
    calls: Sequence[tuple[int, dict[str, Array]]],
    barrier: threading.Barrier,
    clock: Callable[[], int],
) -> dict[int, float]:
    seconds = {}
    barrier.wait()
    try:
        for size, batch in calls:
            start = clock()
            engine.run(batch)
            seconds[size] = (clock() - start) * 1e-9
    except BaseException:
        barrier.abort()
        raise
    return seconds


def _warm_up(instances: Instances, calls: _Calls, effort: Effort, clock: Callable[[], int]) -> None:
    """Run until the rolling median of a pass is steady, or the bounds are reached."""
    totals: list[float] = []
    start = clock()
    while len(totals) < effort.max_warmup_passes:
        of_instances = instances.run([calls.next_pass() for _ in range(instances.n)], clock)
        totals.append(max(sum(seconds.values()) for seconds in of_instances))
        if is_steady(totals) or (clock() - start) * 1e-9 > effort.max_warmup_s:
            return


def is_steady(seconds: Sequence[float]) -> bool:
    """Whether the median of the last window is near that of the one before."""
    if len(seconds) < 2 * _WINDOW:
        return False
    before = float(np.median(seconds[-2 * _WINDOW : -_WINDOW]))
    now = float(np.median(seconds[-_WINDOW:]))
    return abs(now - before) <= _STEADY * before


def _take_turns(
    contenders: Sequence[Instances],
    measured: Sequence[_Samples],
    calls: _Calls,
    effort: Effort,
    clock: Callable[[], int],
) -> None:
    start = clock()
    for index in range(effort.max_passes):
        if index >= effort.min_passes and (clock() - start) * 1e-9 > effort.seconds:
            return
        # The same calls for both, and the order changes: who comes second finds warm caches.
        passes = [calls.next_pass() for _ in range(contenders[0].n)]
        turns = list(zip(contenders, measured, strict=True))
        for instances, samples in turns if index % 2 == 0 else reversed(turns):
            samples.add(instances.run(passes, clock))


def _speedup(measured: Sequence[_Samples], batch_size: int, effort: Effort, seed: int) -> Speedup:
    ours, theirs = (samples.passes[batch_size] for samples in measured)
    interval = ratio_interval(theirs, ours, CONFIDENCE, seed=seed)
    width = (interval.high - interval.low) / interval.estimate
    return Speedup(
        low=interval.low,
        estimate=interval.estimate,
        high=interval.high,
        confidence=CONFIDENCE,
        batch_size=batch_size,
        n_pairs=len(ours),
        noisy=width > effort.noisy_width,
    )


def _service_time(batch_size: int, seconds: Sequence[float]) -> ServiceTime:
    p50, p99 = np.quantile(seconds, [0.5, 0.99], method="inverted_cdf")
    return ServiceTime(batch_size, float(p50), float(p99), len(seconds))


def _quantiles(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.quantile(seconds, LEVELS, method="inverted_cdf").tolist())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, whose pauses would be taken for the engine's."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
