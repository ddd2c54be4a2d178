"""A real Prometheus against a real server; needs Debian's package `prometheus`."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve import onnx_models
from tests.serve.running_server import HOST, PATIENCE_S, RunningServer, connect, running, until
from tests.serve.test_rest import INFER, LINEAR, ask
from tests.serve.versions import publish, slo_document

pytestmark = [pytest.mark.full, pytest.mark.alone]

THRESHOLD_MS = 12.5
N_GOOD, N_BAD = 40, 7


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    root = tmp_path / "models"
    publish(root, onnx_models.linear, tmp_path, slo=slo_document(THRESHOLD_MS))
    with running(tmp_path / "log", "--repository", str(root), "--drain-delay-s=0") as started:
        yield started


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        message = f"{name} is missing: apt-get install prometheus"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    return path


def test_metrics_satisfy_promtool_when_requests_were_served(server: RunningServer) -> None:
    send(server)
    with urllib.request.urlopen(f"http://{HOST}:{server.metrics_port}/metrics") as answer:
        exposition = answer.read()
    linted = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=exposition, capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    said = (linted.stdout + linted.stderr).decode().splitlines()
    # Triton's names break the rules (no `_total`, microseconds): they are Triton's all the same.
    assert [line for line in said if not line.startswith("nv_")] == []
    assert all("error" not in line for line in said)


def test_prometheus_counts_what_clients_sent_when_it_scrapes_the_server(
    server: RunningServer, tmp_path: Path
) -> None:
    send(server)
    counts = 'sum by (code) (trimserve_request_duration_seconds_count{model="linear"})'
    within = 'sum(trimserve_request_duration_seconds_bucket{model="linear",code="ok",le="0.0125"})'
    with scraped(server, tmp_path) as prometheus:
        until(lambda: query(prometheus, counts) != {})
        assert query(prometheus, counts) == {"ok": N_GOOD, "invalid_request": N_BAD}
        assert set(query(prometheus, within)) == {""}


def send(server: RunningServer) -> None:
    rest = connect(server.http_port)
    for _ in range(N_GOOD):
        assert ask(rest, "POST", INFER.format("linear"), LINEAR).status == 200
    for _ in range(N_BAD):
        assert ask(rest, "POST", INFER.format("linear"), {"inputs": []}).status == 400
    rest.close()


@contextlib.contextmanager
def scraped(server: RunningServer, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the server every second."""
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "trimserve",
                "static_configs": [{"targets": [f"{HOST}:{server.metrics_port}"]}],
            }
        ],
    }
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(config))
    command = [program("prometheus"), f"--config.file={path}", f"--web.listen-address={HOST}:0"]
    command += [f"--storage.tsdb.path={folder / 'tsdb'}", "--log.format=json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(PATIENCE_S, process.kill)
        killer.start()
        try:
            yield listening_url(process)
        finally:
            killer.cancel()
            process.terminate()


def listening_url(process: "subprocess.Popen[str]") -> str:
    """Where Prometheus listens, once its log says that it is ready."""
    assert process.stderr is not None
    address, is_ready = "", False
    for line in process.stderr:
        message = json.loads(line)
        if message.get("msg") == "Listening on":
            address = message["address"]
        is_ready = is_ready or str(message.get("msg")).startswith("Server is ready")
        if address and is_ready:  # in either order
            return f"http://{address}"
    raise AssertionError("Prometheus ended before it was ready")


def query(prometheus: str, expression: str) -> dict[str, float]:
    """The instant vector of an expression, by its label `code` (empty where it has none)."""
    url = f"{prometheus}/api/v1/query?query={urllib.parse.quote(expression)}"
    with urllib.request.urlopen(url) as answer:
        result = json.loads(answer.read())["data"]["result"]
    return {one["metric"].get("code", ""): float(one["value"][1]) for one in result}
