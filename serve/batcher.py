"""The batcher: requests of one model in, batches through its engine instances, answers out.

One thread for each instance takes decisions from the shared queue and runs them, so a busy
instance goes from batch to batch without a hop through the front end. It knows no transport and
no event loop: answers leave through `deliver`, once a batch, on the instance's thread.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.batch_policy import BatchQueue, Decision, Entry
from serve.engines import Engine
from serve.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    ServeError,
    ShuttingDown,
)
from serve.padding import Padding
from serve.tensor import Array

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Work:
    """What the batcher needs of a request: the engine's inputs, their rows, and their own length
    where the model pads. `context` belongs to whoever submits it."""

    inputs: Mapping[str, Array]
    n_rows: int
    context: object
    length: int = 0


@dataclass(slots=True)
class Phases:
    """Seconds that a batch took: putting its inputs together, in the engine, and taking its
    outputs apart. Several runs where a failing batch was halved."""

    assemble_s: float = 0.0
    execute_s: float = 0.0
    split_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.assemble_s + self.execute_s + self.split_s


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went: in the queue, then in the phases of its batch."""

    queue_s: float
    phases: Phases = field(default_factory=Phases)
    batch_rows: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one piece of work: `outputs` by name, or an `error`."""

    work: Work
    timing: Timing
    outputs: Mapping[str, Array] = field(default_factory=dict)
    error: ServeError | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """All that one decision ended: its completions, and the executed batch (0 rows for none)."""

    completions: tuple[Completion, ...]
    n_rows: int = 0
    phases: Phases = field(default_factory=Phases)
    reason: str = ""


class Batcher:
    """Queue and instances of one model version.

    The first axis of the tensors is the batch where the queue's limits let more than one request
    share a run. `padding` says how lengths are made equal; the queue's lanes are its buckets then,
    and engines with `fixed_shapes` get no other lengths. Others get a batch's longest.
    `deliver` is called from the instances' threads and must not block.
    """

    def __init__(
        self,
        name: tuple[str, str],
        engines: Sequence[Engine],
        queue: BatchQueue[Work],
        deliver: Callable[[Batch], None],
        padding: Padding | None = None,
        fixed_shapes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._queue = queue
        self._deliver = deliver
        self._padding = padding
        self._fixed_shapes = fixed_shapes
        self._clock = clock
        self._condition = threading.Condition()
        self._n_idle = 0
        self._closing = False
        self._threads = [
            threading.Thread(
                target=self._serve, args=(engine,), name=f"{name[0]}-{index}", daemon=True
            )
            for index, engine in enumerate(engines)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def n_queued(self) -> int:
        return self._queue.n_requests

    def retry_after_s(self) -> float:
        """Seconds until what is queued now is served."""
        with self._condition:
            return self._queue.retry_after_s()

    def submit(self, entry: Entry[Work]) -> None:
        """Queue a request. Raises QueueFull or ShuttingDown where it isn't admitted."""
        with self._condition:
            if self._closing:
                raise ShuttingDown
            now = self._clock()
            admitted, evicted = self._queue.offer(entry, now)
            if self._n_idle:
                self._condition.notify()
            full = self._full() if evicted or not admitted else None
            hopeless = [self._is_hopeless(one, now) for one in evicted]
        if evicted:
            ends = zip(evicted, hopeless, strict=True)
            completions = (_ended(one, now, None if past else full) for one, past in ends)
            self._deliver(Batch(tuple(completions)))
        if full is not None and not admitted:
            raise full

    def submit_all(self, entries: Sequence[Entry[Work]]) -> None:
        """Queue the pieces of one request, all of them or, with the errors of `submit`, none;
        nobody is evicted for them."""
        with self._condition:
            if self._closing:
                raise ShuttingDown
            if self._queue.n_requests + len(entries) > self._queue.limits.max_queue_size:
                raise self._full()
            now = self._clock()
            for entry in entries:
                self._queue.offer(entry, now)
            self._condition.notify_all()

    def cancel(self, entry: Entry[Work]) -> bool:
        """Take a request out of the queue; False where it already runs or is answered."""
        with self._condition:
            return self._queue.cancel(entry)

    def close(self, finish: bool = True) -> None:
        """Admit nothing more, finish what is queued, and end the threads. Blocks until then.

        Without `finish` only what runs is waited for; what is queued ends with ShuttingDown.
        """
        with self._condition:
            self._closing = True
            abandoned = [] if finish else self._queue.drain()
            self._condition.notify_all()
        if abandoned:
            now = self._clock()
            self._deliver(Batch(tuple(_ended(entry, now, ShuttingDown()) for entry in abandoned)))
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _full(self) -> QueueFull:
        return QueueFull(self._queue.limits.max_queue_size, self._queue.retry_after_s())

    def _is_hopeless(self, entry: Entry[Work], now: float) -> bool:
        """Whether it couldn't make its deadline any more, even if it ran now."""
        return now + self._queue.times_of(entry.lane).of(entry.n_rows) > entry.deadline_s

    def _serve(self, engine: Engine) -> None:
        while (decision := self._next_decision()) is not None:
            now = self._clock()
            completions = tuple(_ended(entry, now) for entry in decision.expired)
            batch = Batch(completions)
            if decision.batch:
                batch = self._run(engine, decision, completions)
            self._deliver(batch)

    def _next_decision(self) -> Decision[Work] | None:
        """Wait for a decision with something to do; None when the batcher is done."""
        with self._condition:
            while True:
                now = self._clock()
                decision = self._queue.decide(now)
                if decision.batch or decision.expired:
                    return decision
                if self._closing and not self._queue.n_requests:
                    return None
                wait_s = min(decision.wake_at_s - now, threading.TIMEOUT_MAX)
                self._n_idle += 1
                self._condition.wait(wait_s)
                self._n_idle -= 1

    def _run(
        self, engine: Engine, decision: Decision[Work], others: tuple[Completion, ...]
    ) -> Batch:
        started = self._clock()
        entries = decision.batch
        n_rows = sum(entry.n_rows for entry in entries)
        phases = Phases()
        bucket = decision.lane if isinstance(decision.lane, int) else 0
        results = self._run_halving(engine, [entry.item for entry in entries], bucket, phases)
        with self._condition:
            self._queue.times_of(decision.lane).observe(n_rows, max(phases.total_s, 1e-9))
        completions = [
            Completion(
                entry.item,
                Timing(started - entry.arrival_s, phases, n_rows),
                {} if isinstance(result, ServeError) else result,
                result if isinstance(result, ServeError) else None,
            )
            for entry, result in zip(entries, results, strict=True)
        ]
        return Batch((*others, *completions), n_rows, phases, decision.reason)

    def _run_halving(
        self, engine: Engine, works: Sequence[Work], bucket: int, phases: Phases
    ) -> Sequence[Mapping[str, Array] | ServeError]:
        """Run together; where that fails, each half alone, so that only the culprit fails and its
        neighbours are run again as few times as can be."""
        try:
            return self._run_together(engine, works, bucket, phases)
        except Exception as error:  # noqa: BLE001 - engines raise anything; the last is logged
            if len(works) == 1 and isinstance(error, InvalidRequest):
                return [error]
            if len(works) == 1:
                _log.exception("engine failed", extra={"model": ":".join(self._name)})
                return [EngineFailed(*self._name)]
        middle = len(works) // 2
        return [
            *self._run_halving(engine, works[:middle], bucket, phases),
            *self._run_halving(engine, works[middle:], bucket, phases),
        ]

    def _run_together(
        self, engine: Engine, works: Sequence[Work], bucket: int, phases: Phases
    ) -> Sequence[Mapping[str, Array]]:
        started = self._clock()
        inputs = self._assembled(works, bucket)
        assembled = self._clock()
        phases.assemble_s += assembled - started
        try:
            outputs = engine.run(inputs)
        finally:
            executed = self._clock()
            phases.execute_s += executed - assembled
        results = self._split(works, outputs)
        phases.split_s += self._clock() - executed
        return results

    def _assembled(self, works: Sequence[Work], bucket: int) -> Mapping[str, Array]:
        if self._padding is not None:
            length = bucket if self._fixed_shapes else max(work.length for work in works)
            return self._padding.assemble([work.inputs for work in works], length)
        if len(works) == 1:
            return {name: _aligned(array) for name, array in works[0].inputs.items()}
        return {
            name: np.concatenate([work.inputs[name] for work in works]) for name in works[0].inputs
        }

    def _split(
        self, works: Sequence[Work], outputs: Mapping[str, Array]
    ) -> Sequence[Mapping[str, Array]]:
        if len(works) == 1:
            return [self._own(works[0], outputs)]
        stops = np.cumsum([work.n_rows for work in works]).tolist()
        for name, array in outputs.items():
            if len(array) != stops[-1]:
                raise ValueError(f"output {name!r} has {len(array)} rows, want {stops[-1]}")
        return [
            self._own(
                work, {name: array[stop - work.n_rows : stop] for name, array in outputs.items()}
            )
            for work, stop in zip(works, stops, strict=True)
        ]

    def _own(self, work: Work, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return outputs if self._padding is None else self._padding.cut(outputs, work.length)


def _ended(entry: Entry[Work], now: float, error: ServeError | None = None) -> Completion:
    """The end of a request that leaves the queue unserved, by default for its deadline."""
    waited_s = now - entry.arrival_s
    return Completion(
        entry.item,
        Timing(waited_s),
        error=error or DeadlineExceeded(waited_s, "queue"),
    )


def _aligned(array: Array) -> Array:
    """A view into a request's body may start anywhere; engines want aligned memory."""
    return array if array.flags.aligned else array.copy()
