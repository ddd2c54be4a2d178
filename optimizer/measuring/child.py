"""The measurer in a child process: an engine that crashes, hangs or is killed for memory costs a
variant and not the study.

The child is kept for many calls and started anew after it died. It doesn't know what engines do;
that is the worker's matter.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from optimizer.errors import MeasurerUnavailable
from optimizer.measuring import Batch, ContenderFailed
from optimizer.measuring.calls import EXCLUSIVE, Call, Caller, Named, header_of
from optimizer.measuring.cores import MAX_WAIT_S, building, measuring_cores
from optimizer.measuring.frames import Frame, FrameInvalid, encode, read
from optimizer.timing import Contender
from serve.machine import Machine, allowed_cpus, this_machine

MAX_CALL_S = 900.0
_ROOT = Path(__file__).resolve().parents[2]
_MAX_STDERR_BYTES = 4096
_MAX_STDERR_LINES = 8
_MAX_END_S = 10.0
_PIECE = 1 << 20


class ChildMeasurer(Caller):
    """Close it after use. `max_call_s` is the time of one call, beyond its own `seconds`, until the
    child is taken to hang; waiting for the cores, for `max_wait_s` at most, doesn't count."""

    def __init__(
        self,
        *,
        max_call_s: float = MAX_CALL_S,
        takes_cores: bool = True,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._max_call_s = max_call_s
        self._max_wait_s = max_wait_s
        self._takes_cores = takes_cores
        self._worker: _Worker | None = None
        self._stopped = threading.Event()

    @cached_property
    def machine(self) -> Machine:
        return this_machine()

    @property
    def pid(self) -> int | None:
        """The child's, or None while there is none."""
        return self._worker.pid if self._worker is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; a later call starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def stop(self) -> None:
        """For good, and from any thread: the call under way fails at once, and so do later ones."""
        self._stopped.set()
        worker = self._worker
        if worker is not None:
            worker.kill()

    def named(self, contender: Contender) -> Named:
        return Named(str(contender.directory.absolute()), contender.spec)

    def exchange(self, call: Call, batches: Sequence[Batch]) -> Frame:
        """As `Caller.exchange`. Raises ContenderFailed where the child dies over it or takes too
        long."""
        if call.name == "memory_bytes":
            self.close()  # what others loaded would count
        with self._cores(call):
            worker = self._worker = self._worker or _Worker()
            limit_s = self._max_call_s + call.seconds
            try:
                if self._stopped.is_set():
                    raise MeasurerUnavailable("the engine's process", "stopped")
                return worker.exchange(Frame(header_of(call), batches), limit_s)
            except BaseException:
                self.close()
                raise

    def _cores(self, call: Call) -> AbstractContextManager[object]:
        if not self._takes_cores:
            return nullcontext()
        if call.name in EXCLUSIVE:
            n = min(call.n_cores, len(allowed_cpus()))
            return measuring_cores(n, max_wait_s=self._max_wait_s, gives_up=self._stopped.is_set)
        return building(max_wait_s=self._max_wait_s, gives_up=self._stopped.is_set)


class _Worker:
    """One child process, its pipes and the end of what it wrote to standard error."""

    def __init__(self) -> None:
        lifeline, self._lifeline = os.pipe()
        command = [sys.executable, "-P", "-m", "optimizer.measuring.worker", str(lifeline)]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, as a list
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=[lifeline],
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._stderr = self._process.stderr
        os.set_blocking(self._stdin.fileno(), False)
        self._errors = b""
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, frame: Frame, limit_s: float) -> Frame:
        deadline_s = time.monotonic() + limit_s
        try:
            self._send(encode(frame), deadline_s)
            answer = read(lambda n: self._receive(n, deadline_s))
        except TimeoutError:
            self.kill()
            what = f"gave no answer within {limit_s:g} s and was killed"
            raise self._failed(what) from None
        except BrokenPipeError:
            answer = None
        except FrameInvalid as error:
            raise self._failed(f"gave an answer that can't be read ({error})") from error
        if answer is None:
            raise self._failed(self._end())
        return answer

    def kill(self) -> None:
        """End it and what it started, whatever it is doing."""
        with suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it and let go of its pipes; once, by the thread that uses it."""
        self.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._lifeline)
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()

    def _send(self, pieces: Iterator[bytes], deadline_s: float) -> None:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                _wait(self._stdin, select.POLLOUT, deadline_s)
                rest = rest[self._stdin.write(rest[:_PIECE]) or 0 :]

    def _receive(self, n: int, deadline_s: float) -> bytes:
        _wait(self._stdout, select.POLLIN, deadline_s)
        return self._stdout.read(min(n, _PIECE)) or b""

    def _read_errors(self) -> None:
        """Drain standard error to its end; the last of it is kept."""
        while part := self._stderr.read(_MAX_STDERR_BYTES):
            self._errors = (self._errors + part)[-_MAX_STDERR_BYTES:]

    def _end(self) -> str:
        """How it ended, once it closed its pipes."""
        try:
            code = self._process.wait(_MAX_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipes without an answer"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = ", for want of memory perhaps" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def _failed(self, what: str) -> ContenderFailed:
        """With the last lines of standard error."""
        self.kill()
        self._reader.join()
        lines = self._errors.decode("utf-8", "replace").strip().splitlines()
        said = ": " + "\n".join(lines[-_MAX_STDERR_LINES:]) if lines else ""
        return ContenderFailed(f"the engine's process {what}{said}")


def _wait(pipe: IO[bytes], event: int, deadline_s: float) -> None:
    """Until the pipe is ready for the event, or closed. Raises TimeoutError."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1e3):
        raise TimeoutError
