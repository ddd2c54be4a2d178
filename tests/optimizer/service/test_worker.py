"""The worker, where its database is away for a moment."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from optimizer.service.app import Parts, Settings
from optimizer.service.blobs import Blobs
from optimizer.service.database import Database, DatabaseUnavailable
from optimizer.service.jobs import Job, Kind, State
from optimizer.service.ledger import Ledger
from optimizer.service.records import Submission
from optimizer.service.worker import Worker, WorkerMetrics, WorkerOptions


class Unconfirmed(Ledger):
    """Keeps what it is told; its first answers are lost on the way."""

    def __init__(self, database: Database, n_lost: int) -> None:
        super().__init__(database)
        self.n_lost = n_lost

    def tell(
        self,
        job_id: str,
        token: str,
        events: Sequence[tuple[str, Mapping[str, Any]]] = (),
        text: str = "",
        batch: int | None = None,
    ) -> None:
        super().tell(job_id, token, events, text, batch)
        if self.n_lost:
            self.n_lost -= 1
            raise DatabaseUnavailable("jobs", "it was killed")


class OneJob(WorkerMetrics):
    """Stops its worker after the first."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def ended(self, how: str, seconds: float) -> None:
        self.stop.set()


def test_what_the_database_didnt_confirm_is_told_again_and_there_once(
    parts: Parts, settings: Settings, tmp_path: Path
) -> None:
    ledger, metrics = Unconfirmed(parts.database, n_lost=2), OneJob()
    asked = {"repository": "elsewhere", "model": "m", "version": "1", "slo": {}}
    job, _ = ledger.submit(Submission("me", "m", asked, kind=Kind.LOAD_TEST))
    options = WorkerOptions("w", tmp_path / "work", str(tmp_path / "store.sqlite"))
    Worker(
        ledger, parts.uploads, Blobs(settings.blobs), settings.policy.stores, options,
        {}, metrics,
    ).run(metrics.stop)  # fmt: skip
    ended = ledger.job(job.id)
    assert ended.state is State.FAILED
    assert ended.error == "this worker has no repository 'elsewhere'"
    assert ledger.n_lost == 0
    assert [event.kind for event in ledger.journal.events(job.id)] == [
        "state",
        "state",
        "phase",
        "state",
    ]


class Gone(MemoryFileSystem):
    """A store that doesn't answer; who asks it may have something done meanwhile."""

    protocol = "gone"
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def size(self, path: str) -> int:
        Gone.meanwhile()
        raise OSError("it doesn't answer")


def waits_for_a_store(
    parts: Parts, settings: Settings, tmp_path: Path, patience_s: float, metrics: OneJob
) -> Job:
    """The job of a worker whose repository is away."""
    fsspec.register_implementation("gone", Gone, clobber=True)
    asked = {"repository": "prod", "model": "m", "version": "1", "slo": {}}
    job, _ = parts.ledger.submit(Submission("me", "m", asked, kind=Kind.LOAD_TEST))
    options = WorkerOptions(
        "w", tmp_path / "work", str(tmp_path / "store.sqlite"),
        repositories={"prod": "gone://models"}, store_patience_s=patience_s,
    )  # fmt: skip
    Worker(
        parts.ledger, parts.uploads, Blobs(settings.blobs), settings.policy.stores, options,
        {}, metrics,
    ).run(metrics.stop)  # fmt: skip
    return parts.ledger.job(job.id)


def test_a_job_fails_with_the_reason_when_the_store_stays_away(
    parts: Parts, settings: Settings, tmp_path: Path
) -> None:
    Gone.meanwhile = staticmethod(lambda: None)
    job = waits_for_a_store(parts, settings, tmp_path, -1.0, OneJob())
    assert job.state is State.FAILED
    assert job.error == "the store of files: gone://models: OSError: it doesn't answer"


def test_a_job_is_given_back_when_its_worker_stops_while_the_store_is_away(
    parts: Parts, settings: Settings, tmp_path: Path
) -> None:
    metrics = OneJob()
    Gone.meanwhile = staticmethod(metrics.stop.set)
    job = waits_for_a_store(parts, settings, tmp_path, 600.0, metrics)
    assert (job.state, job.attempt, job.lost) == (State.QUEUED, 0, 0)
