"""gRPC: `inference.GRPCInferenceService` on grpc.aio, with standard health and reflection."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serve import oip_pb2 as pb
from serve.errors import Cancelled, ServeError
from serve.service import InferenceService
from serve.tensor import TensorSpec
from serve.transport.proto_codec import decode_request, encode_response
from serve.transport.status import grpc_status

_log = logging.getLogger(__name__)

TRANSPORT = "grpc"
SERVICE = "inference.GRPCInferenceService"
MAX_DETAILS = 1024  # HTTP/2 headers carry the details: longer ones can kill the call
# A client may ping every 10 s, between calls too.
SERVER_OPTIONS: dict[str, int] = {
    "grpc.so_reuseport": 0,
    "grpc.http2.min_recv_ping_interval_without_data_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.max_concurrent_streams": 1024,
}

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")


class GrpcServer:
    """The gRPC side of a service. `start` returns the port; `stop` finishes what runs."""

    def __init__(
        self,
        service: InferenceService,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = SERVER_OPTIONS | {
            "grpc.max_receive_message_length": max_message_bytes,
            "grpc.max_send_message_length": max_message_bytes,
        }
        self._server = grpc.aio.server(options=list(options.items()))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        calls = _Calls(service, clock)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(calls, name),
                request_deserializer=getattr(pb, f"{name}Request").FromString,
                response_serializer=getattr(pb, f"{name}Response").SerializeToString,
            )
            for name in (method.name for method in _service_descriptor().methods)
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


class _Calls:
    """One coroutine for each method of the service, named like it."""

    def __init__(self, service: InferenceService, clock: Callable[[], float]) -> None:
        self._service = service
        self._clock = clock

    async def ServerLive(self, _: pb.ServerLiveRequest, __: Context) -> pb.ServerLiveResponse:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: pb.ServerReadyRequest, __: Context) -> pb.ServerReadyResponse:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._service.is_ready)

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        async def answer() -> pb.ModelReadyResponse:
            ready = self._service.is_model_ready(request.name, request.version)
            return pb.ModelReadyResponse(ready=ready)

        return await _translated(answer(), context)

    async def ServerMetadata(  # noqa: N802
        self, _: pb.ServerMetadataRequest, __: Context
    ) -> pb.ServerMetadataResponse:
        name, version, extensions = self._service.server_metadata()
        return pb.ServerMetadataResponse(name=name, version=version, extensions=extensions)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        async def answer() -> pb.ModelMetadataResponse:
            metadata = self._service.model_metadata(request.name, request.version)
            return pb.ModelMetadataResponse(
                name=metadata.name,
                versions=metadata.versions,
                platform=metadata.platform,
                inputs=[_tensor_metadata(spec) for spec in metadata.signature.inputs],
                outputs=[_tensor_metadata(spec) for spec in metadata.signature.outputs],
            )

        return await _translated(answer(), context)

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        arrival_s = self._clock()
        code = Cancelled.code  # unless it ends otherwise
        try:
            wanted = decode_request(request, arrival_s, context.time_remaining())
            answer = encode_response(await self._service.infer(wanted, arrival_s))
            code = "ok"
            return answer
        except ServeError as error:
            code = error.code
            await _abort(error, context)
        except Exception:  # noqa: BLE001 - the request boundary: the client gets no internals
            _log.exception("request failed", extra={"transport": TRANSPORT})
            code = ServeError.code
            await _abort(ServeError("internal error, see the log"), context)
        finally:
            labels = self._service.labels(request.model_name, request.model_version)
            seconds = self._clock() - arrival_s
            self._service.metrics.request_answered(*labels, TRANSPORT, code, seconds)


async def _translated(answer: Awaitable[Answer], context: Context) -> Answer:
    try:
        return await answer
    except ServeError as error:
        await _abort(error, context)


async def _abort(error: ServeError, context: Context) -> NoReturn:
    await context.abort(grpc_status(error), str(error)[:MAX_DETAILS])


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _service_descriptor() -> Any:
    return pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


def _add_reflection(server: grpc.aio.Server) -> None:
    """Reflection over our messages' own descriptor pool, with the other services' added."""
    pool = pb.DESCRIPTOR.pool
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server, pool=pool)
