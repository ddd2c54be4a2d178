"""How much disk a job uses: its own files on the worker, and what its processes keep in the store
of studies, which all studies share.

The store's artifacts don't say whose they are, so every process of a job tells which ones it has
kept anew, by `optimizer.store.artifacts.KEPT`. That file is a report and no barrier: user code
could write to it.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

KEPT_FILE = "artifacts-kept"
_MAX_REPORT_BYTES = 16 << 20


@dataclass(frozen=True)
class Usage:
    """In bytes."""

    files: int
    artifacts: int

    @property
    def total(self) -> int:
        return self.files + self.artifacts

    def __str__(self) -> str:
        return f"{self.total} bytes of disk ({self.files} of files, {self.artifacts} of artifacts)"


def usage(folders: tuple[Path, ...], kept: Path) -> Usage:
    """Of what lies in the folders, and of the artifacts that the report `kept` names."""
    return Usage(sum(folder_bytes(folder) for folder in folders), _kept_bytes(kept))


def folder_bytes(folder: Path) -> int:
    """Of all files, each as long as it is; links aren't followed. What goes meanwhile is left
    out."""
    total = 0
    for entry in _files(folder):
        with suppress(OSError):
            total += entry.stat(follow_symlinks=False).st_size
    return total


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    waiting = [str(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry


def _kept_bytes(report: Path) -> int:
    try:
        with report.open("rb") as file:
            lines = file.read(_MAX_REPORT_BYTES).decode("ascii", "replace").splitlines()
    except OSError:
        return 0
    pairs = (line.partition(" ") for line in lines)
    sizes = {digest: int(n) for digest, _, n in pairs if n.isascii() and n.isdigit()}
    return sum(sizes.values())
