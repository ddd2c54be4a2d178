"""The service's commands as the manifests have them, with a PostgreSQL on this machine."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.k8s.kustomizations import K8S
from tests.k8s.resolved import Document, containers, pods, resolved
from tests.optimizer.postgresql import Cluster, running_cluster

pytestmark = [pytest.mark.full, pytest.mark.alone]

PATIENCE_S = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as one:
        yield one


def container(name: str) -> Document:
    documents = resolved(K8S / "service")
    (one,) = [c for _, pod in pods(documents) for c in containers(pod) if c["name"] == name]
    return one


def arguments(name: str, folder: Path, changes: dict[str, str]) -> list[str]:
    """As in the manifest, with folders of this machine, and `changes` in place of values."""
    made = []
    for argument in container(name)["args"]:
        option, equals, value = argument.partition("=")
        if option in changes:
            value = changes[option]
        for mount in ("/shared", "/models", "/work", "/tmp/service"):
            value = value.replace(mount, str(folder / mount.replace("/", "-").strip("-")))
        made.append(f"{option}{equals}{value}")
    return made


@contextmanager
def running(
    command: list[str], environ: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "trimserve", *command],
            env={**os.environ, **environ}, text=True, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def until(port: int, path: str, text: str) -> str:
    """The body once it holds `text`."""
    ends = time.monotonic() + PATIENCE_S
    seen = ""
    while time.monotonic() < ends:
        try:
            _, seen = get(port, path)
        except OSError as error:
            seen = str(error)
        if text in seen:
            return seen
        time.sleep(0.2)
    raise AssertionError(f"{path}: want {text!r}, got {seen[-2000:]!r}")


def test_commands_of_the_manifests_work_together(cluster: Cluster, tmp_path: Path) -> None:
    environ = {"TRIMSERVE_SERVICE_DATABASE": cluster.create("service")}
    environ["TRIMSERVE_STORE"] = environ["TRIMSERVE_SERVICE_DATABASE"]
    for name in ("shared", "models", "work"):
        (tmp_path / name).mkdir()
    with running(arguments("migrate", tmp_path, {}), environ, tmp_path / "migrate.log") as migrate:
        assert migrate.wait(PATIENCE_S) == 0, (tmp_path / "migrate.log").read_text()
    loopback = {"--host": "127.0.0.1", "--port": "0", "--grpc-port": "0"}
    metrics_port = free_port()
    worker = {"--name": "optimizer-worker-0", "--metrics-port": str(metrics_port)}
    with (
        running(
            arguments("service", tmp_path, loopback), environ, tmp_path / "service.log"
        ) as service,
        running(arguments("worker", tmp_path, worker), environ, tmp_path / "worker.log"),
    ):
        assert service.stdout is not None
        listening = json.loads(service.stdout.readline())
        port = listening["http_port"]
        for path in (
            container("service")[f"{one}Probe"]["httpGet"]["path"]
            for one in ("startup", "readiness", "liveness")
        ):
            assert get(port, path)[0] == 200
        assert get(port, "/v1/jobs")[0] == 401  # without a key nobody sees anything
        path = container("worker")["startupProbe"]["httpGet"]["path"]
        until(metrics_port, path, "trimserve_worker_job_duration_seconds")
        until(port, "/metrics", 'trimserve_workers{busy="false"} 1.0')
