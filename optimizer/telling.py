"""Telling: how far a long step has come, in a few words, for whoever watches a study.

A step tells as often as it likes, and `Seldom` passes on what people can read. It decides nothing.
"""

import time
from collections.abc import Callable

Tell = Callable[[str], None]


def untold(_: str) -> None:
    """Nobody watches."""


class Seldom:
    """Passes on the first message and then one in `every_s` seconds; the others are dropped."""

    def __init__(self, tell: Tell, every_s: float, clock: Callable[[], float] = time.monotonic):
        """`clock` is monotonic, in seconds."""
        self._tell = tell
        self._every_s = every_s
        self._clock = clock
        self._next_s = clock()

    def __call__(self, message: str) -> None:
        now_s = self._clock()
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._tell(message)
