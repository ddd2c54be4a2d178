"""The servers' memory while the window is played, read from their metrics now and then."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loadtest.samples import FloatArray
from loadtest.server_metrics import MetricsUnusable, fetch

METRIC = "process_resident_memory_bytes"
LINE = re.compile(rf"^{METRIC}(?:{{[^}}]*}})? (\S+)", re.MULTILINE)
SAMPLES_PER_WINDOW = 50
MIN_EVERY_S, MAX_EVERY_S = 1.0, 60.0


@dataclass(frozen=True)
class MemorySeries:
    """Resident memory of one server."""

    url: str
    time_s: FloatArray
    """[n] seconds from the first sample, ascending"""
    n_bytes: FloatArray
    """[n]"""


def every_s(window_s: float) -> float:
    """How often memory is read: 50 times in a window, but no more than once a second."""
    return min(MAX_EVERY_S, max(MIN_EVERY_S, window_s / SAMPLES_PER_WINDOW))


def series_of(url: str, points: list[tuple[float, float]]) -> MemorySeries:
    """Points are (seconds, bytes)."""
    times_s, values = np.array(points, dtype=float).reshape(-1, 2).T
    return MemorySeries(url, times_s - times_s[:1].sum(), values)


class MemorySampler:
    """Reads the memory of servers in a thread of its own, from `start` to `stop`.

    A server that doesn't answer, or has no such metric, has no sample at that time.
    """

    def __init__(
        self, urls: tuple[str, ...], each_s: float, read: Callable[[str], str] = fetch
    ) -> None:
        self._each_s, self._read = each_s, read
        self._points: dict[str, list[tuple[float, float]]] = {url: [] for url in urls}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        if self._points:
            self._thread.start()

    def stop(self) -> None:
        """May be called again, and without a start."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def series(self) -> tuple[MemorySeries, ...]:
        """Of the servers that have the metric."""
        return tuple(series_of(url, points) for url, points in self._points.items() if points)

    def _sample(self) -> None:
        next_s = time.monotonic()
        while not self._over.is_set():
            for url, points in self._points.items():
                try:
                    found = LINE.search(self._read(url))
                    if found is not None:
                        points.append((time.monotonic(), float(found[1])))
                except (MetricsUnusable, ValueError):
                    continue
            next_s = max(next_s + self._each_s, time.monotonic())
            self._over.wait(next_s - time.monotonic())
