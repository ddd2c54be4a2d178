"""The cores' locks among processes: alone, together, in turn, and after a holder was killed."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optimizer.errors import MeasurerUnavailable
from optimizer.measuring.cores import building, measuring_cores, runtime_directory
from serve.machine import allowed_cpus

HOLDER = """
import sys
from pathlib import Path
from optimizer.measuring.cores import building, measuring_cores
use, where = sys.argv[1], Path(sys.argv[2])
with measuring_cores(1, directory=where) if use == "measuring" else building(directory=where):
    print("held", flush=True)
    sys.stdin.readline()
print("freed", flush=True)
"""


@contextmanager
def another_process(use: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """One that has the cores, as soon as it says so, until it is sent a line."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, use, str(directory)], cwd=root, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def has_cores(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"


def frees_them(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_cores_are_the_lowest_allowed_when_they_are_free(tmp_path: Path) -> None:
    with measuring_cores(1, directory=tmp_path) as cores:
        assert cores == {allowed_cpus()[0]}


def test_cores_are_refused_when_there_are_not_as_many(tmp_path: Path) -> None:
    n = len(allowed_cpus())
    with (
        pytest.raises(ValueError, match=f"want 1 to {n}"),
        measuring_cores(n + 1, directory=tmp_path),
    ):
        pass


@pytest.mark.parametrize("holder", ["measuring", "building"])
def test_measuring_gives_up_with_the_reason_when_another_process_has_the_cores(
    holder: str, tmp_path: Path
) -> None:
    with another_process(holder, tmp_path) as other:
        has_cores(other)
        with (
            pytest.raises(MeasurerUnavailable, match=r"not free for measuring within 0\.1 s"),
            measuring_cores(1, directory=tmp_path, max_wait_s=0.1),
        ):
            pass


def test_building_goes_on_beside_building_and_not_beside_measuring(tmp_path: Path) -> None:
    with another_process("building", tmp_path) as other:
        has_cores(other)
        with building(directory=tmp_path, max_wait_s=0.1):
            pass
    with another_process("measuring", tmp_path) as other:
        has_cores(other)
        with (
            pytest.raises(MeasurerUnavailable, match="not free for building"),
            building(directory=tmp_path, max_wait_s=0.1),
        ):
            pass


def test_cores_are_free_when_their_holder_was_killed(tmp_path: Path) -> None:
    with another_process("measuring", tmp_path) as other:
        has_cores(other)
        other.kill()
        with measuring_cores(1, directory=tmp_path, max_wait_s=30):
            pass


def test_waiting_is_said_once_when_it_takes_a_while(tmp_path: Path) -> None:
    said: list[str] = []
    with another_process("building", tmp_path) as other:
        has_cores(other)

        def say(message: str) -> None:
            said.append(message)
            frees_them(other)

        with measuring_cores(1, directory=tmp_path, max_wait_s=30, on_wait=say):
            pass
    assert len(said) == 1
    assert "for measuring" in said[0]


def test_waiting_ends_when_it_is_given_up(tmp_path: Path) -> None:
    with another_process("measuring", tmp_path) as other:
        has_cores(other)
        with (
            pytest.raises(MeasurerUnavailable, match="no longer waited for"),
            building(directory=tmp_path, gives_up=lambda: True),
        ):
            pass


def test_measuring_comes_before_builders_that_came_later(tmp_path: Path) -> None:
    """One builds, one waits to measure; a third that wants to build comes behind it."""
    waits = threading.Event()
    with another_process("building", tmp_path) as builder:
        has_cores(builder)
        order: list[str] = []

        def measure() -> None:
            with measuring_cores(
                1, directory=tmp_path, max_wait_s=60, on_wait=lambda _: waits.set()
            ):
                order.append("measured")

        measuring = threading.Thread(target=measure)
        measuring.start()
        assert waits.wait(30)
        with (
            pytest.raises(MeasurerUnavailable),
            building(directory=tmp_path, max_wait_s=0.2),  # would share with the first
        ):
            pass
        frees_them(builder)
        with building(directory=tmp_path, max_wait_s=60):
            order.append("built")
        measuring.join()
    assert order == ["measured", "built"]


def test_nothing_more_is_taken_when_a_use_is_inside_of_another(tmp_path: Path) -> None:
    with (
        measuring_cores(1, directory=tmp_path),
        building(directory=tmp_path, max_wait_s=0),
        measuring_cores(1, directory=tmp_path, max_wait_s=0),
    ):
        pass
    with (
        building(directory=tmp_path),
        pytest.raises(ValueError, match="wait for itself"),
        measuring_cores(1, directory=tmp_path),
    ):
        pass


def test_runtime_directory_is_the_users_own_when_it_is_made(tmp_path: Path) -> None:
    path = runtime_directory({}, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert runtime_directory({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "trimserve"


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_runtime_directory_is_refused_when_others_could_hold_locks_in_it(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"trimserve-{os.getuid()}"
    if kind == "open to others":
        path.mkdir()
        path.chmod(0o777)
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("")
    with pytest.raises(MeasurerUnavailable, match=path.name):
        runtime_directory({}, tmp_path)
