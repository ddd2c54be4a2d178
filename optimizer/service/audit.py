"""The audit: who did what to what, and when. Rows are only added, each in the transaction of what
it tells of where that is in the database: neither is there without the other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, insert, select

from optimizer.service import schema
from optimizer.service.database import Database


@dataclass(frozen=True)
class Entry:
    id: int
    at_s: float
    subject: str
    action: str
    target: str
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class Note:
    """Who does what, for the row of what it is done to."""

    subject: str
    action: str
    detail: Mapping[str, Any] = field(default_factory=dict)


def write(connection: Connection, note: Note, target: str, at_s: float) -> None:
    """In the caller's transaction."""
    connection.execute(
        insert(schema.audit).values(
            at_s=at_s,
            subject=note.subject,
            action=note.action,
            target=target,
            detail=json.dumps(note.detail, default=str),
        )
    )


class Audit:
    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, subject: str, action: str, target: str, **detail: Any) -> None:
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            write(connection, Note(subject, action, detail), target, now_s)

    def entries(self, before: int | None = None, limit: int = 100) -> list[Entry]:
        """The newest first; `before` is the number of an entry."""
        statement = select(schema.audit).order_by(schema.audit.c.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(schema.audit.c.id < before)
        with self._database.reading() as connection:
            rows = connection.execute(statement).all()
        return [
            Entry(row.id, row.at_s, row.subject, row.action, row.target, json.loads(row.detail))
            for row in rows
        ]
