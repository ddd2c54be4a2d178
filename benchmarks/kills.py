"""Kills of the service, its workers and its database at random moments, and what is left of it.

    python -m benchmarks.kills [--kills 50] [--seed 0] [--clients 3]

PostgreSQL (Debian's package), the service and two workers run as processes. Clients submit studies
of a tiny network, and publish what each has found. Meanwhile one of the four is killed (SIGKILL; of
PostgreSQL every process) and started again, over and over: service, worker and database equally
often, in an order and at moments drawn from the seed. Then everything may come to its end, and is
looked at: a job for each submission, which has succeeded, once by its events; versions that are
whole, one for each wish; no process, no folder of work left over. Exit code 1 where something is
wrong.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import urllib3
import yaml

from optimizer.client import Client, ServiceError, Unreachable
from serve.artifact import MANIFEST, read_manifest, verify_files
from tests.optimizer.postgresql import Cluster, running_cluster
from tests.optimizer.tiny_study import write_study

T = TypeVar("T")
LEASE_S = 5.0
MAX_AFTER_S = 8.0
MAX_DOWN_S = 2.0
PATIENCE_S = 240.0
WORKERS = ("worker-1", "worker-2")


@dataclass
class World:
    """What runs, and where. `problems` are what shouldn't have happened."""

    folder: Path
    cluster: Cluster
    database: str
    port: int
    up: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str) -> None:
        data, shared = self.folder / "data", ["--database", self.database]
        shared += ["--data", str(data), "--repository", f"prod={self.folder / 'prod'}"]
        if name == "service":
            command = ["run", "--port", str(self.port), "--grpc-port", "0", "--workers", "0"]
            command += ["--allow-factory", "tiny:build"]
        else:
            command = ["worker", "--name", name, "--lease-s", str(LEASE_S)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.up[name] = subprocess.Popen(
                [sys.executable, "-m", "trimserve", "service", *command, *shared],
                cwd=self.folder, stdout=log, stderr=log,
                env={**os.environ, "PYTHONPATH": self.python_path},
            )  # fmt: skip

    @property
    def python_path(self) -> str:
        return f"{self.folder}{os.pathsep}{Path(__file__).parents[1]}"

    def kill(self, name: str) -> None:
        if name == "database":
            pid_file = self.cluster.folder / "data" / "postmaster.pid"
            kill_all(psutil.Process(int(pid_file.read_text().split()[0])))
            if self.ready() == 200:
                self.problems.append("the service says it is ready without its database")
            return
        process = self.up.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            _, alive = psutil.wait_procs(children, timeout=15)
            self.problems += [f"{one.pid} outlives {name}: {one.cmdline()}" for one in alive]
        process.wait()

    def restart(self, name: str) -> None:
        if name == "database":
            self.cluster.start()
        else:
            self.start(name)

    def ready(self) -> int:
        """The status of /readyz, 0 where nothing answers."""
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            answer = urllib3.request("GET", f"{self.url}/readyz", retries=False, timeout=40.0)
            return answer.status
        return 0

    def of_ours(self) -> list[psutil.Process]:
        """Processes that belong to this run."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.environ().get("PYTHONPATH") == self.python_path:
                    found.append(one)
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=3, help="each has one job open at a time")
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="trimserve-kills-") as scratch,
        running_cluster() as cluster,
    ):
        world = World(Path(scratch), cluster, cluster.create("kills"), free_port())
        write_study(world.folder, max_drop_points=90)
        try:
            for name in ("service", *WORKERS):
                world.start(name)
            jobs = played(world, given.clients, given.kills, random.Random(given.seed))
            look_at(world, jobs)
        finally:
            world.is_over.set()
            end(world)
        look_behind(world)
        for problem in world.problems:
            print(f"wrong: {problem}")
        if world.problems:
            for log in world.folder.glob("*.log"):
                print(log.name, log.read_text()[-3000:])
    print(f"{len(world.problems)} things are wrong")
    return 1 if world.problems else 0


def played(world: World, n_clients: int, n_kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Kill while clients submit, follow and publish; what became of each submission."""
    began_s = time.monotonic()
    until(world, lambda: world.ready() == 200, "the service is ready")
    with ThreadPoolExecutor(n_clients) as pool:
        clients = [pool.submit(client, world, number) for number in range(n_clients)]
        for index, name in enumerate(victims(n_kills, draw)):
            time.sleep(draw.uniform(0.5, MAX_AFTER_S))
            print(f"{time.monotonic() - began_s:6.1f} s: kill {index + 1}, {name}", flush=True)
            world.kill(name)
            time.sleep(draw.uniform(0.0, MAX_DOWN_S))
            world.restart(name)
        world.is_over.set()
        jobs = [job for one in clients for job in one.result(PATIENCE_S)]
    print(f"{time.monotonic() - began_s:6.1f} s: {len(jobs)} jobs have ended")
    return jobs


def victims(n: int, draw: random.Random) -> list[str]:
    kinds = [("service", "database", "worker")[index % 3] for index in range(n)]
    draw.shuffle(kinds)
    return [draw.choice(WORKERS) if kind == "worker" else kind for kind in kinds]


def client(world: World, number: int) -> list[dict[str, Any]]:
    """One job after the other, until the kills are over."""
    jobs: list[dict[str, Any]] = []
    with Client(world.url) as calls:
        files = {
            name: patiently(world, partial(calls.upload, world.folder / name))
            for name in ("tiny.safetensors", "train.npz", "validation.npz", "test.npz")
        }
        while not jobs or not world.is_over.is_set():
            spec = spec_of(world.folder, files, seed=1000 * number + len(jobs))
            key = f"job-{spec['seed']}"
            job = patiently(world, lambda: calls.submit(spec, verify=False, key=key))  # noqa: B023
            numbers = followed(world, calls, job["id"])
            ended = patiently(world, lambda: calls.job(job["id"]))["job"]  # noqa: B023
            if ended["state"] == "succeeded":
                patiently(world, lambda: calls.publish(job["id"], "prod", key=f"of-{key}"))  # noqa: B023
            jobs.append({"id": job["id"], "numbers": numbers})
    return jobs


def spec_of(folder: Path, files: dict[str, str], seed: int) -> dict[str, Any]:
    text = (folder / "spec.yaml").read_text()
    for name, reference in files.items():
        text = text.replace(name, reference)
    spec: dict[str, Any] = yaml.safe_load(text)
    spec["slo"] = yaml.safe_load((folder / "slo.yaml").read_text())
    spec["techniques"] = {"include": ["quantization", "compilation"]}
    return {**spec, "seed": seed}


def followed(world: World, calls: Client, job_id: str) -> list[int]:
    numbers: list[int] = []

    def follow() -> None:
        after = numbers[-1] if numbers else 0
        numbers.extend(event["number"] for event in calls.follow(job_id, after))

    patiently(world, follow)
    return numbers


def patiently(world: World, call: Callable[[], T]) -> T:
    """Until it is answered: what is killed comes back."""
    ends_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (ServiceError, Unreachable) as error:
            if getattr(error, "status", 503) not in (500, 503) or time.monotonic() > ends_s:
                raise
            if getattr(error, "status", 503) == 500:
                world.problems.append(f"an internal error: {error}")
        time.sleep(0.3)


def until(world: World, holds: Callable[[], bool], what: str) -> None:
    ends_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > ends_s:
            world.problems.append(f"not within {PATIENCE_S:g} s: {what}")
            return
        time.sleep(0.2)


def look_at(world: World, jobs: list[dict[str, Any]]) -> None:
    """While everything runs."""
    with Client(world.url) as calls:
        wishes = [one for job in jobs for one in calls.publications(job["id"])]

        def states() -> list[str]:
            return [one["state"] for job in jobs for one in calls.publications(job["id"])]

        until(world, lambda: set(states()) <= {"done"}, "every publication is done")
        here = list(calls.jobs(limit=100))
        if sorted(one["id"] for one in here) != sorted(one["id"] for one in jobs):
            world.problems.append(f"{len(jobs)} submissions are {len(here)} jobs")
        for job in jobs:
            world.problems += [f"job {job['id']}: {one}" for one in of_job(calls, job)]
        audit = json.loads(urllib3.request("GET", f"{world.url}/v1/audit?limit=500").data)
        for action in ("submit", "publish"):
            n = sum(one["action"] == action for one in audit)
            if n != len(jobs):
                world.problems.append(f"{n} times {action} in the audit, want {len(jobs)}")
        versions = {path.parent for path in (world.folder / "prod").glob(f"*/*/{MANIFEST}")}
        for version in versions:
            verify_files(version, read_manifest(version))
        numbers = set((world.folder / "prod").glob("*/[0-9]*"))
        if versions != numbers or len(versions) != len(wishes):
            world.problems.append(
                f"{len(wishes)} wishes, {len(numbers)} versions, {len(versions)} whole"
            )
        n_claims = sum(one["attempt"] for one in here)
        print(f"{len(here)} jobs, {n_claims} claims, {len(versions)} versions")


def of_job(calls: Client, job: dict[str, Any]) -> Iterator[str]:
    found = calls.job(job["id"])["job"]
    if found["state"] != "succeeded":
        told = [[event["at"], event["kind"], event["payload"]] for event in calls.follow(job["id"])]
        yield f"{found['state']}: {found['error']}; its events: {json.dumps(told)[:20_000]}"
        return
    if job["numbers"] != list(range(1, found["n_events"] + 1)):
        yield f"its follower saw {job['numbers']} of {found['n_events']}"
    states = [e["payload"]["state"] for e in calls.follow(job["id"]) if e["kind"] == "state"]
    if [one for one in states if one not in ("queued", "running")] != ["succeeded"]:
        yield f"its states were {states}"
    if states.count("running") != found["attempt"]:
        yield f"{states.count('running')} times running, {found['attempt']} attempts"
    if json.loads(calls.result(job["id"]))["outcome"] != found["outcome"]:
        yield "its result has another outcome"


def end(world: World) -> None:
    for process in world.up.values():
        process.send_signal(signal.SIGTERM)
    for process in world.up.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def look_behind(world: World) -> None:
    left = world.of_ours()
    world.problems += [f"{one.pid} is left over: {one.cmdline()}" for one in left]
    for one in left:
        one.kill()
    for name in ("work", "scratch"):
        folders = [one.name for one in (world.folder / "data" / name).glob("*") if one.is_dir()]
        if folders:
            world.problems.append(f"left in {name}: {folders}")


def kill_all(process: psutil.Process) -> None:
    """The parent first, so that it starts nothing in their place."""
    family = [process, *process.children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(family, timeout=10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
