"""A job's process, when its worker dies."""

import os
import subprocess
import sys

import psutil

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
