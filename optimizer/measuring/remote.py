"""The measurer on another machine: calls to an agent there (`optimizer.measuring.agent`).

Artifacts go there once, calls then name their digest. It gives up on an agent that can't be
reached; what a study does then isn't its matter.
"""

import http.client
import json
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

from optimizer.errors import MeasurerUnavailable
from optimizer.measuring import Batch, ContenderFailed
from optimizer.measuring.calls import MAX_SECONDS, PROTOCOL_VERSION, Call, Caller, Named, header_of
from optimizer.measuring.frames import MAX_FRAME_BYTES, Frame, FrameInvalid, decode, encode
from optimizer.timing import Contender
from optimizer.variant import directory_digest
from serve.machine import Machine

MAX_WAIT_S = 3600.0
CONNECT_S = 20.0
_MAX_MESSAGE_BYTES = 64 * 1024
_MAX_PAUSE_S = 30.0
_PIECE = 1 << 20
_OF_CONTENDER = (HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
"""What the agent answers where it is the files or their engine that it can't take."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""A machine that is gone is noticed within 90 s, where the system has these options."""


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    retry_after_s: float

    def told(self) -> Mapping[str, Any]:
        """The agent's code and message; what isn't its own has neither."""
        try:
            told = json.loads(self.body[:_MAX_MESSAGE_BYTES])
        except ValueError:
            told = None
        return told if isinstance(told, dict) else {}


class RemoteMeasurer(Caller):
    """Speaks to the agent at `url` (http:// or https://), which has the same token.

    A busy agent is asked again for up to `max_wait_s`. Raises MeasurerUnavailable for one that
    can't be reached, refuses or speaks another protocol, and ValueError for another kind of URL.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        max_wait_s: float = MAX_WAIT_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"agent: got {url!r}, want http://HOST:PORT or https://HOST:PORT")
        self._url = url
        self._parts = parts
        self._token = token
        self._max_wait_s = max_wait_s
        self._sleep = sleep
        self._digests: dict[tuple[object, ...], str] = {}
        self._there: set[str] = set()
        self._directories: dict[str, Path] = {}

    @cached_property
    def machine(self) -> Machine:
        answer = self._request("GET", "/v1/machine")
        self._check(answer)
        try:
            return Machine.from_dict(json.loads(answer.body)["machine"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._unavailable(f"its machine can't be read: {error}") from error

    def named(self, contender: Contender) -> Named:
        digest = self._digest(contender.directory)
        if digest not in self._there:
            found = self._request("HEAD", f"/v1/artifacts/{digest}").status
            if found == HTTPStatus.NOT_FOUND:
                self._upload(digest, contender.directory)
            elif found != HTTPStatus.OK:  # a HEAD says no more than that
                self.machine  # noqa: B018 - raises with what the agent says
                raise self._unavailable(f"answered {found}")
            self._there.add(digest)
        self._directories[digest] = contender.directory
        return Named(digest, contender.spec)

    def exchange(self, call: Call, batches: Sequence[Batch]) -> Frame:
        pieces = list(encode(Frame(header_of(call), batches)))
        answer = self._request("POST", "/v1/calls", lambda: pieces)
        if answer.told().get("code") == "artifact_missing" and answer.status == 404:
            for named in call.contenders:  # it let them go for want of room
                self._upload(named.files, self._directories[named.files])
            answer = self._request("POST", "/v1/calls", lambda: pieces)
        self._check(answer)
        try:
            return decode(answer.body)
        except FrameInvalid as error:
            raise self._unavailable(f"its answer can't be read: {error}") from error

    def _digest(self, directory: Path) -> str:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        stats = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        state = (str(directory), *stats)
        if state not in self._digests:
            self._digests[state] = directory_digest(directory)
        return self._digests[state]

    def _upload(self, digest: str, directory: Path) -> None:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
        prelude = json.dumps(sizes).encode() + b"\n"
        answer = self._request(
            "PUT",
            f"/v1/artifacts/{digest}",
            lambda: _contents(prelude, files),
            len(prelude) + sum(sizes.values()),
        )
        self._check(answer)

    def _request(
        self,
        method: str,
        path: str,
        body: Callable[[], Iterable[bytes]] | None = None,
        length: int | None = None,
    ) -> _Answer:
        """Until the agent isn't busy. Raises MeasurerUnavailable."""
        waited_s = 0.0
        while True:
            answer = self._request_once(method, path, body, length)
            if answer.status not in (429, 503) or waited_s >= self._max_wait_s:
                return answer
            pause_s = min(max(answer.retry_after_s, 0.1), _MAX_PAUSE_S)
            self._sleep(pause_s)
            waited_s += pause_s

    def _request_once(
        self,
        method: str,
        path: str,
        body: Callable[[], Iterable[bytes]] | None,
        length: int | None,
    ) -> _Answer:
        headers = {
            "Authorization": f"Bearer {self._token}",
            "TrimServe-Protocol": str(PROTOCOL_VERSION),
            "Connection": "close",
        }
        pieces = body() if body is not None else None
        if isinstance(pieces, list):
            length = sum(map(len, pieces))
        if length is not None:
            headers["Content-Length"] = str(length)
        connection = self._connection()
        try:
            connection.connect()
            assert connection.sock is not None
            # An agent may wait for its turn and the cores before it measures.
            connection.sock.settimeout(2 * MAX_SECONDS)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                if hasattr(socket, option):
                    number = getattr(socket, option)
                    connection.sock.setsockopt(socket.IPPROTO_TCP, number, value)
            # It may refuse before it read all of it; then the answer says why.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, pieces, headers)
            response = connection.getresponse()
            read = response.read(MAX_FRAME_BYTES)
            after = response.getheader("Retry-After", "5")
            return _Answer(response.status, read, float(after) if after.isdigit() else 5.0)
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(f"can't be reached: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname, self._parts.port
        assert host is not None
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        context = ssl.create_default_context()  # SSL_CERT_FILE names an authority of one's own
        return http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=context)

    def _check(self, answer: _Answer) -> None:
        if not 200 <= answer.status < 300:
            told = str(answer.told().get("message") or "said nothing of why")
            if answer.status in _OF_CONTENDER:
                raise ContenderFailed(f"the agent refuses it: {told}")
            raise self._unavailable(f"answered {answer.status}: {told}")

    def _unavailable(self, problem: str) -> MeasurerUnavailable:
        return MeasurerUnavailable(f"agent {self._url}", problem)


def _contents(prelude: bytes, files: Sequence[Path]) -> Iterator[bytes]:
    yield prelude
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
