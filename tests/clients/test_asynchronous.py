"""What tritonclient's clients do beside waiting for an answer: callbacks, streams, cancelling."""

import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests.clients.api import Api, assert_close, document
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import PATIENCE_S, RunningServer, until
from tests.serve.versions import rows

MUCH_WORK = np.array(150_000)  # turns of the model `work`: longer than some scrapes
SIZES = range(1, 9)  # of batches, each request's own

Answer = tuple[Any, InferenceServerException | None]


class Answers:
    """A callback, and the answers that it was called with, waited for one by one."""

    def __init__(self) -> None:
        self._answers: queue.Queue[Answer] = queue.Queue()

    def __call__(self, result: Any, error: InferenceServerException | None) -> None:
        self._answers.put((result, error))

    def next(self) -> Answer:
        return self._answers.get(timeout=PATIENCE_S)

    @property
    def is_empty(self) -> bool:
        return self._answers.empty()


@pytest.fixture
def grpc(apis: dict[str, Api]) -> Api:
    return apis["grpc"]


@pytest.fixture
def stream(grpc: Api) -> Iterator[Answers]:
    """The answers of a stream that the test may use and need not stop."""
    answers = Answers()
    grpc.start_stream(answers)
    yield answers
    grpc.stop_stream(cancel_requests=True)


def check(result: Any, n: int) -> None:
    """The result is that of `linear` for `n` rows."""
    assert_close(result.as_numpy("y"), linear_by_hand(rows(n)))


def cancelled_before(server: RunningServer) -> float:
    """How many requests of `work` were cancelled so far; those of tests before are done."""
    until(lambda: n_in_flight(server) == 0)
    return n_cancelled(server)


def n_cancelled(server: RunningServer) -> float:
    return server.metric(
        "trimserve_request_duration_seconds_count",
        model="work",
        code="cancelled",
        transport="grpc",
    )


def n_in_flight(server: RunningServer) -> float:
    return server.metric("trimserve_requests_in_flight", model="work")


# --- one request at a time


def test_http_async_infer_answers_each_when_several_are_sent_before(apis: dict[str, Api]) -> None:
    api = apis["http"]
    sent = [
        api.async_infer(
            "linear",
            api.inputs({"x": rows(n)}),
            request_id=str(n),
            request_compression_algorithm="gzip",
            response_compression_algorithm="deflate",
        )
        for n in SIZES
    ]
    for n, one in zip(SIZES, sent, strict=True):
        result = one.get_result(timeout=PATIENCE_S)
        assert result.get_response()["id"] == str(n)
        check(result, n)


def test_http_async_infer_raises_when_its_result_is_an_error(apis: dict[str, Api]) -> None:
    api = apis["http"]
    sent = api.async_infer("absent", api.inputs({"x": rows(1)}))
    with pytest.raises(InferenceServerException, match="not in the repository"):
        sent.get_result(timeout=PATIENCE_S)


def test_grpc_async_infer_calls_back_when_answered(grpc: Api) -> None:
    answers = Answers()
    for n in SIZES:
        given = grpc.inputs({"x": rows(n)})
        grpc.async_infer("linear", given, answers, request_id=str(n), client_timeout=PATIENCE_S)
    for _ in SIZES:
        result, error = answers.next()
        assert error is None
        check(result, int(result.get_response().id))


def test_grpc_async_infer_calls_back_with_the_error_when_refused(grpc: Api) -> None:
    answers = Answers()
    grpc.async_infer("absent", grpc.inputs({"x": rows(1)}), answers)
    result, error = answers.next()
    assert result is None
    assert error is not None
    assert error.status() == "StatusCode.NOT_FOUND"


def test_grpc_async_infer_leaves_the_server_when_cancelled(
    grpc: Api, server: RunningServer
) -> None:
    before = cancelled_before(server)
    first, second = Answers(), Answers()
    given = grpc.inputs({"n": MUCH_WORK})
    grpc.async_infer("work", given, first)
    call = grpc.async_infer("work", given, second)
    until(lambda: n_in_flight(server) == 2)
    call.cancel()
    result, error = second.next()
    assert result is None
    assert error is not None
    assert error.status() == "StatusCode.CANCELLED"
    until(lambda: n_cancelled(server) == before + 1)
    result, error = first.next()
    assert error is None
    assert result.as_numpy("done") == MUCH_WORK


# --- streams


def test_stream_answers_in_order_when_requests_follow_each_other(
    grpc: Api, stream: Answers
) -> None:
    for n in SIZES:
        grpc.async_stream_infer("linear", grpc.inputs({"x": rows(n)}), request_id=str(n))
    for n in SIZES:
        result, error = stream.next()
        assert error is None
        assert result.get_response().id == str(n)
        check(result, n)


def test_stream_goes_on_when_a_request_is_refused(grpc: Api, stream: Answers) -> None:
    grpc.async_stream_infer("linear", grpc.inputs({"z": rows(1)}))
    grpc.async_stream_infer("several", grpc.inputs({"x": rows(2)}), model_version="1")
    result, error = stream.next()
    assert result is None
    assert error is not None
    assert "inputs.name" in error.message()
    result, error = stream.next()
    assert error is None
    check(result, 2)


@pytest.mark.parametrize("wanted", [True, False], ids=["asked for", "not asked for"])
def test_stream_marks_the_final_response_when_it_is(
    grpc: Api, stream: Answers, wanted: bool
) -> None:
    given = grpc.inputs({"x": rows(1)})
    grpc.async_stream_infer("linear", given, enable_empty_final_response=wanted)
    result, error = stream.next()
    assert error is None
    parameters = result.get_response().parameters
    assert ("triton_final_response" in parameters) is wanted
    assert parameters["triton_final_response"].bool_param is wanted
    grpc.stop_stream()
    assert stream.is_empty, "one response for each request: none is empty"


def test_stream_takes_options_when_requests_have_them(grpc: Api) -> None:
    answers = Answers()
    grpc.start_stream(
        answers, stream_timeout=PATIENCE_S, headers={"x-anything": "1"},
        compression_algorithm="gzip",
    )  # fmt: skip
    grpc.async_stream_infer(
        "pair",
        grpc.inputs({"a": rows(2, 2), "b": np.ones((2, 2), np.int64)}),
        outputs=[grpc.output("doubled")],
        priority=1,
        timeout=60_000_000,
        parameters={"text": "x"},
    )
    result, error = answers.next()
    assert error is None
    np.testing.assert_array_equal(result.as_numpy("doubled"), np.full((2, 2), 2))
    grpc.stop_stream()


def test_stream_refuses_a_request_when_it_belongs_to_a_sequence(grpc: Api, stream: Answers) -> None:
    given = grpc.inputs({"x": rows(1)})
    grpc.async_stream_infer("linear", given, sequence_id=1, sequence_start=True)
    _, error = stream.next()
    assert error is not None
    assert "sequences are not supported" in error.message()


def test_stream_ends_its_requests_when_it_is_stopped_at_once(
    grpc: Api, server: RunningServer
) -> None:
    before = cancelled_before(server)
    answers = Answers()
    grpc.start_stream(answers)
    grpc.async_stream_infer("linear", grpc.inputs({"x": rows(1)}))
    check(answers.next()[0], 1)
    for _ in range(2):
        grpc.async_stream_infer("work", grpc.inputs({"n": MUCH_WORK}))
    until(lambda: n_in_flight(server) == 2)
    grpc.stop_stream(cancel_requests=True)
    result, error = answers.next()
    assert result is None
    assert error is not None
    assert error.status() == "StatusCode.CANCELLED"
    until(lambda: n_cancelled(server) == before + 2)


# --- asyncio


def test_aio_stream_answers_in_order_when_it_ends_by_itself(apis: dict[str, Api]) -> None:
    api = apis["grpc aio"]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for n in SIZES:
            yield {"model_name": "linear", "inputs": api.inputs({"x": rows(n)})}
        yield {"model_name": "linear", "inputs": api.inputs({"z": rows(1)}), "request_id": "last"}

    async def answers() -> list[Answer]:
        stream = api.client.stream_infer(
            requests(), stream_timeout=PATIENCE_S, compression_algorithm="deflate"
        )
        return [answer async for answer in stream]

    *good, (result, error) = api.run(answers)
    assert len(good) == len(SIZES)
    for n, (one, none) in zip(SIZES, good, strict=True):
        assert none is None
        check(one, n)
    assert result is None
    assert "inputs.name" in error.message()


def test_aio_stream_ends_when_it_is_cancelled(apis: dict[str, Api]) -> None:
    api = apis["grpc aio"]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        while True:
            yield {"model_name": "linear", "inputs": api.inputs({"x": rows(1)})}

    async def first() -> bool:
        stream = api.client.stream_infer(requests())
        result, error = await anext(stream)
        assert error is None
        check(result, 1)
        return bool(stream.cancel())

    assert api.run(first)
    assert document(api.get_model_metadata("linear"))["name"] == "linear"
