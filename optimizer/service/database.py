"""The service's database: SQLite in a file, or PostgreSQL, brought to today's tables by Alembic.

One engine a process, usable from several threads. It knows no job.
"""

import importlib.resources
import random
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from optimizer.errors import OptimizerError
from optimizer.store.location import Location, StoreInvalid, locate

_TIMEOUT_S = 30
"""How long a statement may take, waiting for other processes included."""
_POOL_SIZE = 8
# A server that is gone is noticed within a minute. What the URL says goes first.
_LIBPQ = {"connect_timeout": 5, "application_name": "trimserve-service", "keepalives_idle": 30}
_MIGRATING = int.from_bytes(b"trimjobs")
"""A number that only migrations use: of several processes that start at once, one migrates."""


class DatabaseUnavailable(OptimizerError):
    """The database doesn't answer, or not as it should; what was asked can be asked again."""

    def __init__(self, shown: str, problem: str) -> None:
        super().__init__(f"database {shown}: {problem}")
        self.shown = shown
        self.problem = problem


class RevisionUnknown(OptimizerError):
    """There are no tables of that revision; says which there are."""

    def __init__(self, revision: str, known: Sequence[str]) -> None:
        super().__init__(f"got {revision!r}, want head or {min(known)} … {max(known)}")


class Database:
    def __init__(self, location: str) -> None:
        """`location`: a file, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE.

        Raises StoreInvalid where it can't be read as one of them."""
        found = _located(location)
        self.shown = found.shown
        self.is_sqlite = found.file is not None
        if found.file is not None:
            try:
                found.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = f"no folder {found.file.parent} can be made ({error.strerror})"
                raise StoreInvalid(found.shown, f"{problem}, want a file in one") from error
        try:
            self._engine = _engine(found)
        except (ArgumentError, ImportError) as error:
            raise StoreInvalid(
                found.shown, f"needs pip install 'trimserve[postgres]' ({error})"
            ) from error

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection whose statements see one state of the database."""
        with self._translated(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction: whole when the block ends, undone when it raises. In SQLite it is alone
        from its beginning, so that what it has read is still true when it writes."""
        with self._translated(), self._engine.connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            with connection.begin() if not self.is_sqlite else _committed(connection):
                yield connection

    def now_s(self, connection: Connection) -> float:
        """Seconds since 1970 by the one clock that all processes share: PostgreSQL's, or of the
        machine that the file is on."""
        if self.is_sqlite:
            return time.time()
        asked = text("SELECT extract(epoch FROM clock_timestamp())")
        return float(connection.execute(asked).scalar_one())

    def started_s(self, connection: Connection) -> float:
        """When the database's server was started, by the same clock; 0 for a file, which is never
        away."""
        if self.is_sqlite:
            return 0.0
        asked = text("SELECT extract(epoch FROM pg_postmaster_start_time())")
        return float(connection.execute(asked).scalar_one())

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to `revision`: today's, or an older one, with what they hold.

        Raises RevisionUnknown, DatabaseUnavailable, and StoreInvalid where they are of a newer
        trimserve, or the file isn't SQLite's."""
        _check_revision(revision)
        with self._translated(), self._engine.connect() as connection:
            if self.is_sqlite:
                # A table is altered by copying it, and others refer to it meanwhile.
                connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                with _committed(connection):
                    self._migrate(connection, revision)
                    lost = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                    if lost:
                        raise StoreInvalid(
                            self.shown, f"rows would lose what they refer to: {lost}"
                        )
                connection.exec_driver_sql("PRAGMA foreign_keys = ON")
            else:
                with connection.begin():
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATING})"))
                    self._migrate(connection, revision)

    def _migrate(self, connection: Connection, revision: str) -> None:
        config = migrations(connection)
        script = ScriptDirectory.from_config(config)
        current = MigrationContext.configure(connection).get_current_revision()
        known = {one.revision for one in script.walk_revisions()}
        if current is not None and current not in known:
            raise StoreInvalid(
                self.shown, f"has schema {current}, of a newer trimserve: install that one"
            )
        order = [one.revision for one in script.walk_revisions()]  # newest first
        wanted = script.get_current_head() if revision == "head" else revision
        if current is not None and (
            revision == "base" or order.index(str(wanted)) > order.index(current)
        ):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                raise StoreInvalid(
                    self.shown, "is no database of SQLite, want one, or a new file"
                ) from error
            raise DatabaseUnavailable(self.shown, str(cause).strip()) from error


def migrations(connection: Connection) -> Config:
    """Alembic's configuration for `connection`, which stays the caller's."""
    config = _scripts()
    config.attributes["connection"] = connection
    return config


def _scripts() -> Config:
    config = Config()
    folder = importlib.resources.files("optimizer.service") / "migrations"
    config.set_main_option("script_location", str(folder))
    return config


def _check_revision(revision: str) -> None:
    known = [one.revision for one in ScriptDirectory.from_config(_scripts()).walk_revisions()]
    if revision not in ("head", "base", *known):
        raise RevisionUnknown(revision, known)


@contextmanager
def _committed(connection: Connection) -> Iterator[None]:
    """Ends what BEGIN IMMEDIATE began: the driver is in its autocommit mode."""
    try:
        yield
    except BaseException:
        connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


def _located(location: str) -> Location:
    """As a store is located; a job database needs no folder of artifacts."""
    return locate(location, Path())


def _engine(location: Location) -> Engine:
    is_sqlite = location.file is not None
    engine = create_engine(
        location.url,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_SIZE,
        pool_timeout=_TIMEOUT_S,
        pool_pre_ping=not is_sqlite,
        **({"isolation_level": "AUTOCOMMIT"} if is_sqlite else {}),
        connect_args=(
            {"timeout": _TIMEOUT_S, "check_same_thread": False}
            if is_sqlite
            else {name: value for name, value in _LIBPQ.items() if name not in location.url.query}
        ),
    )
    event.listen(engine, "connect", _set_up_sqlite if is_sqlite else _set_up_postgresql)
    return engine


def _set_up_postgresql(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET statement_timeout = {_TIMEOUT_S * 1000}")
    cursor.close()
    connection.commit()


def _set_up_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Readers don't wait for the writer. FULL, unlike a store's NORMAL: a job that was accepted
    must outlive a power cut, and no measurement repeats it."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    cursor = connection.cursor()
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            break
        except Exception as error:
            # Processes that make a new file wait for each other; SQLite's timeout doesn't apply.
            if "locked" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - not a secret
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
