"""REST, over sockets: what a client sees, good and bad, and that the next request works."""

import http.client
import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pytest

from serve import VERSION
from serve.service import EXTENSIONS
from tests.serve.conftest import MAX_REQUEST_BYTES
from tests.serve.onnx_models import INVALID_INDEX, linear_by_hand
from tests.serve.running_server import HOST, PATIENCE_S, RunningServer, ask, connect, until
from tests.serve.versions import rows

INFER = "/v2/models/{}/infer"
MUCH_WORK = 40_000  # turns of the model `work`: some tenths of a second


@pytest.fixture
def rest(server: RunningServer) -> Iterator[http.client.HTTPConnection]:
    """A connection that is kept alive."""
    connection = connect(server.http_port)
    yield connection
    connection.close()


def tensor(name: str, datatype: str, shape: list[int], data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


LINEAR = {"inputs": [tensor("x", "FP32", [2, 4], rows(2).tolist())]}


def assert_works(rest: http.client.HTTPConnection) -> None:
    """The next request on the same connection gets its numbers."""
    answer = ask(rest, "POST", INFER.format("linear"), LINEAR)
    assert answer.status == 200
    data = np.reshape(answer.json["outputs"][0]["data"], (2, 3))
    np.testing.assert_allclose(data, linear_by_hand(rows(2)), atol=1e-5)


# --- health and metadata

LINEAR_METADATA = {
    "name": "linear",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
}
SERVER_METADATA = {"name": "trimserve", "version": VERSION, "extensions": list(EXTENSIONS)}


@pytest.mark.parametrize(
    ("path", "document"),
    [
        pytest.param("/v2/health/live", {"live": True}, id="the server is live"),
        pytest.param("/v2/health/ready", {"ready": True}, id="the server is ready"),
        pytest.param("/v2", SERVER_METADATA, id="the server is described"),
        pytest.param("/v2/", SERVER_METADATA, id="the server is described, with a slash"),
        pytest.param("/v2/models/linear", LINEAR_METADATA, id="a model is described"),
        pytest.param("/v2/models/linear/versions/1", LINEAR_METADATA, id="a version is described"),
        pytest.param(
            "/v2/models/linear/ready", {"name": "linear", "ready": True}, id="a model is ready"
        ),
        pytest.param(
            "/v2/models/linear/versions/1/ready", {"name": "linear", "ready": True},
            id="a version is ready",
        ),
    ],
)  # fmt: skip
def test_rest_answers_when_asked_whether(
    rest: http.client.HTTPConnection, path: str, document: dict[str, Any]
) -> None:
    answer = ask(rest, "GET", path)
    assert (answer.status, answer.json) == (200, document)


def test_rest_documents_itself_when_asked(rest: http.client.HTTPConnection) -> None:
    assert ask(rest, "GET", "/docs").status == 200
    assert "/v2/models/{model}/ready" in ask(rest, "GET", "/openapi.json").json["paths"]


# --- inference


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        pytest.param(
            "pair",
            [tensor("b", "INT64", [1, 2], [2**53 + 1, 3]), tensor("a", "FP32", [1, 2], [0.5, 1])],
            [
                tensor("sum", "FP32", [1, 2], [9007199000000000.0, 4.0]),
                tensor("doubled", "INT64", [1, 2], [2**54 + 2, 6]),
            ],
            id="there are several tensors, and float32 in its shortest digits",
        ),
        pytest.param(
            "fixed", [tensor("x", "FP32", [3], [1, 2, 3])],
            [tensor("y", "FP32", [3], [-1.0, -2.0, -3.0])], id="there is no batch axis",
        ),
        pytest.param(
            "text", [tensor("words", "BYTES", [1, 2], [["é", ""]])],
            [tensor("echo", "BYTES", [1, 2], ["é", ""])], id="there is text",
        ),
        pytest.param(
            "ragged", [tensor("x", "FP32", [1, 3], [[1, 2, 3]])],
            [tensor("total", "FP32", [1, 1], [6.0])], id="an axis is variable",
        ),
        pytest.param(
            "ragged", [tensor("x", "FP32", [2, 0], [])],
            [tensor("total", "FP32", [2, 1], [0.0, 0.0])], id="rows are empty",
        ),
        pytest.param(
            "work", [tensor("n", "INT64", [], [3])], [tensor("done", "INT64", [], [3])],
            id="tensors are scalars",
        ),
    ],
)  # fmt: skip
def test_infer_answers_in_json_when(
    rest: http.client.HTTPConnection,
    model: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
) -> None:
    answer = ask(rest, "POST", INFER.format(model), {"id": "7", "inputs": inputs})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {
        "id": "7", "model_name": model, "model_version": "1", "outputs": outputs
    }  # fmt: skip


def test_infer_answers_the_version_when_it_is_named(rest: http.client.HTTPConnection) -> None:
    answer = ask(rest, "POST", "/v2/models/linear/versions/1/infer", LINEAR)
    assert (answer.status, answer.json["model_version"]) == (200, "1")


def test_infer_answers_only_what_is_asked_for_when_outputs_are_named(
    rest: http.client.HTTPConnection,
) -> None:
    inputs = [tensor("a", "FP32", [1, 2], [1, 2]), tensor("b", "INT64", [1, 2], [3, 4])]
    asked = {"inputs": inputs, "outputs": [{"name": "doubled"}]}
    answer = ask(rest, "POST", INFER.format("pair"), asked)
    assert [output["name"] for output in answer.json["outputs"]] == ["doubled"]


def binary(document: dict[str, Any], raw: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request whose JSON is followed by `raw`."""
    head = json.dumps(document).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def binary_linear(n_bytes: int = 32) -> tuple[bytes, dict[str, str]]:
    x = {"name": "x", "datatype": "FP32", "shape": [2, 4],
         "parameters": {"binary_data_size": n_bytes}}  # fmt: skip
    return binary({"inputs": [x], "parameters": {"binary_data_output": True}}, rows(2).tobytes())


def test_infer_answers_in_binary_when_asked(rest: http.client.HTTPConnection) -> None:
    body, headers = binary_linear()
    answer = ask(rest, "POST", INFER.format("linear"), body, headers)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.body[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 24}
    y = np.frombuffer(answer.body[length:], np.float32).reshape(output["shape"])
    np.testing.assert_allclose(y, linear_by_hand(rows(2)), atol=1e-5)


def test_infer_carries_nan_when_the_output_is_binary(rest: http.client.HTTPConnection) -> None:
    inputs = [tensor("x", "FP32", [1, 2], [-1, 0])]
    refused = ask(rest, "POST", INFER.format("logarithm"), {"inputs": inputs})
    assert refused.status == 400
    assert "NaN or Infinity" in refused.error
    asked = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    answer = ask(rest, "POST", INFER.format("logarithm"), asked)
    got = np.frombuffer(answer.body[-8:], np.float32)
    np.testing.assert_array_equal(got, np.array([np.nan, -np.inf], np.float32))


def test_infer_reads_the_body_when_it_is_chunked(rest: http.client.HTTPConnection) -> None:
    body = json.dumps(LINEAR).encode()
    for size in (1, 7, len(body)):
        chunks = (body[start : start + size] for start in range(0, len(body), size))
        rest.request("POST", INFER.format("linear"), chunks, encode_chunked=True,
                     headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        response = rest.getresponse()
        assert (response.status, response.read()[:1]) == (200, b"{")


def next_body(answers: IO[bytes]) -> bytes:
    """The body of the next answer in a stream of them; HTTPResponse would read beyond it."""
    assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
    headers = http.client.parse_headers(answers)
    return answers.read(int(headers["content-length"]))


def test_infer_answers_in_order_when_requests_are_pipelined(server: RunningServer) -> None:
    requests = b""
    for n in range(5):
        body = json.dumps({"id": str(n), **LINEAR}).encode()
        requests += b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: x\r\nContent-Length: "
        requests += str(len(body)).encode() + b"\r\n\r\n" + body
    with socket.create_connection((HOST, server.http_port), PATIENCE_S) as client:
        client.sendall(requests)
        with client.makefile("rb") as answers:
            ids = [json.loads(next_body(answers))["id"] for _ in range(5)]
    assert sorted(ids) == ids == ["0", "1", "2", "3", "4"]


# --- errors


def changed(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{**LINEAR["inputs"][0], **changes}]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        pytest.param("POST", "linear/infer", changed(name="z"), 400,
                     "inputs.name: got 'z', want one of x", id="an input is unknown"),
        pytest.param("POST", "linear/infer", changed(datatype="FP64"), 400,
                     "inputs.x.datatype: got 'FP64', want FP32", id="a datatype is another"),
        pytest.param("POST", "linear/infer", changed(shape=[4, 2]), 400, "inputs.x.shape",
                     id="a shape is another"),
        pytest.param("POST", "linear/infer", changed(shape=[-1, 4]), 400, "inputs.x.shape",
                     id="a dimension is negative"),
        pytest.param("POST", "linear/infer", changed(shape=[2**62, 4]), 400, "inputs.x.shape",
                     id="a shape overflows"),
        pytest.param("POST", "linear/infer", changed(data=[1, 2]), 400, "inputs.x.data",
                     id="data are missing"),
        pytest.param("POST", "linear/infer", changed(data=[[1] * 4, [1] * 3]), 400,
                     "inputs.x.data", id="data are ragged"),
        pytest.param("POST", "linear/infer", {"inputs": LINEAR["inputs"] * 2}, 400, "inputs.name",
                     id="an input is twice"),
        pytest.param("POST", "linear/infer", {"inputs": []}, 400, "inputs",
                     id="an input is missing"),
        pytest.param("POST", "linear/infer", {**LINEAR, "outputs": [{"name": "q"}]}, 400,
                     "outputs.name: got 'q', want one of y", id="an output is unknown"),
        pytest.param("POST", "linear/infer", b"", 400, "body", id="the body is empty"),
        pytest.param("POST", "linear/infer", b'{"inputs":', 400, "body", id="the body is cut"),
        pytest.param("POST", "linear/infer", b"\xff\xfe\x00", 400, "body", id="it is no text"),
        pytest.param("POST", "linear/infer", b"[" * 50_000, 400, "body", id="it is very deep"),
        pytest.param("POST", "linear/infer",
                     json.dumps(changed(data=[float("nan")] * 8)).encode(), 400,
                     "body: got 'NaN or Infinity'", id="a number is NaN"),
        pytest.param("POST", "text/infer",
                     b'{"inputs":[{"name":"words","datatype":"BYTES","shape":[1,2],'
                     b'"data":[["a"],["b","c"]]}]}', 400, "inputs.words.data",
                     id="text is ragged"),
        pytest.param("POST", "absent/infer", LINEAR, 404, "'absent' is not in the repository",
                     id="the model is unknown"),
        pytest.param("POST", "linear/versions/9/infer", LINEAR, 404, "'9'",
                     id="the version is unknown"),
        pytest.param("POST", "..%2f..%2fetc/infer", LINEAR, 404, "Not Found", id="it is a path"),
        pytest.param("POST", "%2e%2e/infer", LINEAR, 404, "'..'", id="the model is .."),
        pytest.param("POST", "linear%00/infer", LINEAR, 404, r"'linear\x00'", id="it has a NUL"),
        pytest.param("GET", "linear/infer", None, 405, "want POST", id="the verb is wrong"),
        pytest.param("DELETE", "linear", None, 405, "Method Not Allowed", id="a model is deleted"),
        pytest.param("GET", "absent", None, 404, "'absent'", id="metadata of an unknown model"),
        pytest.param("GET", "absent/ready", None, 404, "'absent'", id="an unknown model is ready"),
        pytest.param("GET", "linear/nonsense", None, 404, "Not Found", id="the path is unknown"),
    ],
)  # fmt: skip
def test_rest_answers_an_error_and_goes_on_when(
    rest: http.client.HTTPConnection, method: str, path: str, body: Any, status: int, error: str
) -> None:
    answer = ask(rest, method, f"/v2/models/{path}", body)
    assert (answer.status, error in answer.error) == (status, True), answer.body
    assert answer.headers["content-type"] == "application/json"
    assert_works(rest)


@pytest.mark.parametrize(
    ("headers", "status", "error"),
    [
        pytest.param({"Inference-Header-Content-Length": "100000"}, 400,
                     "Inference-Header-Content-Length", id="the JSON's length is past the body"),
        pytest.param({"Inference-Header-Content-Length": "-5"}, 400,
                     "inference-header-content-length", id="the JSON's length is negative"),
        pytest.param({"Inference-Header-Content-Length": "1e3"}, 400,
                     "inference-header-content-length", id="the JSON's length is no number"),
        pytest.param({"Inference-Header-Content-Length": "0"}, 400, "inputs.x: got",
                     id="the whole body is a tensor, of another size"),
        pytest.param({"Trimserve-Timeout-Ms": "soon"}, 400, "trimserve-timeout-ms",
                     id="the timeout is no number"),
        pytest.param({"Content-Encoding": "gzip"}, 400, "bytes that aren't gzip",
                     id="the body is compressed, and isn't"),
        pytest.param({"Content-Encoding": "br"}, 415, "Content-Encoding: got 'br'",
                     id="the body is compressed in an unknown way"),
    ],
)  # fmt: skip
def test_rest_answers_an_error_and_goes_on_when_headers_say(
    rest: http.client.HTTPConnection, headers: dict[str, str], status: int, error: str
) -> None:
    body, _ = binary_linear()
    answer = ask(rest, "POST", INFER.format("linear"), body, headers)
    assert (answer.status, error in answer.error) == (status, True), answer.body
    assert_works(rest)


@pytest.mark.parametrize("n_bytes", [28, 36, 31])
def test_rest_answers_an_error_and_goes_on_when_the_binary_size_is(
    rest: http.client.HTTPConnection, n_bytes: int
) -> None:
    body, headers = binary_linear(n_bytes)
    answer = ask(rest, "POST", INFER.format("linear"), body, headers)
    assert answer.status == 400, answer.body
    assert "inputs.x" in answer.error
    assert_works(rest)


@pytest.mark.parametrize(
    "prefix", [pytest.param(5, id="a little"), pytest.param(2**32 - 1, id="by far")]
)
def test_rest_refuses_text_when_its_length_leads_past_the_end(
    rest: http.client.HTTPConnection, prefix: int
) -> None:
    raw = struct.pack("<I", 0) + struct.pack("<I", prefix) + b"abc"
    words = {"name": "words", "datatype": "BYTES", "shape": [1, 2],
             "parameters": {"binary_data_size": len(raw)}}  # fmt: skip
    body, headers = binary({"inputs": [words]}, raw)
    answer = ask(rest, "POST", INFER.format("text"), body, headers)
    assert (answer.status, "inputs.words" in answer.error) == (400, True)
    assert_works(rest)


@pytest.mark.parametrize("chunked", [False, True], ids=["length known", "chunked"])
@pytest.mark.parametrize("factor", [2, 3])
def test_rest_refuses_a_body_when_it_is_too_large(
    server: RunningServer, rest: http.client.HTTPConnection, factor: int, chunked: bool
) -> None:
    """The client gets the answer though it looks for it only after it has sent everything."""
    pieces = [b" " * 100_000] * (factor * MAX_REQUEST_BYTES // 100_000)
    body = iter(pieces) if chunked else b"".join(pieces)
    answer = ask(rest, "POST", INFER.format("linear"), body)
    assert answer.status == 413
    assert f"at most {MAX_REQUEST_BYTES} are allowed" in answer.error
    again = connect(server.http_port)
    assert_works(again)
    again.close()


def test_rest_answers_text_is_no_utf8_when_the_model_needs_it(
    rest: http.client.HTTPConnection,
) -> None:
    raw = struct.pack("<I", 0) + struct.pack("<I", 1) + b"\xff"
    words = {"name": "words", "datatype": "BYTES", "shape": [1, 2],
             "parameters": {"binary_data_size": len(raw)}}  # fmt: skip
    body, headers = binary({"inputs": [words]}, raw)
    answer = ask(rest, "POST", INFER.format("text"), body, headers)
    assert (answer.status, "UTF-8" in answer.error) == (400, True)


def test_rest_hides_the_cause_when_the_engine_fails(
    server: RunningServer, rest: http.client.HTTPConnection
) -> None:
    asked = {"inputs": [tensor("index", "INT64", [1], [INVALID_INDEX])]}
    answer = ask(rest, "POST", INFER.format("pick"), asked)
    assert (answer.status, answer.error) == (
        500, "the engine of model 'pick' version '1' failed, see the log"
    )  # fmt: skip
    assert "indices element out of data bounds" in server.log.read_text()
    assert_works(rest)


def test_rest_lives_on_when_bytes_are_no_http(server: RunningServer) -> None:
    with socket.create_connection((HOST, server.http_port), PATIENCE_S) as client:
        client.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == 400
        assert list(json.loads(response.read())) == ["error"]
    rest = connect(server.http_port)
    assert_works(rest)
    rest.close()


def test_rest_lives_on_when_a_client_leaves_in_the_middle_of_its_body(
    server: RunningServer,
) -> None:
    before = server.metric("trimserve_request_duration_seconds_count", code="cancelled")
    with socket.create_connection((HOST, server.http_port), PATIENCE_S) as client:
        client.sendall(
            b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        )
    until(
        lambda: server.metric("trimserve_request_duration_seconds_count", code="cancelled") > before
    )
    rest = connect(server.http_port)
    assert_works(rest)
    rest.close()


# --- load: queue, deadline, clients that hang up


def work_request(turns: int, **parameters: int) -> dict[str, Any]:
    return {"inputs": [tensor("n", "INT64", [], turns)], "parameters": parameters}


def in_flight(server: RunningServer) -> float:
    return server.metric("trimserve_requests_in_flight", model="work")


def test_rest_answers_429_when_the_queue_is_full(server: RunningServer) -> None:
    answers = []

    def send() -> None:
        rest = connect(server.http_port)
        answers.append(ask(rest, "POST", INFER.format("work"), work_request(MUCH_WORK)))
        rest.close()

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert "the queue holds its limit of 1 requests" in refused.error


@pytest.mark.parametrize(
    ("headers", "parameters"),
    [
        pytest.param({"Trimserve-Timeout-Ms": "20"}, {}, id="in a header"),
        pytest.param({}, {"timeout": 20_000}, id="in a parameter"),
        pytest.param({"Trimserve-Timeout-Ms": "60000"}, {"timeout": 1}, id="twice"),
    ],
)
def test_rest_answers_504_when_the_deadline_is(
    server: RunningServer,
    rest: http.client.HTTPConnection,
    headers: dict[str, str],
    parameters: dict[str, int],
) -> None:
    request = work_request(MUCH_WORK, **parameters)
    answer = ask(rest, "POST", INFER.format("work"), request, headers)
    assert answer.status == 504
    assert answer.error.startswith("deadline exceeded in the ")
    # The batch goes on; the next request waits for it and is answered.
    assert ask(rest, "POST", INFER.format("work"), work_request(1)).status == 200


def test_rest_request_leaves_the_queue_when_its_client_hangs_up(server: RunningServer) -> None:
    until(lambda: in_flight(server) == 0)
    before = server.metric(
        "trimserve_request_duration_seconds_count", model="work", code="cancelled"
    )
    running, queued = connect(server.http_port), connect(server.http_port)
    body = json.dumps(work_request(3 * MUCH_WORK))
    running.request("POST", INFER.format("work"), body)
    until(lambda: in_flight(server) == 1)
    queued.request("POST", INFER.format("work"), body)
    until(lambda: in_flight(server) == 2)
    queued.close()
    until(
        lambda: (
            server.metric(
                "trimserve_request_duration_seconds_count", model="work", code="cancelled"
            )
            == before + 1
        )
    )
    response = running.getresponse()
    assert (response.status, json.loads(response.read())["outputs"][0]["data"]) == (
        200, [3 * MUCH_WORK]
    )  # fmt: skip
    running.close()
