"""The command as its users run it, against a small real server in another process."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from loadtest.capacity_report import CapacityReport
from loadtest.cli import main
from loadtest.document import parse_document
from loadtest.kubernetes.replica import load_at, read_replica
from loadtest.report import Report, from_json
from loadtest.server_metrics import fetch
from loadtest.session import Settings, make_plan
from loadtest.signature import Signature, TensorSpec
from loadtest.slo import Slo
from loadtest.target import parse_target

pytestmark = pytest.mark.alone  # the rates of a busy machine are others

SLO = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.9, threshold_ms: 100}
workload: {rate_per_s: 150, rows: 2}
success_ratio: 0.99
window_s: 3
"""


class Ports(Protocol):
    rest_url: str
    grpc_url: str
    metrics_url: str
    metrics: int


class StartStub(Protocol):
    def __call__(self, *arguments: str) -> Ports: ...


def write_slo(folder: Path, text: str = SLO) -> Path:
    path = folder / "slo.yaml"
    path.write_text(text, "utf-8")
    return path


def run_loadtest(folder: Path, *arguments: str, text: str = SLO) -> tuple[int, Report | None]:
    """Run the command in this process, which leaves Locust to its child."""
    file = folder / "report.json"
    common = [str(write_slo(folder, text)), "--model", "stub", "--json", str(file)]
    code = main([*common, *arguments])
    return code, from_json(file.read_text("utf-8")) if file.exists() else None


def kinds(report: Report | None) -> list[str]:
    assert report is not None
    return [one.reason.kind for one in report.reasons]


def test_loadtest_is_met_when_both_transports_answer_in_time(
    start_stub: StartStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = start_stub("--edge-s", "0.1")
    page = tmp_path / "report.html"
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.rest_url, "--target", stub.grpc_url),
        *("--metrics-url", stub.metrics_url, "--warmup-s", "0.5", "--html", str(page)),
    )
    shown = capsys.readouterr().out
    assert (code, kinds(report)) == (0, [])
    assert "MET" in shown
    assert report is not None
    assert report.requests.n_sent == report.requests.n_ok == 450
    assert report.generator.n_warmup == 75
    assert report.server is not None
    by_transport = {one.transport: one for one in report.server.transports}
    assert set(by_transport) == {"rest", "grpc"}
    assert sum(one.server_n for one in by_transport.values()) == 450
    assert all(one.server_n == one.client_n for one in by_transport.values())
    html = page.read_text("utf-8")
    assert "The promise was kept" in html
    assert "<script src" not in html
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".part")]


def test_loadtest_is_violated_when_the_server_is_too_slow(
    start_stub: StartStub, tmp_path: Path
) -> None:
    stub = start_stub("--edge-s", "0.1", "--latency-s", "0.15")
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.grpc_url, "--metrics-url", stub.metrics_url, "--duration-s", "2"),
    )
    assert (code, kinds(report)) == (1, ["latency_missed"])
    assert report is not None
    assert report.server is not None
    assert report.server.transports[0].server_over == 300


def test_loadtest_shows_a_stall_when_most_requests_never_met_it(
    start_stub: StartStub, tmp_path: Path
) -> None:
    """A closed loop would send one request into the stall and report it as one slow request."""
    stalled_at = 150
    stub = start_stub("--stall-at", str(stalled_at), "--stall-s", "1")
    arguments = ("--target", stub.rest_url, "--warmup-s", "0", "--no-server-metrics", "--seed", "3")
    code, report = run_loadtest(tmp_path, *arguments)
    assert (code, kinds(report)) == (1, ["latency_missed"])
    assert report is not None
    settings = Settings(
        slo=parse_document(SLO, Slo, "here"),
        model="stub",
        targets=(parse_target(stub.rest_url),),
        warmup_s=0,
        seed=3,
    )
    plan = make_plan(settings, Signature((TensorSpec("x", "FP32", (-1, 8)),)))
    intended_s = plan.window.intended_s
    stall_ends_s = intended_s[stalled_at - 1] + 1
    waits_s = np.clip(stall_ends_s - intended_s[stalled_at - 1 :], 0, None)
    wanted_s = np.sort(np.concatenate([np.zeros(stalled_at - 1), waits_s]))[int(0.95 * 450)]
    p95_s = next(one.latency_s for one in report.latency if one.quantile == 0.95)
    assert wanted_s > 0.5
    assert p95_s is not None
    assert wanted_s * 0.95 < p95_s < wanted_s + 0.3


def test_loadtest_is_violated_when_requests_fail(
    start_stub: StartStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = start_stub("--edge-s", "0.1", "--fail-every", "20")
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.rest_url, "--metrics-url", stub.metrics_url, "--duration-s", "2"),
    )
    assert (code, kinds(report)) == (1, ["success_ratio_missed"])
    assert report is not None
    statuses = {one.label: one for one in report.requests.statuses}
    assert statuses["HTTP 503"].n == 15
    assert statuses["HTTP 503"].example == "told to fail"
    assert "VIOLATED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stub_arguments", "arguments", "reasons"),
    [
        pytest.param(
            ["--edge-s", "0.1", "--metrics", "lossy"],
            ["--duration-s", "1"],
            ["counts_disagree", "counts_disagree"],
            id="the server loses counts",
        ),
        pytest.param(
            ["--edge-s", "0.1", "--latency-s", "0.05"],
            ["--duration-s", "1", "--max-in-flight", "3"],
            ["requests_dropped"],
            id="too many are in flight",
        ),
    ],
)
def test_loadtest_is_inconclusive_when_the_measurement_is_doubtful(
    start_stub: StartStub,
    tmp_path: Path,
    stub_arguments: list[str],
    arguments: list[str],
    reasons: list[str],
) -> None:
    stub = start_stub(*stub_arguments)
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.rest_url, "--metrics-url", stub.metrics_url, "--warmup-s", "0"),
        *arguments,
    )
    assert code == 3
    assert set(reasons) <= set(kinds(report))


def test_loadtest_is_a_usage_error_when_the_server_cannot_be_tested(
    start_stub: StartStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = start_stub("--not-ready")
    slo = str(write_slo(tmp_path))
    nowhere = "http://127.0.0.1:1"
    cases = [
        (["--target", stub.rest_url, "--model", "other"], "--model 'other'"),
        (["--target", stub.grpc_url, "--model", "other"], "--model 'other'"),
        (["--target", stub.rest_url, "--model", "stub"], "isn't ready"),
        (["--target", stub.grpc_url, "--model", "stub"], "isn't ready"),
        (["--target", nowhere, "--model", "stub"], f"{nowhere} can't be reached"),
        (["--target", "grpc://127.0.0.1:1", "--model", "stub"], "can't be reached"),
    ]
    for arguments, message in cases:
        assert main([slo, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_loadtest_is_a_usage_error_when_arguments_do_not_fit(
    start_stub: StartStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = start_stub()
    slo = str(write_slo(tmp_path))
    json_slo = tmp_path / "json.yaml"
    json_slo.write_text(SLO.replace("rows: 2", "rows: 2, encoding: json"), "utf-8")
    good = ["--target", stub.rest_url, "--model", "stub"]
    cases = [
        ([slo], "Missing option"),
        ([slo, *good, "--rate", "5"], "No such option"),
        ([slo, *good, "--duration-s", "soon"], "--duration-s"),
        ([str(tmp_path / "absent.yaml"), *good], "No such file"),
        ([slo, "--target", "localhost:8000", "--model", "stub"], "want http://HOST:PORT"),
        ([slo, *good, "--inputs", str(tmp_path / "absent.npz")], "--inputs"),
        ([slo, *good, "--json", str(tmp_path / "no" / "r.json")], "--json"),
        ([slo, *good, "--model", ""], "--model: got '', want the name of one on the server"),
        ([slo, *good, "--metrics-url", "http://127.0.0.1:1/metrics"], "--no-server-metrics"),
        ([str(json_slo), "--target", stub.grpc_url, "--model", "stub"], "encoding json"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_loadtest_finds_the_highest_rate_when_the_server_takes_one_at_a_time(
    start_stub: StartStub, tmp_path: Path
) -> None:
    """20 ms a request are 50 requests/s at most, and few less within 20 times that."""
    stub = start_stub("--edge-s", "0.4", "--service-s", "0.02")
    text = SLO.replace("threshold_ms: 100", "threshold_ms: 400").replace("150", "20")
    file, page = tmp_path / "capacity.json", tmp_path / "capacity.html"
    arguments = ["--target", stub.rest_url, "--model", "stub", "--metrics-url", stub.metrics_url]
    arguments += [
        "--find-capacity",
        "--warmup-s",
        "0.5",
        "--duration-s",
        "4",
        "--json",
        str(file),
        "--html",
        str(page),
    ]
    code = main([str(write_slo(tmp_path, text)), *arguments])
    report = CapacityReport.model_validate_json(file.read_text("utf-8"))
    assert code == report.exit_code
    assert report.ending == "found", report.message
    assert report.capacity_per_s is not None
    assert 25 < report.capacity_per_s < 55
    assert {one.batch_rows for one in report.points} == {2}
    assert report.request_bytes
    assert report.operation is not None
    assert report.operation.in_flight is not None
    assert 0.9 * 0.02 * report.operation.rate_per_s < report.operation.in_flight < 10
    if report.verdict == "inconclusive":  # what runs beside it can make the confirming run fail
        return
    replica = read_replica(file, report.slo)
    load = load_at(replica, 0.8 * replica.capacity_per_s)
    if report.operation.verdict != "violated":
        assert load.in_flight == pytest.approx(report.operation.in_flight)
    assert load.seen_by == "server"
    assert "Latency by rate" in page.read_text("utf-8")


@pytest.mark.full
def test_loadtest_is_inconclusive_when_the_server_leaks_memory(
    start_stub: StartStub, tmp_path: Path
) -> None:
    """200 kB of each request are kept, 30 MB a second."""
    stub = start_stub("--edge-s", "1", "--leak-bytes", "200000")
    page = tmp_path / "report.html"
    code, report = run_loadtest(
        tmp_path,
        *("--target", stub.rest_url, "--metrics-url", stub.metrics_url, "--duration-s", "14"),
        *("--drift-horizon-s", "3600", "--max-memory-mb", "4000", "--html", str(page)),
        text=SLO.replace("threshold_ms: 100", "threshold_ms: 1000"),
    )
    assert "memory_grows" in kinds(report)
    assert code == 3
    assert report is not None
    assert report.drift is not None
    (memory,) = report.drift.memory
    assert memory.trend is not None
    assert memory.trend.per_s == pytest.approx(30e6, rel=0.3)
    assert "Memory of the servers over time" in page.read_text("utf-8")


def test_loadtest_takes_the_command_run_by_name_when_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["run"], []):
        assert main([*arguments, str(tmp_path / "absent.yaml"), "--target", "x"]) == 2
        assert "--model" in capsys.readouterr().err


def test_loadtest_ends_with_130_when_interrupted(start_stub: StartStub, tmp_path: Path) -> None:
    stub = start_stub("--edge-s", "0.1")
    file = tmp_path / "report.json"
    command = subprocess.Popen(
        [
            *(sys.executable, "-m", "loadtest.cli", str(write_slo(tmp_path))),
            *("--target", stub.rest_url, "--model", "stub", "--json", str(file)),
            *("--metrics-url", stub.metrics_url, "--duration-s", "60"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while 'code="ok"' not in fetch(stub.metrics_url):
        assert command.poll() is None
    command.send_signal(signal.SIGINT)
    _, error = command.communicate(timeout=20)
    assert command.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not file.exists()


WITHOUT_LOCUST = """
import sys

class WithoutLocust:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name == "locust" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutLocust(finder) for finder in sys.meta_path]
from loadtest.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_loadtest_says_what_to_install_when_locust_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", WITHOUT_LOCUST, str(write_slo(tmp_path))),
            *("--target", "http://127.0.0.1:1", "--model", "m"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'trimserve[loadtest]'" in done.stderr


IMPORTS = """
import sys
import loadtest.cli, loadtest.display, loadtest.html, loadtest.report, loadtest.session
bad = {"locust", "gevent", "serve", "optimizer"} & set(sys.modules)
sys.exit(f"imported {bad}" if bad else 0)
"""


def test_loadtest_leaves_locust_to_its_child_when_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=os.environ, check=False)
    assert done.returncode == 0
