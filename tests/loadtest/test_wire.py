import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtest.arrivals import draw_arrivals
from loadtest.inputs import FileInputs, InputsInvalid, RandomInputs, Tensors, read_inputs_file
from loadtest.plan import Payload, Plan, load_plan, save_plan
from loadtest.signature import (
    Signature,
    SignatureUnusable,
    TensorSpec,
    check_fit,
    check_lengths,
    read_inputs,
)
from loadtest.slo import InputLengths, Workload
from loadtest.target import Target, TargetInvalid, parse_target
from loadtest.wire import bfloat16_bits, encode_payloads, grpc_payload, raw_bytes, rest_payload

TEXTS = Signature(
    (
        TensorSpec("input_ids", "INT64", (-1, -1)),
        TensorSpec("attention_mask", "INT64", (-1, -1)),
        TensorSpec("note", "BYTES", (-1, 1)),
    )
)
BINARY = Workload(rate_per_s=1, rows=3, input_lengths=InputLengths(min=2, max=9))
JSON = Workload(rate_per_s=1, rows=3, encoding="json", input_lengths=InputLengths(min=2, max=9))


def draw(signature: Signature, workload: Workload, seed: int = 0) -> Tensors:
    inputs = RandomInputs(signature, workload.rows, workload.input_lengths)
    return next(inputs.draw(np.random.default_rng(seed)))


def test_random_inputs_have_one_length_when_several_axes_vary() -> None:
    lengths = set()
    stream = RandomInputs(TEXTS, 3, InputLengths(min=2, max=9)).draw(np.random.default_rng(1))
    for _ in range(200):
        tensors = next(stream)
        assert tensors["input_ids"].shape == tensors["attention_mask"].shape
        assert tensors["input_ids"].shape[0] == 3
        assert (tensors["attention_mask"] == 1).all()
        lengths.add(tensors["input_ids"].shape[1])
    assert lengths == set(range(2, 10))


def test_rest_payload_holds_the_tensors_when_binary() -> None:
    tensors = draw(TEXTS, BINARY)
    payload = rest_payload(tensors, TEXTS, BINARY)
    assert payload.json_bytes is not None
    header = json.loads(payload.body[: payload.json_bytes])
    assert header["parameters"] == {"binary_data_output": True}
    rest = payload.body[payload.json_bytes :]
    for described in header["inputs"]:
        size = described["parameters"]["binary_data_size"]
        part, rest = rest[:size], rest[size:]
        tensor = tensors[described["name"]]
        assert described["shape"] == list(tensor.shape)
        if described["datatype"] == "INT64":
            np.testing.assert_array_equal(np.frombuffer(part, "<i8").reshape(tensor.shape), tensor)
        else:
            assert part[:4] == len(tensor[0, 0]).to_bytes(4, "little")
            assert part[4:].startswith(tensor[0, 0])
    assert rest == b""


def test_rest_payload_holds_the_tensors_when_json() -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)), TensorSpec("t", "BYTES", (-1,))))
    tensors = draw(signature, JSON)
    payload = rest_payload(tensors, signature, JSON)
    assert payload.json_bytes is None
    floats, texts = json.loads(payload.body)["inputs"]
    np.testing.assert_array_equal(np.float32(floats["data"]).reshape(3, 4), tensors["x"])
    assert [text.encode() for text in texts["data"]] == tensors["t"].tolist()


def test_grpc_payload_is_understood_when_read_with_tritons_messages() -> None:
    tensors = draw(TEXTS, BINARY)
    payload = grpc_payload(tensors, TEXTS, "m", "2")
    request = service_pb2.ModelInferRequest.FromString(payload.body)
    assert (request.model_name, request.model_version) == ("m", "2")
    assert [one.name for one in request.inputs] == ["input_ids", "attention_mask", "note"]
    ids = np.frombuffer(request.raw_input_contents[0], "<i8")
    np.testing.assert_array_equal(ids.reshape(tensors["input_ids"].shape), tensors["input_ids"])


def test_payloads_are_several_distinct_ones_when_encoded() -> None:
    stream = RandomInputs(TEXTS, 3, BINARY.input_lengths).draw(np.random.default_rng(2))
    payloads = encode_payloads(stream, TEXTS, BINARY, ["grpc", "rest"], "m", "")
    assert len(payloads["rest"]) == len(payloads["grpc"]) == 64
    assert len({payload.body for payload in payloads["rest"]}) == 64


@pytest.mark.parametrize(
    ("value", "bits"),
    [(1.0, 0x3F80), (-2.0, 0xC000), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (3.0e38, 0x7F62)],
)
def test_bfloat16_rounds_to_even_when_halfway(value: float, bits: int) -> None:
    assert bfloat16_bits(np.array([value], np.float32))[0] == bits
    assert raw_bytes(np.array([value], np.float32), "BF16") == bits.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.array([[np.nan]], np.float32), "NaN or infinity, want binary"),
        (np.array([[b"\xff"]], object), "not UTF-8, want binary"),
    ],
)
def test_rest_payload_is_refused_when_json_has_no_form_for_it(tensor: Any, message: str) -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 1)),))
    with pytest.raises(InputsInvalid, match=message):
        rest_payload({"x": tensor}, signature, JSON)


@pytest.mark.parametrize(
    ("spec", "workload", "message"),
    [
        (TensorSpec("x", "FP32", (1, 8)), Workload(rate_per_s=1, rows=4), "workload.rows: got 4"),
        (
            TensorSpec("x", "FP16", (-1, 8)),
            Workload(rate_per_s=1, encoding="json"),
            "FP16, which has no JSON form, want binary",
        ),
        (
            TensorSpec("x", "INT64", (-1, -1)),
            Workload(rate_per_s=1),
            "workload.input_lengths: missing",
        ),
    ],
    ids=["rows of a fixed batch", "half floats as JSON", "an unknown length"],
)
def test_workload_is_refused_when_the_model_cannot_have_it(
    spec: TensorSpec, workload: Workload, message: str
) -> None:
    def check() -> None:
        check_fit(Signature((spec,)), workload)
        check_lengths(Signature((spec,)), workload)

    with pytest.raises(SignatureUnusable, match=message):
        check()


@pytest.mark.parametrize(
    "described", [None, [], [{"name": "x"}], [{"name": "x", "datatype": "FP8", "shape": [1]}]]
)
def test_metadata_is_refused_when_it_describes_no_inputs(described: object) -> None:
    with pytest.raises(SignatureUnusable, match="metadata"):
        read_inputs(described)


def test_file_inputs_are_the_same_rows_when_a_request_has_several_inputs(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT32", (-1,))))
    path = tmp_path / "inputs.npz"
    numbers = np.arange(50)
    np.savez(path, a=np.stack([numbers, numbers], 1).astype(np.float64), b=numbers)
    arrays = read_inputs_file(path, signature)
    tensors = next(FileInputs(signature, 4, arrays).draw(np.random.default_rng(3)))
    assert tensors["a"].dtype == np.float32
    assert tensors["b"].dtype == np.int32
    np.testing.assert_array_equal(tensors["a"][:, 0], tensors["b"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((2, 8))}, r"'X' is no input of the model, want x"),
        ({}, "no array 'x'"),
        ({"x": np.zeros((2, 9), np.float32)}, r"got shape \[2, 9\], want \[n, 8\]"),
        ({"x": np.zeros((2, 8), np.int64)}, "got int64 values that FP32 can't hold"),
        ({"x": np.zeros((0, 8), np.float32)}, "at least 1"),
    ],
    ids=["another name", "no array", "another shape", "another kind", "no rows"],
)
def test_inputs_file_is_refused_when_it_does_not_fit(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputsInvalid, match=message):
        read_inputs_file(path, Signature((TensorSpec("x", "FP32", (-1, 8)),)))


def test_inputs_file_is_refused_when_it_holds_pickles(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(InputsInvalid, match="pickled"):
        read_inputs_file(path, Signature((TensorSpec("x", "BYTES", (-1,)),)))


def test_plan_is_the_same_when_read_from_its_files(tmp_path: Path) -> None:
    arrivals = draw_arrivals("poisson", 10, 2, 2, 2, np.random.default_rng(4))
    plan = Plan(
        model="m",
        version="",
        targets=(Target("rest", "::1", 8000), Target("grpc", "host", 8001)),
        payloads={
            "rest": (Payload(b"{}abc", 2), Payload(b"{}", None)),
            "grpc": (Payload(b""),) * 2,
        },
        warmup=arrivals,
        window=arrivals,
        timeout_s=5.0,
        max_in_flight=10,
    )
    save_plan(plan, tmp_path)
    again = load_plan(tmp_path)
    assert again.payloads == plan.payloads
    assert again.targets == plan.targets
    np.testing.assert_array_equal(again.window.intended_s, arrivals.intended_s)


@pytest.mark.parametrize(
    ("url", "protocol", "address"),
    [
        ("http://127.0.0.1:8000", "rest", "127.0.0.1:8000"),
        ("grpc://model.example:8001/", "grpc", "model.example:8001"),
        ("http://[::1]:8000", "rest", "[::1]:8000"),
    ],
)
def test_target_is_read_when_the_url_is_complete(url: str, protocol: str, address: str) -> None:
    target = parse_target(url)
    assert (target.protocol, target.address) == (protocol, address)
    assert parse_target(target.url) == target


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "https://h:1",
        "http://h",
        "http://h:99999",
        "http://h:1/v2",
        "http://u@h:1",
    ],
)
def test_target_is_refused_when_the_url_is_another(url: str) -> None:
    with pytest.raises(TargetInvalid, match="want http://HOST:PORT"):
        parse_target(url)
