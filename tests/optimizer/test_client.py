"""The service's client, where the service is away for a while."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from optimizer.client import FIRST_PAUSE_S, MAX_PAUSE_S, Client, Outage, ServiceError, Unreachable

END = b"event: end\ndata: {}\n\n"


def event(number: int) -> bytes:
    told = {"number": number, "kind": "note", "payload": {}}
    return f"id: {number}\nevent: note\ndata: {json.dumps(told)}\n\n".encode()


@contextmanager
def service(answers: list[tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Gives the answers one after the other, the last one again and again; with its address and
    what it was asked to go on from."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.headers["Last-Event-ID"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Not to standard error."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_pauses_double_up_to_a_bound_until_patience_is_over() -> None:
    outage = Outage(100.0)
    now_s, pauses = 1_000.0, []
    while (pause_s := outage.failed(now_s)) is not None:
        pauses.append(pause_s)
        now_s += pause_s
    assert pauses[:4] == [FIRST_PAUSE_S * 2**n for n in range(4)]
    assert max(pauses) == MAX_PAUSE_S
    assert now_s == 1_100.0
    outage.over()
    assert outage.failed(5_000.0) == FIRST_PAUSE_S
    assert Outage(0.0).failed(1.0) is None


def test_follower_goes_on_where_it_was_when_the_database_was_away() -> None:
    away = (503, b'{"detail": "the database does not answer"}')
    answers = [(200, event(1)), away, (200, event(2) + END)]
    with service(answers) as (url, asked), Client(url) as client:
        assert [one["number"] for one in client.follow("job")] == [1, 2]
    assert asked == ["0", "1", "1"]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((503, b'{"detail": "the database does not answer"}'), id="refused"),
        pytest.param((200, b""), id="a stream that breaks off at once"),
    ],
)
def test_follower_gives_up_when_its_patience_is_over(answer: tuple[int, bytes]) -> None:
    with (
        service([answer]) as (url, asked),
        Client(url) as client,
        pytest.raises(Unreachable),
    ):
        list(client.follow("job", patience_s=0.5))
    assert len(asked) >= 2


def test_follower_says_why_in_plain_words_when_nothing_answers() -> None:
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(Unreachable, match=r"^http://127\.0\.0\.1:1: Connection refused$"),
    ):
        client.wait("job", patience_s=0.0)


def test_follower_ends_with_the_reason_when_its_key_is_revoked() -> None:
    problem = {"status": 401, "title": "Who are you?", "detail": "this API key was revoked"}
    refused = f"event: refused\ndata: {json.dumps(problem)}\n\n".encode()
    with (
        service([(200, event(1) + refused)]) as (url, _),
        Client(url) as client,
        pytest.raises(ServiceError, match="this API key was revoked") as ended,
    ):
        list(client.follow("job"))
    assert ended.value.status == 401
