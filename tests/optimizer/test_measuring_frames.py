"""Frames: what goes in comes out, and what is no frame is refused."""

import io
import json
import struct

import ml_dtypes
import numpy as np
import pytest

from optimizer.measuring.calls import Call, Named, call_of, header_of
from optimizer.measuring.frames import Frame, FrameInvalid, decode, encode, read
from optimizer.timing import Effort
from serve.engines import EngineSpec
from serve.tensor import Array


def texts(*words: bytes) -> Array:
    array = np.empty(len(words), object)
    array[:] = words
    return array


ARRAYS: dict[str, Array] = {
    "floats": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "bfloat16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "text": texts(b"", b"two words"),
    "truth": np.array([True, False]),
    "scalar": np.array(7, np.int64),
    "nothing": np.zeros((0, 5), np.float32),
    "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
}


def test_frame_comes_out_as_it_went_in_when_it_is_read() -> None:
    raw = b"".join(encode(Frame({"call": "x"}, [ARRAYS, {}, {"again": ARRAYS["floats"]}])))
    frame = decode(raw)
    assert frame.header == {"call": "x"}
    assert [list(batch) for batch in frame.batches] == [list(ARRAYS), [], ["again"]]
    for name, array in ARRAYS.items():
        got = frame.batches[0][name]
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        np.testing.assert_array_equal(got, array)


def test_frames_are_read_one_after_the_other_when_they_come_in_crumbs() -> None:
    raw = b"".join(piece for n in range(3) for piece in encode(Frame({"n": n}, [ARRAYS])))
    stream = io.BytesIO(raw)
    frames = [read(lambda n: stream.read(min(n, 3))) for _ in range(4)]
    assert [frame and frame.header["n"] for frame in frames] == [0, 1, 2, None]


def framed(document: object, body: bytes = b"") -> bytes:
    header = json.dumps(document).encode()
    return struct.pack("<4sIQ", b"TSM1", len(header), len(body)) + header + body


TENSOR = {"name": "x", "datatype": "FP32", "shape": [2], "size": 8}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n", "begins with", id="something else"),
        pytest.param(framed({}), "header: want", id="no header"),
        pytest.param(framed([]), "header: want", id="a list"),
        pytest.param(framed({"header": {}, "batches": 3}), "batches: want", id="no batches"),
        pytest.param(framed({"header": {}, "batches": [[TENSOR]]}), "more than", id="no bytes"),
        pytest.param(
            framed({"header": {}, "batches": [[{**TENSOR, "size": -1}]]}), "more than",
            id="a negative size",
        ),
        pytest.param(
            framed({"header": {}, "batches": [[{**TENSOR, "shape": [2**50]}]]}, b"12345678"),
            "can't be read", id="an absurd shape",
        ),
        pytest.param(
            framed({"header": {}, "batches": [[{**TENSOR, "datatype": "PICKLE"}]]}, b"12345678"),
            "can't be read", id="an unknown datatype",
        ),
        pytest.param(framed({"header": {}, "batches": []}, b"x"), "no tensor", id="bytes left"),
        pytest.param(framed({"header": {}, "batches": []})[:-2], "too early", id="cut off"),
        pytest.param(framed({"header": {}, "batches": []}) + b"x", "exactly one", id="too long"),
        pytest.param(struct.pack("<4sIQ", b"TSM1", 2, 2**40), "are allowed", id="too large"),
        pytest.param(framed("x" * 3)[:-1] + b"\xff", "no JSON", id="no JSON"),
    ],
)  # fmt: skip
def test_frame_is_refused_with_the_reason_when_it_is_none(raw: bytes, message: str) -> None:
    with pytest.raises(FrameInvalid, match=message):
        decode(raw)


def test_array_is_refused_by_name_when_no_datatype_fits() -> None:
    with pytest.raises(FrameInvalid, match="'z'"):
        list(encode(Frame({}, [{"z": np.zeros(2, np.complex64)}])))


CALL = Call(
    "time",
    (Named("a", EngineSpec("openvino", "m.xml", batch_sizes=(1, 8), options={"x": True, "y": 1})),),
    batch_sizes=(1, 8),
    effort=Effort(min_passes=3),
    seed=7,
)


def test_call_comes_out_as_it_went_in_when_it_passes_through_json() -> None:
    assert call_of(json.loads(json.dumps(header_of(CALL)))) == CALL


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"name": "shell"}, "call.name", id="an unknown call"),
        pytest.param({"contenders": []}, "call.contenders", id="no contender"),
        pytest.param({"seconds": 1e9}, "call.seconds", id="too long"),
        pytest.param({"n_runs": -1}, "call.n_runs", id="negative"),
        pytest.param({"more": 1}, "call.more", id="an unknown key"),
    ],
)
def test_call_is_refused_by_field_when_it_is_malformed(
    changed: dict[str, object], message: str
) -> None:
    header = header_of(CALL)
    assert isinstance(header["call"], dict)
    with pytest.raises(FrameInvalid, match=message):
        call_of({"call": {**header["call"], **changed}})
