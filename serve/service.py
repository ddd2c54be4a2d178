"""The inference service: what REST and gRPC both call.

It owns the way of a request from its checked form to its answer, on the event loop; transports
bring requests in their own encodings and translate errors. It knows neither HTTP nor gRPC.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve import VERSION
from serve.batch_policy import Entry
from serve.batcher import Batch, Completion, Work
from serve.engines import Signature
from serve.errors import DeadlineExceeded, ModelNotFound, ModelNotReady
from serve.messages import InferRequest, InferResponse
from serve.metrics import Metrics
from serve.model import Model
from serve.repository import Repository

# Of the Open Inference Protocol; only what is implemented, clients rely on it.
EXTENSIONS = ("binary_tensor_data",)
# After its deadline a request in a running batch is given up; the batch itself goes on.
_MAX_DEADLINE_S = 24 * 3600.0


@dataclass(frozen=True)
class ModelMetadata:
    name: str
    versions: tuple[str, ...]
    platform: str
    signature: Signature


@dataclass(slots=True, eq=False)
class _Call:
    """A request under way: where its answer goes."""

    model: Model
    answer: asyncio.Future[Completion]


class InferenceService:
    """Inference, metadata and health over the models of a repository.

    Made on the event loop that its coroutines run on. `deliver` may be called from any thread;
    everything else belongs to the loop.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics = metrics
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._repository: Repository | None = None
        self._draining = False
        self._n_in_flight = 0

    def open(self, repository: Repository) -> None:
        """Serve the models of `repository`, which is loaded."""
        self._repository = repository
        for slot in repository.slots():
            if slot.model is not None:
                manifest = slot.model.manifest
                self.metrics.model_loaded(
                    manifest.model,
                    manifest.version,
                    manifest.variant_id,
                    manifest.engine.name,
                    manifest.engine.precision,
                )

    @property
    def is_ready(self) -> bool:
        """Models answer and new requests are welcome: false while loading and draining."""
        return self._repository is not None and self._repository.is_ready and not self._draining

    @property
    def is_draining(self) -> bool:
        return self._draining

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """False while loading, draining or failed; raises ModelNotFound for an unknown one."""
        try:
            self._model(name, version)
        except ModelNotReady:
            return False
        return not self._draining

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        model = self._model(name, version)
        assert self._repository is not None
        return ModelMetadata(
            name, tuple(self._repository.versions(name)), model.platform, model.signature
        )

    def server_metadata(self) -> tuple[str, str, tuple[str, ...]]:
        """Name, version and extensions."""
        return "trimserve", VERSION, EXTENSIONS

    def labels(self, name: str, version: str = "") -> tuple[str, str]:
        """Model and version as metric labels: empty where the repository doesn't know them."""
        try:
            manifest = self._model(name, version).manifest
        except (ModelNotFound, ModelNotReady):
            return "", ""
        return manifest.model, manifest.version

    async def infer(self, request: InferRequest, arrival_s: float) -> InferResponse:
        """Answer one request, which arrived at `arrival_s` on the monotonic clock.

        Raises a ServeError. Cancelling the coroutine takes the request out of the queue.
        """
        model = self._model(request.model, request.version)
        entry = model.entry(request, arrival_s, None)
        call = _Call(model, self._loop.create_future())
        entry.item.context = call
        completion = await self._completion(entry, call)
        if completion.error is not None:
            raise completion.error
        return InferResponse(
            model=model.manifest.model,
            version=model.manifest.version,
            outputs=model.outputs(request, completion.outputs),
            id=request.id,
        )

    def deliver(self, batch: Batch) -> None:
        """Hand a batch's completions to the loop; called from the instances' threads."""
        self._loop.call_soon_threadsafe(self._resolve, batch)

    def start_draining(self) -> None:
        """Turn not ready; requests are still answered, so that balancers can look away."""
        self._draining = True

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all admitted requests are answered; False where the time ran out."""
        self._draining = True
        ends = self._clock() + timeout_s
        while self._n_in_flight and self._clock() < ends:
            await asyncio.sleep(0.01)
        return not self._n_in_flight

    def _model(self, name: str, version: str) -> Model:
        if self._repository is None:
            raise ModelNotReady(name, version, "the repository is loading")
        return self._repository.get(name, version)

    async def _completion(self, entry: Entry[Work], call: _Call) -> Completion:
        model, version = call.model.manifest.model, call.model.manifest.version
        now = self._clock()
        if entry.deadline_s <= now:
            raise DeadlineExceeded(now - entry.arrival_s, "front end")
        call.model.batcher.submit(entry)
        self._n_in_flight += 1
        self.metrics.request_admitted(model, version)
        try:
            if entry.deadline_s - now > _MAX_DEADLINE_S:
                return await call.answer
            async with asyncio.timeout(entry.deadline_s - now):
                return await call.answer
        except TimeoutError:
            phase = "queue" if call.model.batcher.cancel(entry) else "engine"
            raise DeadlineExceeded(self._clock() - entry.arrival_s, phase) from None
        except asyncio.CancelledError:
            call.model.batcher.cancel(entry)
            raise
        finally:
            self._n_in_flight -= 1
            self.metrics.request_left(model, version)

    def _resolve(self, batch: Batch) -> None:
        for completion in batch.completions:
            call = completion.work.context
            assert isinstance(call, _Call)
            manifest = call.model.manifest
            self.metrics.request_queued(manifest.model, manifest.version, completion)
            if not call.answer.done():
                call.answer.set_result(completion)
        if batch.n_rows:
            call = batch.completions[-1].work.context
            assert isinstance(call, _Call)
            manifest = call.model.manifest
            self.metrics.batch_executed(manifest.model, manifest.version, batch)
