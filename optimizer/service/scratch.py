"""Folders of work under way. Each is held by the process that works in it; once that has ended,
however it ended, the folder can be cleared away.

The hold is a lock of the kernel's (flock), which no dead process keeps. It doesn't know what is in
the folders; they belong on the machine's own disk.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HELD, _DOOR = ".held", ".door"


@contextmanager
def held(parent: Path, name: str) -> Iterator[Path]:
    """A new folder `name` in `parent`, both made if need be; it goes when the block ends.

    Raises OSError, also where the folder is there already."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / name
    with _locked(parent / _DOOR):  # nobody clears between the folder and its lock
        folder.mkdir()
        file = os.open(folder / _HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


def clear(parent: Path) -> int:
    """Remove the folders in `parent` whose process has ended; how many that were."""
    if not parent.is_dir():
        return 0
    with _locked(parent / _DOOR):
        left = [folder for folder in parent.iterdir() if folder.is_dir() and not _is_held(folder)]
        gone = [parent / f".gone-{secrets.token_hex(8)}" for _ in left]
        for folder, aside in zip(left, gone, strict=True):
            folder.rename(aside)
    for aside in gone:  # what can't be removed yet is seen again the next time
        shutil.rmtree(aside, ignore_errors=True)
    return len(gone)


def _is_held(folder: Path) -> bool:
    with suppress(FileNotFoundError):
        file = os.open(folder / _HELD, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
