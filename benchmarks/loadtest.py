"""Whether the load test is right, beside other tools on the same server at the same rate.

    python -m benchmarks.loadtest agreement --perf-analyzer PATH [--rounds 6] [--seconds 20]
    python -m benchmarks.loadtest omission [--seconds 60]
    python -m benchmarks.loadtest limits [--seconds 5]

agreement: latencies as NVIDIA's perf_analyzer sees them and as we do, Poisson arrivals, in
turns; the server is trimserve with a model of some milliseconds. The binary is in the wheel of
tritonclient 2.50.0 and wants Debian's libb64-0d, and libcudart.so.12 (the wheel
nvidia-cuda-runtime-cu12) in LD_LIBRARY_PATH.
omission: a server that stalls for one second in five, as an open queue would see it (simulated),
as we do, and as Locust's own waiting times do.
limits: the highest rate of one generator process that isn't inconclusive, on a core of its own,
with the server on the other: for REST nginx (Debian: nginx-light) that answers at once, for gRPC
the tests' stub. Where the server gives up first, the figure is a lower bound.

Everything is on loopback. The machine should have nothing else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from loadtest.session import Result, Settings, Watcher, run
from loadtest.slo import Slo
from loadtest.target import parse_target
from tests.loadtest.queues import stalled_sojourns

STUB = Path(__file__).parent.parent / "tests" / "loadtest" / "stub_server.py"
QUANTILES = (0.5, 0.9, 0.95, 0.99)
TURNS = 400
"""of a product of 64x64 matrices: some milliseconds on one thread"""
READY_S = 60.0
STALL_EVERY_S, STALL_S, SERVICE_S = 5.0, 1.0, 0.005
N_SIMULATED = 200
LOCUST_USERS = 10
LIMIT_RATES = (500, 1000, 1500, 2000, 3000, 4000, 5000, 6000, 8000, 10_000, 12_000)
Array = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("agreement")
    one.add_argument("--perf-analyzer", type=Path, required=True)
    one.add_argument("--protocol", choices=("http", "grpc"), default="http")
    one.add_argument("--rate", type=float, default=60.0)
    one.add_argument("--rounds", type=int, default=6)
    one.add_argument("--seconds", type=float, default=20.0)
    parts.add_parser("omission").add_argument("--seconds", type=float, default=60.0)
    parts.add_parser("limits").add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        PARTS[given.part](given, Path(scratch))


# --- agreement


def agreement(given: argparse.Namespace, scratch: Path) -> None:
    model = scratch / "work.onnx"
    onnx.save(work(), model)
    ours, theirs = [], []
    with served(model) as ports:
        address = f"127.0.0.1:{ports[f'{given.protocol}_port']}"
        for turn in range(given.rounds):
            latencies_s, rate = theirs_of(given, address, scratch)
            theirs.append(latencies_s)
            # It sends some percent less than it is told to, and a queue feels that.
            result = judged(f"{given.protocol}://{address}", "work", rate, given.seconds, seed=turn)
            ours.append(result.played.samples.latency_s)
            print(f"{rate:.2f}/s: {shown(ours[-1])} | {shown(theirs[-1])}", flush=True)
    print("| tool | requests | " + " | ".join(f"p{q * 100:g}" for q in QUANTILES) + " |")
    print("|---|---|" + "---|" * len(QUANTILES))
    for name, found in (("trimserve loadtest", ours), ("perf_analyzer", theirs)):
        together = np.concatenate(found)
        print(f"| {name} | {len(together)} | {shown(together)} |")
    ratios = np.quantile(np.concatenate(ours), QUANTILES) / np.quantile(
        np.concatenate(theirs), QUANTILES
    )
    print("| ratio | | " + " | ".join(f"{one:.3f}" for one in ratios) + " |")


def theirs_of(given: argparse.Namespace, address: str, scratch: Path) -> tuple[Array, float]:
    """Seconds from the actual send, of all requests in the export, and their rate."""
    export = scratch / "export.json"
    export.unlink(missing_ok=True)
    output_of(
        [
            str(given.perf_analyzer), "-m", "work", "-u", address, "-i", given.protocol, "--async",
            "--request-rate-range", f"{given.rate:g}", "--request-distribution", "poisson",
            # Three windows at least, all of which are stable enough for it.
            "--measurement-interval", f"{given.seconds * 1e3 / 3:.0f}", "--max-trials", "3",
            "-s", "900", "--shape", "x:64", "--profile-export-file", str(export),
        ],
        10 * given.seconds,
    )  # fmt: skip
    (experiment,) = json.loads(export.read_text())["experiments"]
    times_ns = np.array(
        [[one["timestamp"], one["response_timestamps"][0]] for one in experiment["requests"]]
    )
    sent_s, answered_s = times_ns.T / 1e9
    return answered_s - sent_s, (len(sent_s) - 1) / float(np.ptp(sent_s))


def work() -> onnx.ModelProto:
    """x FP32 [rows, 64] -> y FP32 [rows, 64]: the same work however many rows there are."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["more_out"]),
            helper.make_node("MatMul", ["state", "matrix"], ["product"]),
            helper.make_node("Tanh", ["product"], ["state_out"]),
        ],
        "turn",
        [
            value("turn", TensorProto.INT64, []),
            value("more", TensorProto.BOOL, []),
            value("state", TensorProto.FLOAT, [64, 64]),
        ],
        [value("more_out", TensorProto.BOOL, []), value("state_out", TensorProto.FLOAT, [64, 64])],
    )
    constants = {
        "matrix": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
        "yes": np.array(True),
        "turns": np.array(TURNS, np.int64),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["turns", "yes", "matrix"], ["end"], body=body),
            helper.make_node("MatMul", ["x", "end"], ["y"]),
        ],
        "work",
        [value("x", TensorProto.FLOAT, ["rows", 64])],
        [value("y", TensorProto.FLOAT, ["rows", 64])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# --- omission


def omission(given: argparse.Namespace, scratch: Path) -> None:
    rate = 100.0
    rows = [("an open queue, simulated", simulated_p95(rate, given.seconds), rate)]
    arguments = ("--service-s", f"{SERVICE_S}", "--stall-every-s", f"{STALL_EVERY_S}")
    with stub(*arguments, "--stall-s", f"{STALL_S}") as ports:
        url = f"http://127.0.0.1:{ports['rest']}"
        ours = judged(url, "stub", rate, given.seconds).played.samples.latency_s
        p95_s, n = float(np.quantile(ours, 0.95)), len(ours)
        rows.append(("trimserve loadtest", p95_s, n / given.seconds))
        rows += [
            (f"Locust, {wait}", *locust_p95(wait, rate, url, given.seconds, scratch))
            for wait in ("constant_throughput", "poisson")
        ]
    print("| how | requests/s | p95 | of the open queue's |\n|---|---|---|---|")
    for name, p95_s, rate_per_s in rows:
        print(f"| {name} | {rate_per_s:.1f} | {p95_s * 1e3:.0f} ms | {p95_s / rows[0][1]:.3f} |")


def simulated_p95(rate_per_s: float, seconds: float) -> float:
    """Seconds; the mean over draws of arrivals and of where in the cycle they begin."""
    found = []
    for seed in range(N_SIMULATED):
        rng = np.random.default_rng(seed)
        arrivals_s = np.sort(rng.uniform(0, seconds, round(rate_per_s * seconds)))
        first_s = rng.uniform(0, STALL_EVERY_S)
        latencies_s = stalled_sojourns(arrivals_s, SERVICE_S, STALL_EVERY_S, STALL_S, first_s)
        found.append(np.quantile(latencies_s, 0.95))
    return float(np.mean(found))


LOCUSTFILE = """
import json, sys
import gevent
from locust import FastHttpUser, constant_throughput, task
from locust import poisson
from locust.env import Environment
wait, rate, url, seconds, n_users = sys.argv[1], *sys.argv[2:]
rate, seconds, n_users = float(rate), float(seconds), int(n_users)
class One(FastHttpUser):
    host = url
    waits = {"constant_throughput": constant_throughput, "poisson": poisson}
    wait_time = waits[wait](rate / n_users)
    @task
    def infer(self):
        self.client.post("/v2/models/stub/infer", data=b"{}", name="infer")
del sys.argv[1:]
environment = Environment(user_classes=[One])
runner = environment.create_local_runner()
runner.start(n_users, spawn_rate=n_users)
gevent.sleep(2)
environment.stats.reset_all()
gevent.sleep(seconds)
entry = environment.stats.get("infer", "POST")
sys.stdout.write(json.dumps([entry.get_response_time_percentile(0.95) / 1e3,
                             entry.num_requests / seconds]))
sys.stdout.flush()
runner.quit()
"""


def locust_p95(
    wait: str, rate: float, url: str, seconds: float, scratch: Path
) -> tuple[float, float]:
    """Seconds by Locust's own statistics, and the requests/s that it sent."""
    script = scratch / "users.py"
    script.write_text(LOCUSTFILE)
    given = [wait, f"{rate}", url, f"{seconds}", f"{LOCUST_USERS}"]
    p95_s, rate_per_s = json.loads(
        output_of([sys.executable, str(script), *given], seconds + READY_S)
    )
    return p95_s, rate_per_s


# --- limits


NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off; default_type application/json; keepalive_requests 1000000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location = /v2/models/stub {{ return 200 '{metadata}'; }}
    location / {{ return 200 '{{"model_name":"stub","outputs":[]}}'; }}
  }}
}}
"""
METADATA = {
    "name": "stub",
    "versions": ["1"],
    "platform": "stub",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 4]}],
}


def limits(given: argparse.Namespace, scratch: Path) -> None:
    print("| transport | requests/s | lag p99 | of a core | verdict |\n|---|---|---|---|---|")
    cores = sorted(os.sched_getaffinity(0))
    for server in (nginx(scratch), pinned_stub()):
        with server as url:
            # The generator is a child, and inherits this process' core.
            os.sched_setaffinity(0, cores[1:2])
            for rate in LIMIT_RATES:
                if not is_within(url, rate, given.seconds):
                    break
            os.sched_setaffinity(0, cores)


def is_within(url: str, rate: float, seconds: float) -> bool:
    """Print a row; whether neither the generator nor the server gave up."""
    result = judged(url, "stub", rate, seconds, 0.5)
    samples, judgement = result.played.samples, result.judgement
    kinds = [one.kind for one in judgement.reasons]
    lag_ms = float(np.quantile(samples.lag_s, 0.99)) * 1e3
    print(
        f"| {url.split(':')[0]} | {int(samples.sent.sum()) / seconds:.0f} of {rate} | "
        f"{lag_ms:.2f} ms | {result.played.cpu_share:.0%} | "
        f"{judgement.outcome} {', '.join(kinds)} |",
        flush=True,
    )
    return judgement.outcome == "met"


@contextmanager
def nginx(scratch: Path) -> Iterator[str]:
    port = 18_777
    config = scratch / "nginx.conf"
    config.write_text(NGINX.format(folder=scratch, port=port, metadata=json.dumps(METADATA)))
    command = pinned(0, ["/usr/sbin/nginx", "-p", str(scratch), "-c", str(config)])
    with child(command):
        time.sleep(1)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def pinned_stub() -> Iterator[str]:
    with stub(core=0) as ports:
        yield f"grpc://127.0.0.1:{ports['grpc']}"


# --- ours, and the servers


def judged(
    url: str, model: str, rate: float, seconds: float, quantile: float = 0.9, seed: int = 0
) -> Result:
    """Half a second is the threshold: what is measured here is no promise."""
    slo = Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "benchmark",
            "latency": {"quantile": quantile, "threshold_ms": 500},
            "workload": {"rate_per_s": rate},
        }
    )
    settings = Settings(
        slo,
        model,
        (parse_target(url),),
        duration_s=seconds,
        seed=seed,
        server_metrics=False,
    )
    return run(settings, Watcher(ignore, ignore, ignore, ignore))


def ignore(*_: object) -> None:
    """Nobody watches."""


@contextmanager
def served(model: Path) -> Iterator[Mapping[str, int]]:
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "trimserve", "serve", "--model", str(model), *ports]
    with child(command) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())


@contextmanager
def stub(*arguments: str, core: int | None = None) -> Iterator[Mapping[str, int]]:
    command = [sys.executable, str(STUB), *arguments]
    with child(command if core is None else pinned(core, command)) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())


@contextmanager
def child(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def output_of(command: Sequence[str], limit_s: float) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=limit_s
    ).stdout


def pinned(core: int, command: Sequence[str]) -> list[str]:
    return ["taskset", "-c", str(sorted(os.sched_getaffinity(0))[core]), *command]


def shown(latencies_s: Array) -> str:
    return " | ".join(f"{one * 1e3:.2f} ms" for one in np.quantile(latencies_s, QUANTILES))


PARTS = {"agreement": agreement, "omission": omission, "limits": limits}

if __name__ == "__main__":
    main()
