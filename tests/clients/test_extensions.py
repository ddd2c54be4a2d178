"""Health, metadata, control, statistics and settings by tritonclient's four clients."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from serve import VERSION
from tests.clients.api import Api, document
from tests.clients.models import MODELS
from tests.serve.versions import rows

# What a server says that its clients may do, as it comes, and with everything allowed.
EXTENSIONS = [
    "classification", "binary_tensor_data", "model_configuration", "parameters", "statistics",
]  # fmt: skip
ALLOWED = [
    "system_shared_memory", "model_repository", "model_repository(unload_dependents)", "logging",
]  # fmt: skip
DURATIONS = {
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit",
    "cache_miss",
}  # fmt: skip
FORBIDDEN = ("403", "StatusCode.PERMISSION_DENIED")
INVALID = ("400", "StatusCode.INVALID_ARGUMENT")
NOT_FOUND = ("404", "StatusCode.NOT_FOUND")
UNSUPPORTED = ("501", "StatusCode.UNIMPLEMENTED")

Call = Callable[[Api], Any]


def refusal(api: Api, call: Call) -> tuple[str, str]:
    """Status and message of the error that the call must end with."""
    with pytest.raises(InferenceServerException) as caught:
        call(api)
    return caught.value.status(), caught.value.message()


def settings(answer: Any) -> dict[str, Any]:
    """Trace or log settings by name; protobuf wraps each value, and the first in a list."""
    got = document(answer)
    if "settings" not in got:
        return dict(got)
    return {name: next(iter(wrapped.values())) for name, wrapped in got["settings"].items()}


def index(api: Api) -> dict[tuple[str, str], str]:
    """State by model and version."""
    answer = document(api.get_model_repository_index())
    entries = answer["models"] if api.is_grpc else answer
    return {(entry["name"], entry["version"]): entry["state"] for entry in entries}


def config(api: Api, model: str) -> dict[str, Any]:
    answer = document(api.get_model_config(model))
    return dict(answer["config"] if api.is_grpc else answer)


@pytest.fixture
def loaded(api: Api) -> Iterator[Api]:
    """An API whose test may unload `labelled` and load it otherwise."""
    yield api
    api.load_model("labelled")


# --- health and metadata


def test_health_is_good_when_models_answer(api: Api) -> None:
    assert api.is_server_live()
    assert api.is_server_ready()
    assert api.is_model_ready("several")
    assert api.is_model_ready("several", "1")


def test_model_is_not_ready_when_its_version_is_unknown(http_api: Api) -> None:
    assert not http_api.is_model_ready("several", "9")
    assert not http_api.is_model_ready("absent")


def test_model_readiness_is_refused_when_it_is_unknown(grpc_api: Api) -> None:
    assert refusal(grpc_api, lambda a: a.is_model_ready("absent"))[0] == NOT_FOUND[1]


def test_server_tells_its_name_and_extensions_when_asked(api: Api, plain_api: Api) -> None:
    metadata = plain_api.get_server_metadata(**plain_api.plain)
    assert metadata == {"name": "trimserve", "version": VERSION, "extensions": EXTENSIONS}
    metadata = api.get_server_metadata(headers={"x-anything": "1"}, **api.plain)
    assert metadata["extensions"] == EXTENSIONS + ALLOWED


def test_model_tells_its_tensors_when_asked(api: Api) -> None:
    metadata = document(api.get_model_metadata("pair", "1"))
    assert metadata["platform"] == "onnxruntime_onnx"
    found = [(t["name"], t["datatype"], [int(n) for n in t["shape"]]) for t in metadata["inputs"]]
    assert found == [("a", "FP32", [-1, 2]), ("b", "INT64", [-1, 2])]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["sum", "doubled"]


def test_model_tells_its_versions_when_it_has_several(api: Api) -> None:
    assert document(api.get_model_metadata("several"))["versions"] == ["1", "2"]


def test_model_tells_its_configuration_when_asked(api: Api) -> None:
    got = config(api, "pair")
    assert (got["name"], got["max_batch_size"], got["backend"]) == ("pair", 8, "onnxruntime")
    dims = [(one["name"], one["data_type"], [int(n) for n in one["dims"]]) for one in got["input"]]
    assert dims == [("a", "TYPE_FP32", [2]), ("b", "TYPE_INT64", [2])]


def test_model_has_its_folders_name_when_it_has_no_manifest(api: Api) -> None:
    assert document(api.get_model_metadata("labelled"))["name"] == "labelled"
    assert config(api, "labelled")["name"] == "labelled"
    scores = {"scores": np.zeros((1, 3), np.float32)}
    assert document(api.ask("labelled", scores).get_response())["model_name"] == "labelled"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda a: a.get_model_metadata("absent"), id="metadata"),
        pytest.param(lambda a: a.get_model_metadata("linear", "9"), id="metadata of a version"),
        pytest.param(lambda a: a.get_model_config("absent"), id="configuration"),
        pytest.param(lambda a: a.get_inference_statistics("absent"), id="statistics"),
        pytest.param(lambda a: a.get_trace_settings("absent"), id="trace settings"),
        pytest.param(lambda a: a.load_model("absent"), id="being loaded"),
        pytest.param(lambda a: a.unload_model("absent"), id="being unloaded"),
    ],
)
def test_model_is_not_found_when_it_is_unknown_and_asked_for(api: Api, call: Call) -> None:
    status, message = refusal(api, call)
    assert status == NOT_FOUND[api.is_grpc]
    assert "is not in the repository" in message


# --- the repository


def test_index_lists_every_version_when_asked(api: Api) -> None:
    states = index(api)
    assert {name for name, _ in states} == set(MODELS)
    assert states["several", "1"] == states["several", "2"] == "READY"


def test_model_comes_and_goes_when_it_is_loaded_and_unloaded(loaded: Api) -> None:
    loaded.unload_model("labelled", unload_dependents=True)
    assert index(loaded)["labelled", "1"] == "UNAVAILABLE"
    assert not loaded.is_model_ready("labelled")
    loaded.load_model("labelled")
    assert index(loaded)["labelled", "1"] == "READY"
    assert loaded.is_model_ready("labelled")


def test_model_follows_a_configuration_when_it_is_loaded_with_one(loaded: Api) -> None:
    loaded.load_model("labelled", config=json.dumps({"max_batch_size": 2}))
    assert config(loaded, "labelled")["max_batch_size"] == 2
    with pytest.raises(InferenceServerException, match="a batch of 1 to 2"):
        loaded.ask("labelled", {"scores": rows(3, 3)})
    loaded.load_model("labelled")
    assert config(loaded, "labelled")["max_batch_size"] == 4


def test_model_goes_on_when_it_is_loaded_with_a_broken_configuration(loaded: Api) -> None:
    status, message = refusal(loaded, lambda a: a.load_model("labelled", config="{"))
    assert status == INVALID[loaded.is_grpc]
    assert "parameters.config" in message
    assert loaded.ask("labelled", {"scores": rows(4, 3)}).as_numpy("best").shape == (4, 3)


def test_model_is_not_loaded_when_files_are_sent_along(api: Api) -> None:
    file = "file:1/model.onnx"
    call = {"config": "{}", "files": {file: b"x"}}
    status, message = refusal(api, lambda a: a.load_model("labelled", **call))
    assert status == INVALID[api.is_grpc]
    assert file in message
    assert api.is_model_ready("labelled")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda a: a.load_model("linear"), id="it wants to load"),
        pytest.param(lambda a: a.unload_model("linear"), id="it wants to unload"),
        pytest.param(
            lambda a: a.update_log_settings({"log_verbose_level": 1}), id="it wants other logs"
        ),
    ],
)
def test_client_is_told_where_to_go_when_control_is_elsewhere_and(
    plain_api: Api, call: Call
) -> None:
    status, message = refusal(plain_api, call)
    assert status == FORBIDDEN[plain_api.is_grpc]
    assert "--control-on-data-port" in message
    assert plain_api.is_model_ready("linear")


# --- statistics


def test_statistics_count_a_request_when_it_is_answered(api: Api) -> None:
    def counts() -> tuple[int, int, int]:
        (found,) = document(api.get_inference_statistics("pair", "1"))["model_stats"]
        durations = found["inference_stats"]
        assert set(durations) >= DURATIONS
        return (
            int(found["inference_count"]),
            int(found["execution_count"]),
            int(durations["success"]["count"]),
        )

    before = counts()
    api.ask("pair", {"a": rows(3, 2), "b": np.zeros((3, 2), np.int64)})
    assert counts() == (before[0] + 3, before[1] + 1, before[2] + 1)


def test_statistics_are_of_every_version_when_no_model_is_named(api: Api) -> None:
    found = document(api.get_inference_statistics())["model_stats"]
    assert [(one["name"], one["version"]) for one in found] == sorted(index(api))


# --- settings


def test_trace_settings_say_off_when_asked(api: Api) -> None:
    for answer in (
        api.get_trace_settings(),
        api.get_trace_settings("linear"),
        api.update_trace_settings(settings={"trace_level": ["OFF"], "trace_rate": None}),
        api.update_trace_settings("linear", settings={"trace_level": None}),
    ):
        assert settings(answer)["trace_level"] == ["OFF"]


def test_tracing_is_refused_when_it_would_trace(api: Api) -> None:
    wanted = {"trace_level": ["TIMESTAMPS"]}
    status, message = refusal(api, lambda a: a.update_trace_settings(settings=wanted))
    assert status == UNSUPPORTED[api.is_grpc]
    assert "trace_level" in message


def test_logs_change_when_asked(api: Api) -> None:
    before = settings(api.get_log_settings())
    try:
        changed = settings(api.update_log_settings({"log_verbose_level": 1}))
        assert changed == before | {"log_verbose_level": 1}
        assert settings(api.get_log_settings()) == changed
    finally:
        back = {"log_verbose_level": before["log_verbose_level"]}
        assert settings(api.update_log_settings(back)) == before


def test_logs_stay_where_they_are_when_a_file_is_asked_for(api: Api) -> None:
    status, message = refusal(api, lambda a: a.update_log_settings({"log_file": "x.log"}))
    assert status == UNSUPPORTED[api.is_grpc]
    assert "log_file" in message


def test_logs_are_told_when_they_may_not_be_changed(plain_api: Api) -> None:
    assert settings(plain_api.get_log_settings())["log_info"] is True


# --- CUDA


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda a: a.get_cuda_shared_memory_status(), id="its status"),
        pytest.param(lambda a: a.get_cuda_shared_memory_status("r"), id="a region's status"),
        pytest.param(lambda a: a.register_cuda_shared_memory("r", b"eA==", 0, 1), id="a region"),
        pytest.param(lambda a: a.unregister_cuda_shared_memory("r"), id="to forget a region"),
        pytest.param(lambda a: a.unregister_cuda_shared_memory(), id="to forget all"),
    ],
)
def test_cuda_memory_is_not_there_when_it_asks_for(api: Api, call: Call) -> None:
    status, message = refusal(api, call)
    assert status == UNSUPPORTED[api.is_grpc]
    assert "CUDA shared memory is not supported" in message


# --- plug-ins


class Marking:
    """A plug-in of the client, which adds a header to every request, and what it saw."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, request: Any) -> None:
        self.n_calls += 1
        request.headers["x-anything"] = "1"


def test_plugin_may_add_headers_when_it_is_registered(api: Api) -> None:
    marking = Marking()
    client = api.client
    client.register_plugin(marking)
    try:
        assert client.plugin() is marking
        assert api.get_server_metadata(headers={}, **api.plain)["name"] == "trimserve"
        assert marking.n_calls == 1
    finally:
        client.unregister_plugin()
    assert client.plugin() is None
