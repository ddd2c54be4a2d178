"""gRPC, over a channel: the protocol's calls, health, reflection, errors."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serve import VERSION
from serve import oip_pb2 as pb
from serve.service import EXTENSIONS
from tests.serve.conftest import MAX_REQUEST_BYTES
from tests.serve.onnx_models import INVALID_INDEX, linear_by_hand
from tests.serve.running_server import PATIENCE_S, RunningServer, channel_to, method, until
from tests.serve.versions import rows

MUCH_WORK = 40_000  # turns of the model `work`: some tenths of a second
Status = grpc.StatusCode


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with channel_to(server.grpc_port) as made:
        yield made


def infer_request(
    model: str, *inputs: tuple[str, str, list[int], bytes], **fields: Any
) -> pb.ModelInferRequest:
    """A request of raw inputs (name, datatype, shape, bytes)."""
    message = pb.ModelInferRequest(model_name=model, **fields)
    for name, datatype, shape, raw in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw)
    return message


X = ("x", "FP32", [2, 4], rows(2).tobytes())


def call(channel: grpc.Channel, name: str, request: Any) -> Any:
    return method(channel, name)(request, timeout=PATIENCE_S)


def refusal(channel: grpc.Channel, name: str, request: Any) -> tuple[grpc.StatusCode, str]:
    """Code and details of the error that the call must end with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, name, request)
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


def assert_works(channel: grpc.Channel) -> None:
    """The next request on the same channel gets its numbers."""
    answer = call(channel, "ModelInfer", infer_request("linear", X))
    y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
    np.testing.assert_allclose(y, linear_by_hand(rows(2)), atol=1e-5)


# --- health and metadata


def test_grpc_is_live_and_ready_when_asked(channel: grpc.Channel) -> None:
    assert call(channel, "ServerLive", pb.ServerLiveRequest()).live
    assert call(channel, "ServerReady", pb.ServerReadyRequest()).ready
    for version in ("", "1"):
        asked = pb.ModelReadyRequest(name="linear", version=version)
        assert call(channel, "ModelReady", asked).ready


def test_grpc_describes_server_and_model_when_asked(channel: grpc.Channel) -> None:
    server = call(channel, "ServerMetadata", pb.ServerMetadataRequest())
    assert (server.name, server.version) == ("trimserve", VERSION)
    assert list(server.extensions) == list(EXTENSIONS)
    pair = call(channel, "ModelMetadata", pb.ModelMetadataRequest(name="pair"))
    assert (pair.name, list(pair.versions), pair.platform) == ("pair", ["1"], "onnxruntime_onnx")
    sides = [
        [(t.name, t.datatype, list(t.shape)) for t in side] for side in (pair.inputs, pair.outputs)
    ]
    assert sides == [
        [("a", "FP32", [-1, 2]), ("b", "INT64", [-1, 2])],
        [("sum", "FP32", [-1, 2]), ("doubled", "INT64", [-1, 2])],
    ]


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService"])
def test_health_service_says_serving_when_asked_for(channel: grpc.Channel, service: str) -> None:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_and_describes_services_when_asked(channel: grpc.Channel) -> None:
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="inference.GRPCInferenceService"
        ),
    ]
    listed, described = list(reflect(iter(questions), timeout=PATIENCE_S))
    names = {service.name for service in listed.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
    assert b"ModelInferRequest" in described.file_descriptor_response.file_descriptor_proto[0]


# --- inference


def test_infer_answers_raw_in_order_when_outputs_are_named(channel: grpc.Channel) -> None:
    a, b = rows(1, 2), np.array([[2**53 + 1, 3]])
    request = infer_request(
        "pair", ("b", "INT64", [1, 2], b.tobytes()), ("a", "FP32", [1, 2], a.tobytes()), id="7"
    )
    for name in ("doubled", "sum"):
        request.outputs.add(name=name)
    answer = call(channel, "ModelInfer", request)
    assert (answer.model_name, answer.model_version, answer.id) == ("pair", "1", "7")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [
        ("doubled", "INT64", [1, 2]), ("sum", "FP32", [1, 2])
    ]  # fmt: skip
    doubled, total = answer.raw_output_contents
    assert np.frombuffer(doubled, np.int64).tolist() == (2 * b).ravel().tolist()
    np.testing.assert_array_equal(np.frombuffer(total, np.float32), (a + b.astype("f4")).ravel())


def test_infer_reads_typed_contents_when_given(channel: grpc.Channel) -> None:
    request = pb.ModelInferRequest(model_name="text")
    words = request.inputs.add(name="words", datatype="BYTES", shape=[1, 2])
    words.contents.bytes_contents.extend(["é".encode(), b""])
    answer = call(channel, "ModelInfer", request)
    assert answer.raw_output_contents[0] == b"\x02\0\0\0" + "é".encode() + b"\0\0\0\0"


def test_infer_takes_scalars_when_the_shape_is_empty(channel: grpc.Channel) -> None:
    request = infer_request("work", ("n", "INT64", [], (5).to_bytes(8, "little")))
    answer = call(channel, "ModelInfer", request)
    assert list(answer.outputs[0].shape) == []
    assert answer.raw_output_contents[0] == (5).to_bytes(8, "little")


# --- errors


def with_timeout(timeout_us: int) -> pb.ModelInferRequest:
    request = infer_request("work", ("n", "INT64", [], MUCH_WORK.to_bytes(8, "little")))
    request.parameters["timeout"].int64_param = timeout_us
    return request


def mixed() -> pb.ModelInferRequest:
    request = infer_request("linear", X)
    request.inputs[0].contents.fp32_contents.append(1.0)
    return request


@pytest.mark.parametrize(
    ("name", "request_message", "code", "details"),
    [
        pytest.param("ModelInfer", infer_request("linear", ("z", *X[1:])), Status.INVALID_ARGUMENT,
                     "inputs.name: got 'z', want one of x", id="an input is unknown"),
        pytest.param("ModelInfer", infer_request("linear"), Status.INVALID_ARGUMENT,
                     "also x", id="an input is missing"),
        pytest.param("ModelInfer", infer_request("linear", X, X), Status.INVALID_ARGUMENT,
                     "each input once", id="an input is twice"),
        pytest.param("ModelInfer", infer_request("linear", ("x", "FP64", [1, 4], bytes(32))),
                     Status.INVALID_ARGUMENT, "inputs.x.datatype", id="a datatype is another"),
        pytest.param("ModelInfer", infer_request("linear", ("x", "FP32", [4, 2], bytes(32))),
                     Status.INVALID_ARGUMENT, "inputs.x.shape", id="a shape is another"),
        pytest.param("ModelInfer", infer_request("linear", ("x", "FP32", [-1, 4], bytes(32))),
                     Status.INVALID_ARGUMENT, "inputs.x.shape", id="a dimension is negative"),
        pytest.param("ModelInfer",
                     infer_request("linear", ("x", "FP32", [2**62, 2**62], bytes(32))),
                     Status.INVALID_ARGUMENT, "inputs.x.shape", id="a shape overflows"),
        pytest.param("ModelInfer",
                     infer_request("linear", ("x", "FP32", [0, 2**62, 2**62], b"")),
                     Status.INVALID_ARGUMENT, "inputs.x.shape", id="a shape is empty and absurd"),
        pytest.param("ModelInfer", infer_request("linear", ("x", "FP32", [2, 4], bytes(31))),
                     Status.INVALID_ARGUMENT, "31 bytes", id="a byte is missing"),
        pytest.param("ModelInfer", mixed(), Status.INVALID_ARGUMENT, "inputs.x.contents",
                     id="raw and typed are mixed"),
        pytest.param("ModelInfer",
                     infer_request("text", ("words", "BYTES", [1, 2], b"\xff\xff\xff\xffabcd")),
                     Status.INVALID_ARGUMENT, "inputs.words", id="a length leads past the end"),
        pytest.param("ModelInfer",
                     infer_request("text", ("words", "BYTES", [1, 2], b"\1\0\0\0\xff\0\0\0\0")),
                     Status.INVALID_ARGUMENT, "UTF-8", id="text is no UTF-8"),
        pytest.param("ModelInfer", infer_request("absent", X), Status.NOT_FOUND, "'absent'",
                     id="the model is unknown"),
        pytest.param("ModelInfer", infer_request("linear", X, model_version="9"),
                     Status.NOT_FOUND, "'9'", id="the version is unknown"),
        pytest.param("ModelInfer", infer_request("a" * 5000, X), Status.NOT_FOUND, "aaa...",
                     id="the model's name is very long"),
        pytest.param("ModelMetadata", pb.ModelMetadataRequest(name="absent"), Status.NOT_FOUND,
                     "'absent'", id="metadata of an unknown model"),
        pytest.param("ModelReady", pb.ModelReadyRequest(name="absent"), Status.NOT_FOUND,
                     "'absent'", id="an unknown model is ready"),
        pytest.param("ModelInfer",
                     infer_request("pick", ("index", "INT64", [1],
                                            INVALID_INDEX.to_bytes(8, "little"))),
                     Status.INTERNAL, "the engine of model 'pick' version '1' failed, see the log",
                     id="the engine fails"),
        pytest.param("ModelInfer",
                     infer_request("linear", ("x", "FP32", [2, 4], bytes(2 * MAX_REQUEST_BYTES))),
                     Status.RESOURCE_EXHAUSTED, "larger than max", id="the request is too large"),
        pytest.param("ModelInfer", with_timeout(20_000), Status.DEADLINE_EXCEEDED,
                     "deadline exceeded in the", id="the deadline passes"),
        pytest.param("ModelInfer", with_timeout(-1), Status.INVALID_ARGUMENT,
                     "parameters.timeout", id="the timeout is negative"),
    ],
)  # fmt: skip
def test_grpc_answers_an_error_and_goes_on_when(
    channel: grpc.Channel, name: str, request_message: Any, code: grpc.StatusCode, details: str
) -> None:
    got_code, got_details = refusal(channel, name, request_message)
    assert (got_code, details in got_details) == (code, True), (got_code, got_details)
    assert len(got_details) <= 1024
    assert_works(channel)


def test_grpc_says_unimplemented_when_a_call_is_not_served(channel: grpc.Channel) -> None:
    unknown = channel.unary_unary("/inference.GRPCInferenceService/ModelTrain")
    with pytest.raises(grpc.RpcError) as caught:
        unknown(b"", timeout=PATIENCE_S)
    assert caught.value.code() == Status.UNIMPLEMENTED
    assert_works(channel)


def test_grpc_lives_on_when_bytes_are_no_message(channel: grpc.Channel) -> None:
    broken = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError):
        broken(b"\xff\xff\xff", timeout=PATIENCE_S)
    assert_works(channel)


# --- load: queue, clients that hang up


def work(turns: int) -> pb.ModelInferRequest:
    return infer_request("work", ("n", "INT64", [], turns.to_bytes(8, "little")))


def test_grpc_says_resource_exhausted_when_the_queue_is_full(channel: grpc.Channel) -> None:
    calls = [
        method(channel, "ModelInfer").future(work(MUCH_WORK), timeout=PATIENCE_S) for _ in range(6)
    ]
    codes = {call.code() for call in calls}
    assert codes == {Status.OK, Status.RESOURCE_EXHAUSTED}


def test_grpc_request_leaves_the_queue_when_it_is_cancelled(
    server: RunningServer, channel: grpc.Channel
) -> None:
    def n_in_flight() -> float:
        return server.metric("trimserve_requests_in_flight", model="work")

    def n_ended(code: str) -> float:
        name = "trimserve_request_duration_seconds_count"
        return server.metric(name, model="work", transport="grpc", code=code)

    until(lambda: n_in_flight() == 0)
    cancelled, answered = n_ended("cancelled"), n_ended("ok")
    infer = method(channel, "ModelInfer")
    running = infer.future(work(3 * MUCH_WORK), timeout=PATIENCE_S)
    until(lambda: n_in_flight() == 1)
    queued = infer.future(work(1), timeout=PATIENCE_S)
    until(lambda: n_in_flight() == 2)
    queued.cancel()
    until(lambda: n_ended("cancelled") == cancelled + 1)
    assert running.code() == Status.OK
    until(lambda: n_in_flight() == 0)
    assert n_ended("ok") == answered + 1


def test_grpc_serves_all_when_many_threads_share_a_channel(channel: grpc.Channel) -> None:
    wrong: list[int] = []

    def send(first: int) -> None:
        for seed in range(first, first + 25):
            x = rows(1 + seed % 4, seed=seed)
            answer = call(
                channel,
                "ModelInfer",
                infer_request("linear", ("x", "FP32", [*x.shape], x.tobytes())),
            )
            y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(x), 3)
            if not np.allclose(y, linear_by_hand(x), atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=send, args=(25 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
