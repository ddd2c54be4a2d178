"""Bodies of the REST transport: round trips of every datatype, and the traps of JSON."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest, NotSupported
from serve.messages import InferRequest, InferResponse
from serve.tensor import NUMPY_DTYPES, Array, Tensor, encode_raw
from serve.transport.json_codec import (
    BINARY_ONLY,
    ResponseForm,
    decode_request,
    encode_response,
)
from tests.serve.tensors import TEXT, assert_same, tensors

JSON_DATATYPES = tuple(name for name in NUMPY_DTYPES if name not in BINARY_ONLY)


def decode(body: bytes, json_bytes: int | None = None) -> tuple[InferRequest, ResponseForm]:
    return decode_request("m", "", body, json_bytes, arrival_s=100.0)


def json_body(data: Any, datatype: str = "FP32", shape: list[int] | None = None) -> bytes:
    """A request of one input x; `data` is JSON text or a value."""
    text = data if isinstance(data, str) else json.dumps(data)
    shown = json.dumps([2] if shape is None else shape)
    return (
        f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shown},"data":{text}}}]}}'
    ).encode()


def binary_body(*given_tensors: Tensor, **fields: Any) -> tuple[bytes, int]:
    """A request with binary inputs, and the length of its JSON."""
    raws = [encode_raw(tensor) for tensor in given_tensors]
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
            "parameters": {"binary_data_size": len(raw)},
        }
        for tensor, raw in zip(given_tensors, raws, strict=True)
    ]
    head = json.dumps({"inputs": inputs, **fields}).encode()
    return head + b"".join(raws), len(head)


def listed(tensor: Tensor, flat: bool) -> Any:
    """The values of a tensor for JSON, flat or nested."""
    array: Array = tensor.array.reshape(-1) if flat else tensor.array
    if tensor.datatype == "BYTES":
        texts = [item.decode() for item in array.ravel()]
        return np.array(texts, object).reshape(array.shape).tolist()
    return array.tolist()


def answer(*outputs: Tensor, **form: Any) -> tuple[bytes, int | None]:
    response = InferResponse("m", "1", outputs)
    parts, length = encode_response(response, ResponseForm(form, False))
    return b"".join(parts), length


# --- round trips


@given(tensors(JSON_DATATYPES, finite=True, elements=TEXT), st.booleans())
def test_request_round_trips_when_json(tensor: Tensor, flat: bool) -> None:
    data = json.dumps(listed(tensor, flat))
    body = json_body(data, tensor.datatype, list(tensor.shape))
    (got,) = decode(body)[0].inputs
    assert_same(got, tensor)


@given(tensors(), tensors())
def test_request_round_trips_when_binary(first: Tensor, second: Tensor) -> None:
    second = Tensor("y", second.datatype, second.array)
    body, length = binary_body(first, second)
    got_first, got_second = decode(body, length)[0].inputs
    assert_same(got_first, first)
    assert_same(got_second, second)


@given(tensors(JSON_DATATYPES, finite=True, elements=TEXT))
def test_response_round_trips_when_json(tensor: Tensor) -> None:
    body, length = answer(tensor)
    assert length is None
    (output,) = json.loads(body)["outputs"]
    got = decode(json_body(output["data"], output["datatype"], output["shape"]))[0].inputs[0]
    assert_same(got, tensor)


@given(tensors())
def test_response_round_trips_when_binary(tensor: Tensor) -> None:
    body, length = answer(tensor, x=True)
    assert (length is not None) == (encode_raw(tensor) != b"")
    length = len(body) if length is None else length
    (output,) = json.loads(body[:length])["outputs"]
    assert "data" not in output
    assert output["parameters"] == {"binary_data_size": len(body) - length}
    assert body[length:] == encode_raw(tensor)


def test_request_reads_both_when_json_and_binary_inputs_are_mixed() -> None:
    raw = np.array([1.5], np.float32).tobytes()
    head = json.dumps(
        {
            "inputs": [
                {"name": "a", "datatype": "INT8", "shape": [1], "data": [1]},
                {"name": "b", "datatype": "FP32", "shape": [1],
                 "parameters": {"binary_data_size": 4}},
                {"name": "c", "datatype": "BYTES", "shape": [1], "data": ["é"]},
            ]
        }
    ).encode()  # fmt: skip
    request, _ = decode(head + raw, len(head))
    assert [tensor.array.tolist() for tensor in request.inputs] == [[1], [1.5], ["é".encode()]]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_response_prints_the_shortest_float32_when_json(value: float) -> None:
    body, _ = answer(Tensor("x", "FP32", np.array([value], np.float32)))
    text = body.split(b'"data":[')[1].split(b"]")[0].decode()
    assert np.float32(text) == np.float32(value)
    digits = text.lower().split("e")[0].replace(".", "").replace("-", "").strip("0")
    assert len(digits) <= 9


# --- what is accepted


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "values"),
    [
        pytest.param("5", "INT32", [], 5, id="a bare scalar"),
        pytest.param("[5]", "INT32", [], 5, id="a scalar in a list"),
        pytest.param("[]", "FP32", [0], [], id="no element"),
        pytest.param("[[],[]]", "FP32", [2, 0], [[], []], id="rows without elements"),
        pytest.param("[]", "BYTES", [0, 3], [], id="no bytes"),
        pytest.param("[1, 2]", "FP32", [2], [1.0, 2.0], id="integers for floats"),
        pytest.param("[1,2,3,4]", "INT8", [2, 2], [[1, 2], [3, 4]], id="flat for a matrix"),
        pytest.param("[[1,2,3,4]]", "INT8", [2, 2], [[1, 2], [3, 4]], id="nested otherwise"),
        pytest.param(
            "[\n" + " " * 300 + "[1],\n [2]\n]", "INT8", [2, 1], [[1], [2]], id="much whitespace"
        ),
        pytest.param("[18446744073709551615]", "UINT64", [1], [2**64 - 1], id="a large uint64"),
        pytest.param(
            "[9007199254740993, 1]", "INT64", [2], [2**53 + 1, 1], id="more than a double holds"
        ),
        pytest.param("[true,false]", "BOOL", [2], [True, False], id="bools"),
        pytest.param('["", "\\u00e9"]', "BYTES", [2], [b"", "é".encode()], id="text"),
    ],
)  # fmt: skip
def test_data_is_read_when(data: str, datatype: str, shape: list[int], values: Any) -> None:
    (tensor,) = decode(json_body(data, datatype, shape))[0].inputs
    assert tensor.array.shape == tuple(shape)
    assert tensor.array.tolist() == (values if values != [] else np.zeros(shape).tolist())


# --- what is refused


@pytest.mark.parametrize(
    ("data", "datatype", "shape"),
    [
        pytest.param("[NaN, 1]", "FP32", [2], id="NaN"),
        pytest.param("[Infinity, 1]", "FP32", [2], id="Infinity"),
        pytest.param("[1e39, 1]", "FP32", [2], id="too large for a float32"),
        pytest.param("[1e400, 1]", "FP64", [2], id="too large for a double"),
        pytest.param("[128, 1]", "INT8", [2], id="too large for an int8"),
        pytest.param("[-1, 1]", "UINT32", [2], id="negative for unsigned"),
        pytest.param("[18446744073709551616, 1]", "UINT64", [2], id="too large for a uint64"),
        pytest.param("[1" + "0" * 5000 + ", 1]", "INT64", [2], id="5000 digits"),
        pytest.param("[1.0, 2]", "INT32", [2], id="1.0 for an integer"),
        pytest.param("[true, 1]", "INT32", [2], id="a bool for an integer"),
        pytest.param("[true, 1]", "FP32", [2], id="a bool for a float"),
        pytest.param("[1, 0]", "BOOL", [2], id="integers for bools"),
        pytest.param('["1", "2"]', "FP32", [2], id="strings for floats"),
        pytest.param("[1, 2]", "BYTES", [2], id="integers for bytes"),
        pytest.param("[null, 1]", "FP32", [2], id="null for a float"),
        pytest.param("null", "FP32", [2], id="null for data"),
        pytest.param("{}", "FP32", [2], id="an object for data"),
        pytest.param("[[1, 2], [3]]", "FP32", [3], id="ragged numbers"),
        pytest.param('[["a", "b"], ["c"]]', "BYTES", [3], id="ragged text"),
        pytest.param('[[], ["c"]]', "BYTES", [1], id="ragged text with an empty row"),
        pytest.param("[[1], 2]", "FP32", [2], id="depths are mixed"),
        pytest.param("[1, 2, 3]", "FP32", [2], id="an element too many"),
        pytest.param("[1]", "FP32", [2], id="an element too few"),
        pytest.param("[" * 40 + "1" + "]" * 40, "FP32", [1], id="nested 40 deep"),
        pytest.param("[" * 10**5 + "]" * 10**5, "FP32", [0], id="nested 100000 deep"),
        pytest.param('["\\ud800"]', "BYTES", [1], id="half of a surrogate pair"),
        pytest.param("[1]", "FP16", [1], id="a datatype without a JSON form"),
        pytest.param("[1]", "BF16", [1], id="a datatype that isn't served"),
        pytest.param("[1]", "FP32", [-1], id="a negative dimension"),
        pytest.param("[]", "FP32", [0, 2**62, 2**62], id="an absurd shape"),
        pytest.param("[1]", "FP32", [1] * 100, id="100 dimensions"),
    ],
)
def test_data_is_refused_when(data: str, datatype: str, shape: list[int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(json_body(data, datatype, shape))
    assert caught.value.field == "body" or caught.value.field.startswith("inputs.x")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="it is empty"),
        pytest.param(b"{", id="it is cut"),
        pytest.param(b"[]", id="it is a list"),
        pytest.param(b"{}", id="inputs are missing"),
        pytest.param(b'{"inputs":{}}', id="inputs are an object"),
        pytest.param(b'{"inputs":[{}]}', id="an input is empty"),
        pytest.param(b'{"inputs":[]} trailing', id="text follows"),
        pytest.param(b'{"inputs":[{"name":"\xff","shape":[],"datatype":"FP32"}]}', id="no UTF-8"),
        pytest.param(
            b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\xff"]}]}',
            id="no UTF-8 in the data",
        ),
        pytest.param(
            b'{"inputs":[{"name":"x","shape":[1.5],"datatype":"FP32","data":[1]}]}',
            id="a dimension is a fraction",
        ),
        pytest.param(
            b'{"inputs":[{"name":"x","shape":1,"datatype":"FP32","data":[1]}]}',
            id="the shape is a number",
        ),
        pytest.param(
            b'{"inputs":[{"name":"x","shape":[1],"datatype":5,"data":[1]}]}',
            id="the datatype is a number",
        ),
        pytest.param(
            b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32"}]}', id="the data are missing"
        ),
        pytest.param(
            b'{"inputs":[],"parameters":{"timeout":-1}}', id="the timeout is negative"
        ),
        pytest.param(
            b'{"inputs":[],"parameters":{"timeout":' + b"9" * 400 + b"}}",
            id="the timeout is beyond all numbers",
        ),
        pytest.param(b'{"inputs":[],"parameters":{"timeout":true}}', id="the timeout is a bool"),
        pytest.param(b'{"inputs":[],"parameters":{"a":null}}', id="a parameter is null"),
        pytest.param(
            b'{"inputs":[],"parameters":{"binary_data_output":1}}', id="a flag is a number"
        ),
        pytest.param(
            b'{"inputs":[],"outputs":[{"name":"y","parameters":{"binary_data":"yes"}}]}',
            id="an output's flag is text",
        ),
        pytest.param(
            b'{"inputs":[' + b",".join([b'{"name":"x","shape":[],"datatype":"FP32"}'] * 1100)
            + b"]}",
            id="there are too many inputs",
        ),
        pytest.param(b'{"inputs":' + b"[" * 10**5, id="it is nested without end"),
    ],
)  # fmt: skip
def test_body_is_refused_when(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(body)


def test_body_is_refused_with_advice_when_it_holds_nan() -> None:
    with pytest.raises(InvalidRequest, match=r"finite numbers in JSON.*binary"):
        decode(json_body("[NaN, 1]"))


FOUR = Tensor("x", "FP32", np.array([1.0], np.float32))


@pytest.mark.parametrize(
    ("change", "extra"),
    [
        pytest.param(+1000, b"", id="the JSON's length leads past the body"),
        pytest.param(-1, b"", id="the JSON's length cuts the JSON"),
        pytest.param(0, b"x", id="a byte is left over"),
    ],
)
def test_binary_body_is_refused_when(change: int, extra: bytes) -> None:
    body, length = binary_body(FOUR)
    with pytest.raises(InvalidRequest):
        decode(body + extra, length + change)


def test_binary_body_is_refused_when_it_is_truncated() -> None:
    body, length = binary_body(FOUR)
    with pytest.raises(InvalidRequest, match="binary_data_size"):
        decode(body[:-1], length)


@pytest.mark.parametrize("size", [-1, True, "4", 4.0, 10**30])
def test_binary_body_is_refused_when_the_size_is(size: object) -> None:
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [1],
                 "parameters": {"binary_data_size": size}}
            ]
        }
    ).encode()  # fmt: skip
    with pytest.raises(InvalidRequest, match="binary_data_size"):
        decode(head + bytes(4), len(head))


def test_input_is_refused_when_it_has_data_and_a_binary_size() -> None:
    head = (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1],'
        b'"parameters":{"binary_data_size":4}}]}'
    )
    with pytest.raises(InvalidRequest, match=r"inputs\.x\.data"):
        decode(head + bytes(4), len(head))


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300)))
def test_body_is_read_or_refused_when_it_is_any_bytes(body: bytes, length: int | None) -> None:
    with pytest.raises(InvalidRequest):
        decode(body, length)


@given(st.data())
def test_body_is_read_or_refused_when_a_byte_is_changed(data: st.DataObject) -> None:
    good = json_body([[1.5, 2], [3, 4]], shape=[2, 2])
    place = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[place] = data.draw(st.integers(0, 255))
    try:
        request, _ = decode(bytes(changed))
    except InvalidRequest:
        return
    assert all(isinstance(tensor.array, np.ndarray) for tensor in request.inputs)


# --- fields of the request


def test_request_keeps_its_id_when_it_is_an_integer() -> None:
    assert decode(b'{"id":7,"inputs":[]}')[0].id == "7"


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        pytest.param("", None, id="they are absent"),
        pytest.param(',"outputs":null', None, id="they are null"),
        pytest.param(',"outputs":[]', None, id="the list is empty"),
        pytest.param(',"outputs":[{"name":"b"},{"name":"a"}]', ("b", "a"), id="two are named"),
    ],
)
def test_requested_outputs_are_read_when(outputs: str, names: tuple[str, ...] | None) -> None:
    assert decode(b'{"inputs":[]' + outputs.encode() + b"}")[0].outputs == names


@pytest.mark.parametrize(
    ("default", "own", "binary"),
    [
        pytest.param(None, None, False, id="nothing is said"),
        pytest.param(True, None, True, id="the request says binary"),
        pytest.param(True, False, False, id="the output overrules the request"),
        pytest.param(False, True, True, id="the output asks for it"),
        pytest.param(None, True, True, id="only the output says something"),
    ],
)
def test_output_form_follows_the_flags_when(
    default: bool | None, own: bool | None, binary: bool
) -> None:
    document: dict[str, Any] = {"inputs": [], "outputs": [{"name": "y"}]}
    if default is not None:
        document["parameters"] = {"binary_data_output": default}
    if own is not None:
        document["outputs"][0]["parameters"] = {"binary_data": own}
    _, form = decode(json.dumps(document).encode())
    assert form.is_binary("y") is binary


@pytest.mark.parametrize(
    ("timeout_us", "timeout_s", "deadline_s"),
    [
        pytest.param(0, None, None, id="there is none"),
        pytest.param(500_000, None, 100.5, id="the request has one"),
        pytest.param(0, 0.25, 100.25, id="the transport has one"),
        pytest.param(500_000, 0.25, 100.25, id="the transport's is earlier"),
        pytest.param(100_000, 0.25, 100.1, id="the request's is earlier"),
    ],
)
def test_deadline_is_the_earliest_when(
    timeout_us: int, timeout_s: float | None, deadline_s: float | None
) -> None:
    body = json.dumps({"inputs": [], "parameters": {"timeout": timeout_us}}).encode()
    request, _ = decode_request("m", "", body, None, 100.0, timeout_s)
    assert request.deadline_s == (None if deadline_s is None else pytest.approx(deadline_s))


# --- responses


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        pytest.param(
            Tensor("y", "FP32", np.array([1, math.nan], np.float32)), "NaN", id="a value is NaN"
        ),
        pytest.param(
            Tensor("y", "FP64", np.array([math.inf])), "Infinity", id="a value is infinite"
        ),
        pytest.param(
            Tensor("y", "FP16", np.ones(1, np.float16)), "FP16", id="the datatype has no JSON form"
        ),
        pytest.param(
            Tensor("y", "BYTES", np.array([b"\xff"], object)), "UTF-8", id="bytes are no text"
        ),
    ],
)
def test_response_is_refused_with_advice_when(tensor: Tensor, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^outputs\.y: .*{field}.*binary_data: true"):
        answer(tensor)


def test_response_carries_nan_when_the_output_is_binary() -> None:
    array = np.array([math.nan, math.inf], np.float32)
    body, _ = answer(Tensor("y", "FP32", array), y=True)
    assert body.endswith(array.tobytes())


def test_response_is_row_major_when_the_output_is_in_fortran_order() -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3))
    body, _ = answer(Tensor("y", "INT32", array))
    assert orjson.loads(body)["outputs"][0]["data"] == [0, 1, 2, 3, 4, 5]


def test_response_has_all_fields_when_they_are_given() -> None:
    response = InferResponse("m", "3", (), id="é", parameters={"variant": "abc"})
    parts, length = encode_response(response, ResponseForm({}, False))
    assert length is None
    assert orjson.loads(parts[0]) == {
        "model_name": "m",
        "model_version": "3",
        "outputs": [],
        "id": "é",
        "parameters": {"variant": "abc"},
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"parameters": {"sequence_id": 1}}, "sequence_id", id="a sequence"),
        pytest.param(
            {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            "shared memory is off",
            id="shared memory, which is off",
        ),
    ],
)
def test_request_is_refused_as_not_supported_when_it_asks_for(
    fields: dict[str, Any], field: str
) -> None:
    body = json.dumps({**json.loads(json_body([1, 2])), **fields}).encode()
    with pytest.raises(NotSupported, match=field):
        decode(body)


# --- what is refused before its data are decoded


def test_request_meets_the_check_before_its_data_when_there_is_one() -> None:
    seen: list[tuple[str, str, list[int]]] = []

    def check(name: str, datatype: str, shape: Sequence[int]) -> None:
        seen.append((name, datatype, list(shape)))
        raise InvalidRequest("inputs.name", name, "another")

    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1,"no number"]}]}'
    with pytest.raises(InvalidRequest, match="want another"):
        decode_request("m", "", body, None, 0.0, check=check)
    assert seen == [("x", "FP32", [2])]


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        pytest.param([1, 4], "[" + "[]," * 2000 + "[]]", id="lists of nothing"),
        pytest.param([2], "[1" + ",1" * 2000 + "]", id="many more numbers"),
        pytest.param([1], "[" + " " * 3000 + "1]", id="white space"),
    ],
)
def test_request_is_refused_undecoded_when_its_shape_needs_far_less_json_than(
    shape: list[int], data: str
) -> None:
    body = f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":{shape},"data":{data}}}]}}'
    with pytest.raises(InvalidRequest, match=r"inputs\.x\.data: got '\d+ bytes of JSON'"):
        decode_request("m", "", body.encode(), None, 0.0)


def test_request_is_taken_when_its_json_is_written_wide() -> None:
    data = json.dumps([[[1.0000000000000002e-38] * 3] * 5] * 2, indent=8)
    body = f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":[2,5,3],"data":{data}}}]}}'
    request, _ = decode_request("m", "", body.encode(), None, 0.0)
    assert request.inputs[0].shape == (2, 5, 3)
