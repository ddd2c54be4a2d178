"""The optimizer's service under many jobs and many who follow them.

    python -m benchmarks.service [--jobs 1000] [--followers 100] [--seconds 60] [--database URL]

The service runs by its command, without workers; this process stands in for them: it claims as
many jobs as there are followers and tells events of them, a fixed number in a second over all,
through the ledger as workers do. Each follower holds a stream of server-sent events of one job, by
the Python client; a hundred threads of it share this process. A client in a process of its own
lists the newest hundred jobs again and again. Printed: the latency of lists, what followers missed
or had twice, how late an event came, and the service's memory. All of it on loopback and on one
machine, whose cores service, followers and ledger share.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from optimizer.client import Client
from optimizer.service.database import Database
from optimizer.service.ledger import Ledger
from optimizer.service.records import Claim

LEASE_S = 600.0
LIST_EVERY_S = 0.1
EVENTS_PER_S = 100.0
PATIENCE_S = 60.0
SLO: dict[str, Any] = {
    "apiVersion": "trimserve/v1", "kind": "SLO", "name": "none",
    "latency": {"quantile": 0.9, "threshold_ms": 50}, "workload": {"rate_per_s": 10},
    "success_ratio": 0.99, "window_s": 10,
}  # fmt: skip


@dataclass
class Followed:
    """What one follower saw."""

    numbers: list[int] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--followers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--database", help="URL; a SQLite file without")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        database = given.database or str(folder / "jobs.sqlite")
        with served(folder, database, given.jobs) as (url, process):
            memory = [process.memory_info().rss]
            submit_all(url, folder, given.jobs)
            memory.append(process.memory_info().rss)
            follow_all(url, database, given)
            memory.append(process.memory_info().rss)
        shown = ", ".join(f"{one / 1e6:.0f}" for one in memory)
        print(f"memory of the service: {shown} MB (at the start, all submitted, at the end)")


@contextlib.contextmanager
def served(folder: Path, database: str, n_jobs: int) -> Iterator[tuple[str, psutil.Process]]:
    command = [
        sys.executable, "-m", "trimserve", "service", "run", "--data", str(folder / "data"),
        "--database", database, "--port", "0", "--grpc-port", "0", "--workers", "0",
        "--max-open-jobs", str(n_jobs + 1),
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        port = json.loads(process.stdout.readline())["http_port"]
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def submit_all(url: str, folder: Path, n_jobs: int) -> None:
    for name in ("m.onnx", "d.npz"):
        (folder / name).write_bytes(name.encode())
    with Client(url) as client:
        model, data = (client.upload(folder / name) for name in ("m.onnx", "d.npz"))
        spec = {
            "apiVersion": "trimserve/v1", "kind": "Optimization", "name": "none", "slo": SLO,
            "model": {"onnx": model}, "budget": {"wall_clock_s": 60, "trials": 2},
            "data": {"format": "numpy", "validation": {"path": data}, "test": {"path": data}},
            "target": {"price_per_core_hour": 0.04},
        }  # fmt: skip
        started_s = time.monotonic()
        for _ in range(n_jobs):
            client.submit(spec)
    spent_s = time.monotonic() - started_s
    print(f"{n_jobs} jobs submitted by one client: {n_jobs / spent_s:.0f}/s", flush=True)


def follow_all(url: str, database: str, given: argparse.Namespace) -> None:
    ledger = Ledger(Database(database))
    claims = [claimed(ledger) for _ in range(given.followers)]
    followed = {one.job.id: Followed() for one in claims}
    # A process of its own: what it times isn't what a hundred threads wait for in this one.
    alone = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with alone, ThreadPoolExecutor(given.followers) as pool:
        streams = [pool.submit(follow, url, job_id, one) for job_id, one in followed.items()]
        time.sleep(3)  # until all are connected
        lists = alone.submit(list_for, url, given.seconds)
        n_told = tell_all(ledger, claims, given.seconds)
        for one in claims:
            ledger.fail(one.job.id, one.lease.token, "the benchmark is over")
        for stream in streams:
            stream.result(PATIENCE_S)
        listed_s = np.array(lists.result(PATIENCE_S)) * 1e3
    report(ledger, followed, n_told, listed_s)


def claimed(ledger: Ledger) -> Claim:
    found = ledger.claim("benchmark", LEASE_S)
    assert found is not None
    return found


def tell_all(ledger: Ledger, claims: list[Claim], seconds: float) -> int:
    """Events at their rate, job after job, each with the time at which it was told."""
    begun_s, n = time.monotonic(), 0
    while time.monotonic() < begun_s + seconds:
        one = claims[n % len(claims)]
        event = ("phase", {"name": f"step {n}", "at_s": time.time()})
        ledger.tell(one.job.id, one.lease.token, [event])
        n += 1
        time.sleep(max(0.0, begun_s + n / EVENTS_PER_S - time.monotonic()))
    return n


def follow(url: str, job_id: str, into: Followed) -> None:
    with Client(url) as client:
        for event in client.follow(job_id):
            into.numbers.append(event["number"])
            told_s = event["payload"].get("at_s")
            if told_s is not None:
                into.late_s.append(time.time() - told_s)


def list_for(url: str, seconds: float) -> list[float]:
    """Seconds of each list of the newest hundred."""
    found, until_s = [], time.monotonic() + seconds
    with Client(url) as client:
        while time.monotonic() < until_s:
            started_s = time.perf_counter()
            page = list(islice(client.jobs(limit=100), 100))
            found.append(time.perf_counter() - started_s)
            assert len(page) == 100
            time.sleep(LIST_EVERY_S)
    return found


def report(
    ledger: Ledger, followed: dict[str, Followed], n_told: int, listed_ms: np.ndarray
) -> None:
    wrong = {
        job_id
        for job_id, one in followed.items()
        if one.numbers != list(range(1, ledger.job(job_id).n_events + 1))
    }
    late_ms = np.concatenate([one.late_s for one in followed.values()]) * 1e3
    p50, p99 = np.quantile(listed_ms, [0.5, 0.99])
    print(f"lists of 100 jobs: {len(listed_ms)}, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    p50, p99 = np.quantile(late_ms, [0.5, 0.99])
    print(
        f"events: {n_told} told, {len(late_ms)} followed, late p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    )
    print(f"followers that missed an event, had one twice or in another order: {len(wrong)}")


if __name__ == "__main__":
    main()
