"""A worker: plays the part of a plan that a master gives it, once, and ends.

Locust's runner connects, tells that it lives, and starts the user; the plan, the word to go on and
the samples are messages of ours.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from locust.env import Environment  # isort: skip

import gevent
from gevent.event import AsyncResult

from loadtest.generator import messages
from loadtest.generator.files import allow_open_files
from loadtest.generator.finish import Finish
from loadtest.generator.run import EXIT_DEFECT, EXIT_INTERRUPTED, Run, longest_s, user_class
from loadtest.generator.stopping import on_signals

EXIT_NO_MASTER = 69
START_S = 120.0
"""How long the others may take to warm up, beside what the plan says."""


def work(host: str, port: int) -> int:
    """Wait for the master, play the part that it gives; returns the exit code."""
    environment = Environment()
    user = user_class()
    environment.user_classes = [user]
    try:
        runner = environment.create_worker_runner(host, port)
    except ConnectionError:
        sys.stderr.write(f"no master answers at {host}:{port}\n")
        return EXIT_NO_MASTER
    on_signals(runner.quit)
    with tempfile.TemporaryDirectory(prefix="trimserve-worker-") as folder:
        part = Part(environment, runner, user, Path(folder))
        runner.register_message(messages.PLAN, part.hear_plan)
        runner.register_message(messages.GO, part.hear_go)
        # By now it is heard; a plan that came with the acknowledgment wouldn't have been.
        runner.send_message(messages.HELLO)
        # Until the master says quit, or isn't heard any more.
        runner.greenlet.join()
    return EXIT_INTERRUPTED if part.run is None else part.run.exit_code


class Part:
    """What the master says to this worker; and the parent of its run, which answers."""

    def __init__(self, environment: Environment, runner: Any, user: Any, folder: Path) -> None:
        self._environment = environment
        self._runner = runner
        self._user = user
        self._folder = folder
        self._start_s: AsyncResult[float] = AsyncResult()
        self.run: Run | None = None

    def hear_plan(self, msg: Any, **_: object) -> None:
        plan = messages.plan_of(msg.data, self._folder)
        allow_open_files(plan.max_in_flight)
        self.run = self._user.run_to_play = Run(plan, self, self._environment)
        gevent.spawn(self._watch, self.run)
        self._runner.send_message(messages.READY)

    def hear_go(self, msg: Any, **_: object) -> None:
        self._start_s.set(messages.start_of(msg.data))

    def warm(self, n_sent: int, n_bad: int) -> float:
        self._runner.send_message(messages.WARM, {"n_sent": n_sent, "n_bad": n_bad})
        start_s: float = self._start_s.get()
        return start_s

    def progress(self, n_done: int, n_bad: int) -> None:
        self._runner.send_message(messages.PROGRESS, {"n_done": n_done, "n_bad": n_bad})

    def finished(self, finish: Finish) -> None:
        message = messages.finish_message(finish, self._folder)
        self._runner.send_message(messages.FINISHED, message)

    def _watch(self, run: Run) -> None:
        """Tell the master of a defect, and never go on for ever."""
        if not run.over.wait(longest_s(run.plan) + START_S):
            run.exit_code, run.trace = EXIT_DEFECT, "the run didn't end in its time"
        if run.exit_code == EXIT_DEFECT:
            sys.stderr.write(run.trace + "\n")
            self._runner.send_message(messages.DEFECT, {"trace": run.trace})
