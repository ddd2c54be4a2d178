"""The load test pauses, kills and stops a real server, which a supervisor starts again."""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from loadtest.cli import main
from loadtest.report import from_json
from tests.serve import onnx_models
from tests.serve.running_server import HOST, PATIENCE_S, PROGRAM
from tests.serve.versions import publish, slo_document

pytestmark = [pytest.mark.full, pytest.mark.alone]

SUPERVISOR = Path(__file__).parent.parent / "loadtest" / "supervisor.py"
SLO = """\
apiVersion: trimserve/v1
kind: SLO
name: linear
latency: {quantile: 0.6, threshold_ms: 100}
workload: {rate_per_s: 60}
success_ratio: 0.5
"""
CHAOS = """\
apiVersion: trimserve/v1
kind: ChaosProfile
objectives: {max_recovery_s: 10, hold_s: 2}
actions:
  - {kind: pause, at_s: 2, for_s: 1, pid_file: server.pid}
  - {kind: kill, at_s: 8, pid_file: server.pid}
  - {kind: stop, at_s: 22, pid_file: server.pid}
"""


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(n)]
        return [one.getsockname()[1] for one in sockets]


def test_chaos_finds_that_a_real_server_recovers(tmp_path: Path) -> None:
    publish(tmp_path / "models", onnx_models.linear, tmp_path, slo=slo_document(100))
    for name, text in (("slo.yaml", SLO), ("chaos.yaml", CHAOS)):
        (tmp_path / name).write_text(text, "utf-8")
    http, rpc, metrics = free_ports(3)
    supervisor = subprocess.Popen(
        [
            *(sys.executable, str(SUPERVISOR), str(tmp_path / "server.pid"), *PROGRAM, "serve"),
            *("--repository", str(tmp_path / "models"), "--drain-delay-s=0"),
            *(f"--http-port={http}", f"--grpc-port={rpc}", f"--metrics-port={metrics}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert supervisor.stdout is not None
        assert json.loads(supervisor.stdout.readline())["event"] == "ready"
        code = main(
            [
                *(str(tmp_path / "slo.yaml"), "--model", "linear", "--duration-s", "36"),
                *("--target", f"http://{HOST}:{http}", "--target", f"grpc://{HOST}:{rpc}"),
                *("--metrics-url", f"http://{HOST}:{metrics}/metrics", "--warmup-s", "1"),
                *("--chaos", str(tmp_path / "chaos.yaml"), "--json", str(tmp_path / "report.json")),
            ]
        )
    finally:
        supervisor.terminate()
        supervisor.communicate(timeout=PATIENCE_S)
    report = from_json((tmp_path / "report.json").read_text("utf-8"))
    assert report.chaos is not None
    assert [(one.kind, one.error) for one in report.chaos.actions] == [
        ("pause", ""), ("kill", ""), ("stop", ""),
    ]  # fmt: skip
    assert all(one.kept for one in report.chaos.actions)
    assert all(one.n_lost for one in report.chaos.actions)
    assert report.server is not None
    assert len(report.server.lost) == 1
    doubts = {one.reason.kind for one in report.reasons}
    assert not doubts & {"counts_disagree", "server_restarted", "metrics_unreadable"}
    assert code == report.exit_code
