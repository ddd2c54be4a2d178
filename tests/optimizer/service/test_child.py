"""A job's process: when its worker dies, and when it has nowhere to build."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from optimizer.execution.cluster import Cluster
from optimizer.service.child import EXIT_USAGE, Order
from optimizer.service.running import ChildLimits, Running, child_environment
from tests.optimizer.tiny_study import write_study

CHILD = """
import subprocess, sys
from optimizer.service.child import end_with_worker
server = subprocess.Popen(
    [sys.executable, "-c", sys.argv[2]], start_new_session=True, stdout=subprocess.PIPE
)
print(server.pid, int(server.stdout.readline()), flush=True)
end_with_worker(int(sys.argv[1]))
"""
SERVER = """
import subprocess
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
input()
"""


def test_a_child_ends_with_its_worker_and_with_all_that_it_started() -> None:
    lifeline, worker = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(lifeline), SERVER],
        pass_fds=[lifeline], start_new_session=True, stdout=subprocess.PIPE,
        stdin=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        os.close(lifeline)
        assert child.stdout is not None
        started = [psutil.Process(int(pid)) for pid in child.stdout.readline().split()]
        assert [one.is_running() for one in started] == [True, True]
        assert child.poll() is None
        os.close(worker)
        _, alive = psutil.wait_procs([psutil.Process(child.pid), *started], timeout=60)
        for one in alive:
            one.kill()
        assert alive == []


@pytest.mark.full  # takes a while
def test_what_a_killed_child_has_started_ends_with_it(tmp_path: Path) -> None:
    spec = write_study(tmp_path)
    code = "import subprocess\nsubprocess.run(['sleep', '600'], start_new_session=True)\n"
    (tmp_path / "tiny.py").write_text(code)
    (tmp_path / "out").mkdir()
    order = Order("optimization", str(spec), str(tmp_path / "out"), -1, -1)
    child = Running(
        replace(order, store=str(tmp_path / "store.sqlite")), tmp_path / "order.json",
        ChildLimits(), os.environ,
    )  # fmt: skip
    try:
        started: list[psutil.Process] = []
        deadline_s = time.monotonic() + 120
        while not started and time.monotonic() < deadline_s:
            time.sleep(0.2)
            assert child.broken_limit() is None
            found = psutil.Process(child.pid).children(recursive=True)
            started = [one for one in found if one.name() == "sleep"]
        assert started
        assert child.broken_limit() is None
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.close()
    _, alive = psutil.wait_procs(started, timeout=30)
    for one in alive:
        one.kill()
    assert alive == []


@pytest.mark.full  # takes a while
def test_a_study_on_a_cluster_that_cant_be_reached_is_told_to_the_jobs_author(
    tmp_path: Path,
) -> None:
    lifeline, worker = os.pipe()
    events, events_in = os.pipe()
    (tmp_path / "out").mkdir()
    order = Order(
        kind="optimization", spec=str(write_study(tmp_path)), out=str(tmp_path / "out"),
        lifeline=lifeline, events=events_in, store=str(tmp_path / "store.sqlite"),
        cluster=asdict(Cluster("127.0.0.1:1")),
    )  # fmt: skip
    order.write(tmp_path / "order.json")
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "optimizer.service.child", str(tmp_path / "order.json")],
        pass_fds=[lifeline, events_in], env=child_environment(os.environ), timeout=300,
        check=False,
    )  # fmt: skip
    for descriptor in (lifeline, worker, events_in):
        os.close(descriptor)
    with os.fdopen(events) as told:
        *_, last = map(json.loads, told)
    assert ended.returncode == EXIT_USAGE
    assert last["kind"] == "error"
    assert "Ray cluster 127.0.0.1:1: can't be reached" in last["payload"]["message"]
