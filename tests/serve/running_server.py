"""A server as its users start it: the command line in a process of its own, on free ports."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from serve import oip_pb2 as pb

PATIENCE_S = 30.0  # a test that waits for longer has failed
HOST = "127.0.0.1"
PROGRAM = (sys.executable, "-W", "error", "-m", "trimserve")


class RunningServer:
    """`trimserve serve` with `arguments`, or another `program` with them; has announced `event`
    when the constructor returns."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        program: Sequence[str] = PROGRAM,
        event: str = "ready",
    ) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command(*arguments, program=program), stdout=subprocess.PIPE, stderr=stderr
            )
        assert self.process.stdout is not None
        killer = threading.Timer(PATIENCE_S, self.process.kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        assert line, f"the server ended: {log.read_text()}"
        announced = json.loads(line)
        assert announced.pop("event") == event
        self.http_port: int = announced["http_port"]
        self.grpc_port: int = announced["grpc_port"]
        self.metrics_port: int = announced["metrics_port"]
        self.control_port: int | None = announced["control_port"]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def stop(self) -> int:
        self.terminate()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a sample over all label sets that include `labels`."""
        answer = fetch(self.metrics_port, "GET", "/metrics")
        assert answer.status == 200
        return sum(
            sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def command(*arguments: str, program: Sequence[str] = PROGRAM) -> list[str]:
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    return [*program, "serve", *ports, *arguments]


@contextlib.contextmanager
def running(
    log: Path, *arguments: str, program: Sequence[str] = PROGRAM, event: str = "ready"
) -> Iterator[RunningServer]:
    server = RunningServer(log, *arguments, program=program, event=event)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again, each time a request to the server, until the answer is yes."""
    patience = threading.Event()
    timer = threading.Timer(PATIENCE_S, patience.set)
    timer.start()
    try:
        while not condition():
            assert not patience.is_set(), "it never happened"
    finally:
        timer.cancel()


# --- REST


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert set(self.json) == {"error"}
        return str(self.json["error"])


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(HOST, port, timeout=PATIENCE_S)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection that is kept; a dict or list is sent as JSON."""
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection.request(method, path, data, dict(headers or {}))
    return Answer(connection.getresponse())


def fetch(port: int, method: str, path: str, body: Any = None) -> Answer:
    """One request on a connection of its own."""
    connection = connect(port)
    try:
        return ask(connection, method, path, body)
    finally:
        connection.close()


# --- gRPC


@contextlib.contextmanager
def channel_to(port: int) -> Iterator[grpc.Channel]:
    limit = 2**31 - 1
    options = [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(f"{HOST}:{port}", options) as channel:
        yield channel


def method(channel: grpc.Channel, name: str) -> Any:
    """The call of `inference.GRPCInferenceService` with that name."""
    return channel.unary_unary(
        f"/inference.GRPCInferenceService/{name}",
        request_serializer=getattr(pb, f"{name}Request").SerializeToString,
        response_deserializer=getattr(pb, f"{name}Response").FromString,
    )
