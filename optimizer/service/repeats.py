"""Idempotency keys: a request that comes again makes nothing new.

A key is its owner's, and stands for what was asked for with it, by a digest, and for the id of what
that made. The rows are read and written inside of the transaction that makes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, Table, select, update
from sqlalchemy.dialects import postgresql, sqlite

from optimizer.service import schema

INSERT: Mapping[str, Callable[[Table], sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}
"""By the dialect's name: inserts that may find their row there already."""


class KeyReused(Exception):
    """An idempotency key that came before, with another request."""

    def __init__(self, key: str, made_id: str) -> None:
        super().__init__(f"the key {key!r} was used for {made_id}, with another request")
        self.made_id = made_id


@dataclass(frozen=True)
class Repeatable:
    """A request that may come again; `digest` is of all that it asks for."""

    owner: str
    key: str
    digest: str


def made_before(connection: Connection, request: Repeatable, now_s: float) -> str | None:
    """The id of what the same request made; None, with the key now taken, where it is the first.

    Raises KeyReused."""
    table = schema.requests
    taken = connection.execute(
        INSERT[connection.dialect.name](table)
        .values(
            owner=request.owner, key=request.key, digest=request.digest, job_id="",
            created_s=now_s,
        )
        .on_conflict_do_nothing()
        .returning(table.c.key)
    )  # fmt: skip
    if taken.first() is not None:
        return None
    held = connection.execute(
        select(table.c.digest, table.c.job_id).where(
            table.c.owner == request.owner, table.c.key == request.key
        )
    ).one()
    if held.digest != request.digest:
        raise KeyReused(request.key, held.job_id)
    made_id: str = held.job_id
    return made_id


def has_made(connection: Connection, request: Repeatable, made_id: str) -> None:
    """In the transaction in which `made_before` gave None."""
    table = schema.requests
    connection.execute(
        update(table)
        .where(table.c.owner == request.owner, table.c.key == request.key)
        .values(job_id=made_id)
    )
