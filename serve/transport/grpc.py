"""gRPC: `inference.GRPCInferenceService` on grpc.aio, with standard health and reflection."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serve import oip_pb2 as pb
from serve.errors import Cancelled, DeadlineExceeded, InvalidRequest, ServeError
from serve.service import InferenceService
from serve.transport.extensions import ExtensionCalls
from serve.transport.proto_codec import decode_request, encode_response, read_request
from serve.transport.status import grpc_status

_log = logging.getLogger(__name__)

TRANSPORT = "grpc"
SERVICE = "inference.GRPCInferenceService"
MAX_DETAILS = 1024  # HTTP/2 headers carry the details: longer ones can kill the call
# Requests of one stream that are under way at a time; more are read when these are answered.
MAX_STREAM_REQUESTS = 64
CANCEL_SLACK_S = 0.05  # a call that is cancelled so near to its deadline was ended by it
# A client may ping every 10 s, between calls too; one that pings faster is sent away.
SERVER_OPTIONS: dict[str, int] = {
    "grpc.so_reuseport": 0,
    "grpc.http2.min_recv_ping_interval_without_data_ms": 10_000,
    "grpc.http2.max_ping_strikes": 2,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.max_concurrent_streams": 1024,
    # A connection that says nothing is closed after a while.
    "grpc.server_handshake_timeout_ms": 20_000,
}

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class GrpcOptions:
    """Connections that are idle for `keepalive_time_s` are asked whether they live, and closed
    after `keepalive_timeout_s` without an answer; `max_connection_age_s` (0: for ever) makes
    clients connect anew, so that balancers can spread them. More than `max_connections` are closed
    at once. `tenant_header` as in REST."""

    max_message_bytes: int = 64 * 1024 * 1024
    keepalive_time_s: float = 60.0
    keepalive_timeout_s: float = 20.0
    max_connection_age_s: float = 0.0
    max_connections: int = 8192
    tenant_header: str = ""

    def channel_arguments(self) -> list[tuple[str, int]]:
        arguments = SERVER_OPTIONS | {
            "grpc.max_receive_message_length": self.max_message_bytes,
            "grpc.max_send_message_length": self.max_message_bytes,
            "grpc.max_allowed_incoming_connections": self.max_connections,
            "grpc.keepalive_time_ms": round(self.keepalive_time_s * 1e3),
            "grpc.keepalive_timeout_ms": round(self.keepalive_timeout_s * 1e3),
        }
        if self.max_connection_age_s:
            arguments["grpc.max_connection_age_ms"] = round(self.max_connection_age_s * 1e3)
        return list(arguments.items())


class GrpcServer:
    """The gRPC side of a service. `start` returns the port; `stop` finishes what runs."""

    def __init__(
        self,
        service: InferenceService,
        options: GrpcOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = grpc.aio.server(options=options.channel_arguments())
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        calls = _Calls(service, options.tenant_header, clock)
        handlers = {
            method.name: _handler(method, getattr(calls, method.name))
            for method in _service_descriptor().methods
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        add_HealthServicer_to_server(self._health, self._server)
        _add_reflection(self._server)

    async def start(self, address: str) -> int:
        """Bind `host:port` (port 0 for any free one) and serve. Raises OSError if it's taken."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"can't listen on {address} for gRPC: {error}") from error
        await self.set_ready(False)
        await self._server.start()
        return port

    async def set_ready(self, ready: bool) -> None:
        """What the standard health service says, of the server and of the inference service."""
        status = health_pb2.HealthCheckResponse
        state = status.SERVING if ready else status.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls and connections, and wait for those that run."""
        await self._server.stop(grace_s)


class _Calls(ExtensionCalls):
    """One coroutine for each method of the service, named like it."""

    def __init__(
        self, service: InferenceService, tenant_header: str, clock: Callable[[], float]
    ) -> None:
        super().__init__(service)
        self._tenant_header = tenant_header.lower()
        self._clock = clock

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        return await self._infer(request, context.time_remaining(), self._tenant(context))

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answers in the order of the requests, which run side by side; a request's error is its
        answer and doesn't end the stream."""
        tasks: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None] = asyncio.Queue()
        places = asyncio.Semaphore(MAX_STREAM_REQUESTS)
        tenant = self._tenant(context)

        async def read() -> None:
            try:
                await places.acquire()
                async for request in requests:
                    answer = self._stream_answer(request, context.time_remaining(), tenant)
                    tasks.put_nowait(asyncio.create_task(answer))
                    await places.acquire()
            finally:
                tasks.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await tasks.get()) is not None:
                try:
                    yield await task
                except BaseException:
                    task.cancel()
                    raise
                places.release()
            await reader  # where a message couldn't be read, its error ends the stream
        finally:
            reader.cancel()
            while not tasks.empty():
                left = tasks.get_nowait()
                if left is not None:
                    left.cancel()

    async def _stream_answer(
        self, request: pb.ModelInferRequest | InvalidRequest, timeout_s: float | None, tenant: str
    ) -> pb.ModelStreamInferResponse:
        if isinstance(request, InvalidRequest):
            unread = pb.ModelInferResponse()
            return pb.ModelStreamInferResponse(error_message=str(request), infer_response=unread)
        try:
            answer = await self._infer(request, timeout_s, tenant)
        except ServeError as error:
            failed = pb.ModelInferResponse(
                model_name=request.model_name, model_version=request.model_version, id=request.id
            )
            return pb.ModelStreamInferResponse(error_message=str(error), infer_response=failed)
        wanted = "triton_enable_empty_final_response"
        if wanted in request.parameters and request.parameters[wanted].bool_param:
            answer.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=answer)

    async def _infer(
        self, message: pb.ModelInferRequest, timeout_s: float | None, tenant: str
    ) -> pb.ModelInferResponse:
        """Answer one request; raises a ServeError, whatever went wrong."""
        arrival_s = self._clock()
        code = Cancelled.code  # unless it ends otherwise
        n_bytes = sum(map(len, message.raw_input_contents)) or message.ByteSize()
        service = self._service
        labels = service.labels(message.model_name, message.model_version)
        reserved = False
        try:
            service.reserve(n_bytes)
            reserved = True
            memory = service.shared_memory
            name = (message.model_name, message.model_version)
            check = service.input_check(*name) if memory.enabled else None
            request, places = decode_request(message, arrival_s, timeout_s, memory, tenant, check)
            decoded_s = self._clock()
            response = await service.infer(request, arrival_s)
            started_s = self._clock()
            answer = encode_response(response, places, memory)
            code = "ok"
            labels = (response.model, response.version)
            service.metrics.phase_ended(*labels, "decode", decoded_s - arrival_s)
            service.metrics.phase_ended(*labels, "encode", self._clock() - started_s)
            return answer
        except asyncio.CancelledError:
            # The client's own clock ends the call a little before the deadline that it gave.
            if timeout_s is not None and arrival_s + timeout_s - self._clock() < CANCEL_SLACK_S:
                code = DeadlineExceeded.code
            raise
        except ServeError as error:
            code = error.code
            raise
        except Exception as error:
            _log.exception("request failed", extra={"transport": TRANSPORT})
            code = ServeError.code
            raise ServeError("internal error, see the log") from error
        finally:
            if reserved:
                service.release(n_bytes)
            seconds = self._clock() - arrival_s
            service.metrics.request_answered(*labels, TRANSPORT, code, seconds)

    def _tenant(self, context: Context) -> str:
        if not self._tenant_header:
            return ""
        metadata: Any = context.invocation_metadata() or ()
        return next((str(value) for name, value in metadata if name == self._tenant_header), "")


def _handler(method: Any, call: Callable[..., Any]) -> Any:
    """The handler of a method; a ServeError of a unary one becomes its status."""
    codecs = {
        "request_deserializer": _deserializer(getattr(pb, method.input_type.name)),
        "response_serializer": getattr(pb, method.output_type.name).SerializeToString,
    }
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(call, **codecs)

    async def translated(request: Any, context: Context) -> Any:
        try:
            if isinstance(request, ServeError):
                raise request
            return await call(request, context)
        except ServeError as error:
            code, details = grpc_status(error), str(error)[:MAX_DETAILS]
        except Exception:  # noqa: BLE001 - the request boundary: the client gets no internals
            _log.exception("call failed", extra={"transport": TRANSPORT})
            code, details = grpc.StatusCode.INTERNAL, "internal error, see the log"
        # The exception that `abort` raises is kept, and keeps this frame, until the garbage
        # collector comes by: nothing large may hang on it.
        del request
        return await context.abort(code, details)

    return grpc.unary_unary_rpc_method_handler(translated, **codecs)


def _deserializer(kind: Any) -> Callable[[bytes], Any]:
    """What reads a message, or returns the ServeError for one that can't be read: what is raised
    here would end the call, a stream of them included, with internals in its details."""
    read = read_request if kind is pb.ModelInferRequest else kind.FromString

    def read_or_error(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            want = f"a serialized {kind.DESCRIPTOR.name}"
            return InvalidRequest("message", "malformed bytes", want)
        except InvalidRequest as error:
            return error.with_traceback(None)

    return read_or_error


def _service_descriptor() -> Any:
    return pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


def _add_reflection(server: grpc.aio.Server) -> None:
    """Reflection over our messages' own descriptor pool, with the other services' added."""
    pool = pb.DESCRIPTOR.pool
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server, pool=pool)
