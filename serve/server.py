"""The serving process: assembles service and transports, and takes them down without loss."""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from wsgiref.simple_server import WSGIServer

import prometheus_client
import uvicorn

from serve.metrics import DEFAULT_THRESHOLD_S, Metrics
from serve.repository import Repository, Source, find_versions, onnx_source
from serve.service import InferenceService
from serve.settings import Ports, Settings
from serve.transport.grpc import GrpcServer
from serve.transport.rest import RestApp, admin_app

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HTTP_BACKLOG = 2048
KEEP_ALIVE_S = 75
MIN_LEAVING_S = 0.1  # for connections to end once the listener is closed


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, and with a way to stop listening that resets nobody.

    Closing a listening socket resets the connections that the kernel has accepted for it and the
    process has not, and uvicorn then closes idle connections, on one of which a request may be
    under way. So connections in the kernel's queue are taken in first, and all get some time to
    bring the request that was on its way and to be told to leave by its answer.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def stop_listening(self, listener: socket.socket, grace_s: float) -> None:
        """Close `listener`, a duplicate of the one served, and wait for connections to end."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            server.close()
        for connection in _close_accepting(listener):
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)
        ends = loop.time() + grace_s
        while self.server_state.connections and loop.time() < ends:
            await asyncio.sleep(0.005)

    def _protocol(self) -> asyncio.Protocol:
        protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _close_accepting(listener: socket.socket) -> list[socket.socket]:
    """Close a non-blocking listening socket; returns the connections that waited in its queue.

    Nothing stands between the last `accept` and `close`: the kernel offers no way to do both at
    once, and resets a connection that arrives in between.
    """
    connections = []
    try:
        while True:
            connections.append(listener.accept()[0])
    except BlockingIOError:
        listener.close()
    return connections


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
        http_socket = stack.enter_context(_listening(settings.host, settings.http_port))
        listener = stack.enter_context(http_socket.dup())
        listener.setblocking(False)
        metrics_server = _start_metrics(settings, metrics)
        stack.callback(_stop_metrics, metrics_server)
        grpc_server = GrpcServer(service, settings.max_request_bytes)
        ports = Ports(
            http_socket.getsockname()[1],
            await grpc_server.start(_address(settings.host, settings.grpc_port)),
            metrics_server.server_port,
        )
        http_server = _http_server(service, settings)
        http_task = asyncio.create_task(http_server.serve(sockets=[http_socket]))
        await asyncio.to_thread(repository.load, sources)
        service.open(repository)
        # What is loaded now stays: out of the collector's way, whose pauses requests would feel.
        gc.collect()
        gc.freeze()
        await grpc_server.set_ready(service.is_ready)
        announce(ports)
        await stop.wait()
        drained = await _drain(settings, service, grpc_server, http_server, http_task, listener)
        await asyncio.to_thread(repository.close)
    return drained


async def _drain(
    settings: Settings,
    service: InferenceService,
    grpc_server: GrpcServer,
    http_server: _HttpServer,
    http_task: asyncio.Task[None],
    listener: socket.socket,
) -> bool:
    """Not ready first, then closed to new work, then done with the old."""
    _log.info("draining")
    service.start_draining()
    await grpc_server.set_ready(False)
    await asyncio.sleep(settings.drain_delay_s)
    await http_server.stop_listening(listener, max(settings.drain_delay_s, MIN_LEAVING_S))
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


def _listening(host: str, port: int) -> socket.socket:
    """A bound TCP socket; raises OSError naming the address where that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, or asyncio leaves Nagle's algorithm on (uvloop does not).
    http_socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    http_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        http_socket.bind((host, port))
    except OSError as error:
        http_socket.close()
        raise OSError(f"can't listen on {host}:{port} for REST: {error.strerror}") from error
    http_socket.setblocking(False)
    return http_socket


def _http_server(service: InferenceService, settings: Settings) -> _HttpServer:
    app = RestApp(service, admin_app(service), settings.max_request_bytes)
    return _HttpServer(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=HTTP_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        )
    )


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
