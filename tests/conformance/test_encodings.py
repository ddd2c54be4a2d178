"""REST as JSON and binary, gRPC raw and typed: the same request gets the same answer."""

import contextlib
import itertools
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.engines import EngineSpec, load_engine
from serve.errors import EngineFailed
from serve.tensor import NUMPY_DTYPES
from serve.transport.status import STATUS
from tests.conformance.cases import (
    Case,
    Refused,
    many_inputs,
    many_outputs,
    many_request,
    masked_request,
    padded_cases,
    token_ids,
    value_cases,
    whole_case,
)
from tests.conformance.encodings import (
    ENCODINGS,
    GAPS,
    REST_BINARY,
    REST_JSON,
    Encoding,
    Gap,
    arrived,
    connected,
    gap_in_answer,
    gap_in_request,
    rest_body,
    rest_path,
)
from tests.conformance.messages import (
    DTYPES,
    Answer,
    Array,
    Input,
    Output,
    Refusal,
    Request,
    datatype_of,
    tensor_of,
)
from tests.conformance.models import (
    BAD_INDEX,
    MAX_LENGTH,
    NORMAL,
    TABLE,
    masked_by_hand,
)
from tests.conformance.refusals import refused_cases
from tests.serve.running_server import RunningServer, ask, connect, fetch, until

FP32_TOLERANCE = 1e-5  # of the padded cases, relative and absolute
BLOCKING_TURNS = 30_000  # of the model `busy`: about a tenth of a second


def expectation(encoding: str, case: Case) -> Mapping[str, Array] | Refused:
    """What a case must end with in `encoding`: its own expectation, or the error that stands
    declared for values that the encoding can't carry."""
    error = gap_in_request(encoding, case.request)
    if error is None and not isinstance(case.expected, Refused):
        error = gap_in_answer(encoding, case.request, case.expected)
    return case.expected if error is None else Refused(error)


def assert_conforms(encoding: Encoding, case: Case, tolerance: float | None = None) -> None:
    """Ask for the case; without a `tolerance` all that comes must be the same bit for bit."""
    got = encoding.infer(case.request)
    expected = expectation(encoding.name, case)
    if isinstance(expected, Refused):
        assert_refused(encoding.name, got, expected)
        return
    assert isinstance(got, Answer), got
    request = case.request
    assert (got.model, got.version, got.id) == (request.model, case.version, request.id)
    want = [tensor_of(name, arrived(encoding.name, array)) for name, array in expected.items()]
    forms = [(one.name, one.datatype, one.shape) for one in got.tensors]
    assert forms == [(one.name, one.datatype, one.shape) for one in want]
    for mine, theirs in zip(got.tensors, want, strict=True):
        if tolerance is None:
            assert mine.raw == theirs.raw
        else:
            np.testing.assert_allclose(mine.array, theirs.array, tolerance, tolerance)


def assert_refused(encoding: str, got: Answer | Refusal, expected: Refused) -> None:
    assert isinstance(got, Refusal), got
    http_status, grpc_status = STATUS[expected.error]
    want = http_status if encoding in (REST_JSON, REST_BINARY) else grpc_status
    assert got.status == want, got
    assert expected.says in got.message


def table_of(cases: list[Case]) -> list[object]:
    return [pytest.param(case, id=case.name) for case in cases]


# --- the tables


@pytest.mark.parametrize("case", table_of(value_cases()))
def test_encoding_gives_numpys_bits_when(encoding: Encoding, case: Case) -> None:
    assert_conforms(encoding, case)


@pytest.mark.parametrize("case", table_of(refused_cases()))
def test_encoding_gives_the_tables_status_when(encoding: Encoding, case: Case) -> None:
    assert_conforms(encoding, case)


@pytest.mark.parametrize("case", table_of(padded_cases()))
def test_encoding_gives_unpadded_numbers_when(encoding: Encoding, case: Case) -> None:
    """The one family that is compared with a tolerance: see `padded_cases`."""
    assert_conforms(encoding, case, FP32_TOLERANCE)


@pytest.mark.parametrize("length", [1, 3, MAX_LENGTH])
def test_engine_gives_the_padded_cases_numbers_when_nothing_is_padded(
    conformance_models: Path, length: int
) -> None:
    engine = load_engine(
        conformance_models / "masked" / "1", EngineSpec("onnxruntime", "model.onnx")
    )
    ids = token_ids(2, length)
    outputs = engine.run({"ids": ids, "mask": np.ones_like(ids)})
    engine.close()
    for name, want in masked_by_hand(ids, np.ones_like(ids)).items():
        got: Array = outputs[name]
        np.testing.assert_allclose(got, want, FP32_TOLERANCE, FP32_TOLERANCE)


def test_cases_have_every_datatype_when_the_server_knows_one_more() -> None:
    assert DTYPES.keys() == NUMPY_DTYPES.keys()
    sent = {datatype_of(one.array) for case in value_cases() for one in case.request.inputs}
    assert sent == NUMPY_DTYPES.keys()


@pytest.mark.parametrize("gap", [pytest.param(g, id=f"{g.values} in {g.encoding}") for g in GAPS])
def test_cases_meet_what_an_encoding_lacks_when_it_is_declared(gap: Gap) -> None:
    sent = [one.array for c in [*value_cases(), *refused_cases()] for one in c.request.inputs]
    assert any(map(gap.holds, sent))


# --- forms of one encoding


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([1, 2.5, 3, 4, -5, 6e3], id="flat"),
        pytest.param([[1, 2.5, 3], [4, -5, 6e3]], id="nested"),
    ],
)
def test_rest_json_takes_data_in_row_major_order_when_it_is(
    conformance_server: RunningServer, data: list[object]
) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": data}
    answer = fetch(
        conformance_server.http_port, "POST", "/v2/models/rows_fp32/infer", {"inputs": [tensor]}
    )
    assert answer.status == 200, answer.body
    assert answer.json["outputs"][0]["data"] == [1, 2.5, 3, 4, -5, 6000]


def test_rest_takes_json_and_binary_inputs_when_they_are_mixed(
    conformance_server: RunningServer,
) -> None:
    request = many_request(2)
    body, headers = rest_body(request, binary=True)
    length = int(headers["Inference-Header-Content-Length"])
    document, tail = json.loads(body[:length]), body[length:]
    sizes = [one["parameters"]["binary_data_size"] for one in document["inputs"]]
    # The second input, n, goes as JSON: its bytes leave the tail.
    del document["inputs"][1]["parameters"]
    document["inputs"][1]["data"] = request.inputs[1].array.tolist()
    del document["parameters"]
    text = json.dumps(document).encode()
    headers["Inference-Header-Content-Length"] = str(len(text))
    with contextlib.closing(connect(conformance_server.http_port)) as connection:
        mixed = text + tail[: sizes[0]] + tail[sizes[0] + sizes[1] :]
        answer = ask(connection, "POST", "/v2/models/many/infer", mixed, headers)
    assert answer.status == 200, answer.body
    expected = many_outputs(many_inputs(2))
    assert answer.json["outputs"][1]["data"] == expected["doubled"].ravel().tolist()
    assert answer.json["outputs"][3]["data"] == expected["unset"].ravel().tolist()


@pytest.mark.parametrize(
    ("length", "kind"),
    [
        pytest.param(3, "application/octet-stream", id="have bytes"),
        pytest.param(0, "application/json", id="have none"),
    ],
)
def test_rest_says_how_long_its_json_is_when_binary_outputs(
    conformance_server: RunningServer, length: int, kind: str
) -> None:
    """The header and the type of binary data come only if binary data do."""
    request = Request("rows_int8", (Input("x", np.zeros((1, length), np.int8)),))
    body, headers = rest_body(request, binary=True)
    with contextlib.closing(connect(conformance_server.http_port)) as connection:
        answer = ask(connection, "POST", rest_path(request), body, headers)
    assert answer.status == 200, answer.body
    has_header = "Inference-Header-Content-Length" in answer.headers
    assert (answer.headers["content-type"], has_header) == (kind, length > 0)


# --- at once


def busy_case(name: str, index: int, turns: int, *outputs: str) -> Case:
    at = np.array([index])
    request = Request(
        "busy",
        (Input("turns", np.array([turns])), Input("index", at)),
        tuple(map(Output, outputs)),
        id=name,
    )
    if index == BAD_INDEX:
        return Case(name, request, Refused(EngineFailed, "'busy'"))
    known = {"y": TABLE[at], "index_echo": at}
    return Case(name, request, {output: known[output] for output in outputs})


def full_batches(server: RunningServer) -> int:
    """How many batches of eight rows the model `busy` has run."""
    stats = fetch(server.http_port, "GET", "/v2/models/busy/stats").json["model_stats"][0]
    counts = [b["compute_infer"]["count"] for b in stats["batch_stats"] if b["batch_size"] == 8]
    return sum(counts)


def check_alone(name: str, server: RunningServer, case: Case, tolerance: float | None) -> None:
    with connected(name, server) as encoding:
        assert_conforms(encoding, case, tolerance)


@pytest.mark.alone
@pytest.mark.parametrize("bad", ENCODINGS)
def test_neighbours_are_answered_when_one_of_their_batch_fails_in(
    conformance_server: RunningServer, bad: str
) -> None:
    """Seven requests in all encodings, each with an id and outputs of its own, and a bad one, while
    the only instance is busy; again, with it busy for longer, until the eight did run together."""
    lists = (("y",), ("index_echo",), ("index_echo", "y"))
    neighbours = [
        (ENCODINGS[i % 4], busy_case(f"neighbour {i}", NORMAL[i % 2], 1, *lists[i % 3]))
        for i in range(7)
    ]
    waiting = [*neighbours[:3], (bad, busy_case("bad", BAD_INDEX, 1, "y")), *neighbours[3:]]

    turns = (BLOCKING_TURNS * 2**n for n in itertools.count())

    def ran_together() -> bool:
        before = full_batches(conformance_server)
        blocker = busy_case("blocker", 0, next(turns), "y")
        with ThreadPoolExecutor(1 + len(waiting)) as pool:
            checks = [pool.submit(check_alone, REST_BINARY, conformance_server, blocker, None)]
            until(lambda: checks[0].done() or in_flight(conformance_server) == 1)
            checks += [
                pool.submit(check_alone, name, conformance_server, case, None)
                for name, case in waiting
            ]
            for check in checks:
                check.result()
        return full_batches(conformance_server) > before

    until(ran_together)


def in_flight(server: RunningServer) -> float:
    return server.metric("trimserve_requests_in_flight", model="busy")


def test_padded_requests_get_their_own_numbers_when_unequal_ones_come_at_once(
    conformance_server: RunningServer,
) -> None:
    with ThreadPoolExecutor(8) as pool:
        checks = []
        for turn in range(6 * MAX_LENGTH):
            ids = token_ids(1 + turn % 3, turn % (MAX_LENGTH + 1))
            expected = masked_by_hand(ids, np.ones_like(ids))
            case = Case(f"request {turn}", masked_request(ids), expected)
            name = ENCODINGS[turn % len(ENCODINGS)]
            checks.append(pool.submit(check_alone, name, conformance_server, case, FP32_TOLERANCE))
        for check in checks:
            check.result()


# --- anything


@st.composite
def whole_cases(draw: st.DrawFn) -> Case:
    """A scalar, a vector and a cube of one datatype, with any values and any lengths."""
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    finite = draw(st.booleans())  # JSON carries nothing else
    vector = (draw(st.integers(0, 5)),)
    cube = tuple(draw(st.integers(0, 3)) for _ in range(3))
    arrays = [draw(arrays_of(datatype, shape, finite)) for shape in ((), vector, cube)]
    return whole_case(f"any {datatype}", datatype, *arrays)


def arrays_of(datatype: str, shape: tuple[int, ...], finite: bool) -> st.SearchStrategy[Array]:
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        texts = st.text(max_size=6).map(str.encode)
        return hnp.arrays(object, shape, elements=texts)
    if datatype == "BF16":  # hypothesis doesn't know it
        return hnp.arrays(np.uint16, shape).map(lambda bits: bits.view(dtype))
    options: dict[str, Any] = {}
    if finite and dtype.kind == "f":
        options = {"allow_nan": False, "allow_infinity": False}
    return hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **options))


@given(case=whole_cases())
def test_encodings_give_back_what_came_when_a_model_echoes(
    encodings: Mapping[str, Encoding], case: Case
) -> None:
    for encoding in encodings.values():
        assert_conforms(encoding, case)
