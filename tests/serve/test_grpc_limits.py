"""gRPC at its limits: sizes both ways, deadlines, clients that cancel, pings, streams. Where a
client library is too polite to misbehave, the test writes the frames of HTTP/2 itself."""

import contextlib
import queue
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from serve import oip_pb2 as pb
from serve.artifact import Batching
from serve.transport.grpc import MAX_STREAM_REQUESTS, SERVER_OPTIONS
from tests.serve import onnx_models
from tests.serve.onnx_models import linear_by_hand
from tests.serve.process_state import assert_nothing_is_left, memory_mib, n_descriptors
from tests.serve.running_server import (
    HOST,
    PATIENCE_S,
    RunningServer,
    channel_to,
    method,
    running,
    until,
)
from tests.serve.versions import publish, rows

LIMIT = 8_000_000  # bytes of a message
MUCH_WORK = 40_000  # turns of the model `work`: some tenths of a second
Status = grpc.StatusCode


def grow(path: Path) -> Path:
    """n INT64[1] -> zeros FP32[-1], n of them: answers as large as their caller asks for."""
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["n"], ["zeros"])],
        "grow",
        [helper.make_tensor_value_info("n", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("zeros", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose queue of `work` holds all requests of some streams."""
    scratch = tmp_path_factory.mktemp("limited")
    repository = scratch / "repository"
    queue_size = 4 * MAX_STREAM_REQUESTS
    publish(repository, onnx_models.work, scratch, batching=Batching(0, max_queue_size=queue_size))
    publish(repository, onnx_models.linear, scratch)
    publish(repository, grow, scratch)
    limit = f"--max-request-bytes={LIMIT}"
    with running(
        scratch / "log", "--repository", str(repository), limit, "--drain-delay-s=0"
    ) as started:
        yield started


@pytest.fixture(scope="module")
def channel(limited: RunningServer) -> Iterator[grpc.Channel]:
    with channel_to(limited.grpc_port) as made:
        yield made


def asking(model: str, name: str, datatype: str, array: Any, **fields: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def linear(**fields: Any) -> pb.ModelInferRequest:
    return asking("linear", "x", "FP32", rows(2), **fields)


def work(turns: int, **fields: Any) -> pb.ModelInferRequest:
    return asking("work", "n", "INT64", np.array(turns), **fields)


def infer(channel: grpc.Channel, request: pb.ModelInferRequest, **options: Any) -> Any:
    return method(channel, "ModelInfer")(request, **{"timeout": PATIENCE_S} | options)


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def assert_works(channel: grpc.Channel) -> None:
    """The next request on the same channel gets its numbers."""
    answer = infer(channel, linear())
    y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
    np.testing.assert_allclose(y, linear_by_hand(rows(2)), atol=1e-5)


def n_ended(server: RunningServer, code: str) -> float:
    name = "trimserve_request_duration_seconds_count"
    return server.metric(name, transport="grpc", code=code)


def n_in_flight(server: RunningServer) -> float:
    return server.metric("trimserve_requests_in_flight", model="work")


# --- sizes


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_grpc_answers_compressed_messages_when_they_are_small(
    channel: grpc.Channel, compression: grpc.Compression
) -> None:
    answer = infer(channel, linear(), compression=compression)
    assert len(answer.raw_output_contents[0]) == 24


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_grpc_unfolds_no_further_than_its_limit_when_a_message_is_a_bomb(
    limited: RunningServer, channel: grpc.Channel, compression: grpc.Compression
) -> None:
    """100 MB of zeros are 100 kB on the wire, within the limit as they come."""
    bomb = asking("linear", "x", "FP32", np.zeros((1, 25_000_000), np.float32))
    before = memory_mib(limited, "VmHWM")
    code, details = refusal(lambda: infer(channel, bomb, compression=compression))
    assert (code, "larger than max" in details) == (Status.RESOURCE_EXHAUSTED, True)
    assert memory_mib(limited, "VmHWM") < before + 3 * LIMIT / 2**20
    assert_works(channel)


def test_grpc_keeps_nothing_of_a_message_when_it_is_ten_times_too_large(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    large = asking("linear", "x", "FP32", np.zeros((1, 25_000_000), np.float32))
    before = memory_mib(limited, "VmHWM")
    code, details = refusal(lambda: infer(channel, large))
    assert (code, "larger than max" in details) == (Status.RESOURCE_EXHAUSTED, True)
    assert memory_mib(limited, "VmHWM") < before + 3 * LIMIT / 2**20
    assert_works(channel)


def test_grpc_says_resource_exhausted_when_the_answer_is_too_large(
    channel: grpc.Channel,
) -> None:
    fits = asking("grow", "n", "INT64", np.array([LIMIT // 5]))
    assert len(infer(channel, fits).raw_output_contents[0]) == LIMIT // 5 * 4
    grown = asking("grow", "n", "INT64", np.array([LIMIT // 4]))
    code, details = refusal(lambda: infer(channel, grown))
    assert (code, "larger than max" in details) == (Status.RESOURCE_EXHAUSTED, True)
    assert_works(channel)


EMPTY_INPUT, EMPTY_RAW, UNKNOWN = b"\x2a\x00", b"\x3a\x00", b"\xa0\x06\x01"


@pytest.mark.parametrize("field", [EMPTY_INPUT, EMPTY_RAW, UNKNOWN],
                         ids=["inputs", "raw contents", "unknown fields"])  # fmt: skip
def test_grpc_makes_nothing_of_a_message_when_it_has_endless(
    limited: RunningServer, channel: grpc.Channel, field: bytes
) -> None:
    """An empty input takes two bytes on the wire, and fifty times that as an object."""
    call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    message = field * (LIMIT // len(field))
    before = memory_mib(limited, "VmHWM")
    code, details = refusal(lambda: call(message, timeout=PATIENCE_S))
    assert (code, details) == (
        Status.INVALID_ARGUMENT, "message: got 'more than 4096 fields', want at most 4096"
    )  # fmt: skip
    assert memory_mib(limited, "VmHWM") < before + 4 * LIMIT / 2**20
    assert_works(channel)


def test_grpc_answers_a_large_message_when_it_has_all_kinds_of_fields(
    channel: grpc.Channel,
) -> None:
    request = linear(id="é" * 50_000, model_version="1")
    request.outputs.add(name="y")
    for index in range(1000):
        request.parameters[f"a{index}"].int64_param = -index
    request.parameters["b"].double_param = 0.5
    unknown = b"\xa0\x06\x80\x01" + b"\xa1\x06" + bytes(8) + b"\xa5\x06" + bytes(4)
    call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    answer = call(request.SerializeToString() + unknown, timeout=PATIENCE_S)
    assert pb.ModelInferResponse.FromString(answer).id == "é" * 50_000


def test_grpc_keeps_no_message_when_it_has_refused_it(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    refused = asking("linear", "x", "FP32", np.zeros((8, LIMIT // 40), np.float32))
    before = memory_mib(limited)
    for _ in range(40):
        assert refusal(lambda: infer(channel, refused))[0] == Status.INVALID_ARGUMENT
    assert memory_mib(limited) < before + 10 * LIMIT / 2**20


# --- deadlines and clients that cancel


def test_grpc_counts_a_deadline_when_it_passes_in_the_queue(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    before = n_ended(limited, "deadline_exceeded")
    running_one = method(channel, "ModelInfer").future(work(10 * MUCH_WORK), timeout=PATIENCE_S)
    until(lambda: n_in_flight(limited) == 1)
    code, _ = refusal(lambda: infer(channel, work(1), timeout=0.3))
    assert code == Status.DEADLINE_EXCEEDED
    until(lambda: n_ended(limited, "deadline_exceeded") == before + 1)
    assert running_one.code() == Status.OK
    assert_nothing_is_left(limited)


def test_grpc_forgets_calls_when_all_are_cancelled(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    before = n_ended(limited, "cancelled")
    first = method(channel, "ModelInfer").future(work(5 * MUCH_WORK), timeout=PATIENCE_S)
    until(lambda: n_in_flight(limited) == 1)
    calls = [method(channel, "ModelInfer").future(work(1), timeout=PATIENCE_S) for _ in range(20)]
    until(lambda: n_in_flight(limited) == 21)
    for call in calls:
        call.cancel()
    until(lambda: n_ended(limited, "cancelled") == before + 20)
    assert first.code() == Status.OK
    assert_nothing_is_left(limited)


def test_grpc_forgets_calls_when_their_connection_is_lost(limited: RunningServer) -> None:
    cancelled, descriptors = n_ended(limited, "cancelled"), n_descriptors(limited)
    with channel_to(limited.grpc_port) as channel:
        call = method(channel, "ModelInfer")
        calls = [call.future(work(MUCH_WORK), timeout=PATIENCE_S) for _ in range(10)]
        until(lambda: n_in_flight(limited) == 10)
    assert {one.code() for one in calls} == {Status.CANCELLED}
    until(lambda: n_ended(limited, "cancelled") == cancelled + 10)
    until(lambda: n_descriptors(limited) <= descriptors)
    assert_nothing_is_left(limited)


# --- streams


class Stream:
    """A ModelStreamInfer whose requests are sent one by one."""

    def __init__(self, channel: grpc.Channel, raw: bool = False) -> None:
        call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=None if raw else pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call: Any = call(iter(self._requests.get, None), timeout=PATIENCE_S)

    def send(self, *requests: Any) -> None:
        for request in requests:
            self._requests.put(request)

    def end(self) -> None:
        self._requests.put(None)

    def cancel(self) -> None:
        self.call.cancel()
        self.end()


def test_stream_goes_on_when_a_request_in_its_middle_is_bad(channel: grpc.Channel) -> None:
    stream = Stream(channel)
    wrong = linear(id="2")
    wrong.inputs[0].shape[:] = [-1, 4]
    stream.send(
        linear(id="1"), wrong, linear(id="3", model_version="9"), pb.ModelInferRequest(id="4"),
        linear(id="5"),
    )  # fmt: skip
    stream.end()
    answers = list(stream.call)
    assert [answer.infer_response.id for answer in answers] == ["1", "2", "3", "4", "5"]
    errors = [answer.error_message for answer in answers]
    assert [bool(error) for error in errors] == [False, True, True, True, False]
    assert "inputs.x.shape" in errors[1]
    assert "'9'" in errors[2]
    assert stream.call.code() == Status.OK


def test_stream_ends_well_when_nothing_is_asked(channel: grpc.Channel) -> None:
    stream = Stream(channel)
    stream.end()
    assert list(stream.call) == []
    assert stream.call.code() == Status.OK


def test_stream_answers_in_order_when_more_is_asked_than_runs_at_a_time(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    """The first takes long; those behind it are done sooner, and wait for their turn."""
    n = 3 * MAX_STREAM_REQUESTS
    stream = Stream(channel)
    stream.send(work(MUCH_WORK, id="0"), *(linear(id=str(index)) for index in range(1, n)))
    stream.end()
    assert [answer.infer_response.id for answer in stream.call] == [str(i) for i in range(n)]
    assert_nothing_is_left(limited)


def test_stream_leaves_nothing_behind_when_its_client_cancels(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    cancelled = n_ended(limited, "cancelled")
    stream = Stream(channel)
    stream.send(*[work(3 * MUCH_WORK)] * (2 * MAX_STREAM_REQUESTS))
    until(lambda: n_in_flight(limited) == MAX_STREAM_REQUESTS)
    assert_works(channel)
    assert n_in_flight(limited) == MAX_STREAM_REQUESTS  # the others aren't even read
    stream.cancel()
    until(lambda: n_ended(limited, "cancelled") == cancelled + MAX_STREAM_REQUESTS)
    assert_nothing_is_left(limited)
    assert_works(channel)


def test_stream_holds_no_more_when_its_client_reads_no_answer(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    """Answers of 1 MB: those that are done wait in the server, and no more are made."""
    stream = Stream(channel)
    before = memory_mib(limited)
    done = n_ended(limited, "ok")
    grown = asking("grow", "n", "INT64", np.array([250_000]))
    stream.send(*[grown] * 1000)
    until(lambda: n_ended(limited, "ok") >= done + MAX_STREAM_REQUESTS)
    assert_works(channel)
    assert memory_mib(limited) < before + 2 * MAX_STREAM_REQUESTS
    stream.cancel()
    assert_nothing_is_left(limited)


def test_stream_goes_on_when_a_message_is_malformed(channel: grpc.Channel) -> None:
    stream = Stream(channel, raw=True)
    good = [linear(id=name).SerializeToString() for name in ("1", "3")]
    stream.send(good[0], b"\xff" * 20, good[1])
    stream.end()
    first, second, third = stream.call
    assert (first.infer_response.id, third.infer_response.id) == ("1", "3")
    assert second.error_message.startswith("message: got 'malformed bytes'")


def test_stream_ends_with_an_error_when_a_message_is_too_large(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    stream = Stream(channel, raw=True)
    stream.send(linear(id="1").SerializeToString())
    assert next(stream.call).infer_response.id == "1"
    stream.send(bytes(2 * LIMIT))
    with pytest.raises(grpc.RpcError):
        list(stream.call)
    stream.end()
    assert stream.call.code() == Status.RESOURCE_EXHAUSTED
    assert_nothing_is_left(limited)
    assert_works(channel)


# --- HTTP/2 by hand

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY, HEADERS = 4, 6, 7, 1
ACK = 1
MAX_CONCURRENT_STREAMS = 3  # of the settings
ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Http2:
    """A connection on which nothing is sent that the test doesn't ask for."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), PATIENCE_S)
        self._stream: IO[bytes] = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def next(self) -> tuple[int, int, bytes] | None:
        """Kind, flags and payload of the next frame; None where the server has closed."""
        try:
            head = self._stream.read(9)
        except ConnectionResetError:
            return None
        if len(head) < 9:
            return None
        return head[3], head[4], self._stream.read(int.from_bytes(head[:3]))

    def until(self, kind: int, flags: int = 0) -> bytes:
        """The payload of the next frame of that kind; those before it are skipped."""
        while (got := self.next()) is not None:
            if got[:2] == (kind, flags):
                return got[2]
        raise AssertionError(f"closed before a frame of kind {kind}")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def http2(port: int) -> Iterator[Http2]:
    connection = Http2(port)
    try:
        yield connection
    finally:
        connection.close()


def test_grpc_tells_how_many_streams_it_takes_when_a_client_connects(
    limited: RunningServer,
) -> None:
    with http2(limited.grpc_port) as client:
        client.send(PREFACE + frame(SETTINGS))
        settings = dict(struct.iter_unpack(">HI", client.until(SETTINGS)))
    assert settings[MAX_CONCURRENT_STREAMS] == SERVER_OPTIONS["grpc.max_concurrent_streams"]


def test_grpc_answers_a_ping_when_there_are_few(limited: RunningServer) -> None:
    with http2(limited.grpc_port) as client:
        client.send(PREFACE + frame(SETTINGS))
        for index in range(2):
            payload = bytes([index] * 8)
            client.send(frame(PING, payload))
            assert client.until(PING, ACK) == payload


def test_grpc_sends_a_client_away_when_it_pings_too_fast(
    limited: RunningServer, channel: grpc.Channel
) -> None:
    with http2(limited.grpc_port) as client:
        client.send(PREFACE + frame(SETTINGS) + frame(PING, bytes(8)) * 10)
        goaway = client.until(GOAWAY)
        assert int.from_bytes(goaway[4:8]) == ENHANCE_YOUR_CALM
        assert goaway[8:] == b"too_many_pings"
        while client.next() is not None:  # and it closes
            pass
    assert_works(channel)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP/1.1"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(PREFACE + b"\xff" * 1000, id="a frame that is far too large"),
        pytest.param(PREFACE + frame(PING, bytes(7)), id="a ping that is cut short"),
        pytest.param(PREFACE + frame(SETTINGS) + frame(HEADERS, b"\xff" * 100, 4, 1),
                     id="headers that are no HPACK"),
    ],
)  # fmt: skip
def test_grpc_closes_the_connection_when_it_gets(
    limited: RunningServer, channel: grpc.Channel, data: bytes
) -> None:
    before = n_descriptors(limited)
    with http2(limited.grpc_port) as client:
        client.send(data)
        while client.next() is not None:
            pass
    until(lambda: n_descriptors(limited) <= before)
    assert_works(channel)
