"""Whom a playing process reports to: the command by pipes, or a master by Locust's messages."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import gevent

from loadtest.generator.finish import Finish
from loadtest.plan import SAMPLES_FILE
from loadtest.samples import save_samples

LEAD_S = 0.05
"""The first arrival is at least this far ahead when a schedule starts."""


class Abandoned(Exception):
    """The parent is gone, or doesn't want the load any more."""


class Parent(Protocol):
    def warm(self, n_sent: int, n_bad: int) -> float:
        """The warm-up has drained; waits for the word to go on, and gives the window's start on
        time.monotonic(). Raises Abandoned."""

    def progress(self, n_done: int, n_bad: int) -> None:
        """Raises Abandoned."""

    def finished(self, finish: Finish) -> None: ...


class PipeParent:
    """JSON lines on standard output, and a line on standard input as the word to go on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def warm(self, n_sent: int, n_bad: int) -> float:
        tell("warm", n_sent=n_sent, n_bad=n_bad)
        await_word()
        start_s = time.monotonic() + LEAD_S
        tell("started", start_s=start_s)
        return start_s

    def progress(self, n_done: int, n_bad: int) -> None:
        tell_progress(n_done, n_bad)

    def finished(self, finish: Finish) -> None:
        tell_finished(finish, self._folder)


def await_word() -> None:
    """Wait for a line on standard input, while other greenlets run. Raises Abandoned."""
    if not gevent.get_hub().threadpool.apply(sys.stdin.readline):
        raise Abandoned


def tell(event: str, **content: Any) -> None:
    """One line for the command that started this process."""
    sys.stdout.write(json.dumps({"event": event, **content}) + "\n")
    sys.stdout.flush()


def tell_progress(n_done: int, n_bad: int) -> None:
    """Raises Abandoned where nobody listens."""
    try:
        tell("progress", n_done=n_done, n_bad=n_bad)
    except OSError as error:
        raise Abandoned from error


def tell_finished(finish: Finish, folder: Path) -> None:
    save_samples(finish.samples, folder / SAMPLES_FILE)
    tell(
        "finished",
        errors=finish.errors,
        cpu_share=finish.cpu_share,
        process_cores=finish.process_cores,
    )
