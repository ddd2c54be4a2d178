"""The official client (tritonclient, HTTP and gRPC) gets exactly the engine's numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from serve.artifact import read_manifest
from serve.engines import load_engine
from serve.service import EXTENSIONS
from serve.tensor import DATATYPES, Array
from tests.serve.running_server import HOST, RunningServer
from tests.serve.versions import rows

TEXT = np.array([[b"a", "é".encode()], [b"", b"long " * 50]], object)
INPUTS: dict[str, dict[str, Array]] = {
    "linear": {"x": rows(3)},
    "pair": {"a": rows(2, 2), "b": np.array([[2**53 + 1, -5], [0, 7]])},
    "fixed": {"x": np.array([1.5, -2.5, np.float32(1) / 3], np.float32)},
    "ragged": {"x": rows(2, 9)},
    "text": {"words": TEXT},
}


@pytest.fixture(params=["http", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(server: RunningServer, transport: str) -> Iterator[Any]:
    if transport == "http":
        made = tritonclient.http.InferenceServerClient(f"{HOST}:{server.http_port}")
    else:
        made = tritonclient.grpc.InferenceServerClient(f"{HOST}:{server.grpc_port}")
    yield made
    made.close()


def module(transport: str) -> Any:
    return tritonclient.http if transport == "http" else tritonclient.grpc


def ask(client: Any, transport: str, model: str, arrays: dict[str, Array], **options: Any) -> Any:
    inputs = []
    for name, array in arrays.items():
        given = module(transport).InferInput(name, list(array.shape), DATATYPES[array.dtype])
        given.set_data_from_numpy(array, **options)
        inputs.append(given)
    outputs = None
    if options:
        outputs = [
            tritonclient.http.InferRequestedOutput(name, **options)
            for name in output_names(client, model)
        ]
    return client.infer(model, inputs, outputs=outputs, request_id="42")


def output_names(client: Any, model: str) -> list[str]:
    return [output["name"] for output in client.get_model_metadata(model)["outputs"]]


def expected(models: Path, model: str) -> dict[str, Array]:
    """What the engine of the published version gives in this process."""
    directory = models / model / "1"
    engine = load_engine(directory, read_manifest(directory).engine)
    outputs = engine.run(INPUTS[model])
    engine.close()
    return outputs


@pytest.mark.parametrize("model", sorted(INPUTS))
def test_tritonclient_gets_the_engines_numbers_when_binary(
    client: Any, transport: str, models: Path, model: str
) -> None:
    result = ask(client, transport, model, INPUTS[model])
    for name, want in expected(models, model).items():
        np.testing.assert_array_equal(result.as_numpy(name), want, strict=True)


@pytest.mark.parametrize("model", sorted(INPUTS))
def test_tritonclient_gets_the_engines_numbers_when_json(
    server: RunningServer, models: Path, model: str
) -> None:
    client = tritonclient.http.InferenceServerClient(f"{HOST}:{server.http_port}")
    result = ask(client, "http", model, INPUTS[model], binary_data=False)
    for name, want in expected(models, model).items():
        got = result.as_numpy(name)
        if want.dtype == object:
            got = np.vectorize(lambda item: item.encode(), otypes=[object])(got)
        np.testing.assert_array_equal(got, want, strict=True)
    client.close()


def test_tritonclient_sees_health_and_metadata_when_it_asks(client: Any, transport: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    as_json = {"as_json": True} if transport == "grpc" else {}
    assert client.get_server_metadata(**as_json)["extensions"] == list(EXTENSIONS)
    metadata = client.get_model_metadata("pair", **as_json)
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["a", "b"]


def test_tritonclient_gets_its_id_and_the_version_when_it_sends_one(
    client: Any, transport: str
) -> None:
    response = ask(client, transport, "linear", INPUTS["linear"]).get_response()
    if transport == "http":
        assert (response["id"], response["model_version"]) == ("42", "1")
    else:
        assert (response.id, response.model_version) == ("42", "1")


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
def test_tritonclient_raises_with_our_message_when(
    client: Any, transport: str, model: str, arrays: dict[str, Array], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        ask(client, transport, model, arrays)
    assert ask(client, transport, "linear", INPUTS["linear"]).as_numpy("y").shape == (3, 3)
