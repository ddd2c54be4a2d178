"""The ledger: what is asked for by people, by workers, and by both at once."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, inspect, update

from optimizer.service import schema
from optimizer.service.app import Parts
from optimizer.service.audit import Audit, Note
from optimizer.service.database import Database
from optimizer.service.jobs import LeaseLost, NotAllowed, State
from optimizer.service.journal import MAX_LOG_BYTES
from optimizer.service.ledger import Ledger
from optimizer.service.records import (
    Claim,
    JobNotFound,
    Query,
    QuotaExceeded,
    StorageExceeded,
    Submission,
)
from optimizer.service.repeats import KeyReused
from tests.optimizer.conftest import Place


def submission(name: str = "m", owner: str = "me", **values: object) -> Submission:
    return Submission(owner, name, {"spec": {}}, **values)  # type: ignore[arg-type]


@pytest.fixture
def ledger(place: Place) -> Iterator[Ledger]:
    """In SQLite, and in PostgreSQL in the full run."""
    database = Database(place.location)
    database.migrate()
    yield Ledger(database)
    database.close()


def test_the_same_key_gives_the_same_job(ledger: Ledger) -> None:
    first, is_new = ledger.submit(submission(), key="k")
    again, is_new_again = ledger.submit(submission(), key="k")
    assert (first.id, is_new, is_new_again) == (again.id, True, False)
    with pytest.raises(KeyReused):
        ledger.submit(submission("other"), key="k")
    other, _ = ledger.submit(submission(owner="you"), key="k")
    assert other.id != first.id


def test_a_refused_submission_leaves_nothing(ledger: Ledger) -> None:
    ledger.submit(submission(), max_open=1)
    with pytest.raises(QuotaExceeded):
        ledger.submit(submission(), key="k", max_open=1)
    assert len(ledger.find(Query())) == 1
    _, is_new = ledger.submit(submission(), key="k")
    assert is_new


def test_jobs_are_claimed_by_priority_and_age_and_each_once(ledger: Ledger) -> None:
    names = [ledger.submit(submission(f"m{i}", priority=i == 2))[0].name for i in range(4)]
    claims = [ledger.claim("w", 10.0) for _ in range(5)]
    assert [claim and claim.job.name for claim in claims] == [
        names[2], names[0], names[1], names[3], None
    ]  # fmt: skip


def test_many_workers_at_once_never_share_a_job(ledger: Ledger) -> None:
    for index in range(20):
        ledger.submit(submission(f"m{index}"))
    start = threading.Barrier(4)

    def work(name: int) -> list[str]:
        start.wait()
        taken = []
        while claim := ledger.claim(str(name), 60.0):
            taken.append(claim.job.id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        counts = Counter(one for taken in pool.map(work, range(4)) for one in taken)
    assert len(counts) == 20
    assert set(counts.values()) == {1}


def test_one_owner_cant_take_all_workers(ledger: Ledger) -> None:
    ledger.submit(submission("a"))
    ledger.submit(submission("b"))
    ledger.submit(submission("c", owner="you"))
    first, second = ledger.claim("w", 10, max_running=1), ledger.claim("w", 10, max_running=1)
    assert first is not None
    assert second is not None
    assert (first.job.name, second.job.name) == ("a", "c")
    assert ledger.claim("w", 10, max_running=1) is None


def test_owner_keeps_no_more_bytes_than_allowed_when_jobs_end_at_once(ledger: Ledger) -> None:
    for _ in range(4):
        ledger.submit(submission())
    claims = [ledger.claim("w", 60.0) for _ in range(4)]

    def keep(claim: Claim | None) -> bool:
        assert claim is not None
        try:
            ledger.keep(claim.job.id, claim.lease.token, 400, 1_000)
        except StorageExceeded:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(keep, claims)) == [False, False, True, True]
    assert ledger.stored_bytes() == 800


def test_an_outlived_worker_can_say_nothing_any_more(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission())
    old = ledger.claim("old", 10.0)
    assert old is not None
    with ledger.database.writing() as connection:
        connection.execute(update(schema.jobs).values(lease_until_s=1.0))
    new = ledger.claim("new", 10.0)
    assert new is not None
    assert new.job.attempt == 2
    for say in (
        lambda: ledger.renew(job.id, old.lease.token, 10.0),
        lambda: ledger.tell(job.id, old.lease.token, [("phase", {})]),
        lambda: ledger.succeed(job.id, old.lease.token, "met"),
        lambda: ledger.fail(job.id, old.lease.token, "why"),
    ):
        with pytest.raises(LeaseLost):
            say()
    assert ledger.succeed(job.id, new.lease.token, "met").state is State.SUCCEEDED


def test_events_have_numbers_without_a_gap_and_tell_each_state(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission())
    claim = ledger.claim("w", 10.0)
    assert claim is not None
    ledger.tell(job.id, claim.lease.token, [("phase", {"name": "a"}), ("phase", {"name": "b"})])
    ledger.renew(job.id, claim.lease.token, 10.0)
    ledger.fail(job.id, claim.lease.token, "why")
    events = ledger.journal.events(job.id)
    assert [event.number for event in events] == [1, 2, 3, 4, 5]
    assert [event.payload.get("state") for event in events] == [
        "queued", "running", None, None, "failed"
    ]  # fmt: skip
    assert [event.number for event in ledger.journal.events(job.id, after=3)] == [4, 5]
    assert ledger.progress(job.id) == {"phase": {"name": "b"}}
    assert ledger.job(job.id).n_events == 5


def test_a_batch_that_is_told_again_is_there_once(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission())
    claim = ledger.claim("w", 10.0)
    assert claim is not None
    for batch, name in ((1, "a"), (1, "a"), (2, "b"), (1, "a")):
        ledger.tell(job.id, claim.lease.token, [("phase", {"name": name})], f"{name}\n", batch)
    told = [event.payload["name"] for event in ledger.journal.events(job.id, kind="phase")]
    assert told == ["a", "b"]
    assert [piece.text for piece in ledger.journal.logs(job.id)] == ["a\n", "b\n"]


def test_trials_that_are_new_forgive_the_workers_lost_before(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission())
    for trials in (1, 2, 2, 2, 2):
        claim = ledger.claim("w", 10.0)
        if claim is None:
            break
        ended = ("trial_ended", {"budget": {"trials": trials}})
        ledger.tell(job.id, claim.lease.token, [ended], batch=1)
        with ledger.database.writing() as connection:
            connection.execute(update(schema.jobs).values(lease_until_s=1.0))
        ledger.expire()
    failed = ledger.job(job.id)
    assert (failed.state, failed.attempt, failed.lost) == (State.FAILED, 4, 3)


class Restarted(Database):
    """Says that its server was started at another time."""

    def __init__(self, location: str, started_s: float) -> None:
        super().__init__(location)
        self._started_s = started_s

    def started_s(self, connection: Connection) -> float:
        return self._started_s


def test_workers_that_couldnt_renew_since_the_database_was_away_arent_counted(
    place: Place, ledger: Ledger
) -> None:
    job, _ = ledger.submit(submission(max_attempts=2))
    for started_s, lost in ((1e12, 0), (1e12, 0), (1.0, 1), (1e12, 1), (1.0, 2)):
        assert ledger.claim("w", 10.0) is not None
        restarted = Restarted(place.location, started_s)
        with restarted.writing() as connection:
            connection.execute(update(schema.jobs).values(lease_until_s=1.0))
        assert Ledger(restarted).expire() == 1
        restarted.close()
        assert ledger.job(job.id).lost == lost
    assert ledger.job(job.id).state is State.FAILED


def test_a_database_knows_since_when_it_is_there(ledger: Ledger) -> None:
    database = ledger.database
    with database.reading() as connection:
        assert 0.0 <= database.started_s(connection) < database.now_s(connection)
        assert database.is_sqlite == (database.started_s(connection) == 0.0)


def test_the_audit_knows_what_was_done_and_nothing_else(ledger: Ledger) -> None:
    note = Note("me", "submit", {"name": "m"})
    job, _ = ledger.submit(submission(), max_open=1, note=note)
    with pytest.raises(QuotaExceeded):
        ledger.submit(submission(), max_open=1, note=note)
    ledger.cancel(job.id, Note("me", "cancel"))
    with pytest.raises(NotAllowed):
        ledger.cancel(job.id, Note("me", "cancel"))
    entries = Audit(ledger.database).entries()
    assert [(one.action, one.target) for one in entries] == [("cancel", job.id), ("submit", job.id)]


def test_logs_are_kept_in_order_and_end_where_they_are_full(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission())
    claim = ledger.claim("w", 10.0)
    assert claim is not None
    for text in ("one\n", "two\n", "x" * MAX_LOG_BYTES, "never"):
        ledger.tell(job.id, claim.lease.token, text=text)
    kept = "".join(piece.text for piece in ledger.journal.logs(job.id))
    assert kept.startswith("one\ntwo\nxxx")
    assert kept.endswith("the log is full, what comes after is left out\n")
    assert len(kept) < MAX_LOG_BYTES + 100


def test_lists_are_filtered_and_go_on_where_they_ended(ledger: Ledger) -> None:
    ids = [
        ledger.submit(submission(f"m{i}", labels={"team": "a" if i % 2 else "b_"}))[0].id
        for i in range(5)
    ]
    assert [job.id for job in ledger.find(Query())] == ids[::-1]
    first = ledger.find(Query(limit=2))
    rest = ledger.find(Query(after=first[-1].id))
    assert [job.id for job in (*first, *rest)] == ids[::-1]
    assert [job.name for job in ledger.find(Query(labels={"team": "a"}))] == ["m3", "m1"]
    assert ledger.find(Query(labels={"team": "b%"})) == []
    ledger.cancel(ids[0])
    assert [job.id for job in ledger.find(Query(states=(State.CANCELLED,)))] == [ids[0]]
    assert ledger.counts() == {State.QUEUED: 4, State.CANCELLED: 1}


def test_a_deleted_job_is_gone_with_all_that_it_held(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission(), key="k")
    ledger.cancel(job.id)
    ledger.delete(job.id)
    with pytest.raises(JobNotFound):
        ledger.job(job.id)
    assert ledger.journal.events(job.id) == []
    assert ledger.find(Query()) == []
    assert ledger.submit(submission(), key="k")[1]


def test_the_migrated_tables_are_those_of_the_code(ledger: Ledger) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with ledger.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_going_back_and_forth_keeps_what_the_older_schema_knows(ledger: Ledger) -> None:
    job, _ = ledger.submit(submission(labels={"a": "b"}))
    before = ledger.job(job.id)
    ledger.database.migrate("0001")
    with ledger.database.reading() as connection:
        assert "publications" not in inspect(connection).get_table_names()
    ledger.database.migrate()
    assert ledger.job(job.id) == before
    assert [event.kind for event in ledger.journal.events(job.id)] == ["state"]


def test_a_database_of_a_newer_version_is_refused(parts: Parts) -> None:
    with parts.database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    opened = Database(parts.database.shown)
    with pytest.raises(Exception, match="has schema 9999, of a newer trimserve"):
        opened.migrate()
    opened.close()
