"""An HTTP server for an ASGI application: uvicorn on one address, until a signal ends it.

It knows nothing of what the application does.
"""

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn

_DRAIN_S = 10


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 for any. With a certificate and its key, PEM, over TLS. `option` is
    the command's that says so, for errors."""

    host: str
    port: int
    tls_cert: Path | None = None
    tls_key: Path | None = None
    option: str = "--listen"

    def url(self, port: int) -> str:
        scheme = "http" if self.tls_cert is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """Leaves signals alone, and says when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()


async def serve_app(
    app: Any,
    address: Address,
    announce: Callable[[str], None],
    stop: Callable[[], None],
    max_connections: int,
    lifespan: Literal["on", "off"] = "off",
) -> signal.Signals:
    """Serve until SIGTERM or SIGINT, and say which it was.

    `announce` is given the URL, `stop` is called when the signal comes, before connections are
    waited for. Raises OSError where the address or the certificate can't be used.
    """
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=_DRAIN_S,
        ssl_certfile=address.tls_cert,
        ssl_keyfile=address.tls_key,
    )
    _check_certificate(address)
    with _listener(address) as listener:
        url = address.url(listener.getsockname()[1])
        server = _Server(config, lambda: announce(url))
        received: list[signal.Signals] = []

        def end(number: signal.Signals) -> None:
            received.append(number)
            server.should_exit = True
            stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, number)
        await server.serve(sockets=[listener])
    return received[0] if received else signal.SIGTERM


def _check_certificate(address: Address) -> None:
    if address.tls_cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(address.tls_cert, address.tls_key)
    except OSError as error:  # ssl's own are among them
        given = f"{address.tls_cert} and {address.tls_key}"
        raise OSError(f"--tls-cert, --tls-key: {given} can't be used: {error}") from error


def _listener(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        where = f"{address.host}:{address.port}"
        raise OSError(
            f"{address.option}: can't listen on {where}: {error.strerror or error}"
        ) from error
