"""Messages of the gRPC transport: round trips of every datatype, raw and typed, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import oip_pb2 as pb
from serve.errors import InvalidRequest, NotSupported
from serve.messages import InferRequest, InferResponse
from serve.tensor import Tensor, encode_raw
from serve.transport.proto_codec import TYPED_FIELDS, decode_request, encode_response
from tests.serve.tensors import assert_same, tensors


def decode(message: pb.ModelInferRequest) -> InferRequest:
    parsed = pb.ModelInferRequest.FromString(message.SerializeToString())
    return decode_request(parsed, arrival_s=100.0, timeout_s=None)[0]


def raw_request(*given_tensors: Tensor) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m")
    for tensor in given_tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(encode_raw(tensor))
    return message


def typed_request(
    datatype: str, shape: list[int], values: list[object], field: str = ""
) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m")
    given_input = message.inputs.add(name="x", datatype=datatype, shape=shape)
    getattr(given_input.contents, field or TYPED_FIELDS[datatype]).extend(values)
    return message


@given(tensors(), tensors())
def test_request_round_trips_when_raw(first: Tensor, second: Tensor) -> None:
    second = Tensor("y", second.datatype, second.array)
    got_first, got_second = decode(raw_request(first, second)).inputs
    assert_same(got_first, first)
    assert_same(got_second, second)


@given(tensors(tuple(TYPED_FIELDS)))
def test_request_round_trips_when_typed(tensor: Tensor) -> None:
    values = tensor.array.ravel().tolist()
    (got,) = decode(typed_request(tensor.datatype, list(tensor.shape), values)).inputs
    same = Tensor("x", tensor.datatype, tensor.array)
    if tensor.datatype in ("FP32", "FP64"):  # a NaN's payload doesn't survive Python's floats
        np.testing.assert_array_equal(got.array, same.array)
    else:
        assert_same(got, same)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        pytest.param("UINT64", [2**64 - 1, 1], id="one uint64 is beyond int64"),
        pytest.param("UINT64", [2**63 + 1, 2**53 + 1], id="a double would round both"),
        pytest.param("INT64", [2**53 + 1, -(2**63)], id="the int64 are large"),
    ],
)
def test_typed_integers_are_exact_when(datatype: str, values: list[object]) -> None:
    (got,) = decode(typed_request(datatype, [2], values)).inputs
    assert got.array.tolist() == values


@given(tensors())
def test_response_is_raw_when_tensors_are_encoded(tensor: Tensor) -> None:
    empty = Tensor("empty", "FP32", np.zeros((0, 3), np.float32))
    message = encode_response(InferResponse("m", "2", (tensor, empty, tensor), id="7"))
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "7")
    assert [list(output.shape) for output in message.outputs] == [
        list(tensor.shape), [0, 3], list(tensor.shape)
    ]  # fmt: skip
    assert list(message.raw_output_contents) == [encode_raw(tensor), b"", encode_raw(tensor)]


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "field"),
    [
        pytest.param("INT8", [1], [128], "", id="an int8 is 128"),
        pytest.param("INT16", [1], [-(2**15) - 1], "", id="an int16 is too low"),
        pytest.param("UINT8", [1], [256], "", id="a uint8 is 256"),
        pytest.param("FP32", [2], [1.0], "", id="an element is missing"),
        pytest.param("FP32", [1], [1.0, 2.0], "", id="an element is left over"),
        pytest.param("FP32", [-1], [1.0], "", id="a dimension is negative"),
        pytest.param("FP32", [0, 2**62, 2**62], [], "", id="the shape is absurd"),
        pytest.param("FP32", [1], [1.0], "fp64_contents", id="the contents are of another type"),
        pytest.param("FP16", [1], [1.0], "fp32_contents", id="the datatype exists only raw"),
        pytest.param("BF16", [1], [1.0], "fp32_contents", id="the datatype isn't served"),
        pytest.param("STRING", [1], [b"a"], "bytes_contents", id="the datatype is Triton's"),
    ],
)
def test_typed_request_is_refused_when(
    datatype: str, shape: list[int], values: list[object], field: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"^inputs\.x"):
        decode(typed_request(datatype, shape, values, field))


ONE = Tensor("x", "FP32", np.ones(1, np.float32))


def test_request_is_refused_when_raw_and_typed_are_mixed() -> None:
    message = raw_request(ONE)
    message.inputs[0].contents.fp32_contents.append(1.0)
    with pytest.raises(InvalidRequest, match=r"^inputs\.x\.contents"):
        decode(message)


@pytest.mark.parametrize("n_raw", [1, 3])
def test_request_is_refused_when_the_number_of_raw_entries_is_wrong(n_raw: int) -> None:
    message = raw_request(ONE, ONE)
    del message.raw_input_contents[:]
    message.raw_input_contents.extend([encode_raw(ONE)] * n_raw)
    with pytest.raises(InvalidRequest, match="raw_input_contents"):
        decode(message)


def test_request_is_refused_when_it_has_too_many_tensors() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        decode(raw_request(*[ONE] * 1100))


def test_request_is_refused_when_a_parameter_has_no_value() -> None:
    message = raw_request(ONE)
    message.parameters["priority"].SetInParent()
    with pytest.raises(InvalidRequest, match=r"parameters\.priority"):
        decode(message)


@pytest.mark.parametrize("field", ["int64_param", "uint64_param"])
def test_deadline_is_read_when_the_timeout_is(field: str) -> None:
    message = raw_request(ONE)
    setattr(message.parameters["timeout"], field, 250_000)
    assert decode(message).deadline_s == pytest.approx(100.25)


def test_requested_outputs_are_all_when_none_is_named() -> None:
    message = raw_request(ONE)
    assert decode(message).outputs is None
    message.outputs.add(name="b")
    message.outputs.add(name="a")
    assert decode(message).outputs == ("b", "a")


@given(st.binary(max_size=60), st.lists(st.integers(-2, 2**62), max_size=5))
def test_raw_request_is_read_or_refused_when_it_is_any_bytes(raw: bytes, shape: list[int]) -> None:
    message = pb.ModelInferRequest(raw_input_contents=[raw])
    message.inputs.add(name="x", datatype="BYTES", shape=shape)
    try:
        (tensor,) = decode(message).inputs
    except InvalidRequest:
        return
    assert tensor.shape == tuple(shape)


def test_request_says_how_many_classes_are_wanted_when_an_output_asks_for_them() -> None:
    message = typed_request("FP32", [2], [1.0, 2.0])
    message.outputs.add(name="y").parameters["classification"].int64_param = 3
    message.outputs.add(name="z")
    assert decode(message).classification == {"y": 3}


def test_request_is_refused_as_not_supported_when_it_is_part_of_a_sequence() -> None:
    message = typed_request("FP32", [2], [1.0, 2.0])
    message.parameters["sequence_id"].int64_param = 7
    with pytest.raises(NotSupported, match="sequence_id"):
        decode(message)
