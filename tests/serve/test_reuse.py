"""The response cache and the merging of equal requests, in a running server."""

import concurrent.futures
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve import oip_pb2 as pb
from serve.artifact import MANIFEST, Batching
from tests.serve import onnx_models
from tests.serve.running_server import (
    PATIENCE_S,
    Answer,
    RunningServer,
    ask,
    channel_to,
    connect,
    fetch,
    method,
    running,
    until,
)
from tests.serve.versions import publish, rows

MUCH_WORK = 20_000  # turns: tenths of a second
LINEAR = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [[1, 2, 3, 4]]}]}
LINEAR_PATH = "/v2/models/linear/infer"


def work(turns: int) -> dict[str, Any]:
    return {"inputs": [{"name": "n", "datatype": "INT64", "shape": [], "data": turns}]}


def send(
    server: RunningServer, path: str, body: Any, headers: dict[str, str] | None = None
) -> Answer:
    connection = connect(server.http_port)
    try:
        return ask(connection, "POST", path, body, headers)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    scratch = tmp_path_factory.mktemp("reuse")
    root = scratch / "models"
    for builder in (onnx_models.linear, onnx_models.work, onnx_models.pick, onnx_models.text):
        publish(root, builder, scratch)
    options = ["--response-cache-bytes=1000000", "--merge-duplicates", "--tenant-header=X-Tenant"]
    control = ["--model-control=explicit", "--control-on-data-port", "--control-port=0"]
    models = [f"--load-model={name}" for name in ("linear", "work", "pick", "text")]
    arguments = ["--repository", str(root), *options, *control, *models]
    with running(scratch / "log", *arguments) as started:
        started.root = root  # type: ignore[attr-defined]
        yield started


def statistics(server: RunningServer, model: str) -> dict[str, int]:
    (one,) = fetch(server.http_port, "GET", f"/v2/models/{model}/stats").json["model_stats"]
    counts = {name: one["inference_stats"][name]["count"] for name in ("success", "fail")}
    counts |= {name: one["inference_stats"][name]["count"] for name in ("cache_hit", "cache_miss")}
    return counts | {"executions": one["execution_count"], "rows": one["inference_count"]}


def changes(server: RunningServer, model: str, before: dict[str, int]) -> dict[str, int]:
    now = statistics(server, model)
    return {name: now[name] - count for name, count in before.items() if now[name] != count}


def test_cache_answers_when_the_same_is_asked_again(server: RunningServer) -> None:
    before = statistics(server, "linear")
    first, second = (send(server, LINEAR_PATH, LINEAR) for _ in range(2))
    assert (first.status, first.json) == (200, second.json)
    assert changes(server, "linear", before) == {
        "success": 2, "cache_hit": 1, "cache_miss": 1, "executions": 1, "rows": 1
    }  # fmt: skip


def test_cache_answers_both_transports_when_the_tensors_are_the_same(server: RunningServer) -> None:
    x = rows(1, seed=3)
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x.tolist()}]
    rest = send(server, LINEAR_PATH, {"inputs": inputs, "id": "a"}).json
    before = statistics(server, "linear")
    request = pb.ModelInferRequest(model_name="linear", id="b")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(x.tobytes())
    with channel_to(server.grpc_port) as channel:
        answer = method(channel, "ModelInfer")(request, timeout=PATIENCE_S)
    assert (rest["id"], answer.id) == ("a", "b")
    assert changes(server, "linear", before) == {"success": 1, "cache_hit": 1}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param(LINEAR, {"X-Tenant": "other"}, id="the tenant is another"),
        pytest.param(
            {"inputs": [{**LINEAR["inputs"][0], "data": [[1, 2, 3, 5]]}]}, {}, id="a value differs"
        ),
        pytest.param(
            {"inputs": [{**LINEAR["inputs"][0], "shape": [2, 4], "data": [[1, 2, 3, 4]] * 2}]}, {},
            id="there is one more row",
        ),
    ],
)  # fmt: skip
def test_cache_computes_when(
    server: RunningServer, body: dict[str, Any], headers: dict[str, str]
) -> None:
    send(server, LINEAR_PATH, LINEAR)
    before = statistics(server, "linear")
    assert send(server, LINEAR_PATH, body, headers).status == 200
    assert changes(server, "linear", before)["executions"] == 1
    assert send(server, LINEAR_PATH, body, headers).status == 200
    assert changes(server, "linear", before)["executions"] == 1


def test_cache_serves_every_selection_of_outputs_when_one_was_computed(
    server: RunningServer,
) -> None:
    body = {"inputs": [{**LINEAR["inputs"][0], "data": [[4, 3, 2, 1]]}]}
    whole = send(server, LINEAR_PATH, body).json["outputs"][0]["data"]
    classes = [{"name": "y", "parameters": {"classification": 1}}]
    before = statistics(server, "linear")
    (best,) = send(server, LINEAR_PATH, {**body, "outputs": classes}).json["outputs"][0]["data"]
    assert int(best.split(":")[1]) == whole.index(max(whole))
    assert changes(server, "linear", before) == {"success": 1, "cache_hit": 1}


def test_cache_forgets_when_a_version_is_loaded_again(server: RunningServer) -> None:
    """In place of the old file: the same name and version, and another model."""
    root: Path = server.root  # type: ignore[attr-defined]
    body = {"inputs": [{"name": "words", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}]}
    assert send(server, "/v2/models/text/infer", body).status == 200
    before = statistics(server, "text")
    manifest = json.loads((root / "text" / "1" / MANIFEST).read_text())
    manifest["variant_id"] = "another"
    (root / "text" / "1" / MANIFEST).write_text(json.dumps(manifest))
    assert send(server, "/v2/repository/models/text/load", {}).status == 200
    assert send(server, "/v2/models/text/infer", body).status == 200
    assert changes(server, "text", before)["executions"] == 1


def test_equal_requests_run_once_when_they_are_under_way_together(server: RunningServer) -> None:
    before = statistics(server, "work")
    merged = server.metric("trimserve_merged_requests_total", model="work")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        body = work(MUCH_WORK)
        answers = list(pool.map(lambda _: send(server, "/v2/models/work/infer", body), range(6)))
    assert [answer.status for answer in answers] == [200] * 6
    assert {answer.json["outputs"][0]["data"][0] for answer in answers} == {MUCH_WORK}
    change = changes(server, "work", before)
    assert (change["success"], change["executions"]) == (6, 1)
    merged = server.metric("trimserve_merged_requests_total", model="work") - merged
    assert merged + change.get("cache_hit", 0) == 5
    assert merged >= 1


def test_equal_requests_share_an_engines_failure_when_it_fails(server: RunningServer) -> None:
    body = {
        "inputs": [
            {
                "name": "index", "datatype": "INT64", "shape": [1],
                "data": [onnx_models.INVALID_INDEX],
            }
        ]
    }  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: send(server, "/v2/models/pick/infer", body), range(4)))
    assert [answer.status for answer in answers] == [500] * 4


def test_a_request_goes_on_alone_when_the_one_that_it_joined_gives_up(
    server: RunningServer,
) -> None:
    n = 4 * MUCH_WORK + 1  # long enough to be seen under way on a busy machine
    body = work(n)

    def is_running() -> bool:
        return server.metric("trimserve_requests_in_flight", model="work") >= 1

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        path = "/v2/models/work/infer"
        impatient = pool.submit(send, server, path, body, {"Trimserve-Timeout-Ms": "400"})
        until(is_running)
        patient = pool.submit(send, server, path, body)
        assert impatient.result(PATIENCE_S).status == 504
        answer = patient.result(PATIENCE_S)
    assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [n])
    until(lambda: server.metric("trimserve_requests_in_flight", model="work") == 0)


def test_merged_requests_are_refused_when_as_many_wait_as_the_queue_holds(
    tmp_path: Path,
) -> None:
    root = tmp_path / "models"
    publish(root, onnx_models.work, tmp_path, batching=Batching(0, max_queue_size=2))
    with running(tmp_path / "log", "--repository", str(root), "--merge-duplicates") as small:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            body = work(10 * MUCH_WORK)
            answers = list(pool.map(lambda _: send(small, "/v2/models/work/infer", body), range(8)))
        counts = Counter(answer.status for answer in answers)
        assert counts == {200: 3, 429: 5}  # one runs, two follow


def test_config_says_whether_answers_are_cached_when_asked(server: RunningServer) -> None:
    config = fetch(server.http_port, "GET", "/v2/models/linear/config").json
    assert config["response_cache"]["enable"] is True
