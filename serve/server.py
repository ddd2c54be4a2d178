"""The serving process: assembles service and transports, and takes them down without loss."""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

import prometheus_client

from serve.errors import ArtifactInvalid
from serve.metrics import DEFAULT_THRESHOLD_S, Metrics
from serve.repository import Repository, Source, find_versions, onnx_source
from serve.service import InferenceService
from serve.settings import Ports, Settings
from serve.transport.grpc import GrpcServer
from serve.transport.http_server import HttpServer, listening_socket
from serve.transport.rest import RestApp, admin_app

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(settings: Settings, announce: Callable[[Ports], None]) -> bool:
    """Serve until SIGTERM or SIGINT, then drain. `announce` is called once models are ready.

    Returns whether everything admitted was answered in time. Raises ArtifactInvalid where there
    is nothing to serve, OSError where a port is taken.
    """
    stop = _stop_event()
    sources = _sources(settings)
    metrics = Metrics(_threshold_s(settings, sources))
    service = InferenceService(metrics)
    repository = Repository(service.deliver, settings.slo)
    async with contextlib.AsyncExitStack() as stack:
        http_socket = stack.enter_context(listening_socket(settings.host, settings.http_port))
        metrics_server = _start_metrics(settings, metrics)
        stack.callback(_stop_metrics, metrics_server)
        grpc_server = GrpcServer(service, settings.max_request_bytes)
        stack.push_async_callback(grpc_server.stop, 0)
        ports = Ports(
            http_socket.getsockname()[1],
            await grpc_server.start(_address(settings.host, settings.grpc_port)),
            metrics_server.server_port,
        )
        app = RestApp(service, admin_app(service), settings.max_request_bytes)
        http_server = HttpServer(app, settings.drain_timeout_s)
        http_task = asyncio.create_task(http_server.serve(sockets=[http_socket]))
        stack.push_async_callback(_end, http_server, http_task)
        await asyncio.to_thread(repository.load, sources)
        _check_loaded(repository)
        service.open(repository)
        # What is loaded now stays: out of the collector's way, whose pauses requests would feel.
        gc.collect()
        gc.freeze()
        await grpc_server.set_ready(service.is_ready)
        announce(ports)
        await stop.wait()
        drained = await _drain(settings, service, grpc_server, http_server, http_task)
        await asyncio.to_thread(repository.close, drained)
    return drained


async def _end(http_server: HttpServer, http_task: asyncio.Task[None]) -> None:
    """Nothing to do after a drain; where the start failed, this ends the server."""
    http_server.should_exit = True
    await http_task


async def _drain(
    settings: Settings,
    service: InferenceService,
    grpc_server: GrpcServer,
    http_server: HttpServer,
    http_task: asyncio.Task[None],
) -> bool:
    """Not ready first, then closed to new work, then done with the old."""
    _log.info("draining")
    service.start_draining()
    await grpc_server.set_ready(False)
    await asyncio.sleep(settings.drain_delay_s)
    http_server.should_exit = True
    _, _, drained = await asyncio.gather(
        http_task,
        grpc_server.stop(settings.drain_timeout_s),
        service.drain(settings.drain_timeout_s),
    )
    _log.info("drained" if drained else "gave up draining", extra={"complete": drained})
    return drained


def _sources(settings: Settings) -> list[Source]:
    if settings.model is not None:
        return [onnx_source(settings.model)]
    assert settings.repository is not None
    return find_versions(settings.repository)


def _check_loaded(repository: Repository) -> None:
    """At least one model must be there to answer; the others are reported as failed."""
    slots = list(repository.slots())
    if not any(slot.model for slot in slots):
        raise ArtifactInvalid("no model could be loaded", "; ".join(slot.reason for slot in slots))


def _threshold_s(settings: Settings, sources: list[Source]) -> float:
    """The latency threshold that histograms must have an edge on."""
    if settings.slo is not None:
        return settings.slo.latency.threshold_s
    thresholds = {t for source in sources if (t := source.threshold_s()) is not None}
    if len(thresholds) > 1:
        _log.warning("models with several SLO thresholds, histograms follow the lowest")
    return min(thresholds, default=DEFAULT_THRESHOLD_S)


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


def _start_metrics(settings: Settings, metrics: Metrics) -> WSGIServer:
    try:
        server, _ = prometheus_client.start_http_server(
            settings.metrics_port, settings.host, metrics.registry
        )
    except OSError as error:
        raise OSError(
            f"can't listen on {settings.host}:{settings.metrics_port} for metrics: {error.strerror}"
        ) from error
    return server


def _stop_metrics(server: WSGIServer) -> None:
    """Stop answering scrapes; in a thread, since `shutdown` waits for the serving loop."""
    stopper = threading.Thread(target=server.shutdown)
    stopper.start()
    stopper.join()
    server.server_close()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
