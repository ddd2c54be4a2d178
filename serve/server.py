"""The serving process: assembles service and transports, and takes them down without loss."""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from serve.control import ControlOptions, ModelControl
from serve.errors import ArtifactInvalid
from serve.machine import allowed_cores
from serve.metrics import CONTENT_TYPE, DEFAULT_THRESHOLD_S, Metrics
from serve.planning import Wanted
from serve.service import InferenceService, ServiceOptions
from serve.settings import Ports, Settings
from serve.shared_memory import SharedMemory
from serve.storage import Storage, open_storage
from serve.storage.local import LocalStorage
from serve.storage.onnx_file import OnnxFile
from serve.transport.admin import control_app, data_app
from serve.transport.grpc import GrpcOptions, GrpcServer
from serve.transport.http_server import HttpLimits, HttpServer, listening_socket
from serve.transport.metrics_server import MetricsServer
from serve.transport.rest import App, RestApp, RestOptions

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CONTROL_HOST = "127.0.0.1"  # whatever the data port listens on
READINESS_INTERVAL_S = 0.2


async def serve(settings: Settings, announce: Callable[[Ports, bool], None]) -> bool:
    """Serve until SIGTERM or SIGINT, then drain. `announce` is called once the start is over, with
    whether models answer: where some can be loaded later, none need have loaded yet.

    Returns whether everything admitted was answered in time. Raises ArtifactInvalid where there
    is nothing to serve, OSError where a port is taken.
    """
    stop = _stop_event()
    threshold_s = settings.slo.latency.threshold_s if settings.slo else DEFAULT_THRESHOLD_S
    metrics = Metrics(threshold_s)
    async with contextlib.AsyncExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(allowed_cores(), "transform"))
        memory = stack.enter_context(
            contextlib.closing(SharedMemory(settings.shared_memory_prefix))
        )
        service = InferenceService(metrics, workers, _service_options(settings), memory)
        storage = stack.enter_context(contextlib.closing(_storage(settings)))
        _check_found(settings, storage)
        control = service.controlled(storage, _control_options(settings))
        rest = RestApp(service, data_app(service), _rest_options(settings))
        http_port, http_server = await stack.enter_async_context(
            _listening(rest, settings.host, settings.http_port, settings)
        )
        metrics_server = MetricsServer(
            settings.host, settings.metrics_port, CONTENT_TYPE, metrics.exposition
        )
        stack.callback(metrics_server.stop)
        grpc_server = GrpcServer(service, _grpc_options(settings))
        stack.push_async_callback(grpc_server.stop, 0)
        grpc_port = await grpc_server.start(_address(settings.host, settings.grpc_port))
        control_port = None
        if settings.control_port is not None:
            control_port, _ = await stack.enter_async_context(
                _listening(control_app(service), CONTROL_HOST, settings.control_port, settings)
            )
        if not await _started(control, stop):
            await control.close(finish=False)
            return True
        _check_loaded(settings, service)
        # What is loaded now stays: out of the collector's way, whose pauses requests would feel.
        gc.collect()
        gc.freeze()
        readiness = _Readiness(service, grpc_server)
        is_ready = await readiness.update()
        announce(Ports(http_port, grpc_port, metrics_server.port, control_port), is_ready)
        watching = asyncio.create_task(_watch(settings, control, readiness))
        await stop.wait()
        watching.cancel()
        control.stop_changing()
        drained = await _drain(settings, service, grpc_server, http_server)
        await control.close(drained)
    return drained


async def _started(control: ModelControl, stop: asyncio.Event) -> bool:
    """Load what is to be there at the start; False where the process is asked to end meanwhile."""
    starting = asyncio.create_task(control.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.wait((starting,))
    return False


class _Readiness:
    """Tells gRPC's health service whether models answer, and the log each time that it changes."""

    def __init__(self, service: InferenceService, grpc_server: GrpcServer) -> None:
        self._service = service
        self._grpc_server = grpc_server
        self._told: bool | None = None

    async def update(self) -> bool:
        """Whether models answer."""
        is_ready = self._service.is_ready
        await self._grpc_server.set_ready(is_ready)
        if is_ready and not self._told:
            _log.info("ready to serve")
        elif not is_ready and self._told is not False:
            _log.warning("not ready to serve: %s", "; ".join(self._missing()))
        self._told = is_ready
        return is_ready

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(READINESS_INTERVAL_S)
            await self.update()

    def _missing(self) -> Iterator[str]:
        """What was asked for and doesn't answer, each with its reason."""
        for slot in self._service.repository.slots():
            if slot.wanted and slot.model is None:
                name = f"{slot.name}:{slot.version}" if slot.version else slot.name
                yield f"{name}: {slot.reason or slot.state}"


async def _watch(settings: Settings, control: ModelControl, readiness: _Readiness) -> None:
    """Poll the repository where the mode says so, and follow what is loaded and unloaded."""
    async with asyncio.TaskGroup() as tasks:
        if settings.model_control == "poll":
            tasks.create_task(control.poll(settings.poll_interval_s))
        if settings.model_control != "none":
            tasks.create_task(readiness.follow())


@contextlib.asynccontextmanager
async def _listening(
    app: App, host: str, port: int, settings: Settings
) -> AsyncIterator[tuple[int, "RunningHttp"]]:
    """An HTTP server on its port while the context is open; it ends with it, if not before."""
    with listening_socket(host, port) as listener:
        limits = HttpLimits(max_connections=settings.max_connections)
        running = RunningHttp(HttpServer(app, settings.drain_timeout_s, limits))
        running.task = asyncio.create_task(running.server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1], running
        finally:
            await running.stop()


class RunningHttp:
    """An HTTP server and the task that runs it."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.task: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Let no further connection in and answer what is there."""
        self.server.should_exit = True
        if self.task is not None:
            await self.task


async def _drain(
    settings: Settings,
    service: InferenceService,
    grpc_server: GrpcServer,
    http_server: RunningHttp,
) -> bool:
    """Not ready first, then closed to new work, then done with the old."""
    _log.info("draining")
    service.start_draining()
    await grpc_server.set_ready(False)
    await asyncio.sleep(settings.drain_delay_s)
    _, _, drained = await asyncio.gather(
        http_server.stop(),
        grpc_server.stop(settings.drain_timeout_s),
        service.drain(settings.drain_timeout_s),
    )
    _log.info("drained" if drained else "gave up draining", extra={"complete": drained})
    return drained


def _control_options(settings: Settings) -> ControlOptions:
    return ControlOptions(
        mode=settings.model_control,
        models=tuple(_wanted(text) for text in settings.load_models),
        policy=settings.version_policy,
        slo=settings.slo,
        oversize=settings.oversize,
        trust_code=settings.trust_code,
    )


def _storage(settings: Settings) -> Storage:
    if settings.model is not None:
        return OnnxFile(settings.model)
    assert settings.repository is not None
    return open_storage(settings.repository, settings.cache)


def _wanted(text: str) -> Wanted:
    name, _, digest = text.partition("@")
    return Wanted(name, digest=digest)


def _service_options(settings: Settings) -> ServiceOptions:
    return ServiceOptions(
        response_cache_bytes=settings.response_cache_bytes,
        merge_duplicates=settings.merge_duplicates,
        max_in_flight_bytes=max(settings.max_in_flight_bytes, settings.max_request_bytes),
        control_on_data_port=settings.control_on_data_port,
    )


def _rest_options(settings: Settings) -> RestOptions:
    return RestOptions(settings.max_request_bytes, settings.tenant_header)


def _grpc_options(settings: Settings) -> GrpcOptions:
    return GrpcOptions(
        max_message_bytes=settings.max_request_bytes,
        max_connections=settings.max_connections,
        max_connection_age_s=settings.max_connection_age_s,
        tenant_header=settings.tenant_header,
    )


def _check_found(settings: Settings, storage: Storage) -> None:
    """Raises ArtifactInvalid where a folder has nothing to start with, before any port is open. An
    address may take a while to answer, and is asked while we are live."""
    if settings.model_control == "explicit" or not isinstance(storage, LocalStorage):
        return
    found = storage.scan().values()
    if settings.model_control == "none" and not any(one.versions or one.problem for one in found):
        raise _nothing_to_serve(settings)


def _nothing_to_serve(settings: Settings) -> ArtifactInvalid:
    return ArtifactInvalid(
        str(settings.repository or settings.model),
        "no model version, want <model>/<version>/manifest.json or model.onnx in it",
    )


def _check_loaded(settings: Settings, service: InferenceService) -> None:
    """Where nothing can be loaded later, some model must be there to answer; the others are
    reported as failed."""
    slots = list(service.repository.slots())
    if settings.model_control != "none" or any(slot.model for slot in slots):
        return
    if not slots:
        raise _nothing_to_serve(settings)
    raise ArtifactInvalid("no model could be loaded", "; ".join(slot.reason for slot in slots))


def _stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, functools.partial(on_signal, number))
    return stop


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
