"""The audit: who did what to what, and when. Rows are only added."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select

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


class Audit:
    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, subject: str, action: str, target: str, **detail: Any) -> None:
        with self._database.writing() as connection:
            connection.execute(
                insert(schema.audit).values(
                    at_s=self._database.now_s(connection),
                    subject=subject,
                    action=action,
                    target=target,
                    detail=json.dumps(detail, default=str),
                )
            )

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
