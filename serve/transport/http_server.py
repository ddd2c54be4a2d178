"""The HTTP server beneath the REST application: uvicorn, ended without losing a request and with
bounds on what a connection may hold.

uvicorn closes its listener and idle connections at once, while requests may be waiting in the
kernel that it has not read yet; and it waits for ever for a head, a body, or a client to read its
answer. It knows nothing of inference.
"""

import asyncio
import contextlib
import ctypes
import resource
import socket
import struct
import sys
from collections.abc import Generator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serve.transport.rest import App

BACKLOG = 2048
# Descriptors that are left for everything but connections of this server, at least.
SPARE_DESCRIPTORS = 256
SETTLE_S = 0.5  # at most, for what reached the listener to be accepted, read and answered
_SETTLE_POLL_S = 0.005
_SO_ATTACH_FILTER = 26  # of Linux, see socket(7); Python has no name for it


@dataclass(frozen=True)
class HttpLimits:
    """What a client may take its time for, and how much of it there may be.

    A head must have arrived `head_timeout_s` after the connection or its own first byte, a body
    `body_timeout_s` after its head: 64 MiB need 4.5 Mbit/s. A client that reads nothing of its
    answer for `read_timeout_s` is gone. `max_head_bytes` bounds a head, or the trailers of a
    chunked body, beyond the first read (256 KiB at most) that brings some of it. Connections past
    `max_connections`, or past what the process's limit of descriptors leaves, are refused.
    """

    head_timeout_s: float = 20.0
    body_timeout_s: float = 120.0
    read_timeout_s: float = 60.0
    keep_alive_s: int = 75
    max_head_bytes: int = 64 * 1024
    max_connections: int = 8192


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers: setting `should_exit` ends it."""

    def __init__(self, app: App, drain_timeout_s: float, limits: HttpLimits | None = None) -> None:
        limits = limits or HttpLimits()
        super().__init__(
            _Config(
                limits,
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=limits.keep_alive_s,
                timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let no further connection in, accept and answer what is there, then close."""
        for listener in sockets or ():
            _drop_new_connections(listener)
        loop = asyncio.get_running_loop()
        ends = loop.time() + SETTLE_S
        # One pause at least, in which the loop accepts what waits in the listener's queue.
        await asyncio.sleep(_SETTLE_POLL_S)
        while self.server_state.connections and loop.time() < ends:
            await asyncio.sleep(_SETTLE_POLL_S)
        await super().shutdown(sockets)


class _Config(uvicorn.Config):
    """uvicorn's configuration, with the limits that it has no names for."""

    def __init__(self, limits: HttpLimits, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.limits = limits
        self.max_connections = min(limits.max_connections, _connections_allowed())


class _Protocol(HttpToolsProtocol):
    """One connection: HTTP/1.1 within the limits, whose own refusals have the body of all errors.

    At most one timer runs on what the client owes: a head or a body, or else, as uvicorn's own,
    the next request; and at most one on its reading of what it was sent.
    """

    config: _Config

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._in_message = False
        self._in_head = False
        self._is_upgrade = False
        self._n_head_bytes = 0  # since the parser last had something to say
        self._arrival: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._n_unread = 0

    # --- what arrives

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.config.max_connections:
            limit = self.config.max_connections
            self._refuse(503, f"the server holds its limit of {limit} connections")
            return
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_arrival()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def data_received(self, data: bytes) -> None:
        self._n_head_bytes += len(data)
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._n_head_bytes > self._limits.max_head_bytes:
            limit = self._limits.max_head_bytes
            self._refuse(431, f"head or trailers: got more than {limit} bytes, want fewer")
        elif (
            self._in_message
            or self._arrival is not None
            or self.cycle is None
            or self.cycle.response_complete
        ):
            self._expect()

    def _parse(self, rest: bytes | memoryview) -> None:
        """Feed the parser. It leaves out the body of a request that would change protocols: such a
        one is fed again without that wish, which a server may ignore (RFC 9110, section 7.8)."""
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = memoryview(rest)[upgrade.args[0] :]
                self._is_upgrade = False
                self.parser.feed_data(self._head_without_upgrade())

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        for name, value in self.headers:
            if name == b"connection" and b"close" in value.lower():
                lines.append(b"connection: close")
            elif name not in (b"connection", b"upgrade"):
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._n_head_bytes = 0

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._is_upgrade = True
            return
        super().on_headers_complete()
        # What comes later under this name are trailers, which must not pass for headers.
        self.headers = []
        self._in_head = False
        self._n_head_bytes = 0
        self._stop_arrival()  # the body has its own time

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._n_head_bytes = 0

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        super().on_message_complete()
        self._in_message = False
        self._n_head_bytes = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reading()
        elif self._in_message or self.pipeline:
            self._expect()

    # --- what the client owes

    def _expect(self) -> None:
        """Give the client its time for what it has to send now, if it has to."""
        if self.transport.is_closing():
            return
        if self._is_answering():
            self._stop_arrival()
        elif self._in_message and not self._in_head:
            self._start_arrival(self._limits.body_timeout_s)
        elif self._in_message or self.cycle is None:
            self._start_arrival(self._limits.head_timeout_s)
        else:
            self._stop_arrival()
            if self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def _is_answering(self) -> bool:
        """A request that has arrived is being answered; what follows it can wait."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        return bool(self.pipeline) or self._in_head or not self._in_message

    def _start_arrival(self, timeout_s: float) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(timeout_s, self._arrived_too_late)

    def _stop_arrival(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _arrived_too_late(self) -> None:
        self._arrival = None
        if self._in_head:
            self._refuse(408, "the head took too long to arrive")
        elif self._in_message and not self.cycle.response_started:
            self._refuse(408, "the body took too long to arrive")
        else:
            self._close()

    # --- what the client is sent

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None and not self.transport.is_closing():
            self._reading.cancel()
            self._reading = None

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answer for the application, and close; but a request that came before it is answered
        first, and then this one not at all, since what is sent now would pass for its answer."""
        if self.transport.is_closing():
            return
        if self._is_answering():
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        body = orjson.dumps({"error": message})
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._close()

    def _close(self) -> None:
        """Close, once the client has read what was sent."""
        self._stop_arrival()
        self._unset_keepalive_if_required()
        self.transport.close()
        self._watch_reading()

    def _watch_reading(self) -> None:
        """Give up on a client that has stopped reading: closing waits for it, and so do answers."""
        self._n_unread = self.transport.get_write_buffer_size()
        if self._n_unread and self._reading is None:
            self._reading = self.loop.call_later(self._limits.read_timeout_s, self._check_reading)

    def _check_reading(self) -> None:
        self._reading = None
        n_before = self._n_unread
        if self.transport.get_write_buffer_size() >= n_before:
            self.transport.abort()
        else:
            self._watch_reading()


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket; raises OSError naming the address where that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, or asyncio leaves Nagle's algorithm on (uvloop does not).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"can't listen on {host}:{port} for REST: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _drop_new_connections(listener: socket.socket) -> None:
    """Have the kernel, where it is Linux, ignore further handshakes: their clients try again and
    find the listener closed, while those in its queue are still accepted.

    Closing a listener resets the connections in its queue, so the queue must be empty by then.
    The packet filter is one instruction, "accept 0 bytes", and needs no privilege.
    """
    if sys.platform != "linux":
        return
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(drop_all))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _connections_allowed() -> int:
    """How many the process's limit of open files has room for."""
    n_descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if n_descriptors == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(n_descriptors // 2, n_descriptors - SPARE_DESCRIPTORS)
