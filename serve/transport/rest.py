"""REST: inference as a raw ASGI callable; everything else goes to the application behind it.

The framework costs three quarters of the requests a core can take (docs/serving.md), so the one
hot path goes around it. Every answer but 200 has the body `{"error": "..."}`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from serve.errors import (
    Cancelled,
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    ServeError,
    UnsupportedEncoding,
)
from serve.messages import InferRequest
from serve.service import InferenceService
from serve.transport.compression import (
    MIN_COMPRESSED_BYTES,
    choose_encoding,
    compress,
    decompress,
)
from serve.transport.json_codec import (
    ResponseForm,
    decode_raw_request,
    decode_request,
    encode_response,
)
from serve.transport.status import http_status

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TRANSPORT = "rest"
JSON_LENGTH_HEADER = b"inference-header-content-length"
TIMEOUT_HEADER = b"trimserve-timeout-ms"
HANG_UP_WATCH_S = 0.05
CHECKED_JSON_BYTES = 64 * 1024  # longer JSON meets the model's signature before it is decoded
OFF_LOOP_BYTES = 64 * 1024  # more is compressed and decompressed in a thread
DISCARD_FACTOR = 4  # of the largest body allowed, so much of a larger one is read and thrown away
_CLOSE = (b"connection", b"close")
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


@dataclass(frozen=True)
class RestOptions:
    """`tenant_header` names the header, set by a trusted gateway, that tells tenants apart."""

    max_request_bytes: int = 64 * 1024 * 1024
    tenant_header: str = ""


class RestApp:
    """The ASGI application: `POST /v2/models/M[/versions/V]/infer`, the rest to `fallback`."""

    def __init__(
        self,
        service: InferenceService,
        fallback: App,
        options: RestOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._fallback = fallback
        self._max_request_bytes = options.max_request_bytes
        self._tenant_header = options.tenant_header.lower().encode()
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        target = _infer_target(scope) if scope["type"] == "http" else None
        if target is None:
            await self._fallback(scope, receive, closing_while_draining(self._service, send))
        elif scope["method"] != "POST":
            await _send(send, 405, [_JSON, (b"allow", b"POST")], b'{"error":"want POST"}')
        else:
            await self._infer(*target, scope, receive, send)

    async def _infer(
        self, model: str, version: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        arrival_s = self._clock()
        code = "ok"
        headers = _by_name(scope["headers"])
        body = _Body(self._service, self._max_request_bytes)
        labels = self._service.labels(model, version)
        try:
            status, answer_headers, parts, labels = await self._answer(
                model, version, headers, body, receive, arrival_s
            )
        except ServeError as error:
            code = error.code
            status, answer_headers, parts = error_answer(error)
        except Exception:  # noqa: BLE001 - the request boundary: the client gets no internals
            _log.exception("request failed", extra={"transport": TRANSPORT})
            code = ServeError.code
            status, answer_headers, parts = error_answer(ServeError("internal error, see the log"))
        finally:
            body.release()
        seconds = self._clock() - arrival_s
        self._service.metrics.request_answered(*labels, TRANSPORT, code, seconds)
        if self._service.is_draining or body.is_unread:
            answer_headers.append(_CLOSE)
        await _send(send, status, answer_headers, parts[0] if len(parts) == 1 else b"".join(parts))

    async def _answer(
        self,
        model: str,
        version: str,
        headers: dict[bytes, bytes],
        incoming: "_Body",
        receive: Receive,
        arrival_s: float,
    ) -> tuple[int, list[tuple[bytes, bytes]], list[bytes], tuple[str, str]]:
        """Status, headers and parts of the answer, and the model and version that gave it."""
        body = await incoming.read(headers, receive)
        received_s = self._clock()
        request, form = self._decoded(model, version, headers, body, arrival_s)
        decoded_s = self._clock()
        with _HangUpWatch(receive):
            response = await self._service.infer(request, arrival_s)
        started_s = self._clock()
        parts, json_length = encode_response(response, form, self._service.shared_memory)
        answer_headers = [_JSON]
        if json_length is not None:
            answer_headers = [_BINARY, (JSON_LENGTH_HEADER, str(json_length).encode())]
        if b"accept-encoding" in headers:
            parts = await _compressed(headers[b"accept-encoding"], answer_headers, parts)
        phase_ended = self._service.metrics.phase_ended
        phase_ended(response.model, response.version, "decode", decoded_s - received_s)
        phase_ended(response.model, response.version, "encode", self._clock() - started_s)
        return 200, answer_headers, parts, (response.model, response.version)

    def _decoded(
        self, model: str, version: str, headers: dict[bytes, bytes], body: bytes, arrival_s: float
    ) -> tuple[InferRequest, ResponseForm]:
        json_bytes = _header_number(headers, JSON_LENGTH_HEADER)
        timeout_ms = _header_number(headers, TIMEOUT_HEADER)
        timeout_s = timeout_ms / 1e3 if timeout_ms is not None else None
        tenant = headers.get(self._tenant_header, b"").decode("latin-1")
        if json_bytes == 0:
            signature, max_batch_size = self._service.signature(model, version)
            batched = max_batch_size > 0
            return decode_raw_request(
                model, version, body, signature, batched, arrival_s, timeout_s, tenant
            )
        is_long = (len(body) if json_bytes is None else json_bytes) > CHECKED_JSON_BYTES
        memory = self._service.shared_memory
        is_checked = is_long or memory.enabled
        check = self._service.input_check(model, version) if is_checked else None
        return decode_request(
            model, version, body, json_bytes, arrival_s, timeout_s, memory, tenant, check
        )


class _Body:
    """The body of one request, read whole, within its limit and that of all bytes in flight.

    `is_unread` where it was refused and may or may not still come: the connection is of no use.
    """

    def __init__(self, service: InferenceService, max_bytes: int) -> None:
        self._service = service
        self._max_bytes = max_bytes
        self._n_reserved = 0
        self.is_unread = False

    async def read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body, decompressed; refused as soon as it is known to be too large."""
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        size = _header_number(headers, b"content-length") or 0
        if size > self._max_bytes:
            await self._refuse(size, headers, receive)
            raise PayloadTooLarge(size, self._max_bytes)
        if not self._service.has_room(size):
            await self._refuse(size, headers, receive)
            self._reserve(size)
        body = await self._received(receive)
        if encoding == "identity":
            return body
        if len(body) > OFF_LOOP_BYTES:
            body = await asyncio.to_thread(decompress, body, encoding, self._max_bytes)
        else:
            body = decompress(body, encoding, self._max_bytes)
        self._reserve(len(body))
        return body

    def release(self) -> None:
        """The answer is made: nothing of the body is needed any more."""
        self._service.release(self._n_reserved)
        self._n_reserved = 0

    async def _received(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            chunk, more = await _chunk(receive)
            size += len(chunk)
            if size > self._max_bytes:
                if more:
                    await self._discard(size, receive)
                raise PayloadTooLarge(size, self._max_bytes)
            try:
                self._reserve(len(chunk))
            except QueueFull:
                chunks.clear()
                if more:
                    await self._discard(size, receive)
                raise
            chunks.append(chunk)
            if not more:
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _reserve(self, n_bytes: int) -> None:
        self._service.reserve(n_bytes)
        self._n_reserved += n_bytes

    async def _refuse(self, size_bytes: int, headers: dict[bytes, bytes], receive: Receive) -> None:
        """A client that asks before it sends the body is told at once, not invited to send it."""
        self.is_unread = headers.get(b"expect", b"").lower() == b"100-continue"
        if not self.is_unread:
            await self._discard(size_bytes, receive)

    async def _discard(self, size_bytes: int, receive: Receive) -> None:
        """Read on without keeping it, within bounds: many clients look for the answer only when
        they have sent all, and a connection closed under their hands hides it from them."""
        limit = DISCARD_FACTOR * self._max_bytes
        more = size_bytes <= limit
        discarded = 0
        while more and discarded <= limit:
            chunk, more = await _chunk(receive)
            discarded += len(chunk)


class _HangUpWatch:
    """Ends the current task's request with Cancelled when its client hangs up meanwhile, so that
    it leaves the queue.

    Watching costs a task, so it begins only where the answer takes longer than HANG_UP_WATCH_S.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._hung_up = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._request = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HANG_UP_WATCH_S, self._start, loop)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._hung_up and kind is asyncio.CancelledError:
            assert self._request is not None
            if self._request.uncancel() == 0:
                raise Cancelled

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watcher = loop.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        assert self._request is not None
        self._hung_up = self._request.cancel()


def closing_while_draining(service: InferenceService, send: Send) -> Send:
    """Ask clients to leave their connections while draining, so that no request is under way on
    one when the server closes it."""

    async def send_closing(message: Message) -> None:
        if service.is_draining and message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], _CLOSE]
        await send(message)

    return send_closing


def error_answer(error: ServeError) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
    """Status, headers and body of an error."""
    headers = [_JSON]
    if isinstance(error, QueueFull):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if isinstance(error, PayloadTooLarge):
        headers.append(_CLOSE)  # the rest of the body isn't worth reading
    if isinstance(error, UnsupportedEncoding):
        headers.append((b"accept-encoding", ", ".join(error.allowed).encode()))
    return http_status(error), headers, [orjson.dumps({"error": str(error)})]


def _infer_target(scope: Scope) -> tuple[str, str] | None:
    """Model and version of an inference request, None for any other path."""
    match scope["path"].split("/"):
        case ["", "v2", "models", model, "infer"]:
            return model, ""
        case ["", "v2", "models", model, "versions", version, "infer"]:
            return model, version
    return None


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    """The next part of the body, and whether more follows."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled
    return message.get("body", b""), message.get("more_body", False)


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _by_name(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The values by name; those of one that comes again are joined (RFC 9110, section 5.3), so
    that none is overlooked."""
    by_name = dict(headers)
    if len(by_name) == len(headers):
        return by_name
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    return {name: b", ".join(given) for name, given in values.items()}


def _header_number(headers: dict[bytes, bytes], name: bytes) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(name.decode(), value.decode("latin-1"), "a whole number from 0")
    return int(value)


async def _compressed(
    accept_encoding: bytes, headers: list[tuple[bytes, bytes]], parts: list[bytes]
) -> list[bytes]:
    """The body as the client accepts it, where that is worth it; adds the headers that say so."""
    size = sum(map(len, parts))
    if size < MIN_COMPRESSED_BYTES:
        return parts
    encoding = choose_encoding(accept_encoding.decode("latin-1"))
    headers.append((b"vary", b"accept-encoding"))
    if encoding is None:
        return parts
    headers.append((b"content-encoding", encoding.encode()))
    if size > OFF_LOOP_BYTES:
        return [await asyncio.to_thread(compress, parts, encoding)]
    return [compress(parts, encoding)]
