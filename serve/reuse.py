"""Reuse of answers: equal requests are answered from the cache, or by the one that is under way.

Both are options of the server. Equal means: of the same tenant, to the same loaded version, with
the same inputs bit for bit. It knows neither how answers are computed nor what they mean.
"""

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from serve.errors import DeadlineExceeded, EngineFailed, InvalidRequest, QueueFull, ServeError
from serve.execution import Answer, Job
from serve.metrics import Metrics
from serve.model import Model
from serve.response_cache import ResponseCache, request_key

# What an equal request would end with as well; other ends are the first one's own.
_SHARED_ENDS = (EngineFailed, InvalidRequest)


class Reuse:
    """In front of an execution, where it is on."""

    def __init__(
        self,
        metrics: Metrics,
        cache: ResponseCache | None,
        merge: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._cache = cache
        self._merge = merge
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._flights: dict[bytes, asyncio.Future[Answer | ServeError | None]] = {}
        self._n_following: dict[Model, int] = {}
        self._identities: WeakKeyDictionary[Model, str] = WeakKeyDictionary()
        self._numbers = itertools.count()

    @property
    def n_following(self) -> int:
        """Requests that wait for an equal one; as many may as the model's queue holds."""
        return sum(self._n_following.values())

    @property
    def is_on(self) -> bool:
        return self._cache is not None or self._merge

    @property
    def is_caching(self) -> bool:
        return self._cache is not None

    async def answer(
        self, job: Job, tenant: str, compute: Callable[[Job], Awaitable[Answer]]
    ) -> Answer:
        """The job's answer, by `compute` where no other one may be used."""
        started = self._clock()
        signature = job.model.signature
        datatypes = {spec.name: spec.datatype for spec in signature.inputs}
        key = request_key(
            self._secret, tenant, self._identity(job.model), job.inputs, datatypes, ()
        )
        while True:
            found = self._found(job, key, started)
            if found is not None:
                return found
            flight = self._flights.get(key)
            if flight is None:
                return await self._computed(job, key, compute)
            end = await self._followed(job, flight)
            if isinstance(end, ServeError):
                raise end
            if end is not None:
                manifest = job.model.manifest
                self._metrics.request_merged(manifest.model, manifest.version)
                return Answer(end.outputs)

    def forget(self, model: Model) -> None:
        """Drop the answers of a version that is unloaded."""
        if self._cache is not None and model in self._identities:
            self._cache.forget(self._identities[model])

    def _found(self, job: Job, key: bytes, started: float) -> Answer | None:
        if self._cache is None:
            return None
        outputs = self._cache.get(key)
        manifest = job.model.manifest
        statistics = self._metrics.statistics(manifest.model, manifest.version)
        if outputs is None:
            return None
        statistics.cache_hit.add(self._clock() - started)
        return Answer(outputs)

    async def _computed(
        self, job: Job, key: bytes, compute: Callable[[Job], Awaitable[Answer]]
    ) -> Answer:
        """Compute, while equal requests wait for the end if merging is on."""
        flight: asyncio.Future[Answer | ServeError | None] = (
            asyncio.get_running_loop().create_future()
        )
        if self._merge:
            self._flights[key] = flight
        end: Answer | ServeError | None = None
        try:
            answer = end = await compute(job)
        except _SHARED_ENDS as error:
            end = error
            raise
        finally:
            self._flights.pop(key, None)
            flight.set_result(end)
        if self._cache is not None:
            started = self._clock()
            self._cache.put(key, self._identity(job.model), answer.outputs)
            manifest = job.model.manifest
            statistics = self._metrics.statistics(manifest.model, manifest.version)
            statistics.cache_miss.add(self._clock() - started)
        return answer

    async def _followed(
        self, job: Job, flight: asyncio.Future[Answer | ServeError | None]
    ) -> Answer | ServeError | None:
        """How the request under way ended; None where its end was its own (a deadline, a client
        that hung up), and this one has to try for itself."""
        remaining_s = job.deadline_s - self._clock()
        limit = job.model.manifest.batching.max_queue_size
        n_others = self._n_following.get(job.model, 0)
        if n_others >= limit:
            raise QueueFull(limit, job.model.batcher.retry_after_s())
        self._n_following[job.model] = n_others + 1
        try:
            async with asyncio.timeout(None if math.isinf(remaining_s) else remaining_s):
                return await asyncio.shield(flight)
        except TimeoutError:
            raise DeadlineExceeded(self._clock() - job.arrival_s, "queue") from None
        finally:
            self._n_following[job.model] -= 1
            if not self._n_following[job.model]:
                del self._n_following[job.model]

    def _identity(self, model: Model) -> str:
        """Names what is loaded, not the version: loaded again, it may be something else."""
        if model not in self._identities:
            self._identities[model] = f"load-{next(self._numbers)}"
        return self._identities[model]
