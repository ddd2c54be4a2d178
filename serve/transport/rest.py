"""REST: inference as a raw ASGI callable, everything else as a FastAPI application behind it.

The framework costs three quarters of the requests a core can take (docs/serving.md), so the one
hot path goes around it. Every answer but 200 has the body `{"error": "..."}`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import fastapi
import orjson
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve import VERSION
from serve.errors import (
    Cancelled,
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    ServeError,
    UnsupportedEncoding,
)
from serve.service import InferenceService
from serve.transport.json_codec import decode_request, encode_response
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
DISCARD_FACTOR = 4  # of the largest body allowed, so much of a larger one is read and thrown away
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


class RestApp:
    """The ASGI application: `POST /v2/models/M[/versions/V]/infer`, the rest to `fallback`."""

    def __init__(
        self,
        service: InferenceService,
        fallback: App,
        max_request_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._fallback = fallback
        self._max_request_bytes = max_request_bytes
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = self._closing_while_draining(send)
        target = _infer_target(scope) if scope["type"] == "http" else None
        if target is None:
            await self._fallback(scope, receive, send)
        elif scope["method"] != "POST":
            await _send(send, 405, [_JSON, (b"allow", b"POST")], b'{"error":"want POST"}')
        else:
            await self._infer(*target, scope, receive, send)

    def _closing_while_draining(self, send: Send) -> Send:
        """Ask clients to leave their connections while draining, so that no request is under way
        on one when the server closes it."""

        async def send_closing(message: Message) -> None:
            if self._service.is_draining and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        return send_closing

    async def _infer(
        self, model: str, version: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        arrival_s = self._clock()
        code = "ok"
        try:
            status, headers, parts = await self._answer(model, version, scope, receive, arrival_s)
        except ServeError as error:
            code = error.code
            status, headers, parts = _error_answer(error)
        except Exception:  # noqa: BLE001 - the request boundary: the client gets no internals
            _log.exception("request failed", extra={"transport": TRANSPORT})
            code = ServeError.code
            status, headers, parts = _error_answer(ServeError("internal error, see the log"))
        labels = self._service.labels(model, version)
        seconds = self._clock() - arrival_s
        self._service.metrics.request_answered(*labels, TRANSPORT, code, seconds)
        await _send(send, status, headers, parts[0] if len(parts) == 1 else b"".join(parts))

    async def _answer(
        self, model: str, version: str, scope: Scope, receive: Receive, arrival_s: float
    ) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding != b"identity":
            raise UnsupportedEncoding(encoding.decode("latin-1"), ["identity"])
        body = await self._body(headers, receive)
        json_bytes = _header_number(headers, JSON_LENGTH_HEADER)
        timeout_ms = _header_number(headers, TIMEOUT_HEADER)
        timeout_s = timeout_ms / 1e3 if timeout_ms is not None else None
        request, form = decode_request(model, version, body, json_bytes, arrival_s, timeout_s)
        with _HangUpWatch(receive):
            response = await self._service.infer(request, arrival_s)
        parts, json_length = encode_response(response, form)
        if json_length is None:
            return 200, [_JSON], parts
        return 200, [_BINARY, (JSON_LENGTH_HEADER, str(json_length).encode())], parts

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, refused as soon as it is known to be too large."""
        size = _header_number(headers, b"content-length") or 0
        if size > self._max_request_bytes:
            await self._discard(size, receive)
            raise PayloadTooLarge(size, self._max_request_bytes)
        chunks: list[bytes] = []
        size = 0
        while True:
            chunk, more = await _chunk(receive)
            size += len(chunk)
            if size > self._max_request_bytes:
                if more:
                    await self._discard(size, receive)
                raise PayloadTooLarge(size, self._max_request_bytes)
            chunks.append(chunk)
            if not more:
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _discard(self, size_bytes: int, receive: Receive) -> None:
        """Read on without keeping it, within bounds: many clients look for the answer only when
        they have sent all, and a connection closed under their hands hides it from them."""
        limit = DISCARD_FACTOR * self._max_request_bytes
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


def admin_app(service: InferenceService) -> fastapi.FastAPI:
    """Health and metadata, with interactive documentation at `/docs`.

    All coroutines: the service belongs to the event loop, and none of them waits.
    """
    app = fastapi.FastAPI(
        title="trimserve", version=VERSION, redirect_slashes=False, redoc_url=None
    )

    @app.get("/v2/health/live", tags=["health"])
    async def live() -> dict[str, bool]:
        """The process is up."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=["health"])
    async def ready() -> JSONResponse:
        """200 where every model answers and new requests are welcome, else 503."""
        return _ready_answer(service.is_ready, {"ready": service.is_ready}, "not ready")

    @app.get("/v2", tags=["metadata"])
    @app.get("/v2/", include_in_schema=False)
    async def server_metadata() -> dict[str, Any]:
        """Name, version and protocol extensions of the server."""
        name, version, extensions = service.server_metadata()
        return {"name": name, "version": version, "extensions": list(extensions)}

    @app.get("/v2/models/{model}", tags=["metadata"])
    @app.get("/v2/models/{model}/versions/{version}", tags=["metadata"])
    async def model_metadata(model: str, version: str = "") -> dict[str, Any]:
        """Versions, platform and tensors of a model."""
        return _metadata_document(service, model, version)

    @app.get("/v2/models/{model}/ready", tags=["health"])
    @app.get("/v2/models/{model}/versions/{version}/ready", tags=["health"])
    async def model_ready(model: str, version: str = "") -> JSONResponse:
        """200 where the model answers, else 503."""
        is_ready = service.is_model_ready(model, version)
        return _ready_answer(is_ready, {"name": model, "ready": is_ready}, f"{model} is not ready")

    @app.exception_handler(ServeError)
    async def serve_error(_: fastapi.Request, error: ServeError) -> fastapi.Response:
        status, headers, parts = _error_answer(error)
        texts = {name.decode(): value.decode() for name, value in headers}
        return fastapi.Response(parts[0], status, texts)

    @app.exception_handler(HTTPException)
    async def http_error(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers)

    @app.exception_handler(Exception)
    async def internal_error(_: fastapi.Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal error, see the log"}, 500)

    return app


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


def _header_number(headers: dict[bytes, bytes], name: bytes) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(name.decode(), value.decode("latin-1"), "a whole number from 0")
    return int(value)


def _error_answer(error: ServeError) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
    headers = [_JSON]
    if isinstance(error, QueueFull):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if isinstance(error, PayloadTooLarge):
        headers.append((b"connection", b"close"))  # the rest of the body isn't worth reading
    return http_status(error), headers, [orjson.dumps({"error": str(error)})]


def _ready_answer(is_ready: bool, body: dict[str, Any], error: str) -> JSONResponse:
    return JSONResponse(body) if is_ready else JSONResponse({"error": error}, 503)


def _metadata_document(service: InferenceService, model: str, version: str) -> dict[str, Any]:
    metadata = service.model_metadata(model, version)
    sides = {"inputs": metadata.signature.inputs, "outputs": metadata.signature.outputs}
    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        **{
            side: [
                {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
                for spec in specs
            ]
            for side, specs in sides.items()
        },
    }
