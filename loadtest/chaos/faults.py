"""What each kind of action does. What was begun is undone, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import which
from typing import Any

from loadtest.chaos.process import Process, ProcessUnusable, open_process
from loadtest.chaos.profile import AnyAction, Command, Kill, OnProcess, Pause, Slow, Stop
from loadtest.target import Target

KILLED_WITHIN_S = 10.0
PERIOD_S = 0.02
"""Of the pauses of a slowed process."""
GUARD = "loadtest.chaos.guard"
GUARD_SPARE_S = 1.0
"""How much longer than it should a process may be paused before its guard resumes it."""
GUARD_ENDS_WITHIN_S = 10.0
LOOK_EVERY_S = 0.02
MAX_OUTPUT_CHARACTERS = 300


class ActionFailed(Exception):
    """An action that couldn't be done as it was asked for; `str()` says why."""


@dataclass(frozen=True)
class Stage:
    """Where an action takes place."""

    targets: tuple[Target, ...]
    over: threading.Event
    """set where the run is given up: what lasts is undone at once"""
    on_begin: Callable[[], None]
    """called at the moment from which recovery counts"""
    on_end: Callable[[], None]
    """called when the process was gone or runs again, or the last command has ended"""


def perform(action: AnyAction, stage: Stage) -> None:
    """Do it, and return when it is over. Raises ActionFailed."""
    try:
        DEEDS[type(action)](action, stage)
    except ProcessUnusable as error:
        raise ActionFailed(str(error)) from error


def check_action(action: AnyAction, targets: Sequence[Target]) -> None:
    """Find what is wrong before anything is measured. Raises ActionFailed."""
    if isinstance(action, Command):
        for argv in (action.command, action.undo):
            if argv is not None and which(argv[0]) is None:
                raise ActionFailed(f"got {argv[0]!r}, want a program that is installed")
        return
    try:
        _open(action, targets).close()
    except ProcessUnusable as error:
        raise ActionFailed(str(error)) from error


def kill(action: Kill, stage: Stage) -> None:
    with _process(action, stage) as process:
        stage.on_begin()
        process.send(signal.SIGKILL)
        if not process.ends_within(KILLED_WITHIN_S):
            raise ActionFailed(f"process {process.pid} is there {KILLED_WITHIN_S:g} s later")
        stage.on_end()


def stop(action: Stop, stage: Stage) -> None:
    with _process(action, stage) as process:
        stage.on_begin()
        process.send(signal.SIGTERM)
        deadline_s = time.monotonic() + action.within_s
        while not process.ends_within(LOOK_EVERY_S):
            if stage.over.is_set() or time.monotonic() > deadline_s:
                raise ActionFailed(f"process {process.pid} didn't end within {action.within_s:g} s")
        stage.on_end()


def pause(action: Pause, stage: Stage) -> None:
    with _process(action, stage) as process, _resumed(process, action.for_s, stage):
        stage.on_begin()
        _halt(process)
        stage.over.wait(action.for_s)


def slow(action: Slow, stage: Stage) -> None:
    with _process(action, stage) as process, _resumed(process, action.for_s, stage):
        stage.on_begin()
        end_s = time.monotonic() + action.for_s
        _halt(process)
        while not stage.over.wait(PERIOD_S * (1 - action.share)) and time.monotonic() < end_s:
            process.send(signal.SIGCONT)
            stage.over.wait(PERIOD_S * action.share)
            process.send(signal.SIGSTOP)


def command(action: Command, stage: Stage) -> None:
    stage.on_begin()
    began_s = time.monotonic()
    try:
        _run(action.command, action.timeout_s, stage.over)
        if action.for_s is not None:
            stage.over.wait(max(0.0, began_s + action.for_s - time.monotonic()))
    finally:
        # Even if the command failed: it may have done a part of what it was to do.
        if action.undo is not None:
            _run(action.undo, action.timeout_s, None)
        stage.on_end()


DEEDS: Mapping[type, Callable[[Any, Stage], None]] = {
    Kill: kill,
    Stop: stop,
    Pause: pause,
    Slow: slow,
    Command: command,
}


def _open(action: OnProcess, targets: Sequence[Target]) -> Process:
    return open_process(action.pid, action.pid_file, action.any_process, targets)


@contextmanager
def _process(action: OnProcess, stage: Stage) -> Iterator[Process]:
    process = _open(action, stage.targets)
    try:
        yield process
    finally:
        process.close()


def _halt(process: Process) -> None:
    process.send(signal.SIGSTOP)
    if not process.stops_within():
        raise ActionFailed(f"process {process.pid} didn't stop by SIGSTOP")


@contextmanager
def _resumed(process: Process, for_s: float, stage: Stage) -> Iterator[None]:
    """At the end, and by the guard where this process doesn't come to it."""
    guard = subprocess.Popen(  # noqa: S603 - our own module, no shell
        [sys.executable, "-m", GUARD, str(for_s + GUARD_SPARE_S)],
        stdin=subprocess.PIPE,
        stdout=process.descriptor,
        start_new_session=True,
    )
    try:
        yield
    finally:
        try:
            process.send(signal.SIGCONT)
            stage.on_end()
        finally:
            assert guard.stdin is not None
            guard.stdin.close()
            try:
                guard.wait(GUARD_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()


def _run(argv: tuple[str, ...], timeout_s: float, over: threading.Event | None) -> None:
    """Raises ActionFailed for anything but exit code 0 in time."""
    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.Popen(  # noqa: S603 - the user's own words, no shell
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise ActionFailed(f"{argv[0]} can't be run: {error.strerror}") from error
        code = _wait(child, timeout_s, over)
        if code is None:
            raise ActionFailed(f"{argv[0]} didn't end within {timeout_s:g} s")
        if code != 0:
            output.seek(max(0, output.seek(0, os.SEEK_END) - MAX_OUTPUT_CHARACTERS))
            said = output.read().decode("utf-8", "replace").strip()
            raise ActionFailed(f"{argv[0]} ended with {code}: {said or 'it said nothing'}")


def _wait(
    child: "subprocess.Popen[bytes]", timeout_s: float, over: threading.Event | None
) -> int | None:
    """The exit code; none where it took too long or isn't wanted any more, and was killed."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and not (over is not None and over.is_set()):
        try:
            return child.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            continue
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return None
