"""Run the generator as a child process, so that Locust never patches this one.

Speaks the child's protocol of JSON lines and knows no terminal: progress goes to a callback.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtest.plan import SAMPLES_FILE, Plan, save_plan
from loadtest.samples import Samples, load_samples

MODULE = "loadtest.generator"
NEEDED = ("locust", "geventhttpclient")
STOP_S = 10.0
"""How long an interrupted or finished child may take to end."""
LOG_FILE = "generator.log"
MAX_LOG_CHARACTERS = 4000
EXIT_INTERRUPTED = 130


class GeneratorMissing(Exception):
    """Locust isn't installed; `str()` says how to install it."""


class GeneratorFailed(Exception):
    """The child ended without a result; `str()` holds the end of its log."""


@dataclass(frozen=True)
class Warmed:
    """The warm-up has drained."""

    n_sent: int
    n_bad: int


@dataclass(frozen=True)
class Progress:
    """Requests that have ended so far."""

    n_done: int
    n_bad: int


@dataclass(frozen=True)
class Played:
    """What the generator brings home."""

    samples: Samples
    errors: dict[int, str]
    """by status, the first error text seen"""
    cpu_share: float
    """of one core, used by the sending thread while the schedule played"""
    process_cores: float
    """used by the whole process, threads of the gRPC library included"""


def check_generator() -> None:
    """Raises GeneratorMissing without importing what it looks for."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise GeneratorMissing(
            f"the load generator needs {' and '.join(missing)}: pip install 'trimserve[loadtest]'"
        )


def play(
    plan: Plan,
    folder: Path,
    on_warm: Callable[[Warmed], None],
    on_progress: Callable[[Progress], None],
) -> Played:
    """Play the plan; `folder` is an empty one for the files of this run.

    `on_warm` is called between warm-up and measurement, while no request is in flight. Raises
    GeneratorFailed. A KeyboardInterrupt ends the child before it passes on.
    """
    save_plan(plan, folder)
    with (folder / LOG_FILE).open("wb") as log:
        child = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", MODULE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Ctrl-C reaches this process only, which then asks the child to stop.
            start_new_session=True,
        )
    finished: dict[str, Any] | None = None
    try:
        for message in _messages(child):
            event = message.pop("event")
            if event == "warm":
                on_warm(Warmed(**message))
                _answer(child)
            elif event == "progress":
                on_progress(Progress(**message))
            elif event == "finished":
                finished = message
        code = child.wait(STOP_S)
    except subprocess.TimeoutExpired as error:
        raise GeneratorFailed(f"the load generator didn't end within {STOP_S:g} s") from error
    finally:
        stop(child)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0 or finished is None:
        raise GeneratorFailed(f"the load generator ended with {code}:\n{_log_end(folder)}")
    errors = {int(status): text for status, text in finished.pop("errors").items()}
    return Played(load_samples(folder / SAMPLES_FILE), errors, **finished)


def stop(child: "subprocess.Popen[str]") -> None:
    """End the child and close its pipes: ask first, then insist."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def _messages(child: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert child.stdout is not None
    for line in child.stdout:
        yield json.loads(line)


def _answer(child: "subprocess.Popen[str]") -> None:
    """Let the measurement begin; a child that has died by now is noticed by its exit code."""
    assert child.stdin is not None
    try:
        child.stdin.write("go\n")
        child.stdin.flush()
    except BrokenPipeError:
        return


def _log_end(folder: Path) -> str:
    text = (folder / LOG_FILE).read_text("utf-8", "replace")
    return text[-MAX_LOG_CHARACTERS:].strip() or "(its log is empty)"
