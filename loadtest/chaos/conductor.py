"""Begins each action at its time, in a thread of its own, and keeps what came of it."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.chaos.faults import ActionFailed, Stage
from loadtest.chaos.profile import MAX_LATE_S, AnyAction
from loadtest.target import Target


@dataclass(frozen=True)
class Performed:
    """An action and when it took place, in seconds from the window's start."""

    action: AnyAction
    started_s: float | None
    """none: it didn't begin"""
    ended_s: float | None
    """when the process was gone or ran again, or the last command had ended; none: unknown"""
    error: str = ""
    """why it failed"""


class Conductor:
    """Plays a profile's actions once; `close` it whatever happens."""

    def __init__(
        self,
        actions: Sequence[AnyAction],
        targets: tuple[Target, ...],
        perform: Callable[[AnyAction, Stage], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actions, self._targets, self._perform = tuple(actions), targets, perform
        self._clock = clock
        self._over = threading.Event()
        self._performed: dict[int, Performed] = {}
        self._threads: list[threading.Thread] = []

    def start(self, start_s: float) -> None:
        """`start_s` is the window's start on the clock, which may be still to come."""
        for index, action in enumerate(self._actions):
            thread = threading.Thread(target=self._play, args=(index, action, start_s))
            self._threads.append(thread)
            thread.start()

    def finish(self) -> tuple[Performed, ...]:
        """Wait until all actions are over, each of which ends in its own time."""
        for thread in self._threads:
            thread.join()
        never = "the window didn't begin"
        return tuple(
            self._performed.get(index, Performed(action, None, None, never))
            for index, action in enumerate(self._actions)
        )

    def close(self) -> None:
        """Undo what lasts and begin nothing more; may be called again."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _play(self, index: int, action: AnyAction, start_s: float) -> None:
        if self._over.wait(max(0.0, start_s + action.at_s - self._clock())):
            return
        began: list[float] = []
        ended: list[float] = []
        error = ""
        stage = Stage(
            self._targets,
            self._over,
            on_begin=lambda: began.append(self._clock() - start_s),
            on_end=lambda: ended.append(self._clock() - start_s),
        )
        try:
            self._perform(action, stage)
        except ActionFailed as failure:
            error = str(failure)
        except Exception as defect:  # noqa: BLE001 - the thread's boundary: the run must hear of it
            traceback.print_exc()
            error = f"{type(defect).__name__}: {defect}"
        if began and began[0] > action.at_s + MAX_LATE_S and not error:
            error = f"began {began[0] - action.at_s:.3g} s late, want at most {MAX_LATE_S:g} s"
        self._performed[index] = Performed(
            action, began[0] if began else None, ended[0] if ended else None, error
        )
