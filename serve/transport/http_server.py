"""The HTTP server beneath the REST application: uvicorn, ended without losing a request.

uvicorn closes its listener and idle connections at once, while requests may be waiting in the
kernel that it has not read yet. It knows nothing of inference.
"""

import asyncio
import contextlib
import ctypes
import socket
import struct
import sys
from collections.abc import Generator

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.transport.rest import App

BACKLOG = 2048
KEEP_ALIVE_S = 75
SETTLE_S = 0.5  # at most, for what reached the listener to be accepted, read and answered
_SETTLE_POLL_S = 0.005
_SO_ATTACH_FILTER = 26  # of Linux, see socket(7); Python has no name for it


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers: setting `should_exit` ends it."""

    def __init__(self, app: App, drain_timeout_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
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


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose answer to what isn't HTTP has the body of all other errors."""

    def send_400_response(self, msg: str) -> None:
        body = orjson.dumps({"error": msg})
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


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
