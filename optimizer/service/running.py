"""A job's child process, from outside: started with little, watched, and taken down whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import psutil

from optimizer.service.child import Order
from optimizer.service.disk import KEPT_FILE, usage
from optimizer.store.artifacts import KEPT

GRACE_S = 1.5
"""Between SIGTERM and SIGKILL. A job that is cancelled is gone within 5 s, and its worker looks
once a second."""
_DISK_EVERY_S = 5.0
_MAX_LINE_BYTES = 4_000_000
_MAX_PENDING_LOG = 1_000_000
# What a child needs of its worker's environment: never its keys, tokens and database.
_PASSED = frozenset({
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES", "SSL_CERT_FILE", "SSL_CERT_DIR",
})  # fmt: skip
_PASSED_PREFIXES = ("OMP_", "MKL_", "ONEDNN_", "TORCH", "ORT_", "OV_", "RAY_")


@dataclass(frozen=True)
class ChildLimits:
    """Of the child with all its processes: resident bytes, seconds, the size of a file, and bytes
    of disk, of its own files and of the artifacts that it keeps in the store of studies."""

    memory_bytes: int | None = None
    wall_clock_s: float | None = None
    file_bytes: int | None = None
    disk_bytes: int | None = None


class Running:
    """One child. Its events and its log are collected by threads until they are taken."""

    def __init__(
        self, order: Order, order_file: Path, limits: ChildLimits, environ: Mapping[str, str]
    ) -> None:
        self._limits = limits
        self._made = (Path(order.out), order_file.parent / "tmp")
        self._kept = order_file.parent / KEPT_FILE
        self._disk_seen_s = -_DISK_EVERY_S
        self._started_s = time.monotonic()
        self._family: set[psutil.Process] = set()
        lifeline, self._lifeline = os.pipe()
        events, events_in = os.pipe()
        replace(order, lifeline=lifeline, events=events_in, max_file_bytes=limits.file_bytes).write(
            order_file
        )
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-P", "-m", "optimizer.service.child", str(order_file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(lifeline, events_in),
                start_new_session=True,
                cwd=order_file.parent,
                env=child_environment(environ) | {KEPT: str(self._kept)},
            )
        except BaseException:
            os.close(self._lifeline)
            os.close(events)
            raise
        finally:
            os.close(lifeline)
            os.close(events_in)
        assert self._process.stdout is not None
        self._events: SimpleQueue[tuple[str, Mapping[str, Any]]] = SimpleQueue()
        self._log = _Log()
        self._threads = [
            threading.Thread(target=_read_events, args=(events, self._events.put), daemon=True),
            threading.Thread(target=self._log.read, args=(self._process.stdout,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative where a signal ended it."""
        return self._process.poll()

    def taken(self) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
        """Events and log since the last time."""
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        return events, self._log.taken()

    def broken_limit(self) -> str | None:
        """Which limit it has broken, in words. To be asked while it runs: what it has started is
        seen then, and ends with it."""
        self._family |= set(_family(self.pid))
        limits, spent_s = self._limits, time.monotonic() - self._started_s
        if limits.wall_clock_s is not None and spent_s > limits.wall_clock_s:
            return f"ran for {spent_s:.0f} s, allowed are {limits.wall_clock_s:.0f}"
        if limits.memory_bytes is not None:
            used = resident_bytes(self.pid)
            if used > limits.memory_bytes:
                return f"used {used} bytes of memory, allowed are {limits.memory_bytes}"
        if spent_s - self._disk_seen_s >= _DISK_EVERY_S:
            self._disk_seen_s = spent_s
            return self.broken_disk_limit()
        return None

    def broken_disk_limit(self) -> str | None:
        """Looks at all its files."""
        limit = self._limits.disk_bytes
        if limit is None:
            return None
        used = usage(self._made, self._kept)
        return f"used {used}, allowed are {limit}" if used.total > limit else None

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End it with all that it started, however deep and in whatever sessions."""
        family = _family(self.pid)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        for process in {*family, *_family(self.pid)}:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Wait for its end and for its last words. What it left behind ends too, in sessions of its
        own as well: a child that the kernel killed for memory has stopped nothing."""
        self._process.wait()
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(timeout=5.0)
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


class _Log:
    """What the child prints, bounded until somebody takes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._size = self._n_lost = 0

    def read(self, stream: IO[bytes]) -> None:
        with stream:
            while chunk := os.read(stream.fileno(), 65_536):
                text = chunk.decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
                with self._lock:
                    if self._size + len(text) > _MAX_PENDING_LOG:
                        self._n_lost += len(text)
                        continue
                    self._pieces.append(text)
                    self._size += len(text)

    def taken(self) -> str:
        with self._lock:
            text, self._pieces, self._size = "".join(self._pieces), [], 0
            if self._n_lost:
                text += f"\n… {self._n_lost} characters came too fast and are left out\n"
                self._n_lost = 0
        return text


def _read_events(descriptor: int, put: Callable[[tuple[str, Mapping[str, Any]]], None]) -> None:
    """User code shares the child's process and may have written anything: what isn't an event is
    left out."""
    with os.fdopen(descriptor, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                held = json.loads(line)
                kind, payload = held["kind"], held["payload"]
                if isinstance(kind, str) and len(kind) <= 32 and isinstance(payload, dict):
                    put((kind, payload))


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What is passed on: PATH and the like, settings of engines and of Ray, and the tokens of
    measuring agents and of Ray where there are some, which studies need and their code could read
    anyway."""
    return {
        name: value
        for name, value in environ.items()
        if name in _PASSED or name.startswith((*_PASSED_PREFIXES, "TRIMSERVE_AGENT_TOKEN"))
    } | {"PYTHONUNBUFFERED": "1"}


def resident_bytes(pid: int) -> int:
    """Of a process and its descendants; pages that they share count once for each."""
    total = 0
    for process in _family(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
