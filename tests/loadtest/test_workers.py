"""Workers: a load that several processes share is the plan's, and judged by their raw samples."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.arrivals import Arrivals, draw_profile
from loadtest.cli import main
from loadtest.parts import merge, split
from loadtest.plan import ClosedLoop, Payload, Plan
from loadtest.profile import simple_profile
from loadtest.samples import HTTP_OK, Samples
from loadtest.target import Target
from tests.k8s.kustomizations import K8S
from tests.k8s.resolved import containers, found, resolved

SLO_TEXT = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.9, threshold_ms: 100}
workload: {rate_per_s: 150, rows: 2}
success_ratio: 0.99
"""
LIMIT_S = 60.0


def arrivals(n: int, seed: int = 0) -> Arrivals:
    rng = np.random.default_rng(seed)
    return draw_profile(simple_profile("poisson"), n / 10, 10.0, 2, 3, rng)


def plan(**given: Any) -> Plan:
    targets = (Target("rest", "127.0.0.1", 8000), Target("grpc", "127.0.0.1", 8001))
    one = Plan(
        model="m",
        version="",
        targets=targets,
        payloads={"rest": (Payload(b"{}", 2),) * 3, "grpc": (Payload(b"x"),) * 3},
        warmup=arrivals(50),
        window=arrivals(503, 1),
        timeout_s=5.0,
        max_in_flight=64,
    )
    return replace(one, **given)


def samples(window: Arrivals, graded: bool = True) -> Samples:
    """As a server would have answered, each in a time that tells it from the others."""
    n = len(window)
    return Samples(
        intended_s=window.intended_s,
        sent_s=window.intended_s + 1e-5,
        done_s=window.intended_s * 1.5 + 1e-3,
        target=window.target,
        status=np.full(n, HTTP_OK, np.int32),
        n_right=window.payload.astype(np.int32) if graded else None,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("graded", [True, False])
def test_parts_give_the_whole_plan_when_they_are_merged(n: int, graded: bool) -> None:
    whole = plan()
    parts = split(whole, n)
    assert len(parts) == n
    assert sum(part.max_in_flight for part in parts) >= whole.max_in_flight
    assert max(len(part.window) for part in parts) - min(len(part.window) for part in parts) <= 1
    merged, wanted = merge([samples(part.window, graded) for part in parts]), samples(whole.window)
    for name in ("intended_s", "sent_s", "done_s", "target", "status"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(wanted, name))
    if graded:
        np.testing.assert_array_equal(merged.n_right, wanted.n_right)  # type: ignore[arg-type]
    else:
        assert merged.n_right is None


def test_parts_have_some_arrivals_or_none_when_there_are_fewer_than_workers() -> None:
    parts = split(plan(window=arrivals(3)), 8)
    assert sorted({len(part.window) for part in parts}) == [0, 1]


def test_parts_share_the_clients_when_the_loop_is_closed() -> None:
    closed = ClosedLoop(n_clients=7, warmup_s=1.0, window_s=10.0)
    parts = split(plan(closed=closed, max_in_flight=7), 3)
    assert [part.closed and part.closed.n_clients for part in parts] == [3, 2, 2]
    assert all(len(part.window) == 503 for part in parts), "a closed loop's order stays whole"


@pytest.mark.parametrize("n", [0, 65])
def test_parts_are_refused_when_there_is_nothing_for_some(n: int) -> None:
    with pytest.raises(ValueError, match="want 1 to max_in_flight 64"):
        split(plan(), n)


# --- the command


@pytest.fixture
def slo_file(tmp_path: Path) -> Path:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO_TEXT)
    return path


def arguments(slo_file: Path, ports: Any, report: Path, *more: str) -> list[str]:
    return [
        str(slo_file),
        *("--target", ports.rest_url, "--target", ports.grpc_url),
        *("--metrics-url", ports.metrics_url, "--model", "stub"),
        *("--duration-s", "6", "--warmup-s", "1", "--json", str(report), *more),
    ]


def test_loadtest_agrees_with_the_servers_counts_when_two_processes_share_the_load(
    start_stub: Callable[..., Any], slo_file: Path, tmp_path: Path
) -> None:
    ports = start_stub("--edge-s", "0.1", "--fail-every", "29")
    report = tmp_path / "report.json"
    # One in 29 fails, so the promise is broken for certain, and the counts have something to say.
    assert main(arguments(slo_file, ports, report, "--workers", "2")) == 1
    found = json.loads(report.read_text())
    assert found["run"]["workers"] == 2
    counts = {one["transport"]: one for one in found["server"]["transports"]}
    for one in counts.values():
        assert (one["client_n"], one["client_ok"]) == (one["server_n"], one["server_ok"])
    assert sum(one["client_n"] for one in counts.values()) == found["requests"]["n"] > 700
    alone = tmp_path / "alone.json"
    main(arguments(slo_file, ports, alone))
    assert json.loads(alone.read_text())["requests"]["n"] == found["requests"]["n"], (
        "however many send it, a seed's schedule is the same"
    )


@pytest.mark.full
@pytest.mark.alone
def test_loadtest_waits_for_workers_when_they_are_started_elsewhere(
    start_stub: Callable[..., Any], slo_file: Path, tmp_path: Path
) -> None:
    ports, report = start_stub("--edge-s", "0.1"), tmp_path / "report.json"
    master = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        for index in range(2):
            stack.enter_context(worker(master, tmp_path / f"worker-{index}.log"))
        more = ("--expect-workers", "2", "--bind", master)
        for _ in range(2):  # workers stay for the next test
            assert main(arguments(slo_file, ports, report, *more)) == 0
    found = json.loads(report.read_text())
    assert found["run"]["workers"] == 2
    assert found["requests"]["n"] == found["requests"]["n_sent"]


@pytest.mark.full
@pytest.mark.alone
def test_commands_of_the_manifests_give_a_verdict_and_workers_that_end_well(
    start_stub: Callable[..., Any], slo_file: Path, tmp_path: Path
) -> None:
    """With addresses of this machine, and a window of 6 s."""
    ports, address = start_stub("--edge-s", "0.1"), f"127.0.0.1:{free_port()}"
    documents = resolved(K8S / "jobs/loadtest-distributed")
    jobs = {name: found(documents, "Job", name)["spec"] for name in ("loadtest", "loadtest-worker")}
    (master,), (caller,) = (containers(one["template"]) for one in jobs.values())
    here = {"--target": ports.rest_url, "--bind": address, "--master": address}
    told, (_, *played) = (
        [
            f"{option}={here[option]}" if (option := one.partition("=")[0]) in here else one
            for one in container["args"][1:]
        ]
        for container in (master, caller)
    )
    told = [one.replace("/etc/trimserve/slo.yaml", str(slo_file)) for one in told]
    told = [one.replace("$(MODEL_NAME)", "stub") for one in told]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(worker(address, tmp_path / f"{index}.log", *played))
            for index in range(jobs["loadtest-worker"]["completions"])
        ]
        assert main([*told, "--duration-s=6", "--warmup-s=1"]) == 0
        assert [one.wait(LIMIT_S) for one in workers] == [0] * len(workers)


@pytest.mark.full
@pytest.mark.alone
def test_loadtest_fails_and_names_the_worker_when_one_is_killed(
    start_stub: Callable[..., Any],
    slo_file: Path,
    tmp_path: Path,
) -> None:
    ports, report = start_stub("--edge-s", "0.1"), tmp_path / "report.json"
    master = f"127.0.0.1:{free_port()}"
    given = arguments(slo_file, ports, report, "--expect-workers", "2", "--bind", master)
    given[given.index("6")] = "30"
    with ExitStack() as stack:
        stack.enter_context(worker(master, tmp_path / "stays.log"))
        goes = stack.enter_context(worker(master, tmp_path / "goes.log", "--once"))
        command = stack.enter_context(running([sys.executable, "-m", "loadtest.cli", *given]))
        wait_until(lambda: children(goes.pid) != [])
        wait_until(lambda: requests_at(ports.metrics_url) > 400)
        (child,) = children(goes.pid)
        os.kill(child, signal.SIGKILL)
        assert command.wait(LIMIT_S) == 70
        assert command.stderr is not None
        assert "was lost" in command.stderr.read()
    assert not report.exists()


@pytest.mark.full
@pytest.mark.alone
def test_web_interface_of_locust_shows_the_requests_when_it_is_asked_for(
    start_stub: Callable[..., Any], slo_file: Path, tmp_path: Path
) -> None:
    ports, web = start_stub("--edge-s", "0.1"), f"127.0.0.1:{free_port()}"
    for more in ((), ("--workers", "2")):
        given = arguments(slo_file, ports, tmp_path / "report.json", "--web", web, *more)
        given[given.index("6")] = "12"
        with running([sys.executable, "-m", "loadtest.cli", *given]) as command:
            wait_until(lambda: shown_requests(web) > 200)
            assert command.wait(LIMIT_S) == 0


@pytest.mark.full
@pytest.mark.alone
def test_loadtest_is_interrupted_when_somebody_stops_it_in_the_web_interface(
    start_stub: Callable[..., Any], slo_file: Path, tmp_path: Path
) -> None:
    ports, web = start_stub("--edge-s", "0.1"), f"127.0.0.1:{free_port()}"
    report = tmp_path / "report.json"
    given = arguments(slo_file, ports, report, "--web", web)
    given[given.index("6")] = "60"
    with running([sys.executable, "-m", "loadtest.cli", *given]) as command:
        wait_until(lambda: shown_requests(web) > 200)
        stop = urllib.request.Request(f"http://{web}/stop", method="POST")
        with urllib.request.urlopen(stop, timeout=30) as answer:
            assert json.load(answer)["success"]
        assert command.wait(LIMIT_S) == 130
    assert not report.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(
            ("--workers", "2", "--expect-workers", "2"), "want one of them", id="two kinds"
        ),
        pytest.param(("--bind", "127.0.0.1:9999"), "want both or neither", id="bind alone"),
        pytest.param(("--expect-workers", "2", "--bind", "9999"), "want HOST:PORT", id="no host"),
        pytest.param(
            ("--expect-workers", "2", "--bind", "h:70000"), "want HOST:PORT", id="no such port"
        ),
        pytest.param(("--web", "localhost"), "want HOST:PORT", id="web without a port"),
        pytest.param(
            ("--workers", "9", "--max-in-flight", "8"), "want at most 8", id="more than requests"
        ),
        pytest.param(
            ("--workers", "9", "--closed-loop", "8"), "want at most 8", id="more than clients"
        ),
    ],
)
def test_loadtest_says_what_to_change_when_workers_are_wrong(
    slo_file: Path, given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(slo_file), "--target", "http://127.0.0.1:1", "--model", "m", *given])
    assert code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


# --- processes


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextmanager
def worker(master: str, log: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "loadtest.cli", "worker", "--master", master, *more]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.terminate()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(one) for one in text.split()]


def requests_at(url: str) -> float:
    with urllib.request.urlopen(url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    name = "trimserve_request_duration_seconds_count"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def shown_requests(web: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{web}/stats/requests", timeout=5) as answer:
            stats = json.load(answer)["stats"]
    except OSError:
        return 0
    return sum(int(one["num_requests"]) for one in stats if one["name"] == "stub")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
