"""The inference service: what REST and gRPC both call.

It owns the way of a request from its checked form to its answer, on the event loop; transports
bring requests in their own encodings and translate errors. It knows neither HTTP nor gRPC.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from serve import VERSION
from serve.batcher import Batch
from serve.control import ControlOptions, ModelControl
from serve.engines import Signature
from serve.errors import (
    Cancelled,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    QueueFull,
    ServeError,
)
from serve.execution import Execution, Job
from serve.messages import InferRequest, InferResponse, InputCheck
from serve.metrics import Metrics
from serve.model import Model
from serve.model_config_pb2 import ModelConfig
from serve.repository import Repository, Slot
from serve.response_cache import ResponseCache
from serve.reuse import Reuse
from serve.shared_memory import SharedMemory
from serve.statistics import Statistics
from serve.storage import Storage
from serve.triton import config_of

# Of the Open Inference Protocol; only what is implemented, clients rely on it.
EXTENSIONS = (
    "classification",
    "binary_tensor_data",
    "model_configuration",
    "parameters",
    "statistics",
)


@dataclass(frozen=True)
class ServiceOptions:
    """`response_cache_bytes` 0 switches the cache off. `max_in_flight_bytes` bounds the request
    bodies that are held at a time. `control_on_data_port` lets clients of the data port load,
    unload and change settings."""

    response_cache_bytes: int = 0
    merge_duplicates: bool = False
    max_in_flight_bytes: int = 1 << 30
    control_on_data_port: bool = False


@dataclass(frozen=True)
class ModelMetadata:
    name: str
    versions: tuple[str, ...]
    platform: str
    signature: Signature


@dataclass(frozen=True)
class ModelStatistics:
    name: str
    version: str
    statistics: Statistics


class InferenceService:
    """Inference, metadata, statistics and health over the models of a repository.

    Made on the event loop that its coroutines run on. `deliver` may be called from any thread;
    everything else belongs to the loop. `workers` run declared pre- and postprocessing.
    """

    def __init__(
        self,
        metrics: Metrics,
        workers: Executor,
        options: ServiceOptions | None = None,
        shared_memory: SharedMemory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self.options = options or ServiceOptions()
        self.repository = Repository()
        self.shared_memory = shared_memory or SharedMemory(None)
        self.control: ModelControl | None = None
        self._clock = clock
        cache_bytes = self.options.response_cache_bytes
        cache = ResponseCache(cache_bytes) if cache_bytes else None
        self._reuse = Reuse(metrics, cache, self.options.merge_duplicates, clock)
        self._execution = Execution(metrics, workers, clock)
        self._draining = False
        self._n_bytes = 0

    def controlled(self, storage: Storage, options: ControlOptions) -> ModelControl:
        """Have the models come from `storage`, loaded and unloaded as `options` say."""
        self.control = ModelControl(
            storage, self.repository, self.metrics, self.deliver, options, self._reuse.forget
        )
        return self.control

    # --- health and metadata

    @property
    def is_ready(self) -> bool:
        """Models answer and new requests are welcome: false while loading and draining."""
        return self.repository.is_ready and not self._draining

    @property
    def is_draining(self) -> bool:
        return self._draining

    def check_model_ready(self, name: str, version: str = "") -> None:
        """Raise ModelNotReady, with the reason, while loading, draining or failed; and
        ModelNotFound for an unknown one."""
        model = self._model(name, version)
        if self._draining:
            raise ModelNotReady(name, model.manifest.version, "the server is draining")

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        model = self._model(name, version)
        versions = tuple(self.repository.versions(name))
        return ModelMetadata(name, versions, model.platform, model.signature)

    def model_config(self, name: str, version: str = "") -> ModelConfig:
        """What Triton would call the version's configuration."""
        config = config_of(self._model(name, version))
        config.response_cache.enable = self._reuse.is_caching
        return config

    def model_statistics(self, name: str = "", version: str = "") -> list[ModelStatistics]:
        """Those of a version, of all ready versions of a model, or of all models."""
        if version:
            self._model(name, version)
        elif name:
            self.repository.slot(name)
        return [
            ModelStatistics(
                slot.name, slot.version, self.metrics.statistics(slot.name, slot.version)
            )
            for slot in self.repository.slots(name or None)
            if slot.model is not None and version in ("", slot.version)
        ]

    def server_metadata(self) -> tuple[str, str, tuple[str, ...]]:
        """Name, version and extensions."""
        extensions = list(EXTENSIONS)
        if self.shared_memory.enabled:
            extensions.append("system_shared_memory")
        if self.options.control_on_data_port:
            extensions += ["model_repository", "model_repository(unload_dependents)", "logging"]
        return "trimserve", VERSION, tuple(extensions)

    async def index(self, ready_only: bool = False) -> list[Slot]:
        """Every version with its state, and the reason where it isn't ready."""
        if self.control is None:
            return list(self.repository.slots())
        return await self.control.index(ready_only)

    def signature(self, name: str, version: str = "") -> tuple[Signature, int]:
        """The client's side of a model, and its max batch size (0: no batch dimension)."""
        model = self._model(name, version)
        return model.signature, model.max_batch_size

    def input_check(self, name: str, version: str = "") -> InputCheck:
        """What a model says to the inputs of one request, by name, datatype and shape, before their
        data are decoded or copied; each may come once."""
        model = self._model(name, version)
        seen: set[str] = set()

        def check(given: str, datatype: str, shape: Sequence[int]) -> None:
            model.check_declared(given, datatype, shape)
            if given in seen:
                raise InvalidRequest("inputs.name", given, "each input once")
            seen.add(given)

        return check

    def labels(self, name: str, version: str = "") -> tuple[str, str]:
        """Model and version as metric labels: empty where the repository doesn't know them."""
        try:
            manifest = self._model(name, version).manifest
        except (ModelNotFound, ModelNotReady):
            return "", ""
        return manifest.model, manifest.version

    # --- inference

    async def infer(self, request: InferRequest, arrival_s: float) -> InferResponse:
        """Answer one request, which arrived at `arrival_s` on the monotonic clock.

        Raises a ServeError. Cancelling the coroutine takes the request out of the queue.
        """
        model = self._model(request.model, request.version)
        name, version = model.manifest.model, model.manifest.version
        statistics = self.metrics.statistics(name, version)
        model.n_leases += 1
        code = ServeError.code  # unless it ends otherwise
        try:
            job = _job(model, request, arrival_s)
            if self._reuse.is_on:
                answer = await self._reuse.answer(job, request.tenant, self._execution.run)
            else:
                answer = await self._execution.run(job)
            tensors = model.tensors(request, answer.outputs)
            code = "ok"
        except ServeError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = Cancelled.code
            raise
        finally:
            model.n_leases -= 1
            seconds = self._clock() - arrival_s
            if code != "ok":
                statistics.failed(seconds, code)
        now_ms = time.time_ns() // 1_000_000
        statistics.answered(seconds, job.n_rows, answer.timings, now_ms)
        return InferResponse(name, version, tensors, request.id)

    def reserve(self, n_bytes: int) -> None:
        """Count a request's body, before it is kept, against the bytes in flight. Raises QueueFull
        where they are at their limit; every reservation is given back by `release`."""
        if not self.has_room(n_bytes):
            raise QueueFull(self.options.max_in_flight_bytes, 1.0, "bytes in flight")
        self._n_bytes += n_bytes

    def has_room(self, n_bytes: int) -> bool:
        """Whether `reserve` would succeed now. Bodies are counted as they arrive, not as they are
        announced: who announces and sends nothing takes nobody's place."""
        return self._n_bytes + n_bytes <= self.options.max_in_flight_bytes

    def release(self, n_bytes: int) -> None:
        self._n_bytes -= n_bytes

    def deliver(self, batch: Batch) -> None:
        """Take a batch's completions; called from the instances' threads."""
        self._execution.deliver(batch)

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

    @property
    def _n_in_flight(self) -> int:
        return self._execution.n_in_flight + self._reuse.n_following

    def _model(self, name: str, version: str) -> Model:
        if not self.repository.is_open:
            raise ModelNotReady(name, version, "the repository is loading")
        return self.repository.get(name, version)


def _job(model: Model, request: InferRequest, arrival_s: float) -> Job:
    """The request as the model's; raises InvalidRequest where it doesn't fit the signature."""
    inputs = model.checked_inputs(request)
    deadline_s = request.deadline_s
    if deadline_s is None:
        timeout_s = model.manifest.batching.default_timeout_s
        deadline_s = arrival_s + timeout_s if timeout_s else math.inf
    return Job(model, inputs, model.n_rows(inputs), arrival_s, deadline_s)
