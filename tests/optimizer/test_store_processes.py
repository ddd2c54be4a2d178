"""The store among processes: killed ones lose nothing that was kept, many do well at once."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from optimizer.store import Store
from tests.optimizer.conftest import Place
from tests.optimizer.postgresql import Cluster
from tests.optimizer.stored import timing_of, variant

ROOT = Path(__file__).parents[2]
N_KILLS = 12
MAX_LINES = 50
N_AT_ONCE = 4
N_STORES = 8
_PATIENCE_S = 120


@contextmanager
def python(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    watchdog = threading.Timer(_PATIENCE_S, process.kill)
    watchdog.start()
    with process:
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def heard(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "it has ended"
    return line.strip()


def said_until_killed(writers: "subprocess.Popen[str]", study: str, n_lines: int) -> list[str]:
    """The facts that a new writer said it kept, killed as soon as it had said so many lines."""
    tell(writers, study)
    said: list[str] = []
    while (line := heard(writers)) != "ended -9":
        assert not line.startswith("ended")
        said.append(line)
        if len(said) == n_lines:
            os.kill(int(said[0].removeprefix("opening ")), signal.SIGKILL)
    return said[1:]


def assert_kept(store: Store, line: str) -> None:
    kind, name, number = line.split()
    if kind == "measurement":
        assert store.recorded(timing_of(name)) == {"p50_s": int(number)}
    elif kind == "trial":
        assert store.trials(name)[int(number) - 1] == {"variant": f"{name}-{number}"}
    elif kind == "look":
        assert store.looks(name)[int(number) - 1].variant_id == f"{name}-{number}"
    else:
        assert kind == "variant"
        found = store.find(name)
        assert found is not None
        assert (found.model.directory / "model.onnx").read_bytes() == name.encode()


def test_store_keeps_all_that_was_acknowledged_when_writers_are_killed(place: Place) -> None:
    moments = random.Random(0)
    said = []
    with python("-m", "tests.optimizer.stored", place.location, str(place.artifacts)) as writers:
        for kill in range(N_KILLS):
            # The first is killed while it makes the store.
            n_lines = moments.randrange(2, MAX_LINES) if kill else 1
            facts = said_until_killed(writers, f"study{kill}", n_lines)
            assert len(facts) >= n_lines - 1
            said += facts
            with place.open() as store:
                for line in facts:
                    assert_kept(store, line)
                variant(store, f"after{kill}", b"new")
    with place.open() as store:
        for line in said:
            assert_kept(store, line)


PROGRAM = """
import sys
from pathlib import Path
from optimizer.store import Store
from tests.optimizer.stored import timing_of, variant

name, artifacts = sys.argv[1:]
for line in sys.stdin:
    do, what = line.split()
    if do == "open":
        store = Store(what, Path(artifacts))
    elif do == "write":
        variant(store, what, what.encode())
        store.record(timing_of(what), name)
        store.log_trial("shared", 1, {"variant": what})
    else:
        store.close()
    print("done", flush=True)
"""


def all_do(writers: Sequence["subprocess.Popen[str]"], what: str) -> None:
    """Let all do something at once, and wait for them."""
    for writer in writers:
        tell(writer, what)
    for writer in writers:
        assert heard(writer) == "done"


def test_stores_have_all_when_processes_make_and_write_them_at_once(
    new_place: Callable[[], Place],
) -> None:
    names = [f"writer{n}" for n in range(N_AT_ONCE)]
    with ExitStack() as stack:
        places = [new_place() for _ in range(N_STORES)]
        folder = str(places[0].artifacts)
        writers = [stack.enter_context(python("-c", PROGRAM, name, folder)) for name in names]
        for n, place in enumerate(places):
            for what in (f"open {place.location}", f"write v{n}", "close it"):
                all_do(writers, what)
            with place.open() as store:
                assert sorted(value for *_, value in store.values("timing", 1)) == names
                assert store.trials("shared") == ({"variant": f"v{n}"},)
                found = store.find(f"v{n}")
                assert found is not None
                assert (found.model.directory / "model.onnx").read_bytes() == f"v{n}".encode()


@pytest.mark.full
def test_open_store_goes_on_when_the_postgresql_server_crashed_and_is_back(
    tmp_path: Path, cluster: Cluster
) -> None:
    with Store(cluster.create("crashed"), tmp_path / "artifacts") as store:
        store.record(timing_of("before"), 1)
        cluster.crash()
        cluster.start()
        store.record(timing_of("after"), 2)
        assert store.recorded(timing_of("before")) == 1
        assert store.recorded(timing_of("after")) == 2
