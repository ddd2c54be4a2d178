"""The service's processes: the front end with the workers beside it, and a worker on its own.

Each runs until a signal ends it. What only one of them needs it imports itself. Options and exit
codes are the command line's.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.service.addresses import Stores
from optimizer.service.blobs import Blobs
from optimizer.service.telemetry import telemetry

if TYPE_CHECKING:
    from optimizer.service.app import Settings
    from optimizer.service.database import Database
    from optimizer.service.worker import WorkerOptions

_LIFELINE = "TRIMSERVE_LIFELINE"
_RETRY_S = 2.0


@dataclass(frozen=True)
class Listening:
    """Where the front end listens; ports 0 for any. `tls` is a certificate's file and its key's."""

    host: str
    port: int
    grpc_port: int
    tls: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Workplace:
    """What a worker works on, beside its options."""

    database: str
    blobs: str
    stores: Stores
    metrics_port: int | None = None


def run_service(
    settings: "Settings", listening: Listening, n_workers: int, arguments: Sequence[str]
) -> None:
    """Serve, with `n_workers` workers of these arguments beside it.

    Nothing is started before database and stores answer. Raises StoreInvalid,
    DatabaseUnavailable, StoreUnavailable, TelemetryUnusable, and OSError where it can't listen."""
    import asyncio

    from optimizer.service.app import make_parts
    from optimizer.service.server import serve

    at = (listening.host, listening.port, listening.grpc_port, listening.tls)
    with telemetry(os.environ, "trimserve-service") as traces:
        parts = replace(make_parts(settings), telemetry=traces)
        try:
            with _workers(n_workers, arguments):
                asyncio.run(serve(parts, settings, *at, _announce))
        finally:
            parts.database.close()


def run_worker(options: "WorkerOptions", place: Workplace) -> None:
    """Take jobs until SIGTERM or SIGINT, or until the service that has started it ends; before the
    database answers, wait for it. Raises StoreInvalid, StoreUnavailable, TelemetryUnusable."""
    from prometheus_client import start_http_server

    from optimizer.service.database import Database
    from optimizer.service.ledger import Ledger
    from optimizer.service.metrics import PrometheusWorkerMetrics
    from optimizer.service.uploads import Limits, Uploads
    from optimizer.service.worker import Worker

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _end_with_parent(stop)
    database = Database(place.database)
    _migrate(database, stop)
    blobs = Blobs(place.blobs)
    metrics = PrometheusWorkerMetrics()
    if place.metrics_port is not None:
        start_http_server(place.metrics_port, registry=metrics.registry)
    worker = Worker(
        Ledger(database), Uploads(database, blobs, Limits()), blobs, place.stores, options,
        os.environ, metrics,
    )  # fmt: skip
    with telemetry(os.environ, "trimserve-worker"):
        worker.run(stop)
    database.close()


def _migrate(database: "Database", stop: threading.Event) -> None:
    from optimizer.service.database import DatabaseUnavailable

    while not stop.is_set():
        try:
            database.migrate()
            return
        except DatabaseUnavailable as error:
            sys.stderr.write(f"waiting for the database: {error}\n")
            stop.wait(_RETRY_S)


def _announce(ports: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _workers(n: int, arguments: Sequence[str]) -> Iterator[None]:
    """Worker processes beside the service, started again where one dies, ended with it."""
    done = threading.Event()
    lifeline_out, lifeline_in = os.pipe()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-P", "-m", "trimserve", "service", "worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(lifeline_out,),
            env={**os.environ, _LIFELINE: str(lifeline_out)},
        )

    children = [start() for _ in range(n)]

    def watch() -> None:
        while not done.wait(1.0):
            for index, child in enumerate(children):
                if child.poll() is not None:
                    sys.stderr.write(f"a worker ended with {child.returncode}: starting another\n")
                    done.wait(1.0)
                    children[index] = start()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        for child in children:
            child.terminate()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(15.0)
            child.kill()
        os.close(lifeline_in)
        os.close(lifeline_out)


def _end_with_parent(stop: threading.Event) -> None:
    """A worker that the service has started ends with it, however that ends."""
    held = os.environ.pop(_LIFELINE, "")
    if not held.isdigit():
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(int(held), 1)
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
