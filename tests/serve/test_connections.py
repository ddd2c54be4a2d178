"""REST's connections: slow clients, clients that leave, bodies beyond every limit, and what HTTP
allows that few clients do. No case may cost the server a descriptor, a reservation or memory."""

import asyncio
import contextlib
import http.client
import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import pytest

from serve.artifact import Batching
from serve.transport.http_server import HttpLimits, HttpServer, listening_socket
from serve.transport.rest import Receive, Scope, Send
from tests.serve import onnx_models
from tests.serve.conftest import MAX_REQUEST_BYTES
from tests.serve.onnx_models import linear_by_hand
from tests.serve.process_state import assert_nothing_is_left, memory_mib, n_descriptors
from tests.serve.running_server import (
    HOST,
    PATIENCE_S,
    Answer,
    RunningServer,
    ask,
    connect,
    fetch,
    running,
    until,
)
from tests.serve.versions import publish, rows

MIB = 1024 * 1024
MUCH_WORK = 40_000  # turns of the model `work`: some tenths of a second
LINEAR = "/v2/models/linear/infer"
WORK = "/v2/models/work/infer"
X = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": rows(2).ravel().tolist()}
BODY = json.dumps({"inputs": [X]}).encode()


# --- clients that write what they like


class Client:
    """A socket on the server's HTTP port, and the answers that come back on it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), PATIENCE_S)
        self.answers: IO[bytes] = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def next(self, verb: str = "POST") -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the next answer; it may be an interim one."""
        line = self.answers.readline().split(b" ", 2)
        assert line[0] == b"HTTP/1.1", line
        headers = http.client.parse_headers(self.answers)
        length = 0 if verb == "HEAD" else int(headers.get("content-length", "0"))
        return int(line[1]), headers, self.answers.read(length)

    def is_closed(self) -> bool:
        """Wait for the server to close, with nothing more sent."""
        try:
            return self.answers.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.answers.close()
        self.socket.close()

    def reset(self) -> None:
        """Leave without a goodbye."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


@contextlib.contextmanager
def client_of(port: int) -> Iterator[Client]:
    client = Client(port)
    try:
        yield client
    finally:
        client.close()


def request(
    path: str = LINEAR, body: bytes = BODY, verb: str = "POST", version: str = "1.1", **more: str
) -> bytes:
    """A request as bytes; `more` are headers, with _ for -."""
    headers = {"Host": "x", "Content-Length": str(len(body))}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{verb} {path} HTTP/{version}\r\n{lines}\r\n".encode() + body


def error_of(body: bytes) -> str:
    document = json.loads(body)
    assert set(document) == {"error"}
    return str(document["error"])


def assert_next_is_right(client: Client) -> None:
    """A good request on the same connection gets its numbers."""
    client.send(request())
    status, _, body = client.next()
    assert status == 200
    data = np.reshape(json.loads(body)["outputs"][0]["data"], (2, 3))
    np.testing.assert_allclose(data, linear_by_hand(rows(2)), atol=1e-5)


def assert_works(port: int) -> None:
    with client_of(port) as client:
        assert_next_is_right(client)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with the default size of a request, and room for less than three of them."""
    scratch = tmp_path_factory.mktemp("roomy")
    repository = scratch / "repository"
    publish(repository, onnx_models.linear, scratch)
    publish(repository, onnx_models.ragged, scratch)
    publish(repository, onnx_models.work, scratch, batching=Batching(0, max_queue_size=4))
    budget = f"--max-in-flight-bytes={160 * MIB}"
    with running(
        scratch / "log", "--repository", str(repository), budget, "--drain-delay-s=0"
    ) as started:
        yield started


# --- the protocol: verbs, versions, pipelines


@pytest.mark.parametrize(
    ("data", "status", "error"),
    [
        pytest.param(request(verb="GET", body=b""), 405, "want POST", id="inference is got"),
        pytest.param(request(verb="PUT"), 405, "want POST", id="inference is put"),
        pytest.param(request(verb="TRACE", body=b""), 405, "want POST", id="it is traced"),
        pytest.param(request(verb="OPTIONS", body=b""), 405, "want POST", id="options are asked"),
        pytest.param(request("/v2", verb="TRACE", body=b""), 405, "Method Not Allowed",
                     id="metadata are traced"),
        pytest.param(request("/v2", verb="OPTIONS", body=b""), 405, "Method Not Allowed",
                     id="options of metadata are asked"),
        pytest.param(request("*", verb="OPTIONS", body=b""), 404, "Not Found",
                     id="options of the server are asked"),
        pytest.param(request("//v2//models//linear//infer"), 404, "Not Found",
                     id="slashes are double"),
        pytest.param(request("http://x/v2/models/linear/infer"), 200, "", id="a target is a URL"),
        pytest.param(request("http://evil.example/v2/health/live", verb="GET", body=b""), 200, "",
                     id="a target is a URL of elsewhere"),
        pytest.param(request(LINEAR + "?a=b&c"), 200, "", id="a query follows"),
        pytest.param(request(LINEAR + "#infer"), 200, "", id="a fragment follows"),
        pytest.param(request(Connection="Upgrade, HTTP2-Settings", Upgrade="h2c",
                             HTTP2_Settings="AAMAAABkAAQAAP__"), 200, "", id="HTTP/2 is offered"),
        pytest.param(request(Connection="Upgrade", Upgrade="websocket"), 200, "",
                     id="a web socket is asked for"),
    ],
)  # fmt: skip
def test_rest_answers_and_keeps_the_connection_when(
    server: RunningServer, data: bytes, status: int, error: str
) -> None:
    with client_of(server.http_port) as client:
        client.send(data)
        got, _, body = client.next()
        assert (got, error in body.decode()) == (status, True), body
        assert_next_is_right(client)


@pytest.mark.parametrize("path", ["/v2/health/live", LINEAR])
def test_rest_sends_no_body_when_only_the_head_is_asked_for(
    server: RunningServer, path: str
) -> None:
    with client_of(server.http_port) as client:
        client.send(request(path, verb="HEAD", body=b""))
        status, headers, _ = client.next("HEAD")
        assert (status, headers["content-type"]) == (405, "application/json")
        assert_next_is_right(client)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(request(Transfer_Encoding="chunked"), id="a body has two lengths"),
        pytest.param(request(content_length="5"), id="lengths differ"),
        pytest.param(request(Content_Length="-5"), id="a length is negative"),
        pytest.param(request(Content_Length="1e3"), id="a length is no number"),
        pytest.param(request(Content_Length="9" * 30), id="a length has 30 digits"),
        pytest.param(request(content_length="5", Transfer_Encoding="gzip"), id="a body is coded"),
        pytest.param(request("/v2/models/é"), id="a path isn't ASCII"),
        pytest.param(request("/v2/models/a b"), id="a path has a space"),
        pytest.param(request("/v2", A="b\0c"), id="a header has a NUL"),
        pytest.param(request("/v2", A="b\r\n c"), id="a header is folded"),
        pytest.param(request("/v2", A="b\nInjected: c"), id="a line ends with LF"),
        pytest.param(request("x:443", verb="CONNECT", body=b""), id="a proxy is asked for"),
        pytest.param(request("/v2", version="3.0"), id="the version is unknown"),
        pytest.param(request("x:y", Connection="Upgrade", Upgrade="h2c"),
                     id="a target is nonsense and HTTP/2 is offered"),
        pytest.param(request("/v2", verb="BREW"), id="the verb is unknown"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="it is HTTP/2"),
        pytest.param(b"POST " + LINEAR.encode() + b" HTTP/1.1\r\nHost: x\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", id="a chunk has no length"),
        pytest.param(b"POST " + LINEAR.encode() + b" HTTP/1.1\r\nHost: x\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17, id="a chunk is too long"),
    ],
)  # fmt: skip
def test_rest_refuses_and_closes_when(server: RunningServer, data: bytes) -> None:
    with client_of(server.http_port) as client:
        client.send(data)
        status, headers, body = client.next()
        assert (status, headers["connection"]) == (400, "close")
        assert error_of(body)
        assert client.is_closed()
    assert_works(server.http_port)


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_rest_answers_and_closes_when_the_version_is_1_0(
    server: RunningServer, connection: str
) -> None:
    with client_of(server.http_port) as client:
        client.send(request(version="1.0", Connection=connection))
        status, headers, _ = client.next()
        assert (status, headers["connection"]) == (200, "close")
        assert client.is_closed()


def test_rest_answers_and_closes_when_the_client_asks_to(server: RunningServer) -> None:
    with client_of(server.http_port) as client:
        client.send(request(Connection="close"))
        assert client.next()[0] == 200
        assert client.is_closed()


def test_rest_invites_the_body_when_the_client_waits_for_that(server: RunningServer) -> None:
    head, _, body = request(Expect="100-continue").partition(b"{")
    with client_of(server.http_port) as client:
        client.send(head)
        assert client.next()[0] == 100
        client.send(b"{" + body)
        assert client.next()[0] == 200
        assert_next_is_right(client)


def test_rest_refuses_before_the_body_when_the_client_waits_for_that(
    server: RunningServer,
) -> None:
    too_large = str(2 * MAX_REQUEST_BYTES)
    with client_of(server.http_port) as client:
        client.send(request(body=b"", Content_Length=too_large, Expect="100-continue"))
        status, _, body = client.next()
        assert (status, "at most" in error_of(body)) == (413, True)
        assert client.is_closed()


def test_rest_takes_trailers_for_no_headers_when_a_body_is_chunked(server: RunningServer) -> None:
    head = request(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunk = b"%x\r\n%b\r\n" % (len(BODY), BODY)
    trailers = b"0\r\nInference-Header-Content-Length: 5\r\nContent-Encoding: gzip\r\n\r\n"
    with client_of(server.http_port) as client:
        client.send(head + chunk + trailers)
        assert client.next()[0] == 200
        assert_next_is_right(client)


def test_rest_answers_in_order_when_good_and_bad_requests_are_pipelined(
    server: RunningServer,
) -> None:
    kinds = [
        (request(), 200),
        (request(body=b"{"), 400),
        (request("/v2/models/absent/infer"), 404),
        (request("/v2/health/live", verb="GET", body=b""), 200),
        (request("/v2/health/live", Connection="Upgrade", Upgrade="h2c"), 405),
        (request("/v2/repository/index", body=b"[]"), 400),
    ]
    many = kinds * 50
    with client_of(server.http_port) as client:
        writer = threading.Thread(target=client.send, args=(b"".join(data for data, _ in many),))
        writer.start()
        assert [client.next()[0] for _ in many] == [status for _, status in many]
        writer.join()
        assert_next_is_right(client)


def test_rest_answers_first_when_nonsense_is_pipelined_behind_a_request(
    server: RunningServer,
) -> None:
    with client_of(server.http_port) as client:
        client.send(request() + b"\0nonsense\r\n\r\n")
        status, headers, _ = client.next()
        assert (status, headers["connection"]) == (200, "close")
        assert client.is_closed()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n", id="a target"),
        pytest.param(b"GET /v2 HTTP/1.1\r\nA: " + b"a" * 1_000_000 + b"\r\n\r\n", id="a header"),
        pytest.param(b"GET /v2 HTTP/1.1\r\n" + b"a" * 1_000_000 + b": b\r\n\r\n",
                     id="a header's name"),
        pytest.param(b"GET /v2 HTTP/1.1\r\n" + b"A: b\r\n" * 200_000, id="the number of headers"),
        pytest.param(b"POST /v2/models/linear/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
                     b"1\r\n{\r\n0\r\n" + b"A: b\r\n" * 200_000, id="the number of trailers"),
    ],
)  # fmt: skip
def test_rest_answers_431_and_closes_when_there_is_no_end_to(
    server: RunningServer, data: bytes
) -> None:
    with client_of(server.http_port) as client:
        # It may close before it has read everything, and needn't.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.send(data)
        status, headers, body = client.next()
        assert (status, headers["connection"]) == (431, "close")
        assert "want fewer" in error_of(body)
        assert client.is_closed()
    assert_works(server.http_port)


def test_rest_answers_when_a_body_comes_in_thousands_of_tiny_chunks(
    server: RunningServer,
) -> None:
    body = BODY + b" " * 20_000
    head = request(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with client_of(server.http_port) as client:
        client.send(head + chunks + b"0\r\n\r\n")
        assert client.next()[0] == 200
        assert_next_is_right(client)


# --- clients that leave


def n_answered(server: RunningServer, code: str) -> float:
    return server.metric("trimserve_request_duration_seconds_count", transport="rest", code=code)


@pytest.mark.parametrize("how", [Client.close, Client.reset], ids=["politely", "by a reset"])
@pytest.mark.parametrize(
    ("data", "n_cancelled"),
    [
        pytest.param(b"", 0, id="at once"),
        pytest.param(b"PO", 0, id="within the verb"),
        pytest.param(request()[:60], 0, id="within the head"),
        pytest.param(request(Content_Length="1000"), 1, id="within the body"),
        pytest.param(request() * 20, 0, id="before its answers"),
    ],
)
def test_rest_forgets_a_client_when_it_leaves(
    server: RunningServer, data: bytes, n_cancelled: int, how: Any
) -> None:
    before, cancelled = n_descriptors(server), n_answered(server, "cancelled")
    for _ in range(20):
        client = Client(server.http_port)
        client.send(data)
        how(client)
    until(lambda: n_answered(server, "cancelled") == cancelled + 20 * n_cancelled)
    until(lambda: n_descriptors(server) <= before)
    assert_nothing_is_left(server)
    assert_works(server.http_port)


def work(turns: int) -> bytes:
    n = {"name": "n", "datatype": "INT64", "shape": [], "data": turns}
    return request(WORK, json.dumps({"inputs": [n]}).encode())


def test_rest_forgets_clients_when_they_leave_the_queue(roomy: RunningServer) -> None:
    def n_in_flight() -> float:
        return roomy.metric("trimserve_requests_in_flight", model="work")

    before, cancelled = n_descriptors(roomy), n_answered(roomy, "cancelled")
    with client_of(roomy.http_port) as busy:
        busy.send(work(5 * MUCH_WORK))
        until(lambda: n_in_flight() == 1)
        waiting = [Client(roomy.http_port) for _ in range(4)]
        for one in waiting:
            one.send(work(1))
        until(lambda: n_in_flight() == 5)
        for one in waiting:
            one.close()
        until(lambda: n_answered(roomy, "cancelled") == cancelled + 4)
        assert busy.next()[0] == 200
    until(lambda: n_descriptors(roomy) <= before)
    assert_nothing_is_left(roomy)


# --- bodies beyond the limits


def ragged(n_bytes: int) -> tuple[bytes, dict[str, str]]:
    """One row of so many bytes, as binary tensor data."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, n_bytes // 4],
         "parameters": {"binary_data_size": n_bytes}}  # fmt: skip
    head = json.dumps({"inputs": [x]}).encode()
    return head + bytes(n_bytes), {"Inference-Header-Content-Length": str(len(head))}


def send_beyond(port: int, n_bytes: int, chunked: bool) -> Answer | None:
    """The answer to a body of so many bytes; None where the server closed before it could be
    read, which it may do to one who sends on and on."""
    piece = b" " * MIB
    pieces = (piece for _ in range(n_bytes // MIB))
    headers = {} if chunked else {"Content-Length": str(n_bytes)}
    connection = connect(port)
    try:
        connection.request("POST", LINEAR, pieces, headers, encode_chunked=chunked)
        return Answer(connection.getresponse())
    except (BrokenPipeError, ConnectionResetError):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("chunked", [False, True], ids=["length known", "chunked"])
def test_rest_keeps_nothing_of_a_body_when_it_is_a_hundred_times_too_large(
    server: RunningServer, chunked: bool
) -> None:
    before = memory_mib(server, "VmHWM")
    answer = send_beyond(server.http_port, 100 * MIB, chunked)
    assert answer is None or answer.status == 413
    assert memory_mib(server, "VmHWM") < before + 16
    assert_works(server.http_port)


def test_rest_holds_a_body_at_most_twice_when_it_is_as_large_as_allowed(
    roomy: RunningServer,
) -> None:
    body, headers = ragged(60 * MIB)
    before = memory_mib(roomy, "VmRSS")
    connection = connect(roomy.http_port)
    answer = ask(connection, "POST", "/v2/models/ragged/infer", body, headers)
    assert answer.status == 200, answer.body
    assert memory_mib(roomy, "VmHWM") < before + 4 * 64
    refused = send_beyond(roomy.http_port, 100 * MIB, chunked=False)
    assert refused is not None
    assert refused.status == 413
    connection.close()


def test_rest_answers_429_when_bodies_are_beyond_what_may_be_in_flight(
    roomy: RunningServer,
) -> None:
    """Each body is allowed, three at a time aren't; and as soon as two have gone there is room."""
    for _ in range(3):  # together more than the budget: what isn't given back would add up
        holding = [Client(roomy.http_port) for _ in range(2)]
        for one in holding:
            one.send(request(body=b" " * (60 * MIB - 1), Content_Length=str(60 * MIB)))
        until(lambda: not has_room(roomy, 60 * MIB))
        refused = fetch(roomy.http_port, "POST", LINEAR, b" " * (60 * MIB))
        assert refused.status == 429
        assert f"{160 * MIB} bytes in flight" in refused.error
        assert_works(roomy.http_port)
        for one in holding:
            one.close()
        until(lambda: has_room(roomy, 60 * MIB))
    assert_nothing_is_left(roomy)


def test_rest_serves_others_when_bodies_are_announced_and_never_sent(
    roomy: RunningServer,
) -> None:
    """Whoever announces takes nobody's place: only what has arrived counts."""
    stalled = [Client(roomy.http_port) for _ in range(16)]
    for one in stalled:
        one.send(request(body=b"{", Content_Length=str(60 * MIB)))
    assert_works(roomy.http_port)
    for one in stalled:
        one.close()
    assert_nothing_is_left(roomy)


def has_room(server: RunningServer, n_bytes: int) -> bool:
    """Whether the server invites a body of that size; which then isn't sent."""
    with client_of(server.http_port) as client:
        client.send(request(body=b"", Content_Length=str(n_bytes), Expect="100-continue"))
        return client.next()[0] == 100


# --- the limits themselves, of a server whose patience is short


class Slow:
    """An application that answers the body's length, or as many bytes as the path asks for, or
    after as many seconds."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        body = str(size).encode()
        match scope["path"].split("/"):
            case ["", "bytes", wanted]:
                body = bytes(int(wanted))
            case ["", "after", seconds]:
                await asyncio.sleep(float(seconds))
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def impatient(**limits: Any) -> Iterator[tuple[HttpServer, int]]:
    """An HTTP server in a thread, with these of its limits; itself and its port."""
    server = HttpServer(Slow(), 1.0, HttpLimits(**limits))
    with listening_socket(HOST, 0) as listener:
        port: int = listener.getsockname()[1]
        serving = server.serve(sockets=[listener])
        thread = threading.Thread(target=asyncio.run, args=(serving,), name="impatient")
        thread.start()
        try:
            yield server, port
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"G", "the head took too long to arrive", id="its first byte"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: ", "the head took too long to arrive",
                     id="half a head"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
                     "the body took too long to arrive", id="a head without its body"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n12345678",
                     "the body took too long to arrive", id="all but a byte of a body"),
        pytest.param(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n",
                     "the body took too long to arrive", id="a chunk of a body"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_http_answers_408_and_closes_when_a_client_stalls_after(
    data: bytes, error: str, first: bool
) -> None:
    limits = {"head_timeout_s": 0.05, "body_timeout_s": 0.05}
    with impatient(**limits) as (_, port), client_of(port) as client:
        if not first:
            client.send(request("/"))
            assert client.next()[0] == 200
        client.send(data)
        status, headers, body = client.next()
        assert (status, headers["connection"], error_of(body)) == (408, "close", error)
        assert client.is_closed()


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        pytest.param({"head_timeout_s": 0.05}, b"", id="says nothing at all"),
        pytest.param({"keep_alive_s": 0}, request("/"), id="asks nothing more"),
    ],
)
def test_http_closes_without_a_word_when_a_client(limits: dict[str, Any], data: bytes) -> None:
    with impatient(**limits) as (_, port), client_of(port) as client:
        client.send(data)
        if data:
            assert client.next()[0] == 200
        assert client.is_closed()


def test_http_closes_without_a_word_when_a_client_sends_an_empty_line_and_no_more() -> None:
    with impatient(keep_alive_s=1) as (_, port), client_of(port) as client:
        client.send(request("/"))
        assert client.next()[0] == 200
        client.send(b"\r\n")
        assert client.is_closed()


def test_http_gives_the_body_its_own_time_when_the_head_came_in_pieces() -> None:
    head = b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"
    limits = {"head_timeout_s": 2 * PATIENCE_S, "body_timeout_s": 0.05}
    with impatient(**limits) as (_, port), client_of(port) as client, client_of(port) as other:
        client.send(head[:20])
        other.send(request("/"))
        assert other.next()[0] == 200  # so the first piece has been read
        client.send(head[20:])
        assert client.next()[0] == 408


def test_http_waits_for_an_answer_when_it_takes_longer_than_a_client_may() -> None:
    """Nor does the time of a head run that is pipelined behind, until it is answered."""
    limits = {"head_timeout_s": 0.05, "body_timeout_s": 0.05, "read_timeout_s": 0.05}
    with impatient(**limits) as (_, port), client_of(port) as client:
        client.send(request("/after/0.3"))
        assert client.next()[0] == 200
        client.send(request("/after/0.3") + b"POST / HT")
        assert [client.next()[0] for _ in range(2)] == [200, 408]


def test_http_gives_a_connection_up_when_its_client_reads_nothing() -> None:
    """More than the kernel's buffers hold; the server would wait for ever to send the rest."""
    with impatient(read_timeout_s=0.05) as (server, port), client_of(port) as client:
        client.send(request(f"/bytes/{64 * MIB}"))
        client.answers.readline()  # it is being sent
        until(lambda: not server.server_state.connections)


def test_http_sends_all_when_its_client_reads_for_longer_than_it_is_kept() -> None:
    with impatient(keep_alive_s=0) as (_, port), client_of(port) as client:
        client.send(request(f"/bytes/{64 * MIB}"))
        status, _, body = client.next()
        assert (status, len(body)) == (200, 64 * MIB)
        assert client.is_closed()


def test_http_refuses_connections_when_there_are_as_many_as_allowed() -> None:
    with impatient(max_connections=2) as (server, port):
        held = [Client(port), Client(port)]
        for one in held:
            one.send(request("/"))
            assert one.next()[0] == 200
        with client_of(port) as third:
            status, headers, body = third.next()
            assert (status, headers["connection"]) == (503, "close")
            assert "limit of 2 connections" in error_of(body)
            assert third.is_closed()
        held.pop().close()
        until(lambda: len(server.server_state.connections) == 1)
        with client_of(port) as third:
            third.send(request("/"))
            assert third.next()[0] == 200
        held.pop().close()


def test_http_answers_what_it_has_when_a_stalled_request_is_pipelined_behind() -> None:
    """The stalled one's time runs only when its turn has come."""
    with impatient(body_timeout_s=0.05) as (_, port), client_of(port) as client:
        client.send(request("/") * 3 + request("/", body=b"", Content_Length="5"))
        assert [client.next()[0] for _ in range(4)] == [200, 200, 200, 408]
        assert client.is_closed()
