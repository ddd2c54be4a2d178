"""How tests share a machine with other tests, and with whoever else works on it. It doesn't know
what is tested, and holds with workers (pytest-xdist) as without."""

import fcntl
import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Before anything reads it: two processes that compute with a thread for each core slow each other
# down, and what tests compute is too small to gain from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TURNS = "TRIMSERVE_TEST_TURNS"
"""The folder by which workers take turns; they have it from the process that starts them."""


def pytest_configure(config: pytest.Config) -> None:
    """A shell that starts something in the background lets it ignore SIGINT, and all that it
    starts: then no test can interrupt a program."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="trimserve-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ[TURNS] = folder.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` runs while no other worker's does. Through the turnstile, in which one
    waits at a time, so that a worker with many tests can't keep it waiting for good."""
    folder = Path(os.environ[TURNS])
    is_alone = item.get_closest_marker("alone") is not None
    with (folder / "turnstile").open("a") as turnstile, (folder / "machine").open("a") as machine:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            # By name: a forked process may have the file open still.
            fcntl.flock(machine, fcntl.LOCK_UN)


@pytest.fixture(scope="session", autouse=True)
def own_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Who else measures or builds on this machine now is none of these tests' business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield
