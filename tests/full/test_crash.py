"""A study survives being killed at any moment: by the public command, with structural trials that
train, over and over until it ends."""

import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from optimizer.measuring.cores import measuring_cores
from optimizer.store import Store
from serve.artifact import MANIFEST, read_manifest, verify_files
from tests.optimizer.tiny_study import write_study

pytestmark = [pytest.mark.full, pytest.mark.alone]

ROOT = Path(__file__).parents[2]
N_KILLS = 20
N_EARLY = 6
"""Of them, before anything more is stored: while the study starts, or reads its log."""
N_FACTS = 63
"""About as many as the study stores."""
MAX_LATER_S = 0.4
EARLY_S = 4.0
PATIENCE_S = 180.0
MARK = "TRIMSERVE_TEST_STUDY"

PLUGIN = """
from tests.optimizer.synthetic import Narrow, Tune

class Trained(Tune):
    def epochs(self, parameters, context):
        return {"recalibrate": 0.0, "short": 0.5, "full": 1.5}[str(parameters["effort"])]
"""


@dataclass(frozen=True)
class Moment:
    """When to kill: once so many facts are stored, and some seconds later. `whom` is the
    coordinator alone, or with all that it started."""

    n_facts: int
    later_s: float
    alone: bool


@dataclass
class Kept:
    """What was in the store at some moment."""

    variants: frozenset[str] = frozenset()
    n_measurements: int = 0
    trials: Sequence[Mapping[str, Any]] = ()


@dataclass
class Crashes:
    directory: Path
    environ: dict[str, str]
    kept: Kept = field(default_factory=Kept)

    @property
    def store(self) -> Path:
        return self.directory / "store.sqlite"

    @property
    def models(self) -> Path:
        return self.directory / "models" / "tiny"

    @contextmanager
    def study(self, *more: str) -> Iterator["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "trimserve", "optimize", "spec.yaml", *more]
        command += ["--repository", "models", "--store", str(self.store), "--no-verify"]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.directory, env=self.environ, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                yield process
            finally:
                kill(self.processes())
                process.wait(PATIENCE_S)

    def finished(self, name: str) -> Any:
        """The result of a run that nobody disturbs."""
        with self.study("--json", name) as process:
            code = process.wait(PATIENCE_S)
        assert code == 0, (self.directory / "log").read_text()
        return json.loads((self.directory / name).read_text())

    def killed(self, moment: Moment) -> bool:
        """Run the study until the moment; False where it ended before."""
        with self.study() as process:
            if not self._came(process, moment):
                return False
            self.kept = self.read()
            kill([process.pid] if moment.alone else self.processes())
            assert process.wait(PATIENCE_S) == -signal.SIGKILL
            await_end(self.processes())
        return True

    def _came(self, process: "subprocess.Popen[bytes]", moment: Moment) -> bool:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.n_facts() < moment.n_facts:
            assert time.monotonic() < deadline_s, (self.directory / "log").read_text()
            if ended(process, 0.02):
                return False
        return not ended(process, moment.later_s)

    def processes(self) -> list[int]:
        """All that the study started, directly or not, and that still run."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is(pid)]

    def _is(self, pid: int) -> bool:
        with suppress(OSError):
            mark = f"{MARK}={self.environ[MARK]}".encode()
            return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def n_facts(self) -> int:
        if not self.store.exists():
            return 0
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(self.store)) as connection:
            tables = ("variants", "measurements", "trials", "looks")
            counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
            return int(connection.execute(f"SELECT {counts}").fetchone()[0])
        return 0  # its tables aren't made yet

    def read(self) -> Kept:
        """The store as it is, which opens; there is one study in it, so none lost its way."""
        with Store(self.store) as store, closing(sqlite3.connect(self.store)) as connection:
            variants = frozenset(row[0] for row in connection.execute("SELECT id FROM variants"))
            assert all(store.find(one) is not None for one in variants)
            [n] = connection.execute("SELECT count(*) FROM measurements").fetchone()
            studies = [row[0] for row in connection.execute("SELECT DISTINCT study_id FROM trials")]
            assert len(studies) <= 1
            return Kept(variants, n, store.trials(studies[0]) if studies else ())

    def check(self) -> None:
        """Nothing that was there is gone, nobody is left, nothing is half."""
        now = self.read()
        assert now.variants >= self.kept.variants
        assert now.n_measurements >= self.kept.n_measurements
        assert now.trials[: len(self.kept.trials)] == self.kept.trials
        locks = Path(self.environ["XDG_RUNTIME_DIR"], "trimserve")
        if locks.is_dir():
            with measuring_cores(1, directory=locks, max_wait_s=1.0):
                pass
        for version in self.models.glob(f"*/{MANIFEST}"):
            verify_files(version.parent, read_manifest(version.parent))

    def measured_again(self) -> list[Any]:
        """Measurements that were taken more than once; how long one took may be noted before it
        is, so that may be there twice."""
        query = (
            "SELECT metric, variant_id, serving, count(*) FROM measurements "
            "WHERE metric NOT LIKE '%.wall_s' "
            "GROUP BY metric, protocol_version, variant_id, machine, serving HAVING count(*) > 1"
        )
        with closing(sqlite3.connect(self.store)) as connection:
            return connection.execute(query).fetchall()


def ended(process: "subprocess.Popen[bytes]", within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def await_end(pids: Sequence[int]) -> None:
    """Of processes that have lost their parent. A descriptor of one can be read once it ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            assert select.select([descriptor], [], [], PATIENCE_S)[0], f"process {pid} goes on"
            os.close(descriptor)


def moments(seed: int) -> list[Moment]:
    draw = random.Random(seed)
    early = [Moment(0, draw.uniform(0.0, EARLY_S), draw.random() < 0.5) for _ in range(N_EARLY)]
    n_later = N_KILLS - N_EARLY
    counts = sorted(draw.sample(range(1, N_FACTS), n_later))
    later = [Moment(n, draw.uniform(0.0, MAX_LATER_S), draw.random() < 0.5) for n in counts]
    for moment in early:  # anywhere: the study starts each time
        later.insert(draw.randrange(len(later)), moment)
    return later


def crashes(directory: Path) -> Crashes:
    path = write_study(directory, max_drop_points=90)
    (directory / "shapes.py").write_text(PLUGIN)
    text = path.read_text().replace("target: {", "target: {cores: 1, ")
    plugins = (
        "exclude: [quantization, torch_compilation], plugins: ['shapes:Narrow', 'shapes:Trained']"
    )
    # Enough for what trains to be tried behind the baselines, of which some processors have more.
    text = text.replace("trials: 3", "trials: 5")
    path.write_text(text.replace("exclude: [torch_compilation]", plugins))
    (directory / "run").mkdir(mode=0o700)
    given = {"XDG_RUNTIME_DIR": str(directory / "run"), MARK: directory.name}
    return Crashes(directory, {**os.environ, **given, "PYTHONPATH": str(ROOT)})


def test_study_loses_nothing_but_the_running_trial_when_it_is_killed_at_random_moments(
    tmp_path: Path,
) -> None:
    study = crashes(tmp_path)
    n_killed = 0
    for moment in moments(seed=4):
        n_killed += study.killed(moment)
        study.check()
    assert n_killed == N_KILLS

    last = study.finished("last.json")
    study.check()
    n_measurements = study.read().n_measurements
    again = study.finished("again.json")
    study.check()

    assert study.read().n_measurements == n_measurements
    assert study.measured_again() == []
    assert [row["id"] for row in again["variants"]] == [row["id"] for row in last["variants"]]
    assert chosen(again) == chosen(last)
    assert again["budget"]["training_epochs"] == last["budget"]["training_epochs"] > 0
    assert study.processes() == []


def chosen(result: Any) -> str:
    [row] = [row for row in result["variants"] if row["status"] == "chosen"]
    return str(row["id"])
