"""Verification: what a candidate does on the real server under the SLO's load.

The server and the load test run as the commands that users run, in processes of their own; this
module starts them, reads the verdict and takes them down. It judges nothing itself.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import pydantic

from loadtest.slo import Slo
from optimizer.errors import OptimizerError
from optimizer.loadtest_report import LoadTestReport, read_bytes
from optimizer.result import Verdict, Verification
from serve.artifact import Manifest, write_version
from serve.engines import RUNS_CODE

EXIT_CODES: Mapping[Verdict, int] = {"met": 0, "violated": 1, "inconclusive": 3}
GENERATOR_REASONS = frozenset({"generator_lagged", "generator_busy", "rate_not_reached"})
"""Kinds of a load test's reasons that are about itself."""
HOST = "127.0.0.1"
_MAX_STDERR_BYTES = 2_000
_MAX_STDERR_LINES = 8


@dataclass(frozen=True)
class Candidate:
    """A version as it would be published, and over how many replicas the SLO's rate is spread.

    `files` maps names in the version to where they are now.
    """

    manifest: Manifest
    files: Mapping[str, Path]
    replicas: int = 1


class Verifier(Protocol):
    def verify(self, candidate: Candidate, slo: Slo) -> Verification:
        """Load one replica of the candidate with its part of the SLO's rate.

        Where server or load test fail, that is an inconclusive verdict that says so. Raises
        ArtifactInvalid where the candidate is no version that could be published.
        """
        ...


@dataclass(frozen=True)
class Timeouts:
    """Seconds until a process is given up; the load test's comes on top of its schedule."""

    start_s: float = 120.0
    loadtest_s: float = 120.0
    stop_s: float = 45.0


class ProcessFailed(OptimizerError):
    """A command ended, or didn't, in a way that gives no result; `stderr` is its last words."""

    def __init__(self, command: str, what: str, stderr: str) -> None:
        super().__init__(f"{command} {what}" + (f": {stderr}" if stderr else ""))
        self.command = command
        self.what = what
        self.stderr = stderr


class Ports(pydantic.BaseModel):
    """The line that a server prints when its models can answer."""

    http_port: int
    grpc_port: int
    metrics_port: int

    def targets(self, slo: Slo) -> tuple[str, ...]:
        """The URLs of REST and gRPC, as the load test takes them; JSON has no form in gRPC."""
        rest, grpc = f"http://{HOST}:{self.http_port}", f"grpc://{HOST}:{self.grpc_port}"
        return (rest,) if slo.workload.encoding == "json" else (rest, grpc)

    @property
    def metrics_url(self) -> str:
        return f"http://{HOST}:{self.metrics_port}/metrics"


@dataclass(frozen=True)
class ServerVerifier:
    """Serves the candidate on free ports of this machine, and loads it over REST and gRPC
    (over REST alone where the workload is JSON).

    `cores` is how many the replica has. Where this process may use more than that, server and
    load generator are kept apart on cores of their own; else they share them, and the verdict
    errs on the safe side. `inputs` is an .npz file of real inputs for the load test. A test that
    says nothing of the server, since its own load generator was held up, is repeated up to
    `max_repeats` times; one that comes to no conclusion otherwise is not, which would be trying
    until it fits.
    """

    cores: int | None = None
    inputs: Path | None = None
    seed: int = 0
    warmup_s: float = 3.0
    max_repeats: int = 2
    program: tuple[str, ...] = (sys.executable, "-m", "trimserve")
    timeouts: Timeouts = Timeouts()

    def verify(self, candidate: Candidate, slo: Slo) -> Verification:
        with tempfile.TemporaryDirectory(prefix="trimserve-verify-") as scratch:
            try:
                return self._verify(candidate, _share_of(slo, candidate.replicas), Path(scratch))
            except ProcessFailed as error:
                return Verification("inconclusive", (str(error),))

    def _verify(self, candidate: Candidate, slo: Slo, scratch: Path) -> Verification:
        repository, slo_path = scratch / "repository", scratch / "slo.yaml"
        manifest = replace(candidate.manifest, version="1")
        write_version(repository, manifest, candidate.files)
        slo_path.write_text(json.dumps(slo.to_dict()), "utf-8")  # JSON is YAML
        server_cores, generator_cores = split_cores(self.cores)
        serve = [*self.program, "serve", "--repository", str(repository), "--slo", str(slo_path)]
        if manifest.engine.name in RUNS_CODE:  # which this study made itself
            serve.append("--trust-code")
        with running_server(serve, self.timeouts, server_cores) as ports:
            report = scratch / "report.json"
            command = self._loadtest(manifest.model, slo_path, ports, report)
            for target in ports.targets(slo):
                command += ["--target", target]
            for repeats_left in range(self.max_repeats, -1, -1):
                verification = self._load(command, report, slo, generator_cores)
                if not repeats_left or not is_spoiled(report):
                    break
            return verification

    def _load(
        self, command: Sequence[str], report: Path, slo: Slo, cores: frozenset[int] | None
    ) -> Verification:
        report.unlink(missing_ok=True)
        seconds = self.warmup_s + slo.window_s + self.timeouts.loadtest_s
        with _started(command, "loadtest", self.timeouts.stop_s, cores) as loadtest:
            code = loadtest.wait(seconds)
            return read_report(report, code, slo.latency.quantile, loadtest.stderr)

    def _loadtest(self, model: str, slo: Path, ports: Ports, report: Path) -> list[str]:
        command = [*self.program, "loadtest", str(slo), "--model", model, "--json", str(report)]
        command += ["--metrics-url", ports.metrics_url]
        command += ["--seed", str(self.seed), "--warmup-s", str(self.warmup_s)]
        return [*command, "--inputs", str(self.inputs)] if self.inputs else command


@contextlib.contextmanager
def running_server(
    command: Sequence[str], timeouts: Timeouts, cores: frozenset[int] | None = None
) -> Iterator[Ports]:
    """Run a `trimserve serve` command on free ports of the loopback until the block ends.

    Yields when it says that it is ready; raises ProcessFailed where it doesn't. Ends it by
    SIGTERM, which drains it, and kills it where that takes too long.
    """
    free = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    with _started([*command, "--host", HOST, *free], "serve", timeouts.stop_s, cores) as server:
        yield server.ports(timeouts.start_s)


def read_report(path: Path, exit_code: int, quantile: float, stderr: str = "") -> Verification:
    """The verdict of a load test's JSON report; `quantile` is the SLO's.

    Raises ProcessFailed where there is no verdict, or one that isn't the exit code's.
    """
    if exit_code not in EXIT_CODES.values():
        raise ProcessFailed("loadtest", f"ended with exit code {exit_code}", stderr)
    report = _read(path)
    if EXIT_CODES[report.verdict] != exit_code:
        what = f"reported {report.verdict} and ended with exit code {exit_code}"
        raise ProcessFailed("loadtest", what, stderr)
    bound_s = report.latency_bound_s(quantile)
    requests = report.requests
    return Verification(
        verdict=report.verdict,
        reasons=tuple(reason.message for reason in report.reasons),
        p50_s=report.latency_s(0.5),
        p99_s=report.latency_s(0.99),
        slo_latency_s=report.latency_s(quantile),
        slo_latency_bound_s=bound_s,
        bound_confidence=report.good_share.confidence if report.good_share and bound_s else None,
        rate_per_s=requests.achieved_per_s,
        goodput_per_s=requests.goodput_per_s,
        success_ratio=requests.n_ok / requests.n if requests.n else None,
        n_requests=requests.n,
    )


def is_spoiled(path: Path) -> bool:
    """Whether a load test came to no conclusion since its own generator was held up, by a busy
    machine for example. Raises ProcessFailed where there is no report."""
    report = _read(path)
    kinds = {reason.reason.kind for reason in report.reasons}
    return report.verdict == "inconclusive" and not kinds.isdisjoint(GENERATOR_REASONS)


def _read(path: Path) -> LoadTestReport:
    try:
        return LoadTestReport.model_validate_json(read_bytes(path))
    except (OSError, pydantic.ValidationError) as error:
        raise ProcessFailed("loadtest", "wrote no report that can be read", str(error)) from error


class _Process:
    """A child in a session of its own, so that its children go with it."""

    def __init__(
        self, command: Sequence[str], name: str, stderr: IO[bytes], cores: frozenset[int] | None
    ) -> None:
        self._name = name
        self._stderr = stderr
        with on_cores(cores):
            self._child = subprocess.Popen(  # noqa: S603 - our own commands, as lists
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self._announced: queue.SimpleQueue[Ports | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def stderr(self) -> str:
        """Its last lines."""
        file = self._stderr.fileno()
        start = max(0, os.fstat(file).st_size - _MAX_STDERR_BYTES)
        written = os.pread(file, _MAX_STDERR_BYTES, start)  # the child shares the file's position
        lines = written.decode("utf-8", "replace").strip().splitlines()
        return "\n".join(lines[-_MAX_STDERR_LINES:])

    def ports(self, timeout_s: float) -> Ports:
        """Wait for the line that says it is ready."""
        try:
            ports = self._announced.get(timeout=timeout_s)
        except queue.Empty:
            raise self._failed(f"wasn't ready within {timeout_s:g} s") from None
        if ports is None:
            code = self.wait(timeout_s)
            raise self._failed(f"ended with exit code {code} before it was ready")
        return ports

    def wait(self, timeout_s: float) -> int:
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failed(f"didn't end within {timeout_s:g} s") from None

    def stop(self, timeout_s: float) -> None:
        """End it and its children, whatever state they are in."""
        try:
            if self._child.poll() is None:
                self._child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._reader.join()
            assert self._child.stdout is not None
            self._child.stdout.close()

    def _read(self) -> None:
        """Drain standard output to its end; the first line that names ports is passed on."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with contextlib.suppress(pydantic.ValidationError):
                self._announced.put(Ports.model_validate_json(line))
        self._announced.put(None)

    def _failed(self, what: str) -> ProcessFailed:
        return ProcessFailed(self._name, what, self.stderr)


@contextlib.contextmanager
def _started(
    command: Sequence[str], name: str, stop_s: float, cores: frozenset[int] | None
) -> Iterator[_Process]:
    with tempfile.TemporaryFile() as stderr:
        try:
            process = _Process(command, name, stderr, cores)
        except OSError as error:
            raise ProcessFailed(name, "can't be started", str(error)) from error
        try:
            yield process
        finally:
            process.stop(stop_s)


@contextlib.contextmanager
def on_cores(cores: frozenset[int] | None) -> Iterator[None]:
    """Restrict this thread to `cores`, which a process that it starts inherits."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _share_of(slo: Slo, replicas: int) -> Slo:
    """The SLO of one replica: the same promise at its part of the rate."""
    rate_per_s = slo.workload.rate_per_s / replicas
    workload = slo.workload.model_copy(update={"rate_per_s": rate_per_s})
    return slo.model_copy(update={"workload": workload})


def split_cores(wanted: int | None) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """(server's, load generator's) cores; None where there aren't enough to keep them apart."""
    if wanted is None or not hasattr(os, "sched_setaffinity"):
        return None, None
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) <= wanted:
        return None, None
    return frozenset(allowed[:wanted]), frozenset(allowed[wanted:])
