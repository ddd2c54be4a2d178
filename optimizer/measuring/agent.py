"""The agent: an HTTP service by which a machine measures for searches that run elsewhere.

It takes artifacts once, by digest, and calls that name them; one at a time has the machine. Calls
run in a child process, so an engine that crashes costs its call. It trusts whoever has the token
with the machine's time and memory, not with running code of theirs: only data are taken, for
engines that run none of it. What it knows of studies is nothing.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from optimizer.errors import MeasurerUnavailable
from optimizer.measuring import ContenderFailed
from optimizer.measuring.artifact_cache import ArtifactCache
from optimizer.measuring.calls import PROTOCOL_VERSION, Call, Named, call_of
from optimizer.measuring.child import ChildMeasurer
from optimizer.measuring.frames import Frame, FrameInvalid, decode, encode
from serve.artifact import check_file_name
from serve.errors import ArtifactInvalid
from serve.machine import allowed_cpus

PROTOCOL_HEADER = "trimserve-protocol"
ENGINES = ("onnxruntime", "openvino")
"""They read models as data. Those that load compiled packages would run an uploader's code."""
MODEL_SUFFIXES = (".onnx", ".xml")
_MAX_PRELUDE_BYTES = 256 * 1024
_RETRY_AFTER_S = 5

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """What callers may ask of the agent. Beyond `max_waiting` calls in the queue, or after
    `max_wait_s` in it, they are told to come again; a body must be there within `max_body_s`."""

    max_artifact_bytes: int = 2 * 1024**3
    max_cache_bytes: int = 16 * 1024**3
    max_call_bytes: int = 512 * 1024**2
    max_call_s: float = 900.0
    max_waiting: int = 16
    max_wait_s: float = 600.0
    max_body_s: float = 300.0


class Refused(Exception):
    """A request that isn't done, with what the caller is told."""

    def __init__(self, status: HTTPStatus, code: str, message: str, retry: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry = retry


class Agent:
    """The application and what it runs on; `close` it after use."""

    def __init__(self, directory: Path, token: str, limits: Limits) -> None:
        self._limits = limits
        self._cache = ArtifactCache(directory, limits.max_cache_bytes, limits.max_artifact_bytes)
        self._cache.prepare()
        self._measurer = ChildMeasurer(max_call_s=limits.max_call_s)
        self._worker = ThreadPoolExecutor(1, "agent")
        self._turn = asyncio.Lock()
        self._n_admitted = 0
        self._stopping = False
        self.app: ASGIApp = _Guarded(
            Starlette(
                routes=[
                    Route("/health", _health),
                    Route("/v1/machine", self._describe),
                    Route("/v1/artifacts/{digest}", self._has, methods=["HEAD"]),
                    Route("/v1/artifacts/{digest}", self._put, methods=["PUT"]),
                    Route("/v1/calls", self._call, methods=["POST"]),
                ],
                exception_handlers={Refused: _refusal, ClientDisconnect: _gone},
            ),
            token,
        )

    def stop(self) -> None:
        """Let nobody wait any longer: the call under way and those in the queue fail."""
        self._stopping = True
        self._measurer.stop()

    def close(self) -> None:
        self.stop()
        self._worker.shutdown()
        self._measurer.close()

    async def _describe(self, request: Request) -> Response:
        del request
        machine = await asyncio.to_thread(lambda: self._measurer.machine.to_dict())
        return JSONResponse({"machine": machine, **_versions()})

    async def _has(self, request: Request) -> Response:
        found = self._cache.find(request.path_params["digest"])
        return Response(status_code=HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)

    async def _put(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        async with self._my_turn(request):
            with tempfile.TemporaryFile(dir=self._cache.directory) as body:
                limit = self._limits.max_artifact_bytes + _MAX_PRELUDE_BYTES
                await self._read(request, limit, body.write)
                body.seek(0)
                try:
                    sizes = _sizes(body.readline(_MAX_PRELUDE_BYTES))
                    await self._in_thread(lambda: self._cache.add(digest, sizes, body.read))
                except ArtifactInvalid as error:
                    raise Refused(
                        HTTPStatus.UNPROCESSABLE_ENTITY, "artifact_invalid", str(error)
                    ) from error
        _log.info("artifact taken", extra={"digest": digest, "size_bytes": sum(sizes.values())})
        return Response(status_code=HTTPStatus.CREATED)

    async def _call(self, request: Request) -> Response:
        async with self._my_turn(request):
            body = bytearray()
            await self._read(request, self._limits.max_call_bytes, body.extend)
            try:
                frame = decode(bytes(body), self._limits.max_call_bytes)
                call = call_of(frame.header)
            except FrameInvalid as error:
                raise Refused(HTTPStatus.BAD_REQUEST, "call_invalid", str(error)) from error
            body.clear()
            answer = await self._measure(self._placed(call), frame)
        pieces = await asyncio.to_thread(lambda: list(encode(answer)))
        return Response(b"".join(pieces), media_type="application/octet-stream")

    async def _measure(self, call: Call, frame: Frame) -> Frame:
        start_s = time.monotonic()
        outcome = "failed"
        try:
            answer = await self._in_thread(lambda: self._measurer.exchange(call, frame.batches))
            outcome = "engine failed" if "failure" in answer.header else "done"
            return answer
        except ContenderFailed as error:
            outcome = str(error)
            return Frame({"failure": str(error)})
        except MeasurerUnavailable as error:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", str(error), retry=True
            ) from error
        finally:
            seconds = round(time.monotonic() - start_s, 3)
            _log.info("call", extra={"call": call.name, "seconds": seconds, "outcome": outcome})

    def _placed(self, call: Call) -> Call:
        """The call with folders here in place of digests. Raises Refused."""
        n_cpus = len(allowed_cpus())
        if not 1 <= call.n_cores <= n_cpus:
            raise Refused(
                HTTPStatus.BAD_REQUEST,
                "too_many_cores",
                f"instances x threads: got {call.n_cores}, want 1 to {n_cpus}",
            )
        return replace(call, contenders=tuple(map(self._place, call.contenders)))

    def _place(self, named: Named) -> Named:
        spec = named.spec
        if spec.name not in ENGINES:
            raise Refused(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "engine_refused",
                f"engine: got {spec.name!r}, want one of {', '.join(ENGINES)}",
            )
        directory = self._cache.find(named.files)
        if directory is None:
            raise Refused(HTTPStatus.NOT_FOUND, "artifact_missing", f"no artifact {named.files}")
        try:
            check_file_name(spec.file, named.files)
            if not (directory / spec.file).is_file() or not spec.file.endswith(MODEL_SUFFIXES):
                wanted = " or ".join(MODEL_SUFFIXES)
                raise ArtifactInvalid(named.files, f"file {spec.file!r} is no {wanted} in it")
        except ArtifactInvalid as error:
            raise Refused(
                HTTPStatus.UNPROCESSABLE_ENTITY, "artifact_invalid", str(error)
            ) from error
        return Named(str(directory), spec)

    @contextlib.asynccontextmanager
    async def _my_turn(self, request: Request) -> AsyncIterator[None]:
        """One at a time, since even taking an artifact would disturb what is being timed."""
        if self._n_admitted > self._limits.max_waiting:
            await self._discard(request)
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                "queue_full",
                f"{self._limits.max_waiting} requests are waiting already",
                retry=True,
            )
        self._n_admitted += 1
        try:
            try:
                async with asyncio.timeout(self._limits.max_wait_s):
                    await self._turn.acquire()
            except TimeoutError:
                await self._discard(request)
                raise Refused(
                    HTTPStatus.SERVICE_UNAVAILABLE, "busy", "still busy with others", retry=True
                ) from None
            try:
                if self._stopping:
                    raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "stopping", "the agent is ending")
                yield
            finally:
                self._turn.release()
        finally:
            self._n_admitted -= 1

    async def _read(
        self, request: Request, max_bytes: int, write: Callable[[bytes], object]
    ) -> None:
        size = 0
        try:
            async with asyncio.timeout(self._limits.max_body_s):
                async for piece in request.stream():
                    size += len(piece)
                    if size > max_bytes:
                        raise Refused(
                            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                            "too_large",
                            f"more than {max_bytes} bytes",
                        )
                    write(piece)
        except TimeoutError:
            raise Refused(
                HTTPStatus.REQUEST_TIMEOUT,
                "too_slow",
                f"the body took longer than {self._limits.max_body_s:g} s",
            ) from None

    async def _discard(self, request: Request) -> None:
        """Read what a caller sends who won't be served: it looks for the answer only then."""
        await self._read(request, self._limits.max_artifact_bytes, len)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        """In the one thread that uses the measurer. A caller that goes away doesn't end it: what
        was begun has the machine until it is done."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)


class _Guarded:
    """Lets through who has the token and speaks this protocol; the health of the agent is for
    all."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            refused = self._reason_against(dict(scope["headers"]))
            if refused is not None:
                response = await _refusal(None, refused)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _reason_against(self, headers: dict[bytes, bytes]) -> Refused | None:
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._wanted):
            return Refused(HTTPStatus.UNAUTHORIZED, "unauthenticated", "want the agent's token")
        spoken = headers.get(PROTOCOL_HEADER.encode(), b"").decode("latin-1")
        if spoken != str(PROTOCOL_VERSION):
            return Refused(
                HTTPStatus.BAD_REQUEST,
                "protocol_mismatch",
                f"protocol: got {spoken[:16]!r}, want {PROTOCOL_VERSION}: install the same version "
                "of trimserve on both sides",
            )
        return None


def _sizes(line: bytes) -> dict[str, int]:
    """The files of an upload, from its first line: a JSON object of sizes by name."""
    try:
        sizes = json.loads(line)
        if isinstance(sizes, dict) and all(type(size) is int for size in sizes.values()):
            return sizes
    except (ValueError, RecursionError):
        pass
    raise ArtifactInvalid("upload", "its first line is no JSON object of sizes by file")


def _versions() -> dict[str, object]:
    try:
        version = metadata.version("trimserve")
    except metadata.PackageNotFoundError:
        version = ""
    return {"protocol": PROTOCOL_VERSION, "trimserve": version}


async def _health(request: Request) -> Response:
    del request
    return JSONResponse({"status": "ok", **_versions()})


async def _refusal(request: Any, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    headers = {"retry-after": str(_RETRY_AFTER_S)} if error.retry else {}
    if error.status is HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    _log.warning("refused", extra={"code": error.code, "reason": str(error)})
    content = {"code": error.code, "message": str(error)}
    return JSONResponse(content, error.status, headers)


async def _gone(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=HTTPStatus.BAD_REQUEST)
