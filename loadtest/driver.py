"""Run the generator as a child process, so that Locust never patches this one.

With workers the child is their master, and those of this machine are children too. Speaks the
child's protocol of JSON lines and knows no terminal: progress goes to callbacks.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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


@dataclass(frozen=True)
class Workers:
    """So many processes share the load."""

    n: int
    bind: str | None = None
    """HOST:PORT where those of other machines connect; none: they are started here"""


@dataclass(frozen=True)
class Listener:
    """Called as the child goes on."""

    on_warm: Callable[[Warmed], None]
    """between warm-up and measurement, while no request is in flight"""
    on_progress: Callable[[Progress], None]
    on_workers: Callable[[int, int], None]
    """how many workers are connected, of how many"""
    on_start: Callable[[float], None]
    """the window's start on time.monotonic(), shortly before it"""


def play(
    plan: Plan,
    folder: Path,
    listener: Listener,
    workers: Workers | None = None,
    web: str | None = None,
) -> Played:
    """Play the plan; `folder` is an empty one for the files of this run, `web` the HOST:PORT of
    Locust's interface.

    Raises GeneratorFailed. A KeyboardInterrupt ends the children before it passes on.
    """
    save_plan(plan, folder)
    with ExitStack() as stack:
        child = _start(("play", str(folder), *_options(workers, web)), folder / LOG_FILE)
        stack.callback(stop, child)
        try:
            finished = _follow(child, folder, listener, workers, stack)
            code = child.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise GeneratorFailed(f"the load generator didn't end within {STOP_S:g} s") from error
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0 or finished is None:
        raise GeneratorFailed(f"the load generator ended with {code}:\n{_log_end(folder)}")
    errors = {int(status): text for status, text in finished.pop("errors").items()}
    return Played(load_samples(folder / SAMPLES_FILE), errors, **finished)


def work(master: str) -> int:
    """Play one part of a master's plan in a child; gives its exit code."""
    child = _start(("work", "--master", master), None)
    try:
        return child.wait()
    finally:
        stop(child)


def _options(workers: Workers | None, web: str | None) -> Iterator[str]:
    if workers is not None:
        yield from ("--workers", str(workers.n))
        if workers.bind is not None:
            yield from ("--bind", workers.bind)
    if web is not None:
        yield from ("--web", web)


def _start(arguments: Sequence[str], log: Path | None) -> "subprocess.Popen[str]":
    with ExitStack() as stack:
        return subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", MODULE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if log else None,
            stderr=stack.enter_context(log.open("wb")) if log else None,
            text=True,
            # Ctrl-C reaches this process only, which then asks the child to stop.
            start_new_session=True,
        )


def _follow(
    child: "subprocess.Popen[str]",
    folder: Path,
    listener: Listener,
    workers: Workers | None,
    stack: ExitStack,
) -> dict[str, Any] | None:
    """Until the child's output ends; gives what it said last, where it finished."""
    finished = None
    for message in _messages(child):
        event = message.pop("event")
        if event == "listening" and workers is not None and workers.bind is None:
            for index in range(workers.n):
                given = ("work", "--master", f"127.0.0.1:{message['port']}")
                worker = _start(given, folder / f"worker-{index}.log")
                stack.callback(stop, worker)
        elif event == "workers":
            listener.on_workers(message["n"], message["n_wanted"])
        elif event == "warm":
            listener.on_warm(Warmed(**message))
            _answer(child)
        elif event == "started":
            listener.on_start(message["start_s"])
        elif event == "progress":
            listener.on_progress(Progress(**message))
        elif event == "failed":
            raise GeneratorFailed(f"the load generator failed: {message['message']}")
        elif event == "finished":
            finished = message
    return finished


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
    logs = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.log"))]
    text = "\n".join(log[-MAX_LOG_CHARACTERS:].strip() for log in logs)
    return text.strip() or "(its log is empty)"
