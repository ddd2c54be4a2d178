"""The service's process: HTTP and gRPC on one event loop, until a signal ends it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from optimizer.http_server import Address, serve_app
from optimizer.service.app import Parts, Settings, make_service
from optimizer.service.rpc import JobsService, make_server

MAX_CONNECTIONS = 2_000
_GRACE_S = 5.0


async def serve(
    parts: Parts,
    settings: Settings,
    host: str,
    port: int,
    grpc_port: int,
    tls: tuple[Path, Path] | None,
    announce: Callable[[dict[str, int]], None],
) -> None:
    """`announce` is given the ports, `http_port` and `grpc_port`, when both listen.

    Raises OSError where one can't."""
    app = make_service(parts, settings)
    inner = app.router.lifespan_context
    chain, key = tls if tls is not None else (None, None)
    address = Address(host, port, chain, key, option="--port")
    ports: dict[str, int] = {}
    failures: list[OSError] = []

    def lifespan(started: Any) -> Any:
        return _with_grpc(
            inner, started, parts, settings, f"{_bracketed(host)}:{grpc_port}", tls, ports, failures
        )

    app.router.lifespan_context = lifespan

    def listening(url: str) -> None:
        announce({"http_port": urlsplit(url).port or 0, **ports})

    def stop() -> None:
        if getattr(app.state, "feed", None) is not None:
            app.state.feed.close()

    await serve_app(app, address, listening, stop, MAX_CONNECTIONS, lifespan="on")
    if failures:
        raise failures[0]


class _with_grpc:  # noqa: N801 - a context manager, used like a function
    """The application's lifespan with the gRPC server inside of it, since they share the feed."""

    def __init__(
        self,
        inner: Any,
        app: Any,
        parts: Parts,
        settings: Settings,
        address: str,
        tls: tuple[Path, Path] | None,
        ports: dict[str, int],
        failures: list[OSError],
    ) -> None:
        self._inner = inner(app)
        self._app = app
        self._parts = parts
        self._limit = settings.upload_limits.chunk_bytes
        self._recheck_s = settings.recheck_s
        self._address, self._tls = address, tls
        self._ports, self._failures = ports, failures
        self._server: Any = None

    async def __aenter__(self) -> None:
        await self._inner.__aenter__()
        state, parts = self._app.state, self._parts
        service = JobsService(
            parts.operations, parts.authenticator, state.metrics, state.feed, self._recheck_s
        )
        try:
            telemetry = parts.telemetry
            interceptors = telemetry.grpc_interceptors() if telemetry is not None else []
            self._server, port = make_server(
                service, self._limit, self._tls, self._address, interceptors
            )
            await self._server.start()
        except OSError as error:
            self._failures.append(error)
            raise
        self._ports["grpc_port"] = port

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            await self._server.stop(_GRACE_S)
        await self._inner.__aexit__(*exc)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
