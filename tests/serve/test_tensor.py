"""Tensors in memory and in the wire's raw form."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.tensor import (
    MAX_ELEMENTS,
    NUMPY_DTYPES,
    Tensor,
    TensorSpec,
    decode_raw,
    element_count,
    encode_raw,
)
from tests.serve.tensors import assert_same, tensors


def prefixed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@given(tensors())
def test_tensor_round_trips_when_raw(tensor: Tensor) -> None:
    raw = encode_raw(tensor)
    assert_same(decode_raw("x", tensor.datatype, tensor.shape, memoryview(raw)), tensor)


@given(tensors(datatypes=("FP32", "INT16")), st.integers(1, 3))
def test_tensor_round_trips_when_it_starts_at_an_odd_address(tensor: Tensor, offset: int) -> None:
    raw = memoryview(b"\0" * offset + encode_raw(tensor))[offset:]
    assert_same(decode_raw("x", tensor.datatype, tensor.shape, raw), tensor)


def test_encode_raw_is_row_major_when_the_array_is_in_fortran_order() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    fortran = Tensor("x", "INT16", np.asfortranarray(array))
    assert encode_raw(fortran) == array.tobytes()


def test_decode_raw_makes_no_copy_when_the_datatype_allows() -> None:
    raw = memoryview(bytes(8))
    array = decode_raw("x", "FP32", [2], raw).array
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8))
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        pytest.param("FP32", [2], bytes(7), id="a byte is missing"),
        pytest.param("FP32", [2], bytes(9), id="a byte is left over"),
        pytest.param("FP32", [], b"", id="a scalar has no bytes"),
        pytest.param("FP32", [0], bytes(4), id="an empty tensor has bytes"),
        pytest.param("BOOL", [2], b"\x01\x02", id="a bool is 2"),
        pytest.param("float32", [1], bytes(4), id="the datatype is numpy's name"),
        pytest.param("BYTES", [1], b"", id="the prefix is missing"),
        pytest.param("BYTES", [1], b"\x01\x00\x00", id="the prefix is cut"),
        pytest.param("BYTES", [1], b"\x02\x00\x00\x00a", id="the prefix leads past the end"),
        pytest.param("BYTES", [1], b"\xff\xff\xff\xffa", id="the prefix is enormous"),
        pytest.param("BYTES", [2], prefixed(b"abcdefgh"), id="an element is missing"),
        pytest.param("BYTES", [2], prefixed(b"abcd", b"") + b"x", id="bytes are left over"),
        pytest.param("BYTES", [1], prefixed(b"a", b"b"), id="an element is left over"),
        pytest.param("BYTES", [2**39], bytes(4), id="there are far fewer bytes than elements"),
    ],
)
def test_decode_raw_refuses_when(datatype: str, shape: list[int], raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^inputs\.x"):
        decode_raw("x", datatype, shape, memoryview(raw))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param([-1], id="a dimension is -1"),
        pytest.param([2, -(2**70)], id="a dimension is very negative"),
        pytest.param([MAX_ELEMENTS + 1], id="there are too many elements"),
        pytest.param([2**32, 2**32], id="the product overflows 64 bits to 0"),
        pytest.param([0, 2**70], id="an absurd dimension hides behind a 0"),
        pytest.param([0, 2**31, 2**31, 2**31], id="an absurd product hides behind a 0"),
        pytest.param([1] * 100, id="there are more dimensions than numpy has"),
    ],
)
def test_element_count_refuses_when(shape: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"^inputs\.x\.shape"):
        element_count("inputs.x.shape", shape)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        pytest.param([], 1, id="a scalar"),
        pytest.param([0], 0, id="no element"),
        pytest.param([3, 0, 2], 0, id="a dimension of 0"),
        pytest.param([3, 4], 12, id="a matrix"),
    ],
)
def test_element_count_is_the_product_when(shape: list[int], count: int) -> None:
    assert element_count("inputs.x.shape", shape) == count


def test_invalid_request_is_short_when_what_was_given_is_long() -> None:
    assert len(str(InvalidRequest("inputs." + "x" * 10**6, list(range(10**5)), "less"))) < 400


def test_tensor_spec_refuses_when_the_datatype_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"FP8.*want one of BOOL"):
        TensorSpec("x", "FP8", (1,))


def test_numpy_dtypes_are_little_endian_when_they_have_an_order() -> None:
    assert all(dtype.byteorder in "<=|" for dtype in NUMPY_DTYPES.values())
