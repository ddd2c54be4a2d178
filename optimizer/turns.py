"""Turns: the threads of a study take them, so that one at a time does anything here.

What a study knows (store, estimates, what failed) has no locks of its own. A thread gives its turn
to others while what it waits for is done elsewhere, by a worker or another machine; so trials run
at once in all that takes long, and what the study computes itself is never beside a measurement
that a thread has kept its turn for. It doesn't know what is done.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_LISTEN_S = 0.2


class Turns:
    """Where only one thread is at work, nobody takes turns, and nothing here does anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = threading.local()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """It is this thread's turn."""
        self._lock.acquire()
        self._threads.has_turn = True
        try:
            yield
        finally:
            self._threads.has_turn = False
            self._lock.release()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """It is anybody's turn, and this thread's again afterwards; a thread without one has
        nothing to lend."""
        if not getattr(self._threads, "has_turn", False):
            yield
            return
        self._threads.has_turn = False
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._threads.has_turn = True


class Relay:
    """Has calls made in the thread that made it: at once there, from others when that listens."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def __call__(self, call: Callable[[], None]) -> None:
        if threading.get_ident() == self._owner:
            call()
        else:
            self._calls.put(call)

    def listen(self, timeout_s: float) -> None:
        """Make the calls that have come; waits for the first."""
        try:
            self._calls.get(timeout=timeout_s)()
            while True:
                self._calls.get_nowait()()
        except queue.Empty:
            return


def at_once(
    jobs: Sequence[Callable[[], T]], turns: Turns, relay: Relay, stop: Callable[[], None]
) -> list[T]:
    """What the jobs return, each in a thread that takes turns with the others.

    Where one raises, or this thread is interrupted, `stop` is to make the others end soon; then
    that is raised.
    """

    def done_in_turn(job: Callable[[], T]) -> T:
        with turns.taken():
            return job()

    with ThreadPoolExecutor(max(1, len(jobs)), "trial") as threads:
        try:
            futures: list[Future[T]] = [threads.submit(done_in_turn, job) for job in jobs]
            for future in futures:
                future.add_done_callback(lambda _done: relay(lambda: None))
            while not all(future.done() for future in futures):
                relay.listen(_LISTEN_S)
                for future in futures:
                    if future.done():
                        future.result()
        except BaseException:
            stop()
            raise
        relay.listen(0.0)
    return [future.result() for future in futures]
