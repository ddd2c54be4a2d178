"""The command with `--chaos`, against a real server that a supervisor starts again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loadtest.cli import main
from loadtest.report import Report, from_json
from tests.loadtest.supervisor import PAUSE_S

pytestmark = pytest.mark.alone  # the rates of a busy machine are others

STUB = Path(__file__).with_name("stub_server.py")
SUPERVISOR = Path(__file__).with_name("supervisor.py")
LIMIT_S = 30.0
SLO = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.9, threshold_ms: 100}
workload: {rate_per_s: 150, rows: 2}
success_ratio: 0.5
"""
CHAOS = """\
apiVersion: trimserve/v1
kind: ChaosProfile
objectives: {max_recovery_s: MAX_S, hold_s: 1, max_lost: 1000}
actions: ACTIONS
"""


@dataclass(frozen=True)
class Supervised:
    """A stub server that comes back when it is ended."""

    rest: int
    grpc: int
    metrics: int
    pid_file: Path

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> Supervised:
        """Ports are chosen by a first one, which then makes room."""
        first = subprocess.Popen([sys.executable, str(STUB)], stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None
        ports = json.loads(first.stdout.readline())
        first.kill()
        first.communicate(timeout=LIMIT_S)
        pid_file = tmp_path / "server.pid"
        given = [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
        child = subprocess.Popen(
            [
                *(sys.executable, str(SUPERVISOR), str(pid_file)),
                *(sys.executable, str(STUB), "--edge-s", "0.1", *given, *arguments),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        assert child.stdout is not None
        assert json.loads(child.stdout.readline()) == ports
        return Supervised(**ports, pid_file=pid_file)

    yield start
    for child in running:
        child.terminate()
        child.communicate(timeout=LIMIT_S)


def run(
    folder: Path, server: Supervised, actions: str, *more: str, max_s: float = 5
) -> tuple[int, Report | None]:
    slo, chaos, file = folder / "slo.yaml", folder / "chaos.yaml", folder / "report.json"
    slo.write_text(SLO)
    chaos.write_text(CHAOS.replace("ACTIONS", actions).replace("MAX_S", str(max_s)))
    code = main(
        [
            *(str(slo), "--model", "stub", "--chaos", str(chaos), "--json", str(file)),
            *("--target", f"http://127.0.0.1:{server.rest}"),
            *("--target", f"grpc://127.0.0.1:{server.grpc}"),
            *("--metrics-url", f"http://127.0.0.1:{server.metrics}/metrics"),
            *("--warmup-s", "0.5", *more),
        ]
    )
    return code, from_json(file.read_text("utf-8")) if file.exists() else None


def kinds(report: Report) -> set[str]:
    return {one.reason.kind for one in report.reasons}


def test_loadtest_measures_recovery_when_the_server_is_paused(
    supervised: Callable[..., Supervised], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = supervised()
    actions = "[{kind: pause, at_s: 1, for_s: 0.8, pid_file: server.pid}]"
    page, junit = tmp_path / "report.html", tmp_path / "report.xml"
    code, report = run(
        tmp_path, server, actions, "--duration-s", "4.5", "--html", str(page),
        "--junit", str(junit), max_s=1.4,
    )  # fmt: skip
    assert report is not None
    assert report.chaos is not None
    (pause,) = report.chaos.actions
    assert (pause.error, pause.kept) == ("", True)
    assert pause.started_s is not None
    assert pause.started_s >= 1
    assert pause.ended_s is not None
    assert pause.ended_s - pause.started_s >= 0.8
    # Good again are those that come within the threshold of its end, 0.1 s.
    assert pause.recovery_s is not None
    assert pause.recovery_s > 0.6
    assert pause.n_lost is not None
    assert 80 < pause.n_lost < 210
    assert not kinds(report) & {"counts_disagree", "server_restarted", "action_not_performed"}
    assert code == report.exit_code
    assert report.server is not None
    assert report.server.lost == ()
    assert sum(one.server_n for one in report.server.transports) == 675
    assert "pause at 1 s: recovered in" in capsys.readouterr().out
    html = page.read_text("utf-8")
    assert "<h2>Chaos</h2>" in html
    assert f'"text": "pause: {pause.recovery_s:.3g} s"' in html
    assert 'name="chaos pause at 1 s"' in junit.read_text("utf-8")


@pytest.mark.full
def test_loadtest_measures_recovery_when_the_server_is_killed_stopped_paused_and_slowed(
    supervised: Callable[..., Supervised], tmp_path: Path
) -> None:
    server = supervised()
    first = server.pid
    actions = (
        "[{kind: kill, at_s: 2, pid_file: server.pid},"
        " {kind: pause, at_s: 12, for_s: 1.5, pid_file: server.pid},"
        " {kind: slow, at_s: 20, for_s: 1, share: 0.5, pid_file: server.pid},"
        " {kind: stop, at_s: 28, pid_file: server.pid}]"
    )
    code, report = run(tmp_path, server, actions, "--duration-s", "40", "--workers", "2", max_s=8)
    assert report is not None
    assert server.pid != first
    assert report.chaos is not None
    kill, pause, slow, stop = report.chaos.actions
    assert [one.error for one in report.chaos.actions] == [""] * 4
    assert all(one.kept for one in report.chaos.actions)
    for one in (kill, stop):
        assert one.n_lost is not None
        assert one.recovery_s is not None
        assert one.recovery_s > PAUSE_S
        # All that were meant to be sent in that time, but for few.
        assert 0.7 * 150 * one.recovery_s < one.n_lost < 1.5 * 150 * one.recovery_s + 20
    assert pause.recovery_s is not None
    assert pause.recovery_s > 1.3
    assert slow.recovery_s is not None
    assert report.server is not None
    assert report.server.lost == (f"http://127.0.0.1:{server.metrics}/metrics",)
    assert "server_restarted" not in kinds(report)
    assert "counts_disagree" not in kinds(report)
    assert "metric_missing" not in kinds(report)
    assert code == report.exit_code


def test_loadtest_is_violated_when_the_server_does_not_come_back(
    supervised: Callable[..., Supervised], tmp_path: Path
) -> None:
    """The supervisor is stopped, so that nobody starts the server again."""
    server = supervised()
    parent = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGSTOP)
    try:
        actions = "[{kind: kill, at_s: 0.2, pid_file: server.pid}]"
        code, report = run(tmp_path, server, actions, "--duration-s", "3", max_s=0.5)
    finally:
        os.kill(parent, signal.SIGCONT)
    assert report is not None
    assert (code, kinds(report) >= {"recovery_missed", "success_ratio_missed"}) == (1, True)
    assert report.chaos is not None
    assert report.chaos.actions[0].recovery_s is None


def test_loadtest_is_inconclusive_when_an_action_fails(
    supervised: Callable[..., Supervised], tmp_path: Path
) -> None:
    actions = (
        "[{kind: command, at_s: 0,"
        f" command: ['{sys.executable}', '-c', 'raise SystemExit(\"no such pod\")']}}]"
    )
    code, report = run(tmp_path, supervised(), actions, "--duration-s", "2.2", max_s=0.2)
    assert report is not None
    assert (code, kinds(report)) == (3, {"action_not_performed"})
    assert report.reasons[0].message.endswith("ended with 1: no such pod")


@pytest.mark.parametrize(
    ("actions", "more", "message"),
    [
        ("[{kind: kill, at_s: 1, pid: 4194305}]", [], "actions.0: there is no process 4194305"),
        (f"[{{kind: kill, at_s: 1, pid: {os.getppid()}}}]", [], "doesn't listen on"),
        ("[{kind: kill, at_s: 30, pid_file: server.pid}]", [], "actions.0.at_s: got 30 in"),
        ("[{kind: kill, at_s: 1, pid_file: server.pid}]", ["--closed-loop", "2"], "--closed-loop"),
        ("[{kind: kill, at_s: 1, pid_file: server.pid}]", ["--find-capacity"], "--find-capacity"),
        ("[{kind: kill, at_s: 1, pid_file: x, pid: 7}]", [], "want one of pid and pid_file"),
    ],
)
def test_loadtest_is_a_usage_error_when_the_chaos_cannot_be_played(
    supervised: Callable[..., Supervised],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    actions: str,
    more: list[str],
    message: str,
) -> None:
    server = supervised()
    pid = server.pid
    code, report = run(tmp_path, server, actions, "--duration-s", "20", *more)
    assert (code, report) == (2, None)
    assert message in capsys.readouterr().err
    assert server.pid == pid


def test_server_runs_again_when_the_load_test_is_interrupted(
    supervised: Callable[..., Supervised], tmp_path: Path
) -> None:
    server = supervised()
    slo, chaos = tmp_path / "slo.yaml", tmp_path / "chaos.yaml"
    slo.write_text(SLO)
    actions = "[{kind: pause, at_s: 0, for_s: 40, pid_file: server.pid}]"
    chaos.write_text(CHAOS.replace("ACTIONS", actions).replace("MAX_S", "5"))
    command = subprocess.Popen(
        [
            *(sys.executable, "-m", "loadtest.cli", str(slo), "--chaos", str(chaos)),
            *("--target", f"http://127.0.0.1:{server.rest}", "--model", "stub"),
            *("--no-server-metrics", "--warmup-s", "0", "--duration-s", "60"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline_s = time.monotonic() + LIMIT_S
    while state_of(server.pid) != "T":
        assert command.poll() is None
        assert time.monotonic() < deadline_s
    command.send_signal(signal.SIGTERM)
    _, error = command.communicate(timeout=LIMIT_S)
    assert command.returncode == 130, error
    assert state_of(server.pid) != "T"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
