"""Padding: lengths made equal, and answers cut back."""

import numpy as np
import pytest

from serve.errors import InvalidRequest
from serve.padding import CutOutput, PaddedInput, Padding
from serve.tensor import Array, TensorSpec

PADDING = Padding(
    inputs=(PaddedInput("ids", value=9), PaddedInput("mask")),
    buckets=(4, 8),
    outputs=(CutOutput("hidden"),),
    mask="mask",
)
INPUTS = (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1)))
OUTPUTS = (TensorSpec("hidden", "FP32", (-1, -1, 2)), TensorSpec("pooled", "FP32", (-1, 2)))


def part(*rows: list[int]) -> dict[str, Array]:
    ids = np.array(rows, np.int64)
    return {"ids": ids, "mask": np.ones_like(ids)}


def test_padding_fills_up_to_the_bucket_when_requests_are_assembled() -> None:
    assembled = PADDING.assemble([part([1, 2]), part([3, 4, 5], [6, 7, 8])], 4)
    assert assembled["ids"].tolist() == [[1, 2, 9, 9], [3, 4, 5, 9], [6, 7, 8, 9]]
    assert assembled["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert {array.dtype for array in assembled.values()} == {np.dtype(np.int64)}


def test_padding_cuts_only_the_declared_outputs_when_they_go_back() -> None:
    outputs = {"hidden": np.arange(16.0).reshape(1, 8, 2), "pooled": np.ones((1, 2))}
    own = PADDING.cut(outputs, 3)
    assert own["hidden"].tolist() == outputs["hidden"][:, :3].tolist()
    assert own["pooled"] is outputs["pooled"]


def test_padding_fills_another_axis_when_that_is_declared() -> None:
    padding = Padding((PaddedInput("sound", axis=2, value=-1.0),), (4,))
    assembled = padding.assemble([{"sound": np.ones((1, 2, 3), np.float32)}], 4)
    assert assembled["sound"].tolist() == [[[1, 1, 1, -1], [1, 1, 1, -1]]]


def test_padding_fills_bytes_with_nothing_when_the_tensor_is_text() -> None:
    padding = Padding((PaddedInput("words"),), (2,))
    words = np.array([[b"a"]], object)
    assert padding.assemble([{"words": words}], 2)["words"].tolist() == [[b"a", b""]]


@pytest.mark.parametrize(
    ("length", "bucket"),
    [
        pytest.param(0, 4, id="nothing takes the smallest"),
        pytest.param(4, 4, id="a full one is kept"),
        pytest.param(5, 8, id="one more takes the next"),
    ],
)
def test_padding_chooses_a_bucket_when(length: int, bucket: int) -> None:
    assert PADDING.length_of(part(list(range(length)))) == length
    assert PADDING.bucket_of(length) == bucket


def test_padding_needs_no_mask_when_it_measures() -> None:
    assert PADDING.length_of({"ids": np.zeros((2, 3), np.int64)}) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param(part([0] * 9), r"ids\.shape: .*at most 8 on axis 1", id="it is too long"),
        pytest.param(
            {**part([1, 2]), "mask": np.ones((1, 3), np.int64)}, "inputs.shape: .*equal lengths",
            id="its tensors disagree",
        ),
    ],
)  # fmt: skip
def test_padding_refuses_a_request_when(inputs: dict[str, Array], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PADDING.length_of(inputs)


@pytest.mark.parametrize(
    ("padding", "problem"),
    [
        pytest.param(PADDING, None, id="it fits"),
        pytest.param(Padding((), (4,)), "want the inputs", id="nothing is padded"),
        pytest.param(Padding((PaddedInput("ids"),), ()), "rising lengths", id="no bucket is there"),
        pytest.param(
            Padding((PaddedInput("ids"),), (8, 4)), "rising lengths", id="the buckets fall"
        ),
        pytest.param(
            Padding((PaddedInput("ids"),), (0, 4)), "at least 1", id="a bucket holds nothing"
        ),
        pytest.param(
            Padding((PaddedInput("x"),), (4,)), "got tensor 'x'", id="an input is unknown"
        ),
        pytest.param(
            Padding((PaddedInput("ids", axis=0),), (4,)), "other than 0", id="the batch is padded"
        ),
        pytest.param(
            Padding((PaddedInput("ids"),), (4,), mask="mask"), "padding.mask",
            id="the mask isn't padded",
        ),
        pytest.param(
            Padding((PaddedInput("ids"),), (4,), (CutOutput("pooled"),)), "axis 1 of 'pooled'",
            id="an output doesn't vary",
        ),
        pytest.param(
            Padding((PaddedInput("ids"), PaddedInput("mask", value=1)), (4,), mask="mask"),
            "value 1 of 'mask'", id="the mask says that what is filled in is real",
        ),
        pytest.param(
            Padding((PaddedInput("ids"),), (4,)), "no axis that varies",
            id="another input varies and isn't padded",
        ),
    ],
)  # fmt: skip
def test_padding_is_checked_against_the_signature_when(
    padding: Padding, problem: str | None
) -> None:
    found = padding.problem(INPUTS, OUTPUTS)
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert problem in ": ".join(found)
