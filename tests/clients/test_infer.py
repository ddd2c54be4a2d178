"""Inference by tritonclient's four clients: exactly the engine's numbers, whatever the options."""

import contextlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from serve.artifact import read_manifest
from serve.engines import load_engine
from serve.tensor import Array
from tests.clients.api import Api, assert_close, response
from tests.clients.models import LABELS, SEVERAL_SEEDS, several_by_hand, text_rows
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import RunningServer, ask, connect
from tests.serve.versions import rows

INPUTS: dict[str, dict[str, Array]] = {
    "bfloat16": {"x": np.array([[0.1, -2, 3e38]], ml_dtypes.bfloat16)},
    "linear": {"x": rows(3)},
    "pair": {"a": rows(2, 2), "b": np.array([[2**53 + 1, -5], [0, 7]])},
    "fixed": {"x": np.array([1.5, -2.5, np.float32(1) / 3], np.float32)},
    "ragged": {"x": rows(2, 9)},
    "text": {"words": text_rows()},
    "positive": {"x": np.array([-1, 2, -3, 4], np.float32)},
}
MUCH_WORK = 40_000  # turns of the model `work`: some tenths of a second
# Answers longer than this are compressed for those who accept it.
LONG = {"x": np.full(5000, 1.5, np.float32)}


def expected(models: Path, model: str) -> dict[str, Array]:
    """What the engine of the published version gives in this process."""
    directory = models / model / "1"
    engine = load_engine(directory, read_manifest(directory).engine)
    outputs = engine.run(INPUTS[model])
    engine.close()
    return outputs


def as_bytes(array: Array | None) -> Array:
    """BYTES from JSON come as text."""
    assert array is not None
    if array.dtype != object:
        return array
    return np.asarray(np.vectorize(lambda item: item.encode(), otypes=[object])(array))


# --- numbers


@pytest.mark.parametrize("model", sorted(INPUTS))
def test_infer_gives_the_engines_numbers_when_tensors_are_binary(
    api: Api, models: Path, model: str
) -> None:
    result = api.ask(model, INPUTS[model])
    for name, want in expected(models, model).items():
        np.testing.assert_array_equal(result.as_numpy(name), want, strict=True)


@pytest.mark.parametrize("model", sorted(set(INPUTS) - {"bfloat16"}))
def test_infer_gives_the_engines_numbers_when_tensors_are_json(
    http_api: Api, models: Path, model: str
) -> None:
    want = expected(models, model)
    outputs = [http_api.output(name, binary_data=False) for name in want]
    inputs = http_api.inputs(INPUTS[model], binary_data=False)
    result = http_api.infer(model, inputs, outputs=outputs)
    for name, array in want.items():
        np.testing.assert_array_equal(as_bytes(result.as_numpy(name)), array, strict=True)


def test_infer_mixes_binary_and_json_when_tensors_differ(http_api: Api, models: Path) -> None:
    arrays = INPUTS["pair"]
    inputs = [
        *http_api.inputs({"a": arrays["a"]}, binary_data=False),
        *http_api.inputs({"b": arrays["b"]}, binary_data=True),
    ]
    outputs = [
        http_api.output("doubled", binary_data=True),
        http_api.output("sum", binary_data=False),
    ]
    result = http_api.infer("pair", inputs, outputs=outputs)
    for name, want in expected(models, "pair").items():
        np.testing.assert_array_equal(result.as_numpy(name), want, strict=True)


def test_infer_refuses_json_when_the_datatype_has_none(http_api: Api) -> None:
    outputs = [http_api.output("y", binary_data=False)]
    with pytest.raises(InferenceServerException, match="BF16 as JSON"):
        http_api.ask("bfloat16", INPUTS["bfloat16"], outputs=outputs)


def test_infer_finds_each_output_when_the_first_is_empty(api: Api) -> None:
    result = api.ask("positive", {"x": np.array([-1, -2], np.float32)})
    np.testing.assert_array_equal(result.as_numpy("kept"), np.empty(0, np.float32), strict=True)
    want = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(result.as_numpy("negated"), want, strict=True)


def test_infer_gives_empty_outputs_when_the_input_is_empty(api: Api) -> None:
    result = api.ask("positive", {"x": np.empty(0, np.float32)})
    for name in ("kept", "negated"):
        np.testing.assert_array_equal(result.as_numpy(name), np.empty(0, np.float32), strict=True)


# --- what is asked for


@pytest.mark.parametrize("version", list(SEVERAL_SEEDS))
def test_infer_asks_that_version_when_it_is_named(api: Api, version: str) -> None:
    result = api.ask("several", {"x": rows(2)}, model_version=version)
    assert response(result)["model_version"] == version
    want = several_by_hand(rows(2), version)
    assert_close(result.as_numpy("y"), want)


def test_infer_asks_the_latest_version_when_none_is_named(api: Api) -> None:
    got = response(api.ask("several", {"x": rows(1)}))
    assert (got["model_name"], got["model_version"]) == ("several", max(SEVERAL_SEEDS))


def test_infer_gives_only_what_is_wanted_when_outputs_are_named(api: Api) -> None:
    result = api.ask("pair", INPUTS["pair"], outputs=[api.output("doubled")])
    assert result.as_numpy("sum") is None
    np.testing.assert_array_equal(result.as_numpy("doubled"), INPUTS["pair"]["b"] * 2)


@pytest.mark.parametrize(
    ("k", "want"),
    [
        pytest.param(1, [b"0.750000:1:dog"], id="the best class"),
        pytest.param(2, [b"0.750000:1:dog", b"0.250000:2:bird"], id="the two best"),
        pytest.param(
            9, [b"0.750000:1:dog", b"0.250000:2:bird", b"0.000000:0:cat"], id="more than there are"
        ),
    ],
)
def test_infer_gives_the_best_classes_when_it_asks_for(api: Api, k: int, want: list[bytes]) -> None:
    arrays = {"scores": np.array([[0, 0.75, 0.25], [0, 0.75, 0.25]], np.float32)}
    got = api.ask("labelled", arrays, outputs=[api.output("best", class_count=k)])
    assert got.as_numpy("best").tolist() == [want, want]
    assert {label.rpartition(b":")[2].decode() for label in want} <= set(LABELS)


# --- options that change no number


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"request_id": "an id, and é"}, id="a request id"),
        pytest.param({"priority": 1}, id="a priority"),
        pytest.param({"timeout": 60_000_000}, id="a timeout"),
        pytest.param({"headers": {"x-anything": "1"}}, id="a header"),
        pytest.param(
            {"parameters": {"text": "x", "flag": True, "number": 3, "real": 0.5}}, id="parameters"
        ),
    ],
)
def test_infer_gives_its_numbers_when_the_request_has(api: Api, options: dict[str, Any]) -> None:
    result = api.ask("linear", {"x": rows(2)}, **options)
    assert_close(result.as_numpy("y"), linear_by_hand(rows(2)))
    assert response(result).get("id", "") == options.get("request_id", "")


def test_infer_gives_its_numbers_when_the_query_has_parameters(http_api: Api) -> None:
    result = http_api.ask("linear", {"x": rows(2)}, query_params={"a": "1", "b": ["2", "3"]})
    assert_close(result.as_numpy("y"), linear_by_hand(rows(2)))


def test_infer_gives_its_numbers_when_the_client_has_a_timeout(grpc_api: Api) -> None:
    result = grpc_api.ask("linear", {"x": rows(2)}, client_timeout=30.0)
    assert_close(result.as_numpy("y"), linear_by_hand(rows(2)))


@pytest.mark.parametrize("answer", [None, "gzip", "deflate"])
@pytest.mark.parametrize("asked", [None, "gzip", "deflate"])
def test_infer_gives_its_numbers_when_bodies_are_compressed(
    http_api: Api, asked: str | None, answer: str | None
) -> None:
    got = http_api.ask(
        "positive",
        LONG,
        request_compression_algorithm=asked,
        response_compression_algorithm=answer,
    )
    np.testing.assert_array_equal(got.as_numpy("kept"), LONG["x"], strict=True)


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
def test_infer_gives_its_numbers_when_messages_are_compressed(
    grpc_api: Api, algorithm: str | None
) -> None:
    got = grpc_api.ask("positive", LONG, compression_algorithm=algorithm)
    np.testing.assert_array_equal(got.as_numpy("kept"), LONG["x"], strict=True)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_infer_is_answered_in_a_coding_when_the_client_accepts_it(
    server: RunningServer, coding: str
) -> None:
    """What `as_numpy` can't show: that the answer really was compressed, and is read as such."""
    client = tritonclient.http.InferenceServerClient
    given = tritonclient.http.InferInput("x", [5000], "FP32")
    given.set_data_from_numpy(LONG["x"])
    body, json_length = client.generate_request_body([given])
    headers = {"Inference-Header-Content-Length": str(json_length), "Accept-Encoding": coding}
    with contextlib.closing(connect(server.http_port)) as connection:
        answer = ask(connection, "POST", "/v2/models/positive/infer", body, headers)
    assert answer.headers["Content-Encoding"] == coding
    assert len(answer.body) < LONG["x"].nbytes / 10
    length = answer.headers["Inference-Header-Content-Length"]
    result = client.parse_response_body(answer.body, False, length, coding)
    np.testing.assert_array_equal(result.as_numpy("kept"), LONG["x"], strict=True)


# --- refusals


@pytest.mark.parametrize(
    ("model", "arrays", "message"),
    [
        pytest.param("absent", {"x": rows(1)}, "not in the repository", id="the model is unknown"),
        pytest.param("linear", {"x": rows(1, 5)}, "inputs.x.shape", id="the shape is another"),
        pytest.param("linear", {"z": rows(1)}, "inputs.name", id="the input is unknown"),
        pytest.param(
            "linear", {"x": np.ones((1, 4))}, "inputs.x.datatype", id="the datatype is another"
        ),
        pytest.param("linear", {"x": rows(9)}, "a batch of 1 to 8", id="the batch is too large"),
    ],
)
def test_infer_raises_with_our_message_when(
    api: Api, model: str, arrays: dict[str, Array], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        api.ask(model, arrays)
    assert api.ask("linear", INPUTS["linear"]).as_numpy("y").shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "statuses", "message"),
    [
        pytest.param(
            {"model_version": "9"},
            ("404", "StatusCode.NOT_FOUND"),
            "not in the repository",
            id="the version is unknown",
        ),
        pytest.param(
            {"sequence_id": 7, "sequence_start": True, "sequence_end": True},
            ("501", "StatusCode.UNIMPLEMENTED"),
            "sequences are not supported",
            id="it belongs to a sequence",
        ),
        pytest.param(
            {"timeout": 1},
            ("504", "StatusCode.DEADLINE_EXCEEDED"),
            "deadline exceeded",
            id="its timeout is over",
        ),
        pytest.param(
            {"timeout": -1},
            ("400", "StatusCode.INVALID_ARGUMENT"),
            "parameters.timeout",
            id="its timeout is negative",
        ),
    ],
)
def test_infer_is_refused_with_a_status_when(
    api: Api, options: dict[str, Any], statuses: tuple[str, str], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        api.ask("linear", INPUTS["linear"], **options)
    assert caught.value.status() == statuses[api.is_grpc]


def test_infer_is_refused_when_the_output_is_unknown(api: Api) -> None:
    with pytest.raises(InferenceServerException, match=r"outputs\.name"):
        api.ask("linear", INPUTS["linear"], outputs=[api.output("z")])


def test_infer_is_refused_when_the_client_gives_up(grpc_api: Api) -> None:
    with pytest.raises(InferenceServerException) as caught:
        grpc_api.ask("work", {"n": np.array(MUCH_WORK)}, client_timeout=0.05)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
