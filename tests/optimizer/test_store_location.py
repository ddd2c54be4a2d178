"""Where stores lie, which files and servers are refused, and that passwords are never said."""

import logging
import sqlite3
import traceback
from pathlib import Path

import pytest

from optimizer.store import Store, StoreInvalid, without_password
from tests.optimizer.postgresql import Cluster
from tests.optimizer.stored import timing_of, variant

SECRET = "hunter2"
# Tables and version of the first schema, which had no table for the version.
FIRST_SCHEMA = """
CREATE TABLE variants (
    id TEXT PRIMARY KEY,
    parent_id TEXT NOT NULL,
    step TEXT NOT NULL,
    data_digest TEXT NOT NULL,
    model TEXT NOT NULL,
    artifact TEXT NOT NULL,
    build_s REAL NOT NULL,
    created_at TEXT NOT NULL
) STRICT;
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY,
    variant_id TEXT NOT NULL,
    machine TEXT NOT NULL,
    serving TEXT NOT NULL,
    metric TEXT NOT NULL,
    protocol_version INTEGER NOT NULL,
    value TEXT NOT NULL,
    taken_at TEXT NOT NULL
) STRICT;
CREATE INDEX measurements_by_key
    ON measurements (variant_id, machine, serving, metric, protocol_version, id);
CREATE TABLE machines (fingerprint TEXT PRIMARY KEY, machine TEXT NOT NULL) STRICT;
PRAGMA user_version = 1;
"""


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        with connection:
            return connection.execute(statement).fetchall()
    finally:
        connection.close()


# --- SQLite


@pytest.mark.parametrize("scheme", ["", "sqlite:///"])
def test_store_is_a_file_with_its_artifacts_beside_it_when_only_that_is_named(
    scheme: str, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "store.sqlite"
    with Store(f"{scheme}{path}") as store:
        added = variant(store)
    assert path.is_file()
    assert added.model.directory.parent == tmp_path / "folder" / "store.sqlite.artifacts"


def test_store_is_relative_to_the_working_directory_when_its_path_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Store("sqlite:///one.sqlite").close()
    Store(Path(":memory:")).close()
    assert (tmp_path / "one.sqlite").is_file()
    assert (tmp_path / ":memory:").is_file()


def test_artifacts_are_elsewhere_when_a_folder_is_named(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite", tmp_path / "elsewhere") as store:
        assert variant(store).model.directory.parent == tmp_path / "elsewhere"


def test_store_is_refused_when_its_file_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreInvalid, match="can't be opened as a store: file is not a database"):
        Store(path)


def test_store_is_refused_and_nothing_changed_when_another_program_has_the_tables(
    tmp_path: Path,
) -> None:
    path = tmp_path / "optuna.sqlite"
    query(path, "CREATE TABLE trials (trial_id INTEGER PRIMARY KEY)")
    with pytest.raises(StoreInvalid, match="can't be opened as a store: table trials already"):
        Store(path)
    assert query(path, "SELECT name FROM sqlite_schema WHERE type = 'table'") == [("trials",)]


def test_store_is_refused_when_its_schema_is_newer(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    Store(path).close()
    query(path, "INSERT INTO schema VALUES (99, '')")
    with pytest.raises(StoreInvalid, match="has schema 99, this version of trimserve reads 2"):
        Store(path)


def test_store_keeps_what_it_had_when_it_is_of_the_first_schema(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        added = variant(store)
        store.record(timing_of("v"), 1)
    kept = {table: query(path, f"SELECT * FROM {table}") for table in ("variants", "measurements")}
    kept["machines"] = query(path, "SELECT * FROM machines")
    path.unlink()
    first = sqlite3.connect(path)
    first.executescript(FIRST_SCHEMA)
    for table, rows in kept.items():
        first.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)
    first.commit()
    first.close()
    with Store(path) as store:
        assert store.find("v") == added
        assert store.recorded(timing_of("v")) == 1
        store.record(timing_of("v"), 2)
        store.log_trial("study", 1, {})
    fresh = tmp_path / "fresh.sqlite"
    Store(fresh).close()
    assert tables(path) == tables(fresh)


def tables(path: Path) -> dict[str, object]:
    """Columns of each table and index, and the version that old readers see."""
    of = {
        "table": "SELECT name, type FROM pragma_table_xinfo('{}')",
        "index": "SELECT name FROM pragma_index_info('{}')",
    }
    names = query(path, "SELECT type, name FROM sqlite_schema")
    columns = {str(name): query(path, of[str(kind)].format(name)) for kind, name in names}
    return {**columns, "user_version": query(path, "PRAGMA user_version")}


def test_facts_of_a_wrong_type_are_refused_when_another_program_writes_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "store.sqlite"
    Store(path).close()
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
        query(path, "INSERT INTO trials VALUES ('study', 'one', '{}', '')")


def test_error_names_the_store_when_its_file_fails_later(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        query(path, "DROP TABLE looks")
        with pytest.raises(StoreInvalid, match=r"store\.sqlite: can't be used: no such table"):
            store.log_look("study", "v", "test")


# --- URLs


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        pytest.param("mysql://h/db", "mysql://h/db: got mysql://, want a path", id="another kind"),
        pytest.param("postgresql+psycopg2://h/db", "got postgresql.psycopg2://", id="a driver"),
        pytest.param("sqlite://", "names no file", id="SQLite in memory"),
        pytest.param("sqlite:///:memory:", "names no file", id="SQLite in memory by name"),
        pytest.param("sqlite:///a.sqlite?mode=ro", "nothing after it", id="SQLite with options"),
        pytest.param("sqlite://folder/a.sqlite", "names no file", id="SQLite with two slashes"),
        pytest.param("postgresql://h:port/db", "can't be read as a URL", id="no number as port"),
        pytest.param("postgresql://h/db", r"--artifacts", id="PostgreSQL without artifacts"),
    ],
)
def test_store_is_refused_when_its_url_is(location: str, problem: str) -> None:
    with pytest.raises(StoreInvalid, match=problem):
        Store(location)


@pytest.mark.parametrize(
    "location",
    [
        pytest.param("postgresql://user:hunter2@h/db", id="as a URL has it"),
        pytest.param("postgresql://h/db?user=u&password=hunter2", id="as a parameter"),
        pytest.param("postgresql://h/db?sslpassword=hunter2&sslkey=k", id="of the key"),
        pytest.param("postgresql://user:a@hunter2@h/db", id="with an @"),
        pytest.param("postgresql://user:a/hunter2@h/db", id="with a slash"),
        pytest.param("postgresql://user:hunter2/b@h:x/db", id="with a port that isn't"),
        pytest.param("postgresql://user@h:hunter2/b/db", id="in the place of a port"),
        pytest.param("mysql://user:hunter2@h/db", id="of another kind"),
    ],
)
def test_password_is_not_said_when_it_is_in_the_url(location: str) -> None:
    assert SECRET not in without_password(location)
    with pytest.raises(StoreInvalid) as caught:
        Store(location)
    assert SECRET not in str(caught.value)
    assert SECRET not in caught.value.location


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        pytest.param("postgresql://u:p@h:1/db?a=b", "postgresql://u:***@h:1/db?a=b", id="a URL"),
        pytest.param("store.sqlite", "store.sqlite", id="a path"),
        pytest.param(Path("a", "b"), "a/b", id="a Path"),
        pytest.param("postgresql://h:x/db", "postgresql://…", id="no URL"),
    ],
)
def test_location_is_shown_as_given_when_it_has_no_password(
    location: str | Path, shown: str
) -> None:
    assert without_password(location) == shown


# --- PostgreSQL


def test_store_is_refused_when_no_server_is_there(tmp_path: Path) -> None:
    url = f"postgresql://user:{SECRET}@/db?host={tmp_path}"
    with pytest.raises(StoreInvalid, match=r"can't be opened as a store: .*No such file") as caught:
        Store(url, tmp_path / "artifacts")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.full
def test_password_is_not_said_when_the_server_refuses_it(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreInvalid, match="password authentication failed") as caught:
        Store(cluster.url("any", SECRET), tmp_path)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text


@pytest.mark.full
def test_store_is_refused_and_nothing_changed_when_another_program_has_the_tables_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    url = cluster.create("taken")
    cluster.query("taken", "CREATE TABLE trials (trial_id integer)")
    with pytest.raises(StoreInvalid, match='relation "trials" already exists'):
        Store(url, tmp_path)
    assert cluster.query("taken", "SELECT tablename FROM pg_tables WHERE schemaname='taken'") == [
        ("trials",)
    ]


@pytest.mark.full
def test_store_in_postgresql_is_refused_when_its_schema_is_newer(
    cluster: Cluster, tmp_path: Path
) -> None:
    url = cluster.create("newer")
    Store(url, tmp_path).close()
    cluster.query("newer", "INSERT INTO schema VALUES (99, '')")
    with pytest.raises(StoreInvalid, match="has schema 99, this version of trimserve reads 2"):
        Store(url, tmp_path)
