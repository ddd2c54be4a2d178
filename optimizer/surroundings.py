"""Surroundings: how busy the machine was while something was timed, as far as Linux says.

They explain a noisy result; nothing is decided by them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
_STEAL = 7
"""Column of the line `cpu`: time in which the hypervisor ran somebody else (proc(5))."""
_N_COLUMNS = 8
"""Those after it are part of the first two."""


@dataclass(frozen=True)
class Surroundings:
    """None where the system doesn't say."""

    steal_share: float | None = None
    """Of the processors' time meanwhile, 0 to 1: taken by the hypervisor for others."""
    load: float | None = None
    """Processes that ran or waited to, in the mean over the minute before."""


def observe(stat: Path = STAT) -> Callable[[], Surroundings]:
    """Begin to look; call what is returned at the end."""
    load = _load()
    before = _times(stat)

    def ended() -> Surroundings:
        return Surroundings(_steal_share(before, _times(stat)), load)

    return ended


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _times(stat: Path) -> list[int] | None:
    """The columns of all processors together, in ticks."""
    try:
        with stat.open() as file:
            name, *columns = file.readline().split()
    except (OSError, ValueError):
        return None
    counted = columns[:_N_COLUMNS]
    return list(map(int, counted)) if name == "cpu" and len(counted) == _N_COLUMNS else None


def _steal_share(before: list[int] | None, after: list[int] | None) -> float | None:
    if before is None or after is None or sum(after) <= sum(before):
        return None
    return (after[_STEAL] - before[_STEAL]) / (sum(after) - sum(before))
