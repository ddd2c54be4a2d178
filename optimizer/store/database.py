"""The database of a store: one connection to SQLite or PostgreSQL, the differences between them.

Each statement is a transaction of its own. It knows the tables only by name.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from sqlite3 import OperationalError

from sqlalchemy import Connection, Engine, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from optimizer.store import schema
from optimizer.store.location import Location, StoreInvalid

_TIMEOUT_S = 30
"""How long a statement may take, waiting for other processes included."""
_CONNECT_TIMEOUT_S = 10
_INSERT: Mapping[str, Callable[[Table], sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}
# The second is a number that only stores use: processes that make tables queue up behind it.
_EXCLUSIVELY = {
    "sqlite": ("BEGIN IMMEDIATE",),
    "postgresql": (
        "BEGIN",
        f"SELECT pg_advisory_xact_lock({int.from_bytes(b'trimserv')})",
    ),
}
# A server that is gone is noticed after a minute, not after the kernel's two hours.
_LIBPQ = {
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "application_name": "trimserve",
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


class Database:
    """Opened and with today's tables. Used from one thread."""

    def __init__(self, location: Location) -> None:
        """Raises StoreInvalid, also where the tables are of a version that isn't known."""
        self._shown = location.shown
        try:
            self._engine = _engine(location)
        except ImportError as error:
            raise StoreInvalid(
                location.shown, f"needs pip install 'trimserve[postgres]' ({error})"
            ) from error
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def connected(self, failing: str = "can't be used") -> Iterator[Connection]:
        """The connection, made again if it broke. The database's errors become StoreInvalid."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise StoreInvalid(self._shown, f"{failing}: {str(cause).strip()}") from error

    def insert_new(self, table: Table, row: Mapping[str, object]) -> bool:
        """Insert the row unless one with its key is there; returns whether it was new."""
        with self.connected() as connection:
            insert = _INSERT[connection.dialect.name](table).values(row)
            return connection.execute(insert.on_conflict_do_nothing()).rowcount == 1

    def _prepare(self) -> None:
        with self.connected("can't be opened as a store") as connection:
            version = schema.prepare(connection, _EXCLUSIVELY[connection.dialect.name])
        if version != schema.VERSION:
            raise StoreInvalid(
                self._shown,
                f"has schema {version}, this version of trimserve reads {schema.VERSION}",
            )


def _engine(location: Location) -> Engine:
    is_sqlite = location.file is not None
    engine = create_engine(
        location.url,
        isolation_level="AUTOCOMMIT",
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_pre_ping=not is_sqlite,
        connect_args={"timeout": _TIMEOUT_S} if is_sqlite else _libpq(location),
    )
    event.listen(engine, "connect", _set_up_sqlite if is_sqlite else _set_up_postgresql)
    return engine


def _libpq(location: Location) -> dict[str, object]:
    """Parameters for libpq; what the URL says goes first."""
    return {name: value for name, value in _LIBPQ.items() if name not in location.url.query}


def _set_up_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """With WAL, readers don't wait for the writer, and NORMAL loses at most the last commits in a
    power cut, never consistency."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    cursor = connection.cursor()
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            break
        except OperationalError as error:
            # Two processes that make a new file wait for each other, so SQLite's own timeout
            # doesn't apply.
            if "locked" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - not a secret
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _set_up_postgresql(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET statement_timeout = {_TIMEOUT_S * 1000}")
    cursor.close()
    connection.commit()
