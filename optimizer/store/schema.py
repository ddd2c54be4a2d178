"""The schema: the tables of a store, one definition for SQLite and PostgreSQL, and its versions.

It makes and migrates tables. It knows neither where the database is nor what rows mean.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    func,
    inspect,
    select,
)
from sqlalchemy.dialects.sqlite import REAL
from sqlalchemy.types import TypeEngine

VERSION = 2
_WITHOUT_TABLE = 1
"""The last version that SQLite's `user_version` alone said."""

_metadata = MetaData()
# Bytewise order on both: what sorts and compares mustn't depend on the server's locale.
_TEXT = Text().with_variant(Text(collation="C"), "postgresql")
_REAL: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
_NUMBER = BigInteger().with_variant(Integer(), "sqlite")


def _table(name: str, *columns: Column[int] | Column[str] | Column[float]) -> Table:
    return Table(name, _metadata, *columns, sqlite_strict=True)


def _text(name: str, *, is_key: bool = False) -> Column[str]:
    return Column(name, _TEXT, primary_key=is_key, nullable=False)


def _order() -> Column[int]:
    """A number that grows with each row."""
    return Column("id", _NUMBER, Identity(always=True), primary_key=True)


versions = _table(
    "schema",
    Column("version", Integer, primary_key=True, autoincrement=False),
    _text("since"),
)
variants = _table(
    "variants",
    _text("id", is_key=True),
    _text("parent_id"),
    _text("step"),
    _text("data_digest"),
    _text("model"),
    _text("artifact"),
    Column("build_s", _REAL, nullable=False),
    _text("created_at"),
)
measurements = _table(
    "measurements",
    _order(),
    _text("variant_id"),
    _text("machine"),
    _text("serving"),
    _text("metric"),
    Column("protocol_version", Integer, nullable=False),
    _text("value"),
    _text("taken_at"),
)
machines = _table("machines", _text("fingerprint", is_key=True), _text("machine"))
looks = _table(
    "looks", _order(), _text("study_id"), _text("variant_id"), _text("split_digest"), _text("at")
)
trials = _table(
    "trials",
    _text("study_id", is_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    _text("entry"),
    _text("at"),
)
# `serving` is in no index: it may be longer than an entry of PostgreSQL's can be (2,704 bytes).
_of_measurements = (
    Index(
        "measurements_of_variant",
        measurements.c.variant_id,
        measurements.c.machine,
        measurements.c.metric,
        measurements.c.protocol_version,
        measurements.c.id,
    ),
    Index(
        "measurements_of_metric",
        measurements.c.metric,
        measurements.c.protocol_version,
        measurements.c.id,
    ),
)
Index("looks_at_split", looks.c.split_digest, looks.c.id)


def prepare(connection: Connection, exclusively: Sequence[str]) -> int:
    """Make or migrate the tables; returns the version that is there now, or one unknown here.

    `exclusively` are the statements that begin a transaction in which no other process does the
    same. `connection` commits by itself.
    """
    version = _version(connection)
    if version not in (0, _WITHOUT_TABLE):
        return version
    with _transaction(connection, exclusively):
        version = _version(connection)  # another process may have been first
        if version in (0, _WITHOUT_TABLE):
            _bring_up(connection, version)
            version = VERSION
    return version


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat()


@contextmanager
def _transaction(connection: Connection, beginning: Sequence[str]) -> Iterator[None]:
    begin, *rest = beginning
    connection.exec_driver_sql(begin)
    try:
        for statement in rest:
            connection.exec_driver_sql(statement)
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        connection.exec_driver_sql("ROLLBACK")
        raise


def _version(connection: Connection) -> int:
    if inspect(connection).has_table(versions.name):
        return int(connection.execute(select(func.max(versions.c.version))).scalar_one())
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    return 0


def _bring_up(connection: Connection, version: int) -> None:
    if version == _WITHOUT_TABLE:  # its three tables are today's
        connection.exec_driver_sql("DROP INDEX measurements_by_key")
        for index in _of_measurements:
            index.create(connection)
        for table in (versions, looks, trials):
            table.create(connection, checkfirst=False)
    else:
        # Without a check: a table of that name is another program's, and no part of a store.
        _metadata.create_all(connection, checkfirst=False)
    if connection.dialect.name == "sqlite":
        # So that a version of trimserve that reads this number alone refuses the file.
        connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
    connection.execute(versions.insert().values(version=VERSION, since=now()))
