"""Bad input over REST and gRPC: every case has its status and names its field, and the next request
on the same connection is answered as if nothing had been."""

import gzip
import http.client
import itertools
import json
import struct
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serve import oip_pb2 as pb
from tests.serve.conftest import MAX_REQUEST_BYTES
from tests.serve.onnx_models import linear_by_hand
from tests.serve.process_state import assert_nothing_is_left, memory_mib, n_descriptors
from tests.serve.running_server import (
    PATIENCE_S,
    Answer,
    RunningServer,
    ask,
    channel_to,
    connect,
    fetch,
    method,
    running,
)
from tests.serve.versions import rows

MAX_MESSAGE = 1024  # of an error, whatever was sent
DEPTH = 20_000
Status = grpc.StatusCode
LINEAR = "/v2/models/linear/infer"
PAIR = "/v2/models/pair/infer"
TEXT = "/v2/models/text/infer"


@pytest.fixture(scope="module")
def rest(server: RunningServer) -> Iterator[http.client.HTTPConnection]:
    """One connection for all cases: none may break it."""
    connection = connect(server.http_port)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with channel_to(server.grpc_port) as made:
        yield made


# --- REST: what is sent, and what must come back


def x(**changes: Any) -> dict[str, Any]:
    """The input of `linear`, two rows; None takes a field away."""
    whole = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [0.5] * 8} | changes
    return {name: value for name, value in whole.items() if value is not None}


def asking(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def number(text: str) -> bytes:
    """A request whose first number is `text`, which needn't be JSON."""
    return asking(x(data=["@", *[1] * 7])).replace(b'"@"', text.encode())


def words(data: str) -> bytes:
    head = '{"inputs": [{"name": "words", "datatype": "BYTES", "shape": [1, 2], "data": '
    return (head + data + "}]}").encode()


def pair(b: str) -> bytes:
    """A request of `pair` with these two INT64."""
    a = x(name="a", shape=[1, 2], data=[0, 0])
    return asking(a, x(name="b", datatype="INT64", shape=[1, 2], data="@")).replace(
        b'"@"', b.encode()
    )


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth


def inside(field: str, value: str) -> bytes:
    """A valid request with one more field, of JSON that is given as it is."""
    return asking(x())[:-1] + f', "{field}": {value}}}'.encode()


def assert_refused(answer: Answer, status: int, error: str) -> None:
    assert (answer.status, error in answer.error) == (status, True), answer.body
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.error) <= MAX_MESSAGE
    assert answer.error.isprintable()


def assert_rest_works(rest: http.client.HTTPConnection) -> None:
    """The next request on the same connection, without connecting anew, gets its numbers."""
    socket = rest.sock
    answer = ask(rest, "POST", LINEAR, asking(x(data=rows(2).tolist())))
    assert answer.status == 200
    assert rest.sock is socket
    assert socket is not None
    data = np.reshape(answer.json["outputs"][0]["data"], (2, 3))
    np.testing.assert_allclose(data, linear_by_hand(rows(2)), atol=1e-5)


SHAPE, DATA = "inputs.x.shape", "inputs.x.data"
JSON_CASES = [
    pytest.param(LINEAR, asking(x(shape=[2**63, 4])), "shape", id="a dimension is 2^63"),
    pytest.param(LINEAR, asking(x(shape=[2**64, 4])), "shape", id="a dimension is 2^64"),
    pytest.param(LINEAR, asking(x(shape=[10**30, 4])), "shape", id="a dimension has 31 digits"),
    pytest.param(LINEAR, asking(x(shape=[-(2**63), 4])), SHAPE, id="a dimension is -2^63"),
    pytest.param(LINEAR, asking(x(shape=[2**33, 2**33])), SHAPE, id="elements exceed 2^64"),
    pytest.param(LINEAR, asking(x(shape=[2**32, 2**32])), SHAPE, id="elements are 0 modulo 2^64"),
    pytest.param(LINEAR, asking(x(shape=[0, 2**62], data=[])), SHAPE, id="0 is beside 2^62"),
    pytest.param(LINEAR, asking(x(shape=[-1, -8])), SHAPE, id="dimensions' signs cancel out"),
    pytest.param(LINEAR, asking(x(shape=[1] * 33)), SHAPE, id="there are 33 dimensions"),
    pytest.param(LINEAR, asking(x(shape=[1] * 100_000)), SHAPE, id="there are 100,000 dimensions"),
    pytest.param(LINEAR, asking(x(shape=8)), "inputs[0].shape", id="a shape is a number"),
    pytest.param(LINEAR, asking(x(shape=[2.5, 4])), "inputs[0].shape", id="a dimension is 2.5"),
    pytest.param(LINEAR, asking(x(shape=[True, 4])), "inputs[0].shape", id="a dimension is true"),
    pytest.param(LINEAR, asking(x(shape=["2", 4])), "inputs[0].shape", id="a dimension is text"),
    pytest.param(LINEAR, asking({"name": "x", "datatype": "FP32", "data": [1]}), "shape",
                 id="there is no shape"),
    pytest.param(LINEAR, asking(x(shape=[8])), SHAPE, id="a dimension is missing"),
    pytest.param(LINEAR, asking(x(shape=[0, 4], data=[])), "inputs.x", id="there are no rows"),
    pytest.param(LINEAR, asking(x(data=None)), DATA, id="there are no data"),
    pytest.param(LINEAR, asking(x()).replace(b"[0.5", b"[null, 0.5"), DATA, id="a number is null"),
    pytest.param(LINEAR, asking(x(data={})), DATA, id="data are an object"),
    pytest.param(LINEAR, asking(x(data=[])), DATA, id="data are empty"),
    pytest.param(LINEAR, asking(x(data="12345678")), DATA, id="data are text"),
    pytest.param(LINEAR, asking(x(data=[0.5] * 9)), DATA, id="an element is too many"),
    pytest.param(LINEAR, asking(x(data=[0.5] * 7)), DATA, id="an element is missing"),
    pytest.param(LINEAR, asking(x(data=[[0.5] * 4, 0.5, 1, 1, 1])), DATA, id="nesting is uneven"),
    pytest.param(LINEAR, number('"1"'), DATA, id="a number is text"),
    pytest.param(LINEAR, number("true"), DATA, id="a number is true"),
    pytest.param(LINEAR, number("1e999"), DATA, id="a number is 1e999"),
    pytest.param(LINEAR, number("-1e999"), DATA, id="a number is -1e999"),
    pytest.param(LINEAR, number("3.5e38"), DATA, id="a number is too large for FP32"),
    pytest.param(LINEAR, number("9" * 5000), DATA, id="a number has 5,000 digits"),
    pytest.param(LINEAR, number("NaN"), "body: got 'NaN or Infinity'", id="a number is NaN"),
    pytest.param(LINEAR, number("Infinity"), "body: got 'NaN or Infinity'", id="it is Infinity"),
    pytest.param(LINEAR, number("-Infinity"), "body: got 'NaN or Infinity'", id="it is -Infinity"),
    pytest.param(LINEAR, number("0x10"), "body", id="a number is hexadecimal"),
    pytest.param(LINEAR, number("01"), "body", id="a number begins with 0"),
    pytest.param(LINEAR, asking(x(datatype="INT128")), "datatype", id="a datatype is unknown"),
    pytest.param(LINEAR, asking(x(datatype=32)), "datatype", id="a datatype is a number"),
    pytest.param(LINEAR, asking(x(datatype="FP16")), "datatype", id="a datatype has no JSON form"),
    pytest.param(LINEAR, asking(x(name=7)), "name", id="a name is a number"),
    pytest.param(LINEAR, asking(x(name="é" * 10_000)), "inputs.", id="a name is very long"),
    pytest.param(LINEAR, asking(x(name="x\r\nX-Header: 1", data=[1])), r"inputs.x\r\nX-Header",
                 id="a name breaks the line"),
    pytest.param(LINEAR, asking(x(name="x\0", data=[1])), r"inputs.x\x00", id="a name has a NUL"),
    pytest.param(LINEAR, asking(x(name="x\u202e", data=[1])), r"\u202e", id="a name turns text"),
    pytest.param(LINEAR, asking(x()).replace(b'"x"', b'"\\ud800"'), "body",
                 id="a name is half a surrogate pair"),
    pytest.param(LINEAR, asking(x()).replace(b'"x"', b'"\xff"'), "body", id="a name is no UTF-8"),
    pytest.param(LINEAR, asking(*[x(data=[1])] * 1025), "1025 tensors", id="1025 inputs come"),
    pytest.param(LINEAR, asking(x(), outputs=[{"name": "y"}] * 1024), "1025 tensors",
                 id="1024 outputs are asked for"),
    pytest.param(LINEAR, asking(x(), outputs=[{"name": "y"}] * 2), "outputs",
                 id="an output is asked for twice"),
    pytest.param(LINEAR, asking(x(), outputs={"name": "y"}), "outputs", id="outputs are an object"),
    pytest.param(LINEAR, asking(x(), outputs=["y"]), "outputs", id="an output is text"),
    pytest.param(LINEAR, asking(x(), x(name="z")), "inputs.name", id="an input is unknown too"),
    pytest.param(LINEAR, b'{"inputs": null}', "inputs", id="inputs are null"),
    pytest.param(LINEAR, b'{"inputs": {"name": "x"}}', "inputs", id="inputs are an object"),
    pytest.param(LINEAR, b'{"inputs": ["x"]}', "inputs", id="an input is text"),
    pytest.param(LINEAR, b'{"data": [1]}', "inputs", id="there are no inputs"),
    pytest.param(LINEAR, b"[]", "body", id="the body is a list"),
    pytest.param(LINEAR, b"1", "body", id="the body is a number"),
    pytest.param(LINEAR, b"null", "body", id="the body is null"),
    pytest.param(LINEAR, asking(x()) + b"{}", "body", id="something follows the JSON"),
    pytest.param(LINEAR, asking(x()).decode().encode("utf-16"), "body", id="the body is UTF-16"),
    pytest.param(LINEAR, asking(x(), id=1.5), "id", id="the id is 1.5"),
    pytest.param(LINEAR, asking(x(), id=["1"]), "id", id="the id is a list"),
    pytest.param(LINEAR, asking(x(), parameters=[]), "parameters", id="parameters are a list"),
    pytest.param(LINEAR, asking(x(), parameters={"a": {}}), "parameters[...]",
                 id="a parameter is an object"),
    pytest.param(LINEAR, asking(x(), parameters={"timeout": True}), "parameters.timeout",
                 id="the timeout is true"),
    pytest.param(LINEAR, asking(x(), parameters={"timeout": 1.5}), "parameters.timeout",
                 id="the timeout is 1.5"),
    pytest.param(LINEAR, asking(x(), parameters={"timeout": "1"}), "parameters.timeout",
                 id="the timeout is text"),
    pytest.param(LINEAR, asking(x(), parameters={"timeout": -1}), "parameters.timeout",
                 id="the timeout is negative"),
    pytest.param(LINEAR, asking(x(), parameters={"timeout": 2**64}), "parameters",
                 id="the timeout is 2^64"),
    pytest.param(LINEAR, asking(x(), parameters={"binary_data_output": 1}),
                 "parameters.binary_data_output", id="binary_data_output is 1"),
    pytest.param(LINEAR, asking(x(), outputs=[{"name": "y", "parameters": {"binary_data": "a"}}]),
                 "outputs.y.parameters.binary_data", id="binary_data is text"),
    pytest.param(LINEAR, asking(x(), outputs=[{"name": "y", "parameters": {"classification": 0}}]),
                 "outputs.y.parameters.classification", id="no classes are asked for"),
    pytest.param(PAIR, pair("[1.0, 2]"), "inputs.b.data", id="an integer is 1.0"),
    pytest.param(PAIR, pair("[1.5, 2]"), "inputs.b.data", id="an integer is 1.5"),
    pytest.param(PAIR, pair("[1e3, 2]"), "inputs.b.data", id="an integer is 1e3"),
    pytest.param(PAIR, pair("[true, 2]"), "inputs.b.data", id="an integer is true"),
    pytest.param(PAIR, pair('["1", 2]'), "inputs.b.data", id="an integer is text"),
    pytest.param(PAIR, pair(f"[{2**63}, 2]"), "inputs.b.data", id="an integer is 2^63"),
    pytest.param(PAIR, pair(f"[{-(2**63) - 1}, 2]"), "inputs.b.data", id="it is below -2^63"),
    pytest.param(PAIR, pair(f"[{2**64}, 2]"), "inputs.b.data", id="an integer is 2^64"),
    pytest.param(PAIR, pair(f"[{'9' * 5000}, 2]"), "inputs.b.data", id="it has 5,000 digits"),
    pytest.param(TEXT, words("[1, 2]"), "inputs.words.data", id="text is a number"),
    pytest.param(TEXT, words('["a", null]'), "inputs.words.data", id="text is null"),
    pytest.param(TEXT, words('["a", true]'), "inputs.words.data", id="text is true"),
    pytest.param(TEXT, words('["a"]'), "inputs.words.data", id="a text is missing"),
    pytest.param(TEXT, words('["a", "\\ud800"]'), "body", id="text is half a surrogate pair"),
    pytest.param(TEXT, words('["a", "b"]').replace(b'"b"', b'"\xff"'), "inputs.words.data",
                 id="text is no UTF-8"),
    pytest.param(LINEAR, asking(x(data="@")).replace(b'"@"', nested(33).encode()), DATA,
                 id="data are 33 lists deep"),
    pytest.param(LINEAR, asking(x(data="@")).replace(b'"@"', nested(DEPTH).encode()), "body",
                 id="data are far too deep"),
    pytest.param(LINEAR, number(nested(DEPTH)), "body", id="an element is far too deep"),
    pytest.param(LINEAR, inside("parameters", f'{{"a": {nested(DEPTH)}}}'), "parameters",
                 id="parameters are far too deep"),
    pytest.param(LINEAR, inside("unknown", nested(DEPTH)), "body",
                 id="an unknown field is far too deep"),
    pytest.param(LINEAR, inside("unknown", '{"a":' * DEPTH + "1" + "}" * DEPTH), "body",
                 id="objects are far too deep"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "error"), JSON_CASES)
def test_rest_refuses_json_and_goes_on_when(
    rest: http.client.HTTPConnection, path: str, body: bytes, error: str
) -> None:
    assert_refused(ask(rest, "POST", path, body), 400, error)
    assert_rest_works(rest)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        pytest.param({"parameters": {"sequence_id": 1}}, "parameters.sequence_id",
                     id="it is part of a sequence"),
        pytest.param({"inputs": [x(data=None, parameters={
            "shared_memory_region": "r", "shared_memory_byte_size": 32})]},
            "--shared-memory-prefix", id="its input is in shared memory, which is off"),
    ],
)  # fmt: skip
def test_rest_answers_501_and_goes_on_when(
    rest: http.client.HTTPConnection, fields: dict[str, Any], error: str
) -> None:
    body = json.dumps({"inputs": [x()]} | fields).encode()
    assert_refused(ask(rest, "POST", LINEAR, body), 501, error)
    assert_rest_works(rest)


# --- REST: binary tensor data


def binary(size: Any, raw: bytes = rows(2).tobytes(), **changes: Any) -> tuple[bytes, int]:
    """A body whose tensor claims to have `size` bytes, and the length of its JSON."""
    head = asking(x(**{"data": None, "parameters": {"binary_data_size": size}} | changes))
    return head + raw, len(head)


def text_tensor(raw: bytes) -> tuple[bytes, int]:
    return binary(len(raw), raw, name="words", datatype="BYTES", shape=[1, 2])


SIZE = "inputs.x.parameters.binary_data_size"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        pytest.param(binary(-1), SIZE, id="negative"),
        pytest.param(binary(-(2**63)), SIZE, id="-2^63"),
        pytest.param(binary(True), SIZE, id="true"),
        pytest.param(binary(32.0), SIZE, id="32.0"),
        pytest.param(binary("32"), SIZE, id="text"),
        pytest.param(binary(2**63), SIZE, id="2^63"),
        pytest.param(binary(2**70), "parameters", id="2^70"),
        pytest.param(binary([32]), "parameters", id="a list"),
        pytest.param(binary(33), SIZE, id="one more than there are"),
        pytest.param(binary(31), "inputs.x", id="one less than there are"),
        pytest.param(binary(32, rows(2).tobytes() + b"!"), "body: got '1 bytes left over'",
                     id="less than the body has"),
        pytest.param(binary(32, rows(2).tobytes()[:-1]), SIZE, id="more than the body has"),
        pytest.param(binary(0, b""), "inputs.x", id="0"),
        pytest.param(binary(32, data=[0.5] * 8), "inputs.x.data", id="there, and data too"),
        pytest.param(binary(32, shape=[2**62, 2**62]), SHAPE, id="that of no such shape"),
        pytest.param(binary(0, b"", shape=[0, 2**63 - 1]), SHAPE, id="0 and the shape absurd"),
        pytest.param(text_tensor(b"\xff\xff\xff\xff" * 2), "inputs.words", id="of endless text"),
        pytest.param(text_tensor(struct.pack("<IBI", 1, 97, 2**31)), "inputs.words",
                     id="of text that leads past its end"),
        pytest.param(text_tensor(bytes(12)), "inputs.words", id="of one text too many"),
        pytest.param(text_tensor(bytes(4)), "inputs.words", id="of one text too few"),
        pytest.param(text_tensor(bytes(7)), "inputs.words", id="of text cut short"),
        pytest.param(text_tensor(struct.pack("<IBI", 1, 255, 0)), "UTF-8", id="of no UTF-8"),
    ],
)  # fmt: skip
def test_rest_refuses_binary_data_and_goes_on_when_their_size_is(
    rest: http.client.HTTPConnection, body: tuple[bytes, int], error: str
) -> None:
    data, length = body
    path = TEXT if b"words" in data else LINEAR
    headers = {"Inference-Header-Content-Length": str(length)}
    assert_refused(ask(rest, "POST", path, data, headers), 400, error)
    assert_rest_works(rest)


def send(
    rest: http.client.HTTPConnection, path: str, body: bytes, *headers: tuple[str, str]
) -> Answer:
    """A request with these headers in this order, twice the same if asked."""
    rest.putrequest("POST", path)
    for name, value in (("Content-Length", str(len(body))), *headers):
        rest.putheader(name, value)
    rest.endheaders(body)
    return Answer(rest.getresponse())


LENGTH = "inference-header-content-length"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        pytest.param([str(10**6)], "Inference-Header-Content-Length", id="past the body"),
        pytest.param(["9" * 18], "Inference-Header-Content-Length", id="far past the body"),
        pytest.param(["9" * 1000], LENGTH, id="1,000 digits long"),
        pytest.param(["-1"], LENGTH, id="negative"),
        pytest.param(["+5"], LENGTH, id="signed"),
        pytest.param(["0x10"], LENGTH, id="hexadecimal"),
        pytest.param(["1_0"], LENGTH, id="with an underscore"),
        pytest.param(["²"], LENGTH, id="a digit of other scripts"),
        pytest.param([""], LENGTH, id="empty"),
        pytest.param(["5.0"], LENGTH, id="a fraction"),
        pytest.param(["5", "@"], LENGTH, id="there twice, the second right"),
        pytest.param(["@", "5"], LENGTH, id="there twice, the first right"),
        pytest.param(["@", "@"], LENGTH, id="there twice and right"),
        pytest.param(["10"], "body", id="in the middle of the JSON"),
    ],
)
def test_rest_refuses_the_jsons_length_and_goes_on_when_it_is(
    rest: http.client.HTTPConnection, values: list[str], error: str
) -> None:
    body, length = binary(32)
    headers = [
        ("Inference-Header-Content-Length", value.replace("@", str(length))) for value in values
    ]
    assert_refused(send(rest, LINEAR, body, *headers), 400, error)
    assert_rest_works(rest)


# --- REST: compression

ZEROS = bytes(100 * MAX_REQUEST_BYTES)
SOUND = gzip.compress(asking(x()))


def folded(data: bytes, times: int) -> bytes:
    for _ in range(times):
        data = gzip.compress(data)
    return data


def members(n: int) -> bytes:
    """A sound body in so many gzip members, all empty but the last."""
    return gzip.compress(b"") * (n - 1) + SOUND


def wrong_checksum() -> bytes:
    return SOUND[:-8] + bytes(byte ^ 0xFF for byte in SOUND[-8:-4]) + SOUND[-4:]


@pytest.mark.parametrize(
    ("coding", "body", "status", "error"),
    [
        pytest.param("gzip", gzip.compress(ZEROS), 413, "at most", id="it unfolds a thousandfold"),
        pytest.param("deflate", zlib.compress(ZEROS), 413, "at most", id="deflate does too"),
        pytest.param("gzip", folded(ZEROS, 2), 400, "body", id="it is folded twice"),
        pytest.param("gzip", folded(asking(x()), 3), 400, "body", id="it is folded three times"),
        pytest.param("gzip", SOUND[:-1], 400, "body: got 'a body that is cut short'",
                     id="its last byte is missing"),
        pytest.param("gzip", SOUND[:5], 400, "body: got 'a body that is cut short'",
                     id="its head is cut"),
        pytest.param("gzip", b"", 400, "body", id="nothing comes"),
        pytest.param("gzip", wrong_checksum(), 400, "body: got \"bytes that aren't gzip\"",
                     id="its checksum is wrong"),
        pytest.param("gzip", SOUND + b"garbage", 400, "body", id="garbage follows"),
        pytest.param("gzip", members(1025), 400, "1024 members", id="it has 1025 members"),
        pytest.param("gzip", zlib.compress(asking(x())), 400, "body", id="it is deflate"),
        pytest.param("gzip, gzip", SOUND, 415, "Content-Encoding", id="two codings are named"),
        pytest.param("zstd", SOUND, 415, "Content-Encoding: got 'zstd'", id="it is zstd"),
        pytest.param("a" * 5000, SOUND, 415, "Content-Encoding: got 'aaa", id="its name is long"),
        pytest.param("gzip\tx", SOUND, 415, "Content-Encoding", id="its name has a tab"),
    ],
)  # fmt: skip
def test_rest_refuses_a_compressed_body_when(
    server: RunningServer, coding: str, body: bytes, status: int, error: str
) -> None:
    rest = connect(server.http_port)
    answer = send(rest, LINEAR, body, ("Content-Encoding", coding))
    assert_refused(answer, status, error)
    if answer.headers["connection"] != "close":
        assert_rest_works(rest)
    rest.close()


def test_rest_refuses_a_body_when_its_coding_is_named_in_two_headers(
    rest: http.client.HTTPConnection,
) -> None:
    codings = [("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")]
    assert_refused(send(rest, LINEAR, SOUND, *codings), 415, "Content-Encoding: got 'gzip, gzip'")
    assert_rest_works(rest)


def test_rest_answers_a_compressed_body_when_it_is_sound_in_many_members(
    rest: http.client.HTTPConnection,
) -> None:
    answer = send(rest, LINEAR, members(1024), ("Content-Encoding", "gzip"))
    assert answer.status == 200


# --- REST: names and paths

LONG = "a" * 10_000


@pytest.mark.parametrize(
    ("verb", "path", "status", "error"),
    [
        pytest.param("POST", "models/../linear/infer", 404, "Not Found", id="a path goes up"),
        pytest.param("POST", "models/%2e%2e%2f%2e%2e%2fetc/infer", 404, "Not Found",
                     id="a name goes up, encoded"),
        pytest.param("POST", "models/..%5c..%5cetc/infer", 404, r"'..\\..\\etc'",
                     id="a name goes up as on Windows"),
        pytest.param("POST", "models/%252e%252e/infer", 404, "'%2e%2e'", id="it is encoded twice"),
        pytest.param("POST", "models/linear%00.json/infer", 404, r"\x00", id="a name has a NUL"),
        pytest.param("POST", "models/a%0d%0aX:%201/infer", 404, r"'a\r\nX: 1'",
                     id="a name breaks the line"),
        pytest.param("POST", "models/%20linear/infer", 404, "' linear'", id="a name has a space"),
        pytest.param("POST", "models/LINEAR/infer", 404, "'LINEAR'", id="a name is upper case"),
        pytest.param("POST", "models/%ff%fe/infer", 404, "is not in", id="a name is no UTF-8"),
        pytest.param("POST", "models/%e2%80%ae/infer", 404, r"\u202e", id="a name turns text"),
        pytest.param("POST", f"models/{LONG}/infer", 404, "aaa...", id="a name is very long"),
        pytest.param("POST", "models//infer", 404, "''", id="a name is empty"),
        pytest.param("POST", "models/linear/versions//infer", 200, "", id="a version is empty"),
        pytest.param("POST", "models/linear/versions/01/infer", 404, "'01'",
                     id="a version begins with 0"),
        pytest.param("POST", "models/linear/versions/-1/infer", 404, "'-1'",
                     id="a version is negative"),
        pytest.param("POST", "models/linear/versions/../infer", 404, "'..'",
                     id="a version goes up"),
        pytest.param("POST", "models/linear/versions/%d9%a1/infer", 404, "is not in",
                     id="a version is a digit of another script"),
        pytest.param("POST", "models/linear/infer/", 404, "Not Found", id="a slash follows"),
        pytest.param("POST", "models/linear//infer", 404, "Not Found", id="slashes are double"),
        pytest.param("POST", "models/linear/infer?version=9", 200, "", id="a query follows"),
        pytest.param("POST", "models/linear/infer?%00&&=%ff", 200, "", id="a query is nonsense"),
        pytest.param("POST", "models/linear;v=1/infer", 404, "'linear;v=1'", id="a part follows"),
        pytest.param("GET", f"models/{LONG}/stats", 404, "aaa...", id="statistics of a long name"),
        pytest.param("GET", "models/%0d%0a/config", 404, r"'\r\n'", id="a configuration's name"),
        pytest.param("GET", "models/linear/versions/%0a/ready", 404, r"'\n'", id="a version is LF"),
        pytest.param("POST", "repository/models/linear/load", 403, "--control-port",
                     id="a model is loaded"),
        pytest.param("POST", "repository/models/linear/unload", 403, "--control-port",
                     id="a model is unloaded"),
        pytest.param("POST", "repository/models/..%2fx/load", 404, "Not Found",
                     id="something above is loaded"),
        pytest.param("GET", "systemsharedmemory/status", 501, "--shared-memory-prefix",
                     id="shared memory is off"),
        pytest.param("GET", "cudasharedmemory/status", 501, "CUDA", id="there is no CUDA memory"),
    ],
)  # fmt: skip
def test_rest_answers_by_the_path_and_goes_on_when(
    rest: http.client.HTTPConnection, verb: str, path: str, status: int, error: str
) -> None:
    body = asking(x()) if path.partition("?")[0].endswith("infer") else None
    answer = ask(rest, verb, f"/v2/{path}", body)
    if status == 200:
        assert answer.status == 200
    else:
        assert_refused(answer, status, error)
    assert_rest_works(rest)


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        pytest.param("logging", b'{"log_verbose_level": 1}', 403, "--control-port",
                     id="the log is changed"),
        pytest.param("repository/index", b'{"ready": 1}', 400, "ready", id="a switch is 1"),
        pytest.param("repository/index", b'{"\\ud800": 1}', 400, "body",
                     id="a field is half a surrogate pair"),
        pytest.param("repository/index", b'{"a": 1}', 400, "a: got 'a field'",
                     id="a field is unknown"),
        pytest.param("repository/index", b'{"a\\r\\nb": 1}', 400, r"a\r\nb",
                     id="a field breaks the line"),
        pytest.param("repository/index", b"[1]", 400, "body: got 'list'", id="it is a list"),
        pytest.param("repository/index", b"\xff", 400, "body", id="it is no UTF-8"),
        pytest.param("repository/index", nested(DEPTH).encode(), 400, "body", id="it is too deep"),
        pytest.param("repository/index", b"9" * 5000, 400, "body", id="it is a huge number"),
        pytest.param("trace/setting", b'{"\\ud800": 1}', 501, r"\ud800",
                     id="a setting is half a surrogate pair"),
        pytest.param("trace/setting", b'{"a\\nb": 1}', 501, r"a\nb",
                     id="a setting breaks the line"),
        pytest.param("trace/setting", json.dumps({"a" * 10_000: 1}).encode(), 501, "aaa",
                     id="a setting is very long"),
    ],
)  # fmt: skip
def test_rest_refuses_a_document_and_goes_on_when(
    rest: http.client.HTTPConnection, path: str, body: bytes, status: int, error: str
) -> None:
    assert_refused(ask(rest, "POST", f"/v2/{path}", body), status, error)
    assert_rest_works(rest)


# --- gRPC


def raw_x(**changes: Any) -> pb.ModelInferRequest:
    """A request for `linear` of two rows; changes are those of its input, or `raw`."""
    raw = changes.pop("raw", [rows(2).tobytes()])
    request = pb.ModelInferRequest(model_name="linear", raw_input_contents=raw)
    request.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [2, 4]} | changes)
    return request


def typed_x(contents: dict[str, Any], **changes: Any) -> pb.ModelInferRequest:
    return raw_x(raw=[], contents=pb.InferTensorContents(**contents), **changes)


def typed_text(elements: list[bytes]) -> pb.ModelInferRequest:
    contents = {"bytes_contents": elements}
    request = typed_x(contents, name="words", datatype="BYTES", shape=[1, 2])
    request.model_name = "text"
    return request


def raw_text(raw: bytes) -> pb.ModelInferRequest:
    request = raw_x(raw=[raw], name="words", datatype="BYTES", shape=[1, 2])
    request.model_name = "text"
    return request


def with_parameter(name: str, **value: Any) -> pb.ModelInferRequest:
    request = raw_x()
    request.parameters[name].CopyFrom(pb.InferParameter(**value))
    return request


def with_outputs(*names: str, **parameters: int) -> pb.ModelInferRequest:
    request = raw_x()
    for name in names:
        output = request.outputs.add(name=name)
        for parameter, value in parameters.items():
            output.parameters[parameter].int64_param = value
    return request


def with_tensors(n: int) -> pb.ModelInferRequest:
    request = raw_x(raw=[rows(2).tobytes()] * n)
    for _ in range(n - 1):
        request.inputs.add(name="x", datatype="FP32", shape=[2, 4])
    return request


def in_shared_memory() -> pb.ModelInferRequest:
    request = raw_x(raw=[])
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 32
    return request


def named(model: str, version: str = "") -> pb.ModelInferRequest:
    request = raw_x()
    request.model_name, request.model_version = model, version
    return request


def assert_grpc_refused(
    channel: grpc.Channel, call: str, request: Any, code: grpc.StatusCode, details: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        method(channel, call)(request, timeout=PATIENCE_S)
    assert isinstance(caught.value, grpc.Call)
    got = caught.value.details() or ""
    assert (caught.value.code(), details in got) == (code, True), (caught.value.code(), got)
    assert len(got) <= MAX_MESSAGE
    assert got.isprintable()


def assert_grpc_works(channel: grpc.Channel) -> None:
    answer = method(channel, "ModelInfer")(raw_x(), timeout=PATIENCE_S)
    y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
    np.testing.assert_allclose(y, linear_by_hand(rows(2)), atol=1e-5)


GRPC_CASES = [
    pytest.param(raw_x(shape=[2**63 - 1, 4]), SHAPE, id="a dimension is 2^63 - 1"),
    pytest.param(raw_x(shape=[-(2**63), 4]), SHAPE, id="a dimension is -2^63"),
    pytest.param(raw_x(shape=[-2, -4]), SHAPE, id="dimensions' signs cancel out"),
    pytest.param(raw_x(shape=[2**32, 2**32]), SHAPE, id="elements are 0 modulo 2^64"),
    pytest.param(raw_x(shape=[2**33, 2**33]), SHAPE, id="elements exceed 2^64"),
    pytest.param(raw_x(shape=[1] * 33), SHAPE, id="there are 33 dimensions"),
    pytest.param(raw_x(shape=[1] * 100_000), SHAPE, id="there are 100,000 dimensions"),
    pytest.param(raw_x(shape=[]), "inputs.x", id="there is no shape"),
    pytest.param(raw_x(shape=[8]), SHAPE, id="a dimension is missing"),
    pytest.param(raw_x(shape=[0, 4], raw=[b""]), "inputs.x", id="there are no rows"),
    pytest.param(raw_x(datatype=""), "inputs.x.datatype", id="there is no datatype"),
    pytest.param(raw_x(datatype="FP8"), "inputs.x.datatype", id="a datatype is unknown"),
    pytest.param(raw_x(raw=[rows(2).tobytes() + b"!"]), "33 bytes", id="a byte is too many"),
    pytest.param(raw_x(raw=[b""]), "0 bytes", id="bytes are empty"),
    pytest.param(raw_x(raw=[]), "inputs.x.contents", id="nothing is raw nor typed"),
    pytest.param(raw_x(raw=[rows(2).tobytes()] * 2), "raw_input_contents: got '2 entries'",
                 id="a raw entry is too many"),
    pytest.param(typed_x({"fp32_contents": [1.0] * 7}), "inputs.x.contents.fp32_contents",
                 id="a typed element is missing"),
    pytest.param(typed_x({"fp32_contents": [1.0] * 9}), "inputs.x.contents.fp32_contents",
                 id="a typed element is too many"),
    pytest.param(typed_x({"fp64_contents": [1.0] * 8}), "inputs.x.contents",
                 id="contents are of another type"),
    pytest.param(typed_x({"fp32_contents": [1.0] * 8, "bool_contents": [True]}),
                 "inputs.x.contents", id="contents are of two types"),
    pytest.param(typed_x({"fp32_contents": [1.0] * 8}, datatype="FP16"), "inputs.x.datatype",
                 id="a datatype exists only raw"),
    pytest.param(typed_text([b"a", b"\xff"]), "UTF-8", id="typed text is no UTF-8"),
    pytest.param(typed_text([b"a"]), "inputs.words.contents.bytes_contents",
                 id="a typed text is missing"),
    pytest.param(raw_text(b"\xff\xff\xff\x7f" * 2), "inputs.words", id="text is endless"),
    pytest.param(raw_text(bytes(12)), "inputs.words", id="a raw text is too many"),
    pytest.param(raw_text(bytes(5)), "inputs.words", id="a raw text is cut short"),
    pytest.param(with_tensors(1025), "1025 tensors", id="1025 inputs come"),
    pytest.param(with_outputs("y", "y"), "outputs", id="an output is asked for twice"),
    pytest.param(with_outputs("q"), "outputs.name: got 'q'", id="an output is unknown"),
    pytest.param(with_outputs("y", classification=0), "outputs.y.parameters.classification",
                 id="no classes are asked for"),
    pytest.param(with_parameter("timeout", string_param="1"), "parameters.timeout",
                 id="the timeout is text"),
    pytest.param(with_parameter("timeout", bool_param=True), "parameters.timeout",
                 id="the timeout is true"),
    pytest.param(with_parameter("timeout", double_param=float("nan")), "parameters.timeout",
                 id="the timeout is NaN"),
    pytest.param(with_parameter("timeout", uint64_param=2**64 - 1), "parameters.timeout",
                 id="the timeout is 2^64 - 1"),
    pytest.param(with_parameter("a"), "parameters.a", id="a parameter has no value"),
    pytest.param(raw_x(name="x\r\nX: 1", raw=[b""]), r"x\r\nX: 1",
                 id="a name breaks the line"),
    pytest.param(raw_x(name="x\0"), r"x\x00", id="a name has a NUL"),
    pytest.param(raw_x(name="é" * 10_000), "inputs.", id="a name is very long"),
]  # fmt: skip


@pytest.mark.parametrize(("request_message", "details"), GRPC_CASES)
def test_grpc_refuses_a_request_and_goes_on_when(
    channel: grpc.Channel, request_message: pb.ModelInferRequest, details: str
) -> None:
    assert_grpc_refused(channel, "ModelInfer", request_message, Status.INVALID_ARGUMENT, details)
    assert_grpc_works(channel)


@pytest.mark.parametrize(
    ("call", "request_message", "code", "details"),
    [
        pytest.param("ModelInfer", named("../linear"), Status.NOT_FOUND, "'../linear'",
                     id="a name goes up"),
        pytest.param("ModelInfer", named("linear\0"), Status.NOT_FOUND, r"'linear\x00'",
                     id="a name has a NUL"),
        pytest.param("ModelInfer", named("a\r\nb: c"), Status.NOT_FOUND, r"'a\r\nb: c'",
                     id="a name breaks the line"),
        pytest.param("ModelInfer", named("\u202e"), Status.NOT_FOUND, r"\u202e",
                     id="a name turns text"),
        pytest.param("ModelInfer", named(LONG), Status.NOT_FOUND, "aaa...", id="a name is long"),
        pytest.param("ModelInfer", named(""), Status.NOT_FOUND, "''", id="a name is empty"),
        pytest.param("ModelInfer", named("linear", "\n"), Status.NOT_FOUND, r"'\n'",
                     id="a version is LF"),
        pytest.param("ModelInfer", named("linear", LONG), Status.NOT_FOUND, "aaa...",
                     id="a version is long"),
        pytest.param("ModelConfig", pb.ModelConfigRequest(name="\r\n"), Status.NOT_FOUND, r"\r\n",
                     id="a configuration's name breaks the line"),
        pytest.param("ModelStatistics", pb.ModelStatisticsRequest(name=LONG), Status.NOT_FOUND,
                     "aaa...", id="statistics of a long name"),
        pytest.param("ModelInfer", with_parameter("sequence_id", int64_param=1),
                     Status.UNIMPLEMENTED, "parameters.sequence_id", id="it is of a sequence"),
        pytest.param("ModelInfer", in_shared_memory(), Status.UNIMPLEMENTED,
                     "--shared-memory-prefix", id="shared memory is off"),
        pytest.param("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="linear"),
                     Status.PERMISSION_DENIED, "--control-port", id="a model is loaded"),
        pytest.param("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="linear"),
                     Status.PERMISSION_DENIED, "--control-port", id="a model is unloaded"),
    ],
)  # fmt: skip
def test_grpc_answers_its_status_and_goes_on_when(
    channel: grpc.Channel, call: str, request_message: Any, code: grpc.StatusCode, details: str
) -> None:
    assert_grpc_refused(channel, call, request_message, code, details)
    assert_grpc_works(channel)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\x0a\x02\xff\xfe", id="a name is no UTF-8"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="a length leads past the end"),
        pytest.param(b"\x0a" * 1001, id="it is cut short"),
        pytest.param(b"\x2a\x02\x1a\x05", id="an inner message is cut short"),
        pytest.param(b"\xff" * 20, id="a tag has too many bytes"),
        pytest.param(b"\x0b" * 5000, id="groups are far too deep"),
    ],
)
def test_grpc_fails_the_call_alone_when_a_message_is_malformed(
    channel: grpc.Channel, message: bytes
) -> None:
    call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    for padding in (b"", b"\x1a\x80\x80\x08" + b"a" * 2**17):  # long ones are read with more care
        with pytest.raises(grpc.RpcError) as caught:
            call(padding + message, timeout=PATIENCE_S)
        error: Any = caught.value
        assert error.code() == Status.INVALID_ARGUMENT
        assert error.details() == (
            "message: got 'malformed bytes', want a serialized ModelInferRequest"
        )
    assert_grpc_works(channel)


# --- memory


def test_server_grows_no_further_when_thousands_of_requests_are_bad(
    server: RunningServer, rest: http.client.HTTPConnection, channel: grpc.Channel
) -> None:
    """Over a server that has seen them all once: a leak of 16 kB a request would show."""

    def send_bad(n: int) -> None:
        infer = method(channel, "ModelInfer")
        cases = zip(itertools.cycle(JSON_CASES), itertools.cycle(GRPC_CASES), strict=False)
        for by_rest, by_grpc in itertools.islice(cases, n // 2):
            path, body, _ = by_rest.values
            assert ask(rest, "POST", str(path), body).status == 400
            with pytest.raises(grpc.RpcError):
                infer(by_grpc.values[0], timeout=PATIENCE_S)

    send_bad(2 * len(JSON_CASES))
    memory, descriptors = memory_mib(server), n_descriptors(server)
    send_bad(2000)
    assert memory_mib(server) < memory + 32
    assert n_descriptors(server) <= descriptors
    assert_nothing_is_left(server)


# --- control and shared memory, where they are allowed

PREFIX = "trimserve-test-"


@pytest.fixture(scope="module")
def trusting(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose clients may load models and name shared memory."""
    log = tmp_path_factory.mktemp("trusting") / "log"
    options = ["--model-control=explicit", "--load-model=linear", "--control-port=0"]
    allowed = ["--control-on-data-port", f"--shared-memory-prefix={PREFIX}", "--drain-delay-s=0"]
    with running(log, "--repository", str(models), *options, *allowed) as started:
        yield started


NAMES = [
    pytest.param("..", id="goes up"),
    pytest.param("../repository/linear", id="goes up and down again"),
    pytest.param("/etc", id="is absolute"),
    pytest.param("linear/1", id="has a slash"),
    pytest.param("linear\\1", id="has a backslash"),
    pytest.param(".", id="is the repository itself"),
    pytest.param("linear\0", id="has a NUL"),
    pytest.param("a\r\nlevel: error", id="breaks the line"),
    pytest.param("\u202elinear", id="turns text"),
    pytest.param(" linear", id="begins with a space"),
    pytest.param("linear*", id="is a pattern"),
    pytest.param("file:///etc", id="is a URL"),
    pytest.param("a" * 10_000, id="is very long"),
]


@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize("name", NAMES)
def test_control_refuses_and_logs_one_line_when_a_name(
    trusting: RunningServer, name: str, verb: str
) -> None:
    logged = trusting.log.stat().st_size
    rest = connect(trusting.http_port)
    path = f"/v2/repository/models/{urllib.parse.quote(name, safe='')}/{verb}"
    answer = ask(rest, "POST", path)
    assert answer.status in (400, 404), answer.body
    assert len(answer.error) <= MAX_MESSAGE
    assert answer.error.isprintable()
    assert_rest_works(rest)
    rest.close()
    with channel_to(trusting.grpc_port) as channel:
        call = f"RepositoryModel{verb.capitalize()}"
        request = getattr(pb, f"{call}Request")(model_name=name)
        codes = (Status.INVALID_ARGUMENT, Status.NOT_FOUND, Status.FAILED_PRECONDITION)
        with pytest.raises(grpc.RpcError) as caught:
            method(channel, call)(request, timeout=PATIENCE_S)
        error: Any = caught.value
        assert error.code() in codes
        assert error.details().isprintable()
        assert_grpc_works(channel)
    lines = trusting.log.read_bytes()[logged:].decode().splitlines()
    assert all(json.loads(line)["level"] for line in lines)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        pytest.param({"parameters": {"file:1/model.onnx": "AAAA"}}, "file:1/model.onnx",
                     id="a file is sent along"),
        pytest.param({"parameters": {"config": 1}}, "parameters.config", id="it is a number"),
        pytest.param({"parameters": {"config": "{"}}, "config", id="it is cut short"),
        pytest.param({"parameters": {"config": nested(DEPTH)}}, "config", id="it is too deep"),
        pytest.param({"parameters": {"config": '{"name": "pair"}'}}, "name",
                     id="it is another model's"),
        pytest.param({"parameters": {"config": '{"max_batch_size": -1}'}}, "max_batch_size",
                     id="a size in it is negative"),
        pytest.param({"parameters": {"digest": "sha256:../x"}}, "digest", id="a digest is a path"),
        pytest.param({"parameters": []}, "parameters", id="parameters are a list"),
        pytest.param({"a\r\nb": 1}, r"a\r\nb", id="a field breaks the line"),
    ],
)  # fmt: skip
def test_load_is_refused_and_the_model_goes_on_when(
    trusting: RunningServer, body: dict[str, Any], error: str
) -> None:
    rest = connect(trusting.http_port)
    answer = ask(rest, "POST", "/v2/repository/models/linear/load", body)
    assert_refused(answer, 400, error)
    assert_rest_works(rest)
    rest.close()


@pytest.mark.parametrize(
    ("region", "error"),
    [
        pytest.param({"key": "other", "byte_size": 8}, "key", id="a key is outside the prefix"),
        pytest.param({"key": PREFIX, "byte_size": 8}, "key", id="a key is the prefix alone"),
        pytest.param({"key": f"{PREFIX}/../../etc/passwd", "byte_size": 8}, "key",
                     id="a key goes up"),
        pytest.param({"key": f"../{PREFIX}a", "byte_size": 8}, "key", id="a key begins above"),
        pytest.param({"key": f"{PREFIX}a\0b", "byte_size": 8}, "key", id="a key has a NUL"),
        pytest.param({"key": f"{PREFIX}a\r\nb", "byte_size": 8}, "key", id="a key breaks the line"),
        pytest.param({"key": PREFIX + "a" * 10_000, "byte_size": 8}, "key", id="a key is long"),
        pytest.param({"key": f"{PREFIX}absent", "byte_size": 8}, "key", id="nothing is there"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": 0}, "byte_size", id="it has no bytes"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": 2**62}, "byte_size", id="it is huge"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": 8, "offset": 2**63 - 1}, "",
                     id="it begins past every end"),
    ],
)  # fmt: skip
def test_shared_memory_is_refused_when(
    trusting: RunningServer, region: dict[str, Any], error: str
) -> None:
    rest = connect(trusting.http_port)
    path = "/v2/systemsharedmemory/region/r/register"
    assert_refused(ask(rest, "POST", path, region), 400, error)
    assert ask(rest, "GET", "/v2/systemsharedmemory/status").json == []
    assert_rest_works(rest)
    rest.close()
    with channel_to(trusting.grpc_port) as channel:
        request = pb.SystemSharedMemoryRegisterRequest(name="r", **region)
        call = "SystemSharedMemoryRegister"
        assert_grpc_refused(channel, call, request, Status.INVALID_ARGUMENT, error)
        assert_grpc_works(channel)


@pytest.mark.parametrize(
    ("region", "error"),
    [
        pytest.param({"key": f"{PREFIX}a", "byte_size": -1}, "byte_size", id="negative"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": True}, "byte_size", id="true"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": 8.0}, "byte_size", id="8.0"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": "8"}, "byte_size", id="text"),
        pytest.param({"key": f"{PREFIX}a", "byte_size": 2**70}, "byte_size", id="2^70"),
        pytest.param({"key": f"{PREFIX}a"}, "byte_size", id="missing"),
    ],
)
def test_shared_memory_is_refused_over_rest_when_its_size_is(
    trusting: RunningServer, region: dict[str, Any], error: str
) -> None:
    answer = fetch(trusting.http_port, "POST", "/v2/systemsharedmemory/region/r/register", region)
    assert_refused(answer, 400, error)


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        pytest.param({"shared_memory_region": "absent", "shared_memory_byte_size": 32},
                     "shared_memory_region", id="its region is unknown"),
        pytest.param({"shared_memory_region": 1, "shared_memory_byte_size": 32},
                     "shared_memory_region", id="its region is a number"),
        pytest.param({"shared_memory_region": "a\r\nb", "shared_memory_byte_size": 32},
                     r"a\r\nb", id="its region breaks the line"),
        pytest.param({"shared_memory_region": "absent"}, "shared_memory_byte_size",
                     id="it has no size"),
        pytest.param({"shared_memory_region": "absent", "shared_memory_byte_size": -1},
                     "shared_memory_byte_size", id="its size is negative"),
        pytest.param({"shared_memory_region": "absent", "shared_memory_byte_size": 32,
                      "shared_memory_offset": -1}, "shared_memory_offset",
                     id="its offset is negative"),
        pytest.param({"shared_memory_region": "absent", "shared_memory_byte_size": 32,
                      "binary_data_size": 32}, "inputs.x", id="it is in two places"),
    ],
)  # fmt: skip
def test_rest_refuses_an_input_in_shared_memory_when(
    trusting: RunningServer, parameters: dict[str, Any], error: str
) -> None:
    rest = connect(trusting.http_port)
    body = asking(x(data=None, parameters=parameters))
    assert_refused(ask(rest, "POST", LINEAR, body), 400, error)
    assert_rest_works(rest)
    rest.close()
