"""Loading and unloading while traffic runs: no request fails, and each is answered by one."""

import hashlib
import http.client
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from serve import oip_pb2 as pb
from serve.tensor import Array
from tests.serve import onnx_models
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import (
    PATIENCE_S,
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

X = rows(2)
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": X.tolist()}]}
N_CLIENTS = 3  # of each transport


def publish_linear(root: Path, scratch: Path, version: int) -> None:
    """A version whose weights tell it from the others."""

    def linear(path: Path) -> Path:
        return onnx_models.linear(path, seed=version)

    publish(root, linear, scratch, version=str(version))


class Traffic:
    """Clients of both transports that send to a model's default version until they are stopped.

    `versions` counts the answers by version; `failures` has everything that went wrong, a wrong
    output included."""

    def __init__(self, server: RunningServer, model: str = "linear") -> None:
        self.versions: Counter[str] = Counter()
        self.failures: list[str] = []
        self._server = server
        self._model = model
        self._stop = threading.Event()
        self._lock = threading.Lock()
        senders = [self._rest] * N_CLIENTS + [self._grpc] * N_CLIENTS
        self._threads = [threading.Thread(target=sender) for sender in senders]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _rest(self) -> None:
        rest = connect(self._server.http_port)
        while not self._stop.is_set():
            try:
                answer = ask(rest, "POST", f"/v2/models/{self._model}/infer", BODY)
                document = answer.json
                self._check(document["model_version"], document["outputs"][0]["data"])
            except (KeyError, OSError, http.client.HTTPException) as error:
                self._failed(f"REST: {error!r}")
        rest.close()

    def _grpc(self) -> None:
        request = pb.ModelInferRequest(model_name=self._model)
        request.inputs.add(name="x", datatype="FP32", shape=[2, 4])
        request.raw_input_contents.append(X.tobytes())
        with channel_to(self._server.grpc_port) as channel:
            infer = method(channel, "ModelInfer")
            while not self._stop.is_set():
                try:
                    answer = infer(request, timeout=PATIENCE_S)
                    values = np.frombuffer(answer.raw_output_contents[0], np.float32)
                    self._check(answer.model_version, values)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
                    self._failed(f"gRPC: {error!r}")

    def _check(self, version: str, values: Any) -> None:
        want = linear_by_hand(X, seed=int(version)).ravel()
        if not np.allclose(np.asarray(values, np.float64), want, atol=1e-5):
            self._failed(f"version {version} answered {values}")
        with self._lock:
            self.versions[version] += 1

    def _failed(self, what: str) -> None:
        with self._lock:
            self.failures.append(what)


@contextmanager
def under_traffic(server: RunningServer) -> Iterator[Traffic]:
    traffic = Traffic(server)
    traffic.start()
    try:
        yield traffic
    finally:
        traffic.stop()


def answers_of(traffic: Traffic, version: str, n: int = 20) -> Callable[[], bool]:
    """Whether `n` answers came from a version; asks the server something while waiting."""

    def have() -> bool:
        fetch(traffic._server.http_port, "GET", "/v2/health/live")
        return traffic.versions[version] >= n or bool(traffic.failures)

    return have


def post(port: int, path: str, body: Any = None) -> None:
    answer = fetch(port, "POST", path, body)
    assert answer.status == 200, answer.body


def index(server: RunningServer) -> dict[str, str]:
    entries = fetch(server.http_port, "POST", "/v2/repository/index").json
    return {f"{entry['name']}:{entry['version']}": entry["state"] for entry in entries}


def test_polling_loses_nothing_when_versions_come_and_go_under_load(tmp_path: Path) -> None:
    root = tmp_path / "models"
    publish_linear(root, tmp_path, 1)
    arguments = ["--repository", str(root), "--model-control=poll", "--poll-interval-s=0.05"]
    with running(tmp_path / "log", *arguments) as server, under_traffic(server) as traffic:
        for version in (1, 2, 3, 4):
            if version > 1:
                publish_linear(root, tmp_path, version)
            until(answers_of(traffic, str(version)))
        shutil.rmtree(root / "linear" / "4")  # taken back: the one before answers again
        before = traffic.versions["3"]
        until(answers_of(traffic, "3", before + 20))
        traffic.stop()
        assert traffic.failures == []
        assert set(traffic.versions) == {"1", "2", "3", "4"}
        assert server.metric("trimserve_requests_in_flight") == 0
        assert server.stop() == 0


def test_control_loses_nothing_when_models_are_loaded_and_unloaded_under_load(
    tmp_path: Path,
) -> None:
    root = tmp_path / "models"
    publish_linear(root, tmp_path, 1)
    publish(root, onnx_models.pair, tmp_path)
    arguments = ["--repository", str(root), "--model-control=explicit", "--control-port=0"]
    with (
        running(tmp_path / "log", *arguments, "--load-model=linear") as server,
        under_traffic(server) as traffic,
    ):
        control = server.control_port
        assert control is not None
        assert index(server) == {"linear:1": "READY", "pair:1": "UNAVAILABLE"}
        until(answers_of(traffic, "1"))
        for version in (2, 3):
            publish_linear(root, tmp_path, version)
            post(control, "/v2/repository/models/linear/load")
            post(control, "/v2/repository/models/pair/load")
            until(answers_of(traffic, str(version)))
            post(control, "/v2/repository/models/pair/unload")
            # Loading again what is loaded changes nothing, and fails nobody.
            post(control, "/v2/repository/models/linear/load")
        everything = {"parameters": {"config": json.dumps({"version_policy": {"all": {}}})}}
        post(control, "/v2/repository/models/linear/load", everything)
        assert index(server) == {
            "linear:1": "READY", "linear:2": "READY", "linear:3": "READY", "pair:1": "UNAVAILABLE",
        }  # fmt: skip
        traffic.stop()
        assert traffic.failures == []
        for name in ("load", "unload"):  # the data port only says where to ask
            refused = fetch(server.http_port, "POST", f"/v2/repository/models/linear/{name}")
            assert (refused.status, "--control-on-data-port" in refused.error) == (403, True)
        post(control, "/v2/repository/models/linear/unload")
        assert fetch(server.http_port, "GET", "/v2/models/linear/ready").status == 503
        assert fetch(server.http_port, "GET", "/v2/health/ready").status == 200
        assert server.stop() == 0


def test_server_starts_with_the_pinned_version_when_a_digest_is_given(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for version in (1, 2):
        publish_linear(root, tmp_path, version)
    manifest = (root / "linear" / "1" / "manifest.json").read_bytes()
    pin = f"--load-model=linear@sha256:{hashlib.sha256(manifest).hexdigest()}"
    arguments = ["--repository", str(root), "--model-control=explicit", "--control-port=0"]
    with running(tmp_path / "log", *arguments, pin) as server:
        answer = fetch(server.http_port, "POST", "/v2/models/linear/infer", BODY)
        assert answer.json["model_version"] == "1"


def test_server_says_that_it_is_not_ready_until_the_pinned_version_is_there(tmp_path: Path) -> None:
    root, later = tmp_path / "models", tmp_path / "later"
    publish_linear(root, tmp_path, 1)
    publish_linear(later, tmp_path, 2)
    manifest = (later / "linear" / "2" / "manifest.json").read_bytes()
    pin = f"--load-model=linear@sha256:{hashlib.sha256(manifest).hexdigest()}"
    arguments = ["--repository", str(root), "--model-control=explicit", "--control-port=0"]
    log = tmp_path / "log"
    with running(log, *arguments, "--log-format=json", pin, event="not_ready") as server:
        assert fetch(server.http_port, "GET", "/v2/health/ready").status == 503
        assert messages(log, "info", "ready to serve") == []
        [warning] = messages(log, "warning", "not ready to serve: linear: ")
        assert "no version has sha256:" in warning
        shutil.copytree(later / "linear" / "2", root / "linear" / "2")
        control = server.control_port
        assert control is not None
        post(control, "/v2/repository/models/linear/load")
        until(lambda: len(messages(log, "info", "ready to serve")) == 1)
        assert fetch(server.http_port, "GET", "/v2/health/ready").status == 200
        post(control, "/v2/repository/models/linear/unload")
        assert server.stop() == 0
    assert (
        len(messages(log, "warning", "not ready to serve")) == 1
    )  # nothing was asked for any more


def messages(log: Path, level: str, begin: str) -> list[str]:
    """Those of the server's log with that level and beginning."""
    entries = (json.loads(line) for line in log.read_text().splitlines())
    return [
        one["message"]
        for one in entries
        if one["level"] == level and one["message"].startswith(begin)
    ]


# --- repositories elsewhere


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 bucket on a server of its own; the environment says where it is."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    client.close()
    server.stop()


def upload(bucket: Any, folder: Path, prefix: str) -> None:
    """Files first, the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == "manifest.json"):
        bucket.upload_file(str(path), "models", f"{prefix}/{path.relative_to(folder).as_posix()}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_polling_follows_a_bucket_when_the_repository_is_at_an_address(
    tmp_path: Path, bucket: Any
) -> None:
    root = tmp_path / "models"
    publish_linear(root, tmp_path, 1)
    upload(bucket, root, "production")
    arguments = ["--repository=s3://models/production", "--model-control=poll"]
    log = tmp_path / "log"
    cache = f"--cache={tmp_path / 'cache'}"
    with running(log, *arguments, "--poll-interval-s=0.1", cache) as server:
        with under_traffic(server) as traffic:
            until(answers_of(traffic, "1"))
            publish_linear(root, tmp_path, 2)
            upload(bucket, root, "production")
            until(answers_of(traffic, "2"))
        assert traffic.failures == []
        assert list(traffic.versions) == ["1", "2"]
        assert server.stop() == 0
    assert b"test" not in log.read_bytes().replace(str(tmp_path).encode(), b"")  # no credentials


# --- folders as Triton wants them


def test_server_follows_tritons_layout_when_no_manifest_is_there(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for version in ("1", "3"):
        (root / "plain" / version).mkdir(parents=True)
        onnx_models.linear(root / "plain" / version / "model.onnx", seed=int(version))
    (root / "tuned" / "1").mkdir(parents=True)
    onnx_models.linear(root / "tuned" / "1" / "weights.onnx", seed=5)
    (root / "tuned" / "names.txt").write_text("cat\ndog\nowl\n")
    (root / "tuned" / "config.pbtxt").write_text(
        """
        name: "tuned"
        backend: "onnxruntime"
        default_model_filename: "weights.onnx"
        max_batch_size: 2
        input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
        output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "names.txt" } ]
        dynamic_batching { max_queue_delay_microseconds: 100 preferred_batch_size: [ 2 ] }
        instance_group [ { count: 2 kind: KIND_CPU } ]
        parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
        version_policy: { specific { versions: [ 1 ] } }
        """
    )
    log = tmp_path / "log"
    with running(log, "--repository", str(root)) as server:
        assert index(server) == {"plain:3": "READY", "tuned:1": "READY"}
        config = fetch(server.http_port, "GET", "/v2/models/tuned/config").json
        assert (config["max_batch_size"], config["input"][0]["dims"]) == (2, [4])
        assert config["instance_group"][0]["count"] == 2
        assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 100
        assert config["parameters"]["intra_op_thread_count"]["string_value"] == "1"
        answer = fetch(server.http_port, "POST", "/v2/models/tuned/infer", best_of(X))
        best = linear_by_hand(X, seed=5).argmax(axis=1)
        got = [text.split(":")[1:] for text in answer.json["outputs"][0]["data"]]
        assert got == [[str(one), ["cat", "dog", "owl"][one]] for one in best]
        too_large = fetch(server.http_port, "POST", "/v2/models/tuned/infer", best_of(rows(3)))
        assert (too_large.status, "a batch of 1 to 2" in too_large.error) == (400, True)
        plain = fetch(server.http_port, "GET", "/v2/models/plain/config").json
        assert plain["max_batch_size"] == 32
    assert "preferred_batch_size" in log.read_text()  # what has no effect is said


def best_of(x: Array) -> dict[str, Any]:
    given = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    return {
        "inputs": [given],
        "outputs": [{"name": "y", "parameters": {"classification": 1}}],
    }
