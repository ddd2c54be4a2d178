"""Sleep until a point in time, to some 50 microseconds, without spinning.

gevent's own timers are those of epoll, in whole milliseconds. Linux's timerfd is a file that
becomes readable on time, which the same loop waits for among its sockets.
"""

import ctypes
import os
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

import gevent

CLOCK_MONOTONIC = 1
TFD_NONBLOCK = os.O_NONBLOCK
TFD_CLOEXEC = os.O_CLOEXEC
TFD_TIMER_ABSTIME = 1
READ = 1
SPIN_S = 0.0015
"""Where there is no timerfd: how long before the time the loop starts to spin."""


class Timer(Protocol):
    def sleep_until(self, due_s: float) -> None:
        """Let other greenlets run until `due_s` on time.monotonic(); at once if it is past."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class FileTimer:
    """A timerfd on the monotonic clock, for one greenlet at a time; Linux only."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._hub: Any = gevent.get_hub()
        self._watcher = self._hub.loop.io(self._file, READ, priority=self._hub.loop.MAXPRI)
        self._alarm = _Itimerspec()
        self._alarm_address = ctypes.byref(self._alarm)

    def sleep_until(self, due_s: float) -> None:
        if due_s <= time.monotonic():
            return
        seconds = int(due_s)
        self._alarm.it_value.tv_sec = seconds
        self._alarm.it_value.tv_nsec = int((due_s - seconds) * 1e9)
        done = self._libc.timerfd_settime(self._file, TFD_TIMER_ABSTIME, self._alarm_address, None)
        if done < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        self._hub.wait(self._watcher)
        os.read(self._file, 8)

    def close(self) -> None:
        self._watcher.close()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SpinTimer:
    """gevent's timer for the most part, then a loop that lets others run at each turn.

    Exact, but it costs a core, which the generator then reports as a busy one.
    """

    def sleep_until(self, due_s: float) -> None:
        coarse_s = due_s - time.monotonic() - SPIN_S
        if coarse_s > 0:
            gevent.sleep(coarse_s)
        while time.monotonic() < due_s:
            gevent.sleep(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to close."""


def open_timer() -> FileTimer | SpinTimer:
    """The best timer of this system, as a context manager."""
    return FileTimer() if sys.platform == "linux" else SpinTimer()
