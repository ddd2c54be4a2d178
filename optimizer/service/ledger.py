"""The ledger: jobs in the database.

Every change is one transaction that reads the job, asks `jobs` what becomes of it, and writes it
back together with the event that tells so. It runs no job.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
)

from optimizer.service import audit, schema
from optimizer.service import jobs as life
from optimizer.service.audit import Note
from optimizer.service.database import Database
from optimizer.service.job_rows import COLUMNS, job_of, of, row_of
from optimizer.service.jobs import Job, Lease, State
from optimizer.service.journal import Journal, log, remember, told
from optimizer.service.records import (
    MAX_PAGE,
    Claim,
    JobNotFound,
    Query,
    QuotaExceeded,
    StorageExceeded,
    Submission,
)
from optimizer.service.repeats import INSERT, Repeatable, has_made, made_before

MAX_EVENTS = 20_000
"""Of a job. Beyond it only changes of state are told."""


class Ledger:
    """Usable from several threads and processes at once."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.journal = Journal(database)

    # --- asked for by people

    def submit(
        self,
        submission: Submission,
        key: str | None = None,
        max_open: int | None = None,
        note: Note | None = None,
        max_stored_bytes: int | None = None,
    ) -> tuple[Job, bool]:
        """The job, and whether it is new: the same `key` with the same request gives the job of
        before. Raises KeyReused, QuotaExceeded (`max_open` jobs of the owner are open),
        StorageExceeded (those that ended keep `max_stored_bytes`).

        What is done is noted in the audit, here and where else a `note` is given."""
        request = Repeatable(submission.owner, key, submission.digest) if key is not None else None
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            if request is not None:
                known = made_before(connection, request, now_s)
                if known is not None:
                    return self._read(connection, known), False
            if max_open is not None:
                self._check_quota(connection, submission.owner, max_open)
            if max_stored_bytes is not None:
                used = self._stored_bytes(connection, submission.owner)
                if used >= max_stored_bytes:
                    raise StorageExceeded(used, 0, max_stored_bytes)
            job = Job(
                id=_new_id(),
                owner=submission.owner,
                name=submission.name,
                created_s=now_s,
                updated_s=now_s,
                kind=submission.kind,
                labels=dict(submission.labels or {}),
                priority=submission.priority,
                parent_id=submission.parent_id,
                max_attempts=submission.max_attempts,
                traceparent=submission.traceparent,
            )
            if request is not None:
                has_made(connection, request, job.id)
            _noted(connection, note, job, now_s)
            connection.execute(
                insert(schema.jobs).values(
                    **row_of(job), spec=json.dumps(submission.spec), progress="{}"
                )
            )
            return told(connection, job, "state", _state_of(job), now_s), True

    def job(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        with self.database.reading() as connection:
            return self._read(connection, job_id)

    def spec(self, job_id: str) -> Mapping[str, Any]:
        return self._document(job_id, "spec")

    def progress(self, job_id: str) -> Mapping[str, Any]:
        """The last word of the running or ended study about itself, by the kind of event."""
        return self._document(job_id, "progress")

    def find(self, query: Query) -> list[Job]:
        statement = select(*COLUMNS).where(schema.jobs.c.state != State.DELETED)
        if query.owner is not None:
            statement = statement.where(schema.jobs.c.owner == query.owner)
        if query.states:
            statement = statement.where(schema.jobs.c.state.in_(query.states))
        if query.kind is not None:
            statement = statement.where(schema.jobs.c.kind == query.kind)
        if query.parent_id is not None:
            statement = statement.where(schema.jobs.c.parent_id == query.parent_id)
        for name, value in (query.labels or {}).items():
            # Labels are JSON with sorted keys and no spaces, and names have no quotes.
            part = f"{json.dumps(name)}:{json.dumps(value)}"
            statement = statement.where(schema.jobs.c.labels.contains(part, autoescape=True))
        with self.database.reading() as connection:
            if query.after is not None:
                statement = statement.where(self._is_older(connection, query.after))
            found = connection.execute(_newest_first(statement).limit(min(query.limit, MAX_PAGE)))
            return [job_of(row) for row in found]

    def counts(self) -> dict[State, int]:
        """Jobs by state, deleted ones left out."""
        state = schema.jobs.c.state
        with self.database.reading() as connection:
            rows = connection.execute(select(state, func.count()).group_by(state)).all()
        return {State(name): int(n) for name, n in rows if name != State.DELETED}

    def stored_bytes(self, owner: str | None = None) -> int:
        """Of the files that jobs keep: an owner's, or all."""
        with self.database.reading() as connection:
            return self._stored_bytes(connection, owner)

    def uploaded_bytes(self) -> int:
        """Of all uploads, as they were announced."""
        total = select(func.coalesce(func.sum(schema.uploads.c.size_bytes), 0))
        with self.database.reading() as connection:
            return int(connection.execute(total).scalar_one())

    def cancel(self, job_id: str, note: Note | None = None) -> Job:
        """Raises JobNotFound, NotAllowed."""
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            job = self._read(connection, job_id, for_update=True)
            asked = job if job.state is State.CANCELLING else life.ask_cancel(job, now_s)
            _noted(connection, note, job, now_s)
            return self._kept(connection, job, asked)

    def retry(self, job_id: str, max_open: int | None = None, note: Note | None = None) -> Job:
        """Raises JobNotFound, NotAllowed, QuotaExceeded."""
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            job = self._read(connection, job_id, for_update=True)
            again = life.retry(job, now_s)
            if max_open is not None:
                self._check_quota(connection, job.owner, max_open)
            connection.execute(of(job_id).values(progress="{}"))
            _noted(connection, note, job, now_s)
            return self._kept(connection, job, again)

    def delete(self, job_id: str, note: Note | None = None) -> Job:
        """The job's row stays without what it held, so that its number is never given again.
        Raises JobNotFound, NotAllowed."""
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            job = self._read(connection, job_id, for_update=True)
            gone = self._kept(connection, job, life.delete(job, now_s))
            for table in (schema.events, schema.logs):
                connection.execute(delete(table).where(table.c.job_id == job_id))
            connection.execute(delete(schema.requests).where(schema.requests.c.job_id == job_id))
            connection.execute(of(job_id).values(spec="{}", progress="{}", labels="{}"))
            _noted(connection, note, job, now_s)
            return gone

    def ended_before(self, age_s: float, limit: int = 100) -> list[Job]:
        """Jobs that ended longer ago, the oldest first: for retention."""
        with self.database.reading() as connection:
            before_s = self.database.now_s(connection) - age_s
            statement = (
                select(*COLUMNS)
                .where(schema.jobs.c.state.in_(life.ENDED), schema.jobs.c.ended_s < before_s)
                .order_by(schema.jobs.c.ended_s)
                .limit(limit)
            )
            return [job_of(row) for row in connection.execute(statement)]

    # --- asked for by workers

    def claim(self, worker: str, lease_s: float, max_running: int | None = None) -> Claim | None:
        """The queued job of the highest priority, the oldest of them; None where there is none
        or `max_running` jobs of its owner run already (then the next owner's). Lost leases are
        taken back first."""
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            self._expire(connection, now_s)
            job = self._next(connection, max_running)
            if job is None:
                return None
            lease = Lease(worker, secrets.token_hex(16), now_s + lease_s)
            claimed = self._kept(connection, job, life.claim(job, lease, now_s))
            spec = connection.execute(
                select(schema.jobs.c.spec).where(schema.jobs.c.id == job.id)
            ).scalar_one()
            return Claim(claimed, json.loads(spec), lease)

    def renew(self, job_id: str, token: str, lease_s: float) -> Job:
        """Raises LeaseLost. The state tells whether somebody wants it stopped."""
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            job = self._own(connection, job_id)
            renewed = life.renew(job, token, now_s + lease_s, now_s)
            return self._kept(connection, job, renewed, tell=False)

    def tell(
        self,
        job_id: str,
        token: str,
        events: Sequence[tuple[str, Mapping[str, Any]]] = (),
        text: str = "",
        batch: int | None = None,
    ) -> None:
        """Add events (kind, payload) and a text to the log. Raises LeaseLost.

        Batches of a claim are numbered from 1: one that was told before isn't told again, so that
        a worker can repeat it that doesn't know whether it was."""
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            job = self._own(connection, job_id)
            heard = life.told(job, token, batch or job.told, _reached(events))
            if batch is not None and batch <= job.told:
                return
            job = self._kept(connection, job, heard, tell=False)
            room = max(0, MAX_EVENTS - job.n_events)
            for kind, payload in events[:room]:
                job = told(connection, job, kind, payload, now_s)
            if events:
                remember(connection, job_id, events)
            if text:
                log(connection, job, text, now_s)

    def keep(
        self, job_id: str, token: str, stored_bytes: int, max_stored_bytes: int | None = None
    ) -> None:
        """Reserve room for the files that the job is going to keep. Raises LeaseLost,
        StorageExceeded where its owner's jobs would have more than `max_stored_bytes`."""
        with self.database.writing() as connection:
            job = self._own(connection, job_id)
            if max_stored_bytes is not None:
                if not self.database.is_sqlite:  # two jobs of an owner may end at the same time
                    connection.execute(select(func.pg_advisory_xact_lock(_number(job.owner))))
                used = self._stored_bytes(connection, job.owner) - job.stored_bytes
                if used + stored_bytes > max_stored_bytes:
                    raise StorageExceeded(used, stored_bytes, max_stored_bytes)
            self._kept(connection, job, life.kept(job, token, stored_bytes), tell=False)

    def release(self, job_id: str, token: str) -> None:
        self._end(job_id, lambda job, now_s: life.release(job, token, now_s))

    def succeed(self, job_id: str, token: str, outcome: str) -> Job:
        """Raises LeaseLost."""
        return self._end(job_id, lambda job, now_s: life.succeed(job, token, outcome, now_s))

    def fail(self, job_id: str, token: str, error: str) -> Job:
        return self._end(job_id, lambda job, now_s: life.fail(job, token, error, now_s))

    def stopped(self, job_id: str, token: str) -> Job:
        return self._end(job_id, lambda job, now_s: life.stopped(job, token, now_s))

    def expire(self) -> int:
        """Take back leases that ran out; how many that were."""
        with self.database.writing() as connection:
            return self._expire(connection, self.database.now_s(connection))

    def see_worker(self, worker: str, job_id: str | None) -> None:
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            statement = INSERT[connection.dialect.name](schema.workers).values(
                name=worker, seen_s=now_s, job_id=job_id
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["name"], set_={"seen_s": now_s, "job_id": job_id}
                )
            )
            gone = schema.workers.c.seen_s < now_s - 86_400
            connection.execute(delete(schema.workers).where(gone))

    def workers(self, within_s: float) -> dict[str, str | None]:
        """Workers that were seen within that time, and the job of each."""
        table = schema.workers
        with self.database.reading() as connection:
            since_s = self.database.now_s(connection) - within_s
            rows = connection.execute(
                select(table.c.name, table.c.job_id).where(table.c.seen_s >= since_s)
            ).all()
        return {row[0]: row[1] for row in rows}

    # --- inside of a transaction

    def _end(self, job_id: str, change: Callable[[Job, float], Job]) -> Job:
        with self.database.writing() as connection:
            now_s = self.database.now_s(connection)
            job = self._own(connection, job_id)
            return self._kept(connection, job, change(job, now_s))

    def _own(self, connection: Connection, job_id: str) -> Job:
        """For its worker, to whom a job that is gone is a lease that is lost."""
        try:
            return self._read(connection, job_id, for_update=True)
        except JobNotFound as error:
            raise life.LeaseLost(str(error)) from error

    def _read(self, connection: Connection, job_id: str, for_update: bool = False) -> Job:
        statement = select(*COLUMNS).where(
            schema.jobs.c.id == job_id, schema.jobs.c.state != State.DELETED
        )
        row = connection.execute(statement.with_for_update() if for_update else statement).first()
        if row is None:
            raise JobNotFound(job_id)
        return job_of(row)

    def _document(self, job_id: str, name: str) -> Mapping[str, Any]:
        statement = select(schema.jobs.c[name]).where(
            schema.jobs.c.id == job_id, schema.jobs.c.state != State.DELETED
        )
        with self.database.reading() as connection:
            found = connection.execute(statement).scalar_one_or_none()
        if found is None:
            raise JobNotFound(job_id)
        document: Mapping[str, Any] = json.loads(found)
        return document

    def _kept(self, connection: Connection, before: Job, after: Job, tell: bool = True) -> Job:
        """Write the changed job, and the event that tells of its new state."""
        if after == before:
            return before
        after = replace(after, revision=before.revision + 1)
        connection.execute(of(before.id).values(**row_of(after)))
        changed = (after.state, after.attempt, after.run) != (
            before.state, before.attempt, before.run
        )  # fmt: skip
        return (
            told(connection, after, "state", _state_of(after), self.database.now_s(connection))
            if tell and changed
            else after
        )

    def _expire(self, connection: Connection, now_s: float) -> int:
        statement = (
            select(*COLUMNS)
            .where(schema.jobs.c.state.in_(life.ACTIVE), schema.jobs.c.lease_until_s <= now_s)
            .with_for_update(skip_locked=True)
        )
        lost = [job_of(row) for row in connection.execute(statement)]
        if lost:
            started_s = self.database.started_s(connection)
            for job in lost:  # no worker could renew while the database was away
                expired = life.expire(job, now_s, blameless=job.updated_s < started_s)
                self._kept(connection, job, expired)
        return len(lost)

    def _next(self, connection: Connection, max_running: int | None) -> Job | None:
        table = schema.jobs
        statement = select(*COLUMNS).where(table.c.state == State.QUEUED)
        if max_running is not None:
            running = (
                select(table.c.owner)
                .where(table.c.state.in_(life.ACTIVE))
                .group_by(table.c.owner)
                .having(func.count() >= max_running)
            )
            statement = statement.where(table.c.owner.not_in(running))
        statement = statement.order_by(
            table.c.priority.desc(), table.c.created_s, table.c.id
        ).limit(1)
        row = connection.execute(statement.with_for_update(skip_locked=True)).first()
        return None if row is None else job_of(row)

    def _check_quota(self, connection: Connection, owner: str, limit: int) -> None:
        table = schema.jobs
        n_open = connection.execute(
            select(func.count()).where(table.c.owner == owner, table.c.state.in_(life.OPEN))
        ).scalar_one()
        if n_open >= limit:
            raise QuotaExceeded(int(n_open), limit)

    def _stored_bytes(self, connection: Connection, owner: str | None) -> int:
        table = schema.jobs
        total = select(func.coalesce(func.sum(table.c.stored_bytes), 0))
        if owner is not None:
            total = total.where(table.c.owner == owner)
        return int(connection.execute(total).scalar_one())

    def _is_older(self, connection: Connection, job_id: str) -> Any:
        table = schema.jobs
        last = connection.execute(
            select(table.c.created_s, table.c.id).where(table.c.id == job_id)
        ).first()
        if last is None:
            raise JobNotFound(job_id)
        return or_(
            table.c.created_s < last.created_s,
            and_(table.c.created_s == last.created_s, table.c.id < last.id),
        )


def _noted(connection: Connection, note: Note | None, job: Job, now_s: float) -> None:
    if note is not None:
        audit.write(connection, note, job.id, now_s)


def _reached(events: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
    """The number of trials that a study says it has come to; 0 where it says nothing. User code
    shares the process that says so: it may be anything."""
    reached = 0
    for kind, payload in events:
        budget = payload.get("budget") if kind == "trial_ended" else None
        trials = budget.get("trials") if isinstance(budget, Mapping) else None
        if isinstance(trials, int) and reached < trials < 2**31:
            reached = trials
    return reached


def _newest_first(statement: Select[Any]) -> Select[Any]:
    return statement.order_by(schema.jobs.c.created_s.desc(), schema.jobs.c.id.desc())


def _state_of(job: Job) -> dict[str, Any]:
    told = {"state": job.state, "run": job.run, "attempt": job.attempt}
    extra = {"worker": job.lease.worker if job.lease else None, "outcome": job.outcome,
             "error": job.error}  # fmt: skip
    return told | {name: value for name, value in extra.items() if value is not None}


def _number(text: str) -> int:
    """A lock's, 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _new_id() -> str:
    """128 random bits would be a nuisance to type; 64 are enough, and a clash is an error."""
    return secrets.token_hex(8)
