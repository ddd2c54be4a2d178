"""Clients that keep a server busy until it goes, and what they lost by that."""

import json
import math
import threading
import time

import grpc

from serve import oip_pb2 as pb
from tests.serve.running_server import (
    PATIENCE_S,
    RunningServer,
    ask,
    channel_to,
    connect,
    method,
)
from tests.serve.versions import rows

INFER = "/v2/models/linear/infer"
LINEAR = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": rows(1).tolist()}]}
)


def infer_message() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="linear", raw_input_contents=[rows(1).tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return message


class Client(threading.Thread):
    """Sends request after request until the server refuses one.

    `lost` are those that were sent and not answered. `refused_s` is when the first one was sent
    that the server refused, on the monotonic clock.
    """

    def __init__(self, server: RunningServer) -> None:
        super().__init__()
        self.server = server
        self.n_answered = 0
        self.lost: list[str] = []
        self.refused_s = math.inf
        self.is_going = threading.Event()

    def answered(self) -> None:
        self.n_answered += 1
        self.is_going.set()


class RestClient(Client):
    """Keeps its connection until the server asks to leave it, as HTTP clients do."""

    def run(self) -> None:
        rest = connect(self.server.http_port)
        while True:
            if rest.sock is None:
                self.refused_s = time.monotonic()
                try:
                    rest.connect()
                except OSError:
                    return
            try:
                answer = ask(rest, "POST", INFER, LINEAR)
                assert answer.status == 200, answer.body
            except (OSError, AssertionError) as error:
                self.lost.append(f"{error!r} after {self.n_answered} answers")
                return
            self.answered()
            if answer.headers["connection"] == "close":
                rest.close()


class GrpcClient(Client):
    """A call that comes while the listener closes is refused without having run: grpc's core
    says UNAVAILABLE or CANCELLED."""

    def run(self) -> None:
        refusals = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        with channel_to(self.server.grpc_port) as channel:
            infer = method(channel, "ModelInfer")
            while True:
                sent_s = time.monotonic()
                try:
                    infer(infer_message(), timeout=PATIENCE_S)
                except grpc.RpcError as error:
                    self.refused_s = sent_s
                    if error.code() not in refusals:
                        self.lost.append(f"{error.code()}: {error.details()}")
                    return
                self.answered()
