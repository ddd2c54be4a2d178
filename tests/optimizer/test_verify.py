"""The verifier against small stand-ins for the two commands."""

import itertools
import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.slo import Slo
from optimizer.result import Verification
from optimizer.verify import (
    Candidate,
    ServerVerifier,
    Timeouts,
    read_report,
    running_server,
)
from serve.artifact import Batching, Manifest
from serve.engines import EngineSpec, Signature
from serve.tensor import TensorSpec

# argv: MODE LOG serve|loadtest OPTIONS. It notes in LOG what it was asked, one JSON line each.
FAKE = """
import json, os, pathlib, signal, subprocess, sys

mode, log, command, *options = sys.argv[1:]

def cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

def note(**facts):
    with open(log, "a") as file:
        facts |= {"command": command, "pid": os.getpid(), "cores": cores()}
        file.write(json.dumps(facts) + "\\n")

def value(name):
    return options[options.index(name) + 1]

def serve():
    if mode == "server_fails":
        sys.exit("error: manifest.json is no manifest")
    def stop(*_):
        note(event="terminated")
        sys.exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "server_stubborn" else stop)
    repository = pathlib.Path(value("--repository"))
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*.*"))
    slo = json.loads(pathlib.Path(value("--slo")).read_text())
    note(event="started", files=files, slo=slo, options=options)
    print("a line that is not meant for the verifier")
    ports = {"event": "ready", "http_port": 1001, "grpc_port": 1002, "metrics_port": 1003}
    if mode != "server_hangs":
        print(json.dumps(ports), flush=True)
    while True:
        signal.pause()

def loadtest():
    note(event="started", options=options)
    if mode == "loadtest_hangs":
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        note(event="child", child=child.pid)
        while True:
            signal.pause()
    if mode == "loadtest_refuses":
        sys.exit(2 if print("error: --inputs: got x", file=sys.stderr) is None else 0)
    inconclusive = ("inconclusive", "spoiled", "spoiled_once")
    verdict = "inconclusive" if mode in inconclusive else "met"
    verdict = "violated" if mode == "violated" else verdict
    kind = "generator_lagged" if mode.startswith("spoiled") else "too_close_to_call"
    if mode == "spoiled_once" and pathlib.Path(log).read_text().count('"loadtest"') == 2:
        verdict = "met"
    reason = {"message": "p99 was 31 ms", "reason": {"kind": kind}}
    report = {
        "verdict": verdict,
        "reasons": [] if verdict == "met" else [reason],
        "requests": {"n": 400, "n_ok": 399, "achieved_per_s": 99.5, "goodput_per_s": 98.0},
        "latency": [
            {"quantile": 0.5, "latency_s": 0.004},
            {"quantile": 0.9, "latency_s": 0.007},
            {"quantile": 0.99, "latency_s": 0.019},
        ],
        "good_share": {"confidence": 0.95, "effective_n": 400},
        "curve": [{"quantile": i / 400, "latency_s": i / 1e4} for i in range(1, 401)],
        "slo": {},
    }
    if mode != "no_report":
        pathlib.Path(value("--json")).write_text(json.dumps(report))
    codes = {"met": 0, "violated": 1, "inconclusive": 3}
    sys.exit(1 if mode == "disagrees" else codes[verdict])

globals()[command]()
"""

SLO = Slo.model_validate(
    {
        "apiVersion": "trimserve/v1",
        "kind": "SLO",
        "name": "digits",
        "latency": {"quantile": 0.9, "threshold_ms": 20},
        "workload": {"rate_per_s": 200},
        "window_s": 1,
    }
)
TIMEOUTS = Timeouts(start_s=30, loadtest_s=30, stop_s=30)
FIGURES = {
    "p50_s": 0.004,
    "p99_s": 0.019,
    "slo_latency_s": 0.007,
    "slo_latency_bound_s": 0.0371,
    "bound_confidence": 0.95,
    "rate_per_s": 99.5,
    "goodput_per_s": 98.0,
    "success_ratio": 399 / 400,
    "n_requests": 400,
}


class Stage:
    """A folder with the stand-in, its log, and a candidate to verify."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.script = folder / "fake.py"
        self.script.write_text(FAKE)
        model = folder / "model.onnx"
        model.write_bytes(b"weights")
        tensor = TensorSpec("image", "FP32", (-1, 4))
        self.candidate = Candidate(
            Manifest(
                "digits",
                "7",
                Signature((tensor,), (tensor,)),
                EngineSpec("onnxruntime", "model.onnx"),
                Batching(8),
            ),
            {"model.onnx": model},
        )

    def program(self, mode: str) -> tuple[str, ...]:
        return (sys.executable, "-S", "-E", str(self.script), mode, str(self.log))

    def verify(self, mode: str, timeouts: Timeouts = TIMEOUTS, replicas: int = 1) -> Verification:
        verifier = ServerVerifier(program=self.program(mode), timeouts=timeouts, warmup_s=0.1)
        return verifier.verify(replace(self.candidate, replicas=replicas), SLO)

    def notes(self, command: str) -> list[dict[str, Any]]:
        notes = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [note for note in notes if note["command"] == command]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def is_alive(pid: object) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("verdict", ["met", "violated", "inconclusive"])
def test_verdict_and_figures_are_those_of_the_load_test(verdict: str, stage: Stage) -> None:
    verification = stage.verify(verdict)

    reasons = () if verdict == "met" else ("p99 was 31 ms",)
    assert verification == Verification(verdict, reasons, **FIGURES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "verdict", "n_tests"),
    [
        pytest.param("spoiled_once", "met", 2, id="repeated when the generator was held up"),
        pytest.param("spoiled", "inconclusive", 3, id="given up when it is held up every time"),
        pytest.param("inconclusive", "inconclusive", 1, id="not repeated when it is too close"),
    ],
)
def test_load_test_is(mode: str, verdict: str, n_tests: int, stage: Stage) -> None:
    assert stage.verify(mode).verdict == verdict
    assert len(stage.notes("loadtest")) == n_tests
    assert len(stage.notes("serve")) == 2, "one server, started and ended"


def test_server_gets_the_candidate_and_the_load_test_its_ports(stage: Stage) -> None:
    stage.verify("met")

    started, ended = stage.notes("serve")
    assert started["files"] == ["digits/1/manifest.json", "digits/1/model.onnx"]
    assert ended["event"] == "terminated"
    options = stage.notes("loadtest")[0]["options"]
    pairs = list(itertools.pairwise(options))
    assert ("--target", "http://127.0.0.1:1001") in pairs
    assert ("--target", "grpc://127.0.0.1:1002") in pairs
    assert ("--metrics-url", "http://127.0.0.1:1003/metrics") in pairs
    assert ("--model", "digits") in pairs


def test_one_replica_gets_its_part_of_the_rate_when_several_share_it(stage: Stage) -> None:
    stage.verify("met", replicas=4)

    slo = Slo.model_validate(stage.notes("serve")[0]["slo"])
    assert slo.workload.rate_per_s == 50
    assert slo.latency == SLO.latency


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        pytest.param(
            "server_fails",
            "serve ended with exit code 1 before it was ready: error: manifest.json is no manifest",
            id="the server does not start",
        ),
        pytest.param(
            "loadtest_refuses",
            "loadtest ended with exit code 2: error: --inputs: got x",
            id="the load test refuses its arguments",
        ),
        pytest.param("no_report", "wrote no report that can be read", id="there is no report"),
        pytest.param(
            "disagrees",
            "reported met and ended with exit code 1",
            id="report and exit code disagree",
        ),
    ],
)
def test_verdict_is_inconclusive_and_says_why_when(mode: str, reason: str, stage: Stage) -> None:
    verification = stage.verify(mode)

    assert verification.verdict == "inconclusive"
    assert reason in verification.reasons[0]
    assert not any(is_alive(note["pid"]) for note in stage.notes("serve"))


def test_server_is_given_up_when_it_is_never_ready(stage: Stage) -> None:
    verification = stage.verify("server_hangs", replace(TIMEOUTS, start_s=1.0))

    assert verification.reasons == ("serve wasn't ready within 1 s",)
    assert not any(is_alive(note["pid"]) for note in stage.notes("serve"))


def test_load_test_is_given_up_with_its_children_when_it_never_ends(stage: Stage) -> None:
    verification = stage.verify("loadtest_hangs", replace(TIMEOUTS, loadtest_s=0.5, stop_s=5))

    assert verification.reasons[0].startswith("loadtest didn't end within 1.6 s")
    assert not any(is_alive(note.get("child", "none")) for note in stage.notes("loadtest"))
    assert stage.notes("serve")[-1]["event"] == "terminated"


def test_server_is_killed_when_it_ignores_the_request_to_end(stage: Stage) -> None:
    assert stage.verify("server_stubborn", replace(TIMEOUTS, stop_s=0.2)).verdict == "met"
    assert not any(is_alive(note["pid"]) for note in stage.notes("serve"))


def test_verdict_is_inconclusive_when_the_program_is_missing(stage: Stage) -> None:
    verifier = ServerVerifier(program=("/nonexistent/trimserve",))

    verification = verifier.verify(stage.candidate, SLO)

    assert verification.verdict == "inconclusive"
    assert verification.reasons[0].startswith("serve can't be started: ")


def test_running_server_ends_the_server_when_the_block_raises(stage: Stage) -> None:
    slo = stage.log.with_name("slo.json")
    slo.write_text("{}")
    command = [*stage.program("met"), "serve", "--repository", "none", "--slo", str(slo)]

    def serve_and_interrupt() -> None:
        with running_server(command, TIMEOUTS) as ports:
            rest, grpc = "http://127.0.0.1:1001", "grpc://127.0.0.1:1002"
            assert ports.targets(SLO) == (rest, grpc)
            workload = SLO.workload.model_copy(update={"encoding": "json"})
            assert ports.targets(SLO.model_copy(update={"workload": workload})) == (rest,)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve_and_interrupt()

    assert stage.notes("serve")[-1]["event"] == "terminated"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_server_and_load_test_are_kept_apart_when_there_are_cores_enough(stage: Stage) -> None:
    allowed = os.sched_getaffinity(0)
    verifier = ServerVerifier(cores=1, program=stage.program("met"), timeouts=TIMEOUTS)

    verifier.verify(stage.candidate, SLO)

    served, generated = (set(stage.notes(name)[0]["cores"]) for name in ("serve", "loadtest"))
    assert served | generated == allowed
    assert len(allowed) == 1 or (len(served) == 1 and not served & generated)
    assert os.sched_getaffinity(0) == allowed


def test_report_without_figures_still_has_a_verdict(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(
        textwrap.dedent("""
        {"verdict": "inconclusive", "reasons": [{"message": "the rate wasn't reached"}],
         "requests": {"n": 0, "n_ok": 0, "achieved_per_s": 0, "goodput_per_s": 0},
         "latency": [{"quantile": 0.99, "latency_s": null}]}
        """)
    )

    verification = read_report(path, 3, quantile=0.99)

    assert verification.slo_latency_s is None
    assert verification.success_ratio is None
