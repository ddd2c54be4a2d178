"""The journal: what happened to jobs and what they printed, in the database.

It is read by itself. What is written goes into the transaction of whoever changes the job.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, func, insert, select

from optimizer.service import schema
from optimizer.service.database import Database
from optimizer.service.job_rows import of
from optimizer.service.jobs import Job, State
from optimizer.service.records import MAX_PAGE

MAX_LOG_BYTES = 4_000_000
"""Of a job's logs; what comes after is left out, and the last piece says so."""
MAX_PIECE_CHARS = 64_000


@dataclass(frozen=True)
class Event:
    """What happened to a job; `number` counts from 1 without a gap."""

    number: int
    at_s: float
    kind: str
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """A piece of a job's log."""

    number: int
    at_s: float
    text: str


class Journal:
    """Usable from several threads and processes at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def events(
        self, job_id: str, after: int = 0, limit: int = MAX_PAGE, kind: str | None = None
    ) -> list[Event]:
        """Those with numbers above `after`, in their order; of one kind, where it is given."""
        table = schema.events
        statement = (
            select(table.c.number, table.c.at_s, table.c.kind, table.c.payload)
            .where(table.c.job_id == job_id, table.c.number > after)
            .order_by(table.c.number)
            .limit(limit)
        )
        if kind is not None:
            statement = statement.where(table.c.kind == kind)
        with self._database.reading() as connection:
            rows = connection.execute(statement).all()
        return [Event(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    def last_event(self, job_id: str, kind: str) -> Event | None:
        """The newest of a kind."""
        table = schema.events
        statement = (
            select(table.c.number, table.c.at_s, table.c.kind, table.c.payload)
            .where(table.c.job_id == job_id, table.c.kind == kind)
            .order_by(table.c.number.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(statement).first()
        return None if row is None else Event(row[0], row[1], row[2], json.loads(row[3]))

    def logs(self, job_id: str, after: int = 0, limit: int = MAX_PAGE) -> list[Piece]:
        table = schema.logs
        statement = (
            select(table.c.number, table.c.at_s, table.c.text)
            .where(table.c.job_id == job_id, table.c.number > after)
            .order_by(table.c.number)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [Piece(*row) for row in connection.execute(statement).all()]

    def heads(self, job_ids: Sequence[str]) -> dict[str, tuple[int, State]]:
        """The number of the last event and the state of each job that is there."""
        columns = (schema.jobs.c.id, schema.jobs.c.n_events, schema.jobs.c.state)
        statement = select(*columns).where(schema.jobs.c.id.in_(job_ids))
        with self._database.reading() as connection:
            return {row[0]: (row[1], State(row[2])) for row in connection.execute(statement)}


# --- inside of a transaction


def told(
    connection: Connection, job: Job, kind: str, payload: Mapping[str, Any], at_s: float
) -> Job:
    """Write an event down; the job as it is then."""
    number = job.n_events + 1
    connection.execute(
        insert(schema.events).values(
            job_id=job.id,
            number=number,
            at_s=at_s,
            kind=kind,
            payload=json.dumps(payload),
        )
    )
    connection.execute(of(job.id).values(n_events=number))
    return replace(job, n_events=number)


def remember(
    connection: Connection,
    job_id: str,
    events: Sequence[tuple[str, Mapping[str, Any]]],
) -> None:
    """Keep the events as the study's last word about itself, by their kind."""
    held = connection.execute(
        select(schema.jobs.c.progress).where(schema.jobs.c.id == job_id)
    ).scalar_one()
    progress = {**json.loads(held), **dict(events)}
    connection.execute(of(job_id).values(progress=json.dumps(progress)))


def log(connection: Connection, job: Job, text: str, now_s: float) -> None:
    """Add the text to the job's log, as far as there is room."""
    table = schema.logs
    held = connection.execute(
        select(func.coalesce(func.sum(func.length(table.c.text)), 0)).where(
            table.c.job_id == job.id
        )
    ).scalar_one()
    room = MAX_LOG_BYTES - int(held)
    if room <= 0:
        return
    if len(text) >= room:
        text = text[:room] + "\n… the log is full, what comes after is left out\n"
    pieces = [text[at : at + MAX_PIECE_CHARS] for at in range(0, len(text), MAX_PIECE_CHARS)]
    for number, piece in enumerate(pieces, job.n_logs + 1):
        connection.execute(
            insert(table).values(job_id=job.id, number=number, at_s=now_s, text=piece)
        )
    connection.execute(of(job.id).values(n_logs=job.n_logs + len(pieces)))
