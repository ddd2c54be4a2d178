"""Requests over gRPC: grpcio made to wait with gevent, serialized messages sent as they are.

A call carries no deadline of its own, as with the usual clients: on the wire it would take the
place of the objective's in a server that drops what comes too late.
"""

from collections.abc import Sequence

import grpc
import grpc.experimental.gevent  # type: ignore[import-not-found]  # stubs lack it

from loadtest.generator.sender import Answer
from loadtest.plan import Payload
from loadtest.samples import GRPC_BASE
from loadtest.target import Target

INFER = "/inference.GRPCInferenceService/ModelInfer"
MAX_MESSAGE_BYTES = 1 << 30
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A name behind which several servers stand (a headless service) reaches all of them.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # A server that is back is found at once: by default a client waits 1 s and, each time it fails,
    # longer, up to 2 min, and that would be measured as the server's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
)


class RpcSender:
    """Sends a plan's payloads to one gRPC target."""

    def __init__(self, target: Target, payloads: Sequence[Payload]) -> None:
        self._channel = grpc.insecure_channel(target.address, options=OPTIONS)
        self._infer = self._channel.unary_unary(INFER, _as_it_is, _as_it_is)
        self._messages = [payload.body for payload in payloads]

    def send(self, payload: int) -> Answer:
        try:
            reply = self._infer(self._messages[payload])
        except grpc.RpcError as error:
            status: int = GRPC_BASE + error.code().value[0]
            return Answer(status, error=error.details() or "")
        return Answer(GRPC_BASE, len(reply), body=reply)

    def close(self) -> None:
        self._channel.close()


def _as_it_is(message: bytes) -> bytes:
    return message


def use_gevent() -> None:
    """Make grpcio wait with gevent; once, before the first channel, after Locust's import."""
    grpc.experimental.gevent.init_gevent()
