"""The command against a real Prometheus (Debian's package) that scrapes a real server."""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Protocol

import pytest

from loadtest.cli import main
from loadtest.report import Report, from_json
from loadtest.server_metrics import scrape

pytestmark = [pytest.mark.full, pytest.mark.alone]

SLO = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.5, threshold_ms: 500}
workload: {rate_per_s: 60, rows: 2}
success_ratio: 0.5
window_s: 6
"""
CONFIG = """\
global: {scrape_interval: 1s, scrape_timeout: 1s}
scrape_configs:
  - job_name: stub
    static_configs: [{targets: ["127.0.0.1:%d"]}]
"""


class Ports(Protocol):
    rest_url: str
    grpc_url: str
    metrics_url: str
    metrics: int


class StartStub(Protocol):
    def __call__(self, *arguments: str) -> Ports: ...


class StartPrometheus(Protocol):
    def __call__(self, metrics_port: int) -> tuple[str, "subprocess.Popen[bytes]"]: ...


@pytest.fixture
def start_prometheus(tmp_path: Path) -> Iterator[StartPrometheus]:
    """Start one that scrapes a port every second; gives its URL and process."""
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("want Debian's package prometheus (.ci/packages)")
    running: list[subprocess.Popen[bytes]] = []

    def start(metrics_port: int) -> tuple[str, "subprocess.Popen[bytes]"]:
        config = tmp_path / "prometheus.yml"
        config.write_text(CONFIG % metrics_port, "utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        child = subprocess.Popen(
            [
                *(found, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"),
                *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
            ]
        )
        running.append(child)
        url = f"http://127.0.0.1:{port}"
        deadline_s = time.monotonic() + 30
        while not is_scraping(url):
            assert child.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        return url, child

    yield start
    for child in running:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        child.wait(20)


def is_scraping(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/targets", timeout=5) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
    except OSError:
        return False
    return bool(targets) and all(one["health"] == "up" for one in targets)


def run_loadtest(folder: Path, *arguments: str) -> tuple[int, Report]:
    slo, file = folder / "slo.yaml", folder / "report.json"
    slo.write_text(SLO, "utf-8")
    page = folder / "report.html"
    common = [str(slo), "--model", "stub", "--json", str(file), "--html", str(page)]
    code = main([*common, "--warmup-s", "1", *arguments])
    return code, from_json(file.read_text("utf-8"))


def kinds(report: Report) -> list[str]:
    return [one.reason.kind for one in report.reasons]


def test_counts_agree_exactly_when_every_kind_of_fault_comes_over_both_protocols(
    start_stub: StartStub, start_prometheus: StartPrometheus, tmp_path: Path
) -> None:
    """Slow answers take 1.5 s and the limit is 0.5 s: no clock is off by that much."""
    stub = start_stub(
        *("--edge-s", "0.5", "--fail-every", "7", "--slow-every", "10", "--slow-s", "1.5")
    )
    url, _ = start_prometheus(stub.metrics)
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.rest_url, "--target", stub.grpc_url),
        *("--metrics-url", stub.metrics_url, "--prometheus", url),
    )
    assert kinds(report) == []
    assert code == 0
    assert report.server is not None
    assert report.server.prometheus == url
    assert {one.transport for one in report.server.transports} == {"rest", "grpc"}
    for one in report.server.transports:
        assert (one.server_n, one.server_ok, one.server_over) == (
            one.client_n,
            one.client_ok,
            one.client_over,
        )
    assert sum(one.server_n for one in report.server.transports) == 360
    n_failed = sum(one.server_n - one.server_ok for one in report.server.transports)
    assert n_failed in (51, 52)
    assert sum(one.server_over for one in report.server.transports) == 36
    (scraped,) = report.server.scraped
    assert scraped.n_failed == 0
    assert scraped.n_scrapes >= 7
    assert "scrapes of" in (tmp_path / "report.html").read_text("utf-8")


def test_verdict_is_inconclusive_when_prometheus_missed_scrapes(
    start_stub: StartStub, start_prometheus: StartPrometheus, tmp_path: Path
) -> None:
    stub = start_stub("--edge-s", "0.5")
    url, child = start_prometheus(stub.metrics)
    halt = Thread(target=halt_when_measuring, args=(child, stub.metrics_url))
    halt.start()
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.rest_url, "--metrics-url", stub.metrics_url, "--prometheus", url),
    )
    halt.join()
    assert code == 3
    assert kinds(report) == ["scrapes_missing"]
    assert report.server is not None
    assert report.server.scraped[0].longest_gap_s >= 2
    assert report.server.transports[0].server_n == 360


def halt_when_measuring(child: "subprocess.Popen[bytes]", metrics_url: str) -> None:
    """Stop a process for 3 s once more than the warm-up has been answered."""
    while True:
        snapshot = scrape(metrics_url, "stub", "", 0.5)
        if sum(count.n for count in snapshot.counts.values()) > 100:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGSTOP)
    time.sleep(3)
    child.send_signal(signal.SIGCONT)
