"""Classification: the best classes as text, against a slow sort."""

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.classification import classify
from serve.errors import InvalidRequest
from serve.tensor import NUMPY_DTYPES, Array

LONG = 3000  # more elements than are sorted whole
NUMBERS = sorted(set(NUMPY_DTYPES) - {"BOOL", "BYTES"})
FEW_LABELS = ("cat", "", "dog")


def by_hand(row: Sequence[float], k: int) -> list[int]:
    """The indices of the best `k` by a sort of Python's."""

    def rank(index: int) -> tuple[bool, float, int]:
        value = row[index]
        return (True, 0.0, index) if math.isnan(value) else (False, -value, index)

    return sorted(range(len(row)), key=rank)[:k]


def indices(classes: Array) -> list[int]:
    return [int(text.split(b":")[1]) for text in classes.ravel().tolist()]


def test_classes_are_value_index_and_label_when_there_are_labels() -> None:
    array = np.array([[0.1, 0.7, 0.2, 0.5], [4, 3, 2, 1]], np.float32)
    classes = classify("y", array, 3, FEW_LABELS, batched=True)
    assert classes.dtype == object
    assert classes.tolist() == [
        [b"0.700000:1", b"0.500000:3", b"0.200000:2:dog"],
        [b"4.000000:0:cat", b"3.000000:1", b"2.000000:2:dog"],
    ]


@pytest.mark.parametrize(
    ("array", "batched", "shape"),
    [
        pytest.param(np.zeros((2, 3)), True, (2, 2), id="rows of classes"),
        pytest.param(np.zeros((2, 3, 4)), True, (2, 2), id="rows of more axes are flattened"),
        pytest.param(np.zeros(3), True, (3, 1), id="rows of one element"),
        pytest.param(np.zeros((0, 3)), True, (0, 2), id="no rows"),
        pytest.param(np.zeros((2, 0)), True, (2, 0), id="no classes"),
        pytest.param(np.zeros((2, 3)), False, (2,), id="no batch dimension"),
        pytest.param(np.zeros(()), False, (1,), id="a scalar"),
        pytest.param(np.zeros(0), False, (0,), id="no elements"),
        pytest.param(np.zeros((2, LONG)), True, (2, 2), id="long rows"),
        pytest.param(np.zeros((0, LONG)), True, (0, 2), id="no long rows"),
        pytest.param(np.zeros((3, 2)).T, True, (2, 2), id="columns first in memory"),
    ],
)
def test_classes_have_the_shape_of_the_batch_when_k_is_2(
    array: Array, batched: bool, shape: tuple[int, ...]
) -> None:
    assert classify("y", array, 2, (), batched).shape == shape


@pytest.mark.parametrize("datatype", NUMBERS)
@pytest.mark.parametrize("length", [5, LONG])
def test_classes_come_largest_first_when_the_datatype_is_any_number(
    datatype: str, length: int
) -> None:
    array = np.zeros(length, NUMPY_DTYPES[datatype])
    array[[1, 2, 3]] = [2, 5, 1]
    value = "{:f}" if datatype.startswith(("FP", "BF")) else "{}"
    want = [value.format(number) + f":{index}" for number, index in ((5, 2), (2, 1), (1, 3))]
    assert classify("y", array, 3, (), batched=False).tolist() == [t.encode() for t in want]


@pytest.mark.parametrize(
    ("array", "text"),
    [
        pytest.param(np.array([2**64 - 1, 2**64 - 2], np.uint64), b"18446744073709551615:0",
                     id="the largest integer is no double"),
        pytest.param(np.array([-(2**63), -(2**63)], np.int64), b"-9223372036854775808:0",
                     id="the least integer has no opposite"),
        pytest.param(np.array([0.1], np.float32), b"0.100000:0", id="six decimals"),
        pytest.param(np.array([1e-9]), b"0.000000:0", id="small values vanish"),
        pytest.param(np.array([16777216.5]), b"16777216.500000:0", id="no exponent"),
        pytest.param(np.array([0.5, -0.0]), b"0.500000:0", id="a half"),
        pytest.param(np.array([-0.0, 0.0]), b"-0.000000:0", id="zeros tie, their signs show"),
        pytest.param(np.array([1, np.inf]), b"inf:1", id="infinity"),
        pytest.param(np.array([np.nan, np.nan]), b"nan:0", id="nothing but NaN"),
        pytest.param(np.array([np.nan, -np.inf]), b"-inf:1", id="NaN is below minus infinity"),
        pytest.param(np.array([1.5, 2.5], ml_dtypes.bfloat16), b"2.500000:1", id="BF16"),
        pytest.param(np.array([0x7C01], np.uint16).view(np.float16), b"nan:0",
                     id="a signalling NaN"),
    ],
)  # fmt: skip
def test_best_class_is_written_like_triton_does_when_values_are_special(
    array: Array, text: bytes
) -> None:
    assert classify("y", array, 1, (), batched=False).tolist() == [text]


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1.0, 2.0, np.inf, np.nan]),
    ),
    st.integers(1, 14),
)
def test_classes_are_those_of_a_slow_sort_when_values_tie(array: Array, k: int) -> None:
    got = indices(classify("y", array, k, (), batched=True))
    assert got == [index for row in array.tolist() for index in by_hand(row, k)]


@pytest.mark.parametrize("k", [1, 10, 700, LONG - 1, LONG, LONG + 1])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.0, 1.0, 2.0], id="many ties"),
        pytest.param([1.0], id="nothing but ties"),
        pytest.param([np.nan], id="nothing but NaN"),
        pytest.param([np.nan] * 9 + [-np.inf, 3.0], id="mostly NaN"),
        pytest.param([-np.inf, np.inf], id="infinities"),
        pytest.param(np.linspace(-1, 1, 100_000).tolist(), id="few ties"),
    ],
)
def test_classes_are_those_of_a_slow_sort_when_rows_are_long(values: list[float], k: int) -> None:
    array = np.random.default_rng(k).choice(np.array(values, np.float32), (2, LONG))
    got = indices(classify("y", array, k, (), batched=True))
    assert got == [index for row in array.tolist() for index in by_hand(row, k)]


def test_classes_leave_the_output_as_it_is_when_made() -> None:
    array = np.array([[3, 1, 2]], np.int32)
    array.flags.writeable = False
    classify("y", array, 1, (), batched=True)
    assert array.tolist() == [[3, 1, 2]]


def test_labels_are_utf8_when_they_are_not_ascii() -> None:
    classes = classify("y", np.ones(1), 1, ("Käse",), batched=False)
    assert classes.tolist() == ["1.000000:0:Käse".encode()]


@pytest.mark.parametrize(
    "k",
    [
        pytest.param(0, id="none"),
        pytest.param(-1, id="negative"),
        pytest.param(True, id="a bool"),
        pytest.param(1.0, id="a float"),
        pytest.param("1", id="a text"),
    ],
)
def test_classify_refuses_when_k_is_no_whole_number_from_1(k: int) -> None:
    with pytest.raises(InvalidRequest) as raised:
        classify("scores", np.ones(3), k, (), batched=False)
    assert raised.value.field == "outputs.scores.parameters.classification"
    assert raised.value.got == k


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array([True, False]), id="BOOL"),
        pytest.param(np.array([b"a", b"b"], object), id="BYTES"),
    ],
)
def test_classify_refuses_when_an_output_has_no_numbers(array: Array) -> None:
    with pytest.raises(InvalidRequest, match=r"outputs\.scores\..* want an output of numbers"):
        classify("scores", array, 1, (), batched=False)
