"""Requests over REST: HTTP/1.1 on gevent's sockets, one connection for each request in flight.

Written on geventhttpclient's parser and not its client: the bytes of a request are the same
each time, so they are put together once; nothing is sent twice; and an idle connection is
checked with one system call, which works above 1024 open files too.
"""

import json
import select
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import gevent.monkey
from geventhttpclient.response import HTTPParseError, HTTPResponse

from loadtest.generator.sender import Answer
from loadtest.plan import Payload
from loadtest.samples import CONNECTION_FAILED, HTTP_OK
from loadtest.target import Target

RECEIVE_BYTES = 65_536
HEADER_LENGTH = "Inference-Header-Content-Length"


class Connection:
    """A connection that serves one request at a time."""

    def __init__(self, target: Target) -> None:
        self._socket = socket.create_connection((target.host, target.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # gevent's poll gives way to the hub; here an answer at once is wanted.
        self._poll: Any = gevent.monkey.get_original("select", "poll")()
        self._poll.register(self._socket.fileno(), select.POLLIN)

    def is_idle(self) -> bool:
        """Neither closed by the server nor holding bytes that nobody asked for."""
        return not self._poll.poll(0)

    def exchange(self, request: bytes) -> HTTPResponse:
        """Send and receive. Raises OSError or HTTPParseError."""
        self._socket.sendall(request)
        response = HTTPResponse(method="POST")
        while not response.message_complete:
            received = self._socket.recv(RECEIVE_BYTES)
            response.feed(received)
            if not received and not response.message_complete:
                raise ConnectionResetError("closed by the server before its answer was complete")
        return response

    def close(self) -> None:
        self._socket.close()


class RestSender:
    """Sends a plan's payloads to one REST target."""

    def __init__(
        self, target: Target, model: str, version: str, payloads: Sequence[Payload]
    ) -> None:
        self._target = target
        path = infer_path(model, version)
        self._requests = [request_bytes(target, path, payload) for payload in payloads]
        self._idle: list[Connection] = []

    def send(self, payload: int) -> Answer:
        connection = None
        keep = False
        try:
            connection = self._connection()
            response = connection.exchange(self._requests[payload])
            keep = not response.should_close()
        except (OSError, HTTPParseError) as error:
            return Answer(CONNECTION_FAILED, error=str(error) or type(error).__name__)
        finally:
            if connection is not None and keep:
                self._idle.append(connection)
            elif connection is not None:
                connection.close()
        status: int = response.status_code
        body = bytes(response._body_buffer)
        if status != HTTP_OK:
            return Answer(status, len(body), error_text(body))
        length = str(response.get(HEADER_LENGTH.lower(), ""))
        json_bytes = int(length) if length.isdecimal() else None
        return Answer(status, len(body), body=body, json_bytes=json_bytes)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_idle():
                return connection
            connection.close()
        return Connection(self._target)


def infer_path(model: str, version: str) -> str:
    versioned = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(model, safe='')}{versioned}/infer"


def request_bytes(target: Target, path: str, payload: Payload) -> bytes:
    """A whole HTTP request."""
    binary = payload.json_bytes is not None
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {target.address}",
        "User-Agent: trimserve-loadtest",
        f"Content-Type: application/{'octet-stream' if binary else 'json'}",
        f"Content-Length: {len(payload.body)}",
    ]
    if binary:
        lines.append(f"{HEADER_LENGTH}: {payload.json_bytes}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + payload.body


def error_text(body: bytes) -> str:
    """The `error` of an OIP error body, else its beginning."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
