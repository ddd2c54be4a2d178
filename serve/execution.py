"""Execution of one checked request on one model: preprocessing, batches, postprocessing.

On the event loop; what computes does so in worker threads or on the model's instances. It knows
nothing of names, versions to choose or answers to reuse.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from serve.batch_policy import Entry
from serve.batcher import Batch, Completion, Timing, Work
from serve.errors import (
    ArtifactInvalid,
    DeadlineExceeded,
    EngineFailed,
    QueueFull,
    ServeError,
)
from serve.metrics import Metrics
from serve.model import Model
from serve.tensor import Array

_log = logging.getLogger(__name__)

# After its deadline a request in a running batch is given up; the batch itself goes on.
_MAX_DEADLINE_S = 24 * 3600.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose inputs fit the model's signature; `deadline_s` is infinite for none."""

    model: Model
    inputs: Mapping[str, Array]
    n_rows: int
    arrival_s: float
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs by the client's names. `timings` are those of the batches that made them."""

    outputs: Mapping[str, Array]
    timings: tuple[Timing, ...] = field(default=())


@dataclass(slots=True, eq=False)
class _Call:
    """A piece of a request under way: where its completion goes."""

    model: Model
    completion: asyncio.Future[Completion]


class Execution:
    """Runs jobs; made on the event loop. `deliver` may be called from any thread.

    `workers` run declared pre- and postprocessing; of one model at most `max_queue_size` requests
    wait for them.
    """

    def __init__(
        self, metrics: Metrics, workers: Executor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._workers = workers
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._n_working: dict[Model, int] = {}
        self.n_in_flight = 0

    async def run(self, job: Job) -> Answer:
        """The outputs of a request. Raises a ServeError; cancelling takes it out of the queue."""
        name = (job.model.manifest.model, job.model.manifest.version)
        now = self._clock()
        if job.deadline_s <= now:
            raise DeadlineExceeded(now - job.arrival_s, "front end")
        self.n_in_flight += 1
        self._metrics.request_admitted(*name)
        try:
            if job.model.transform is None:
                return await self._batched(job, job.inputs)
            return await self._transformed(job)
        finally:
            self.n_in_flight -= 1
            self._metrics.request_left(*name)

    def deliver(self, batch: Batch) -> None:
        """Hand a batch's completions to the loop; called from the instances' threads."""
        self._loop.call_soon_threadsafe(self._resolve, batch)

    async def _transformed(self, job: Job) -> Answer:
        transform = job.model.transform
        assert transform is not None
        queue_size = job.model.manifest.batching.max_queue_size
        if self._n_working.get(job.model, 0) >= queue_size:
            raise QueueFull(queue_size, 1.0, "requests in preprocessing")
        inputs = await self._worked(job, "preprocessing", transform.before, job.inputs)
        answer = await self._batched(job, inputs)
        outputs = await self._worked(job, "postprocessing", transform.after, answer.outputs)
        return Answer(outputs, answer.timings)

    async def _worked(
        self,
        job: Job,
        phase: str,
        work: Callable[[Mapping[str, Array]], Mapping[str, Array]],
        arrays: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        """`work` in a worker thread, by the deadline at most."""
        model, manifest = job.model, job.model.manifest
        self._n_working[model] = self._n_working.get(model, 0) + 1
        started, outcome = self._clock(), ServeError.code
        future = self._workers.submit(work, arrays)
        # Whoever waits may go; the worker is busy until it is done.
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._worked_off, model))
        try:
            outputs = await self._by_deadline(job, asyncio.wrap_future(future))
            outcome = "ok"
            return outputs
        except ServeError as error:
            outcome = error.code
            raise
        except ArtifactInvalid as error:
            _log.error("%s: %s", phase, error, extra={"model": manifest.model})
            outcome = EngineFailed.code
            raise EngineFailed(manifest.model, manifest.version) from error
        except TimeoutError:
            outcome = DeadlineExceeded.code
            raise DeadlineExceeded(self._clock() - job.arrival_s, phase) from None
        finally:
            seconds = self._clock() - started
            self._metrics.phase_ended(
                manifest.model, manifest.version, "transform", seconds, outcome
            )

    def _worked_off(self, model: Model) -> None:
        self._n_working[model] -= 1
        if not self._n_working[model]:
            del self._n_working[model]

    async def _batched(self, job: Job, inputs: Mapping[str, Array]) -> Answer:
        entries = job.model.entries(inputs, job.n_rows, job.arrival_s, job.deadline_s)
        completions = await self._completions(job, entries)
        for completion in completions:
            if completion.error is not None:
                raise completion.error
        timings = tuple(completion.timing for completion in completions)
        if len(completions) == 1:
            return Answer(completions[0].outputs, timings)
        return Answer(_joined(job.model, [one.outputs for one in completions]), timings)

    async def _completions(self, job: Job, entries: list[Entry[Work]]) -> list[Completion]:
        """Of all pieces of a request, or of none: what is queued of it leaves with an error."""
        batcher = job.model.batcher
        futures: list[asyncio.Future[Completion]] = []
        try:
            for entry in entries:
                call = _Call(job.model, self._loop.create_future())
                entry.item.context = call
                futures.append(call.completion)
            if len(futures) == 1:
                batcher.submit(entries[0])
                return [await self._by_deadline(job, futures[0])]
            batcher.submit_all(entries)
            return await self._by_deadline(job, asyncio.gather(*futures))
        except TimeoutError:
            queued = [batcher.cancel(entry) for entry in entries]
            phase = "queue" if any(queued) else "engine"
            raise DeadlineExceeded(self._clock() - job.arrival_s, phase) from None
        except BaseException:
            for entry in entries:
                batcher.cancel(entry)
            raise

    async def _by_deadline(self, job: Job, future: asyncio.Future[Result]) -> Result:
        """Wait for `future`, and at most until the job's deadline: TimeoutError."""
        remaining_s = job.deadline_s - self._clock()
        if remaining_s > _MAX_DEADLINE_S:
            return await future
        async with asyncio.timeout(remaining_s):
            return await future

    def _resolve(self, batch: Batch) -> None:
        for completion in batch.completions:
            call = completion.work.context
            assert isinstance(call, _Call)
            manifest = call.model.manifest
            self._metrics.request_queued(manifest.model, manifest.version, completion)
            if not call.completion.done():
                call.completion.set_result(completion)
        if batch.n_rows:
            call = batch.completions[-1].work.context
            assert isinstance(call, _Call)
            manifest = call.model.manifest
            self._metrics.batch_executed(manifest.model, manifest.version, batch)


def _joined(model: Model, parts: list[Mapping[str, Array]]) -> dict[str, Array]:
    """The outputs of a request's pieces behind each other. Pieces whose other axes differ (the
    model's choice, not the client's) have no common array."""
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        manifest = model.manifest
        raise EngineFailed(manifest.model, manifest.version) from error
