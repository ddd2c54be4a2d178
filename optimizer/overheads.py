"""Overheads: what serving costs beside the engine, measured on this machine.

Measuring runs the real server with a model that computes next to nothing, and the real load test
against it; what is left is the front end's. It knows neither variants nor the store.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from optimizer.loadtest_report import LoadTestReport, read_bytes
from optimizer.result import LEVELS
from optimizer.simulation import FloatArray, FrontEnd, Spread
from optimizer.verify import (
    Ports,
    ProcessFailed,
    Timeouts,
    on_cores,
    running_server,
    split_cores,
)

PROTOCOL_VERSION = 1
MODEL = "overheads"
N_OUTPUTS = 10
LIGHT_PER_S, BUSY_PER_S = 60.0, 400.0
"""Rates of the two load tests of each transport."""
WINDOW_S = 5.0
WARMUP_S = 1.0
N_WAKE_UPS = 400
LEAST_SHARE = 0.45
"""Of a request's processor time at light load, the work that is done in any case. The straight
line through two rates would leave less than what saturated servers took (docs/experiments.md)."""
Transport = Literal["rest", "grpc"]
Encoding = Literal["binary", "json"]
_BATCH_PHASES = ("assemble", "execute", "split")
_MAX_METRICS_BYTES = 8_000_000
_N_MIXED = 2_000
"""Points by which distributions are put together."""


@dataclass(frozen=True)
class Cost:
    """Of one transport, in seconds: the front end's work on a request, what comes on top of it
    each time that it was asleep, an instance's work on a batch, and the way there and back."""

    request_s: float
    wakeup_s: float
    batch_s: float
    way: Spread


@dataclass(frozen=True)
class Overheads:
    """A machine's overheads for requests of `n_values` numbers, and the wait for a core where
    engines have them all. `apart`: the load generator had cores of its own."""

    n_values: int
    encoding: Encoding
    apart: bool
    costs: Mapping[Transport, Cost]
    wake: Spread

    def front_end(self) -> FrontEnd:
        """That of requests spread evenly over the transports, as the verifier sends them."""
        costs = list(self.costs.values())
        request_s = _mean([cost.request_s for cost in costs])
        return FrontEnd(
            receive_s=request_s / 2,
            answer_s=request_s / 2,
            wakeup_s=_mean([cost.wakeup_s for cost in costs]),
            batch_s=_mean([cost.batch_s for cost in costs]),
            way=_mixed([cost.way for cost in costs]),
            wake=self.wake,
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Overheads":
        """Raises KeyError, TypeError or ValueError for what `to_dict` didn't write."""
        costs: dict[Transport, Cost] = {
            name: Cost(**{**cost, "way": _spread(cost["way"])})
            for name, cost in stored["costs"].items()
        }
        return cls(**{**stored, "costs": costs, "wake": _spread(stored["wake"])})


def measure_overheads(
    cores: int,
    *,
    n_values: int = 64,
    encoding: Encoding = "binary",
    seed: int = 0,
    window_s: float = WINDOW_S,
    program: Sequence[str] = (sys.executable, "-m", "trimserve"),
    timeouts: Timeouts | None = None,
) -> Overheads:
    """Serve on `cores` of this machine a model that takes `n_values` float32 numbers, and load
    it, one transport after the other. Takes about 10 s plus 10 s a transport and rate.

    Raises ProcessFailed where the server or a load test doesn't do its part.
    """
    server_cores, generator_cores = split_cores(cores)
    transports: tuple[Transport, ...] = ("rest",) if encoding == "json" else ("rest", "grpc")
    timeouts = timeouts or Timeouts()
    with tempfile.TemporaryDirectory(prefix="trimserve-overheads-") as folder:
        model = Path(folder) / f"{MODEL}.onnx"
        model.write_bytes(trivial_model(n_values))
        serve = [*program, "serve", "--model", str(model)]
        with running_server(serve, timeouts, server_cores) as ports:
            tester = _Tester(Path(folder), ports, list(program), encoding, seed, window_s, timeouts)
            with on_cores(generator_cores):
                runs = {
                    transport: [tester.run(transport, rate) for rate in (LIGHT_PER_S, BUSY_PER_S)]
                    for transport in transports
                }
    costs = {transport: fitted(*pair) for transport, pair in runs.items()}
    wake = wake_ups(min(server_cores) if server_cores else None, seed=seed)
    return Overheads(n_values, encoding, server_cores is not None, costs, wake)


@dataclass(frozen=True)
class LightRun:
    """A load test of the trivial model: seconds of the server's processor time a request, and an
    instance's on a batch, latencies as clients saw them, at `LEVELS`."""

    rate_per_s: float
    cpu_s: float
    batch_s: float
    latency: Spread


def fitted(light: LightRun, busy: LightRun) -> Cost:
    """The costs that explain two runs of a transport.

    The processor's time falls with the load, since a front end that is busy needn't be woken. It
    is taken as `request_s` + 2 `wakeup_s` (1 - utilization), twice for reading and answering, which
    two rates decide; noise may not take more than `LEAST_SHARE` leaves of it for waking up. The
    way is what is left of the latency at light load.
    """
    asleep = [max(0.0, 1 - run.rate_per_s * run.cpu_s) for run in (light, busy)]
    serial = [max(1e-6, run.cpu_s - run.batch_s) for run in (light, busy)]
    difference = asleep[0] - asleep[1]
    wakeup_s = (serial[0] - serial[1]) / difference / 2 if difference > 0.01 else 0.0
    least_s = LEAST_SHARE * serial[0]
    wakeup_s = min(max(0.0, wakeup_s), (serial[0] - least_s) / 2)
    request_s = max(least_s, serial[1] - 2 * wakeup_s * asleep[1])
    known_s = request_s + 2 * wakeup_s + light.batch_s
    way = tuple(max(0.0, seconds - known_s) for seconds in light.latency.seconds)
    return Cost(request_s, wakeup_s, light.batch_s, Spread(way))


def wake_ups(core: int | None, n: int = N_WAKE_UPS, seed: int = 0) -> Spread:
    """How long a thread waits for a core on which another one computes, from when it should wake
    up: on `core`, or any where that is None.

    The kernel may interrupt the other at once or only at its timer's next tick, 1 to 10 ms.
    """
    done = threading.Event()
    rng = np.random.default_rng(seed)
    pauses_s = rng.exponential(0.006, n) + 0.001

    def compute() -> None:
        _pin(core)
        while not done.is_set():
            hashlib.pbkdf2_hmac(
                "sha256", b"some", b"salt", 50_000
            )  # without the interpreter's lock

    others = [threading.Thread(target=compute, daemon=True) for _ in range(_n_to_fill(core))]
    late_s: list[float] = []

    def wait() -> None:
        _pin(core)
        for pause_s in pauses_s.tolist():
            due_s = time.monotonic() + pause_s
            time.sleep(pause_s)
            late_s.append(time.monotonic() - due_s)
            _work_until(time.monotonic() + 2e-4)

    waiter = threading.Thread(target=wait)
    for thread in (*others, waiter):
        thread.start()
    waiter.join()
    done.set()
    for thread in others:
        thread.join()
    return Spread.of(np.maximum(late_s, 0.0))


def trivial_model(n_values: int) -> bytes:
    """ONNX: the first few of `n_values` numbers, float32 [n, n_values] to [n, 10]."""
    from onnx import TensorProto, helper  # slow to import, and only the optimizer's extra has it

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])

    def indices(name: str, index: int) -> Any:
        return helper.make_tensor(name, TensorProto.INT64, [1], [index])

    n_outputs = min(N_OUTPUTS, n_values)
    constants = [indices("start", 0), indices("stop", n_outputs), indices("axis", 1)]
    node = helper.make_node("Slice", ["x", "start", "stop", "axis"], ["y"])
    sides = [value("x", n_values)], [value("y", n_outputs)]
    graph = helper.make_graph([node], MODEL, *sides, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())


@dataclass(frozen=True)
class _Tester:
    """Runs load tests against the server of the trivial model."""

    folder: Path
    ports: Ports
    program: list[str]
    encoding: Encoding
    seed: int
    window_s: float
    timeouts: Timeouts

    def run(self, transport: Transport, rate_per_s: float) -> LightRun:
        before = _totals(self.ports.metrics_url)
        report = self._loaded(transport, rate_per_s)
        after = _totals(self.ports.metrics_url)
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        n, n_batches = grown["requests"], grown["execute_n"]
        if n < 1 or n_batches < 1:
            raise ProcessFailed("loadtest", "sent no request to the server", "")
        batch_s = sum(grown[phase] for phase in _BATCH_PHASES) / n_batches
        return LightRun(rate_per_s, grown["cpu"] / n, batch_s, report)

    def _loaded(self, transport: Transport, rate_per_s: float) -> Spread:
        slo, report = self.folder / "slo.yaml", self.folder / "report.json"
        slo.write_text(json.dumps(self._slo(rate_per_s)), "utf-8")
        report.unlink(missing_ok=True)
        port = self.ports.http_port if transport == "rest" else self.ports.grpc_port
        scheme = "http" if transport == "rest" else "grpc"
        command = [*self.program, "loadtest", str(slo), "--model", MODEL, "--json", str(report)]
        command += ["--target", f"{scheme}://127.0.0.1:{port}", "--no-server-metrics"]
        command += ["--seed", str(self.seed), "--warmup-s", str(WARMUP_S)]
        seconds = WARMUP_S + self.window_s + self.timeouts.loadtest_s
        ended = subprocess.run(  # noqa: S603 - our own command, as a list
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
        if not report.is_file():
            said = ended.stderr.decode("utf-8", "replace")[-2_000:].strip()
            raise ProcessFailed("loadtest", f"ended with exit code {ended.returncode}", said)
        return latency_of(LoadTestReport.model_validate_json(read_bytes(report)))

    def _slo(self, rate_per_s: float) -> dict[str, object]:
        """Nothing is asked of it, a report is wanted."""
        return {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": MODEL,
            "latency": {"threshold_ms": 1_000},
            "workload": {"rate_per_s": rate_per_s, "encoding": self.encoding},
            "window_s": self.window_s,
        }


def latency_of(report: LoadTestReport) -> Spread:
    """The distribution in a load test's report. Raises ProcessFailed where too many requests got
    no good answer for one."""
    points = [(point.quantile, point.latency_s) for point in report.curve]
    good = [(share, seconds) for share, seconds in points if seconds is not None]
    if len(good) < 2 or good[-1][0] < 0.99:
        raise ProcessFailed("loadtest", "got no answer to more than 1 % of its requests", "")
    shares, seconds = zip(*good, strict=True)
    at_levels = np.interp(LEVELS, shares, seconds)
    return Spread(tuple(np.maximum.accumulate(at_levels).tolist()))


def _totals(url: str) -> dict[str, float]:
    """Processor seconds, requests, and batches with their phases' seconds, since the start."""
    import urllib.request

    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
        text = answer.read(_MAX_METRICS_BYTES).decode("utf-8")
    totals = dict.fromkeys(("cpu", "requests", "execute_n", *_BATCH_PHASES), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            phase = sample.labels.get("phase", "")
            if sample.name == "process_cpu_seconds_total":
                totals["cpu"] += sample.value
            elif sample.name == "trimserve_request_duration_seconds_count":
                totals["requests"] += sample.value
            elif sample.name == "trimserve_phase_duration_seconds_sum" and phase in totals:
                totals[phase] += sample.value
            elif sample.name == "trimserve_phase_duration_seconds_count" and phase == "execute":
                totals["execute_n"] += sample.value
    return totals


def _mixed(spreads: Sequence[Spread]) -> Spread:
    shares = (np.arange(_N_MIXED) + 0.5) / _N_MIXED
    each: list[FloatArray] = [np.interp(shares, LEVELS, one.seconds) for one in spreads]
    return Spread.of(np.concatenate(each)) if len(spreads) > 1 else spreads[0]


def _spread(stored: Mapping[str, Any]) -> Spread:
    return Spread(tuple(stored["seconds"]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pin(core: int | None) -> None:
    """This thread alone."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def _n_to_fill(core: int | None) -> int:
    if core is not None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work_until(end_s: float) -> None:
    while time.monotonic() < end_s:
        pass
