"""Images and texts in, labels out: declared pre- and postprocessing in a running server."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.serve.encoded_models import encoded, repository
from tests.serve.running_server import RunningServer, ask, connect, fetch, running

RAW = {"Inference-Header-Content-Length": "0"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    scratch = tmp_path_factory.mktemp("encoded")
    root = repository(scratch)
    with running(scratch / "log", "--repository", str(root)) as started:
        yield started


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_server_answers_labels_when_an_image_is_the_whole_body(
    server: RunningServer, kind: str
) -> None:
    """curl --data-binary @image.jpg -H 'Inference-Header-Content-Length: 0' .../infer"""
    rest = connect(server.http_port)
    answer = ask(rest, "POST", "/v2/models/colours/infer", encoded((0, 40, 250), kind), RAW)
    rest.close()
    assert answer.status == 200, answer.body
    length = int(answer.headers["Inference-Header-Content-Length"])
    label, confidence = json.loads(answer.body[:length])["outputs"]
    assert (label["datatype"], label["shape"]) == ("BYTES", [1, 2])
    assert (confidence["datatype"], confidence["shape"]) == ("FP32", [1, 2])
    tail = answer.body[length:]
    assert tail[: label["parameters"]["binary_data_size"]] == (
        b"\x04\x00\x00\x00blue\x05\x00\x00\x00green"
    )
    values = np.frombuffer(tail[label["parameters"]["binary_data_size"] :], np.float32)
    np.testing.assert_allclose(values, [250 / 255, 40 / 255], atol=0.02)


def test_server_shows_the_clients_side_when_asked_for_metadata(server: RunningServer) -> None:
    metadata = fetch(server.http_port, "GET", "/v2/models/colours").json
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]
    assert [one["name"] for one in metadata["outputs"]] == ["label", "confidence"]
    config = fetch(server.http_port, "GET", "/v2/models/colours/config").json
    assert config["input"][0]["data_type"] == "TYPE_STRING"


def test_server_batches_texts_of_all_lengths_when_they_come_as_strings(
    server: RunningServer,
) -> None:
    texts = ["a", "a b c a b c", "c c c", "a b", "unknown b"]
    for text in texts:
        given = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
        answer = fetch(server.http_port, "POST", "/v2/models/texts/infer", {"inputs": [given]})
        ids = [{"a": 2, "b": 3, "c": 4}.get(word, 1) for word in text.split()]
        outputs = {one["name"]: one for one in answer.json["outputs"]}
        assert outputs["total"]["data"] == [sum(ids)]
        assert outputs["echo"]["shape"] == [1, len(ids)]
        assert outputs["echo"]["data"] == ids


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        pytest.param("colours", {"name": "image", "data": ["no image"]}, "inputs.image[0]",
                     id="the bytes are no image"),
        pytest.param("colours", {"name": "pixels", "data": ["x"]}, "inputs.name: got 'pixels'",
                     id="the engine's tensor is named"),
        pytest.param("texts", {"name": "text", "data": [""]}, "inputs.text[0]",
                     id="the text is empty"),
    ],
)  # fmt: skip
def test_server_names_the_row_when(
    server: RunningServer, model: str, given: dict[str, Any], message: str
) -> None:
    tensor = {"datatype": "BYTES", "shape": [1, 1], **given}
    answer = fetch(server.http_port, "POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
    assert (answer.status, message in answer.error) == (400, True), answer.body


def test_metrics_time_the_transform_when_there_is_one(server: RunningServer) -> None:
    labels = {"model": "texts", "version": "1", "phase": "transform", "outcome": "ok"}
    name = "trimserve_phase_duration_seconds_count"
    before = server.metric(name, **labels)
    given = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a b"]}
    assert (
        fetch(server.http_port, "POST", "/v2/models/texts/infer", {"inputs": [given]}).status == 200
    )
    assert server.metric(name, **labels) == before + 2  # before the batch and after it
