"""The cache of downloads: folders `<root>/<model>/<key>` that appear whole and never change.

Any number of processes on one machine share it: each holds a shared lock on every entry that it
uses, and pruning removes only what nobody holds. It must lie on a local disk, since the locks are
flock's. It doesn't know what an entry's key means nor what its files are.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve.artifact import MODEL_NAME
from serve.errors import ArtifactInvalid

_DRAFT = ".draft-"  # being written, or moved away to be removed
_ENTRY = "entry-"


class Cache:
    """Made for one owner: `prune` must not run while another thread fills or gets. Without a
    `root` it is a temporary folder that `close` removes."""

    def __init__(self, root: Path | None) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if root is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="trimserve-")
            root = Path(self._temporary.name)
        self._root = root.absolute()
        self._held: dict[Path, int] = {}  # entry -> descriptor with a shared lock

    def get(self, model: str, key: str) -> Path | None:
        """The entry, held from now on; None if there is none."""
        path = self._path(model, key)
        if path in self._held:
            if path.is_dir():
                return path
            self._release(path)
        with _translated(path):
            descriptor = _locked(path, fcntl.LOCK_SH)
        if descriptor is None:
            return None
        self._hold(path, descriptor)
        return path

    def fill(self, model: str, key: str, write: Callable[[Path], None]) -> Path:
        """The entry, held from now on, from what `write` puts in the empty folder that it gets.

        Where another process was faster, the entry is its. Nothing stays of a `write` that raises.
        """
        path = self._path(model, key)
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft, descriptor = _new_draft(path.parent)
            try:
                write(draft)
                while not _renamed(draft, path):
                    if self.get(model, key) is not None:
                        _drop(draft, descriptor)
                        return path
            except BaseException:
                _drop(draft, descriptor)
                raise
        self._hold(path, descriptor)
        return path

    def discard(self, path: Path) -> None:
        """Take an entry that turned out to be damaged out of the way of a new one."""
        self._release(path)
        with _translated(path):
            _remove(path)

    def prune(self, keep: Collection[Path]) -> None:
        """Remove every entry that isn't in `keep` and that no other process holds, and what
        processes left behind that ended in the middle of a download."""
        for path in [held for held in self._held if held not in keep]:
            self._release(path)
        for path in self._entries():
            if path in keep:
                continue
            with _translated(path):
                descriptor = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if descriptor is None:
                    continue
                try:
                    _remove(path)
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Let go of all entries; they stay for the next process, unless they are temporary."""
        for path in list(self._held):
            self._release(path)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _path(self, model: str, key: str) -> Path:
        return self._root / model / f"{_ENTRY}{key}"

    def _entries(self) -> list[Path]:
        folders = [path for path in self._root.glob("*") if MODEL_NAME.fullmatch(path.name)]
        return [
            path
            for folder in folders
            for path in folder.glob("*")
            if path.name.startswith((_ENTRY, _DRAFT))
        ]

    def _hold(self, path: Path, descriptor: int) -> None:
        if self._held.setdefault(path, descriptor) != descriptor:
            os.close(descriptor)

    def _release(self, path: Path) -> None:
        if (descriptor := self._held.pop(path, None)) is not None:
            os.close(descriptor)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactInvalid(
            str(path), f"can't be used: {error.strerror}; want a cache folder on a local disk"
        ) from error


def _drop(draft: Path, descriptor: int) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    os.close(descriptor)


def _new_draft(folder: Path) -> tuple[Path, int]:
    """A new folder with a lock on it; one that is pruned before it is locked is made anew."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))
        descriptor = _locked(draft, fcntl.LOCK_SH)
        if descriptor is not None:
            draft.chmod(0o755)
            return draft, descriptor


def _locked(path: Path, kind: int) -> int | None:
    """A descriptor with a lock of `kind` on the folder; None if it is gone, or held by others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, kind)
        # Pruning renames a folder under its lock: who waited for that holds a folder of no name.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _renamed(draft: Path, path: Path) -> bool:
    """Whether `draft` could take its name; False if there is such an entry already."""
    try:
        os.rename(draft, path)
    except OSError:
        if path.is_dir():
            return False
        raise
    return True


def _remove(path: Path) -> None:
    """Remove a folder so that nobody sees half of it under its name."""
    gone = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=path.parent))
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
