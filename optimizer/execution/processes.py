"""The executor in processes of this machine: one builds, one measures.

A technique or an engine that crashes, hangs or is killed for memory costs its trial and not the
study; the process is started anew. It doesn't know what is built.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from optimizer import tracing
from optimizer.errors import TechniqueFailed
from optimizer.execution import Json
from optimizer.execution.calls import error_from
from optimizer.measuring import Measurer
from optimizer.measuring.cores import MAX_WAIT_S
from optimizer.telling import Tell, untold
from serve.machine import Machine

MAX_BUILD_S = 24 * 3600.0
"""Of one call, without another limit."""
_MAX_STDERR_BYTES = 2_000
_MAX_STDERR_LINES = 8
_STOP_S = 10.0


@dataclass(eq=False)
class ProcessExecutor:
    """`setup` is what the worker builds for; `measurer` measures in a process of its own or on
    another machine, and is closed by whoever made it."""

    setup: Mapping[str, Json]
    measurer: Measurer
    tell: Tell = untold
    """Hears how far a long step has come, in the thread that builds."""
    threads: int | None = None
    """That libraries compute with, where OMP_NUM_THREADS doesn't say otherwise already; None: as
    many as they like."""
    max_build_s: float = MAX_BUILD_S
    program: tuple[str, ...] = (sys.executable, "-P", "-m", "optimizer.execution.worker")
    _worker: "_Worker | None" = field(default=None, init=False)

    def start(self) -> None:
        """Start the worker and wait until it can build. Raises SpecInvalid where model or data
        can't be used."""
        if self._worker is None:
            self._worker = _Worker(self.program, self.threads)
            try:
                self._told(self._worker, self.setup, "the model")
            except BaseException:
                self.close()
                raise

    def build(self, call: str, arguments: Json) -> Json:
        blamed = str(arguments.get("technique") or _last(arguments["recipe"]))
        self.start()
        assert self._worker is not None
        request = {"call": call, "arguments": arguments}
        if (traceparent := tracing.traceparent()) is not None:
            request["traceparent"] = traceparent
        return self._told(self._worker, request, blamed)

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _told(self, worker: "_Worker", request: Mapping[str, Json], blamed: str) -> Json:
        try:
            document = worker.ask(request, self.max_build_s, self.tell)
        except WorkerLost as error:
            self.close()
            raise TechniqueFailed(blamed, str(error)) from error
        except BaseException:
            self.close()
            raise
        if "error" in document:
            raise error_from(document["error"])
        return document["answer"]


class WorkerLost(Exception):
    """The worker died or took too long; the message says how, with its last words."""


class _Worker:
    """The process, a thread that reads its answers, and the file of its standard error."""

    def __init__(self, program: tuple[str, ...], threads: int | None) -> None:
        limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        lifeline, self._lifeline = os.pipe()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop
        try:
            self._child = subprocess.Popen(  # noqa: S603 - our own module, as a list
                (*program, str(lifeline)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**limited, **os.environ},
                pass_fds=[lifeline],
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            self._stderr.close()
            raise
        finally:
            os.close(lifeline)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, request: Mapping[str, Json], timeout_s: float, tell: Tell) -> Mapping[str, Json]:
        """Send one request and wait for its answer. Raises WorkerLost."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise WorkerLost(f"it took longer than {timeout_s:g} s") from None
            if line is None:
                raise WorkerLost(self._last_words())
            document: dict[str, Any] = json.loads(line)
            if "told" in document:
                tell(document["told"])
            elif "span" in document:
                with suppress(ValueError):
                    tracing.pass_on(tracing.SpanRecord.from_dict(document["span"]))
            else:
                return document

    def stop(self) -> None:
        """End it and what it started, whatever it is doing."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait(_STOP_S)
        self._reader.join(_STOP_S)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._stderr.close()
        os.close(self._lifeline)

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        code = self._child.wait()
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._stderr.seek(0, 2)
        self._stderr.seek(max(0, self._stderr.tell() - _MAX_STDERR_BYTES))
        said = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        words = "\n".join(said[-_MAX_STDERR_LINES:])
        return f"its process ended {ended}" + (f": {words}" if words else "")


def setup_of(
    spec: Path,
    store: str | Path,
    artifacts: Path | None,
    machine: Machine,
    max_wait_s: float = MAX_WAIT_S,
) -> Mapping[str, Json]:
    """What a worker is told first; `machine` is the target, `max_wait_s` how long it waits for the
    cores."""
    return {
        "spec": str(spec),
        "store": str(store),
        "artifacts": None if artifacts is None else str(artifacts),
        "machine": machine.to_dict(),
        "max_wait_s": max_wait_s,
    }


def _last(recipe: list[list[Json]]) -> str:
    return str(recipe[-1][0]) if recipe else "the model"
