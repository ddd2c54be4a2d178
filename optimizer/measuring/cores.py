"""Cores: who may use the machine's now, among all processes of this user that ask.

Measuring holds them alone; building shares them with other building, so it never runs beside
measuring. Locks are the kernel's (flock on two files), which frees them when their holder dies,
however it dies. It doesn't know what is measured or built, nor programs that don't ask.
"""

import fcntl
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from optimizer.errors import MeasurerUnavailable
from serve.machine import allowed_cpus

MAX_WAIT_S = 3600.0
"""A training step may hold the cores for long before a measurement's turn."""
_POLL_S = 0.02
_SAID_AFTER_S = 1.0
_TURNSTILE, _CORES = "turnstile.lock", "cores.lock"

Use = Literal["measuring", "building"]
_LOCKS: Mapping[Use, int] = {"measuring": fcntl.LOCK_EX, "building": fcntl.LOCK_SH}

_log = logging.getLogger(__name__)
_held = threading.local()


@contextmanager
def measuring_cores(
    n: int,
    *,
    directory: Path | None = None,
    max_wait_s: float = MAX_WAIT_S,
    on_wait: Callable[[str], None] = _log.info,
    gives_up: Callable[[], bool] = bool,
) -> Iterator[frozenset[int]]:
    """Have the machine's cores alone; gives `n` of those that this process may use, the lowest.

    Where it has to wait it says so to `on_wait`. Inside of itself it takes nothing. Raises
    ValueError for more cores than there are or inside of `building`, which would wait for itself,
    and MeasurerUnavailable after `max_wait_s`, or as soon as `gives_up`.
    """
    cpus = allowed_cpus()
    if not 1 <= n <= len(cpus):
        raise ValueError(f"cores: got {n}, want 1 to {len(cpus)}")
    patience = _Patience("measuring", directory, max_wait_s, on_wait, gives_up)
    with _holding(patience):
        yield frozenset(cpus[:n])


@contextmanager
def building(
    *,
    directory: Path | None = None,
    max_wait_s: float = MAX_WAIT_S,
    on_wait: Callable[[str], None] = _log.info,
    gives_up: Callable[[], bool] = bool,
) -> Iterator[None]:
    """Share the machine's cores with others that build, while nobody measures.

    As `measuring_cores`, but it takes nothing inside of that either.
    """
    patience = _Patience("building", directory, max_wait_s, on_wait, gives_up)
    with _holding(patience):
        yield


def runtime_directory(
    environ: Mapping[str, str] = os.environ, temporary: Path | None = None
) -> Path:
    """This user's folder for locks, made if need be: in XDG_RUNTIME_DIR, else in the temporary
    folder. Raises MeasurerUnavailable where it is somebody else's or open to others, who could hold
    the cores for good."""
    base = environ.get("XDG_RUNTIME_DIR")
    shared = temporary or Path(tempfile.gettempdir())
    path = Path(base, "trimserve") if base else shared / f"trimserve-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise MeasurerUnavailable(str(path), f"no folder for locks: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise MeasurerUnavailable(
            str(path), "want a folder of this user that nobody else can open (mode 0700)"
        )
    return path


@contextmanager
def _holding(patience: "_Patience") -> Iterator[None]:
    use, directory = patience.use, patience.directory
    mine: dict[Path, Use] = _held.__dict__.setdefault("uses", {})
    outer = mine.get(directory)
    if outer == "building" and use == "measuring":
        raise ValueError("cores: measuring inside of building would wait for itself")
    if outer is not None:
        yield
        return
    with (directory / _CORES).open("a") as cores:
        _acquire(cores.fileno(), patience)
        mine[directory] = use
        try:
            yield
        finally:
            del mine[directory]
            # By name: a forked process may have the file open still.
            fcntl.flock(cores, fcntl.LOCK_UN)


def _acquire(cores: int, patience: "_Patience") -> None:
    """Through the turnstile, in which one waits for the cores at a time: whoever wants them
    again comes behind it, so neither use can keep the other out for good."""
    with (patience.directory / _TURNSTILE).open("a") as turnstile:
        patience.lock(turnstile.fileno(), fcntl.LOCK_EX)
        try:
            patience.lock(cores, _LOCKS[patience.use])
        finally:
            fcntl.flock(turnstile, fcntl.LOCK_UN)


class _Patience:
    """One wait, for both locks together. flock has no time limit of its own, so it asks again
    and again."""

    def __init__(
        self,
        use: Use,
        directory: Path | None,
        max_wait_s: float,
        on_wait: Callable[[str], None],
        gives_up: Callable[[], bool],
    ) -> None:
        self.use = use
        self.directory = directory or runtime_directory()
        self._max_wait_s = max_wait_s
        self._on_wait = on_wait
        self._gives_up = gives_up
        self._start_s = time.monotonic()
        self._said = False

    def lock(self, file: int, operation: int) -> None:
        while True:
            try:
                fcntl.flock(file, operation | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._waited(time.monotonic() - self._start_s)
            time.sleep(_POLL_S)

    def _waited(self, seconds: float) -> None:
        what = "this machine's cores"
        if self._gives_up():
            raise MeasurerUnavailable(what, f"no longer waited for, after {seconds:.0f} s")
        if seconds > self._max_wait_s:
            raise MeasurerUnavailable(
                what,
                f"not free for {self.use} within {self._max_wait_s:g} s: another process measures "
                f"or builds (it holds {self.directory / _CORES})",
            )
        if not self._said and seconds >= _SAID_AFTER_S:
            self._said = True
            self._on_wait(f"waiting for the cores, which another process uses, for {self.use}")
