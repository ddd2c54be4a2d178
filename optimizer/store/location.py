"""Where a store lies: the database of its facts, and the folder of its artifacts.

It takes a location apart and says it without passwords; it opens nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from optimizer.errors import OptimizerError

DEFAULT_PATH = Path(".trimserve", "store.sqlite")
"""Relative to the working directory."""
_ALLOWED = "a path, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
_SECRETS = ("password", "sslpassword")
"""libpq's parameters (PostgreSQL 17, 32.1.2) that a URL's query may carry as well."""


class StoreInvalid(OptimizerError):
    """The store can't be used; `problem` says why and what to do, `location` has no password."""

    def __init__(self, location: str, problem: str) -> None:
        super().__init__(f"{location}: {problem}")
        self.location = location
        self.problem = problem


@dataclass(frozen=True)
class Location:
    """`shown` is for people: the path or URL as it was given, without passwords."""

    url: URL
    artifacts: Path
    shown: str

    @property
    def file(self) -> Path | None:
        """The file of an SQLite store."""
        is_sqlite = self.url.get_backend_name() == "sqlite"
        return Path(self.url.database or "") if is_sqlite else None


def locate(location: Path | str, artifacts: Path | None = None) -> Location:
    """Take `location` apart, a path or a URL; `artifacts` None is the folder beside the file.

    Raises StoreInvalid for other URLs, and for PostgreSQL without `artifacts`.
    """
    if isinstance(location, str) and "://" in location:
        return _locate_url(location, artifacts)
    return _locate_file(Path(location), artifacts, str(location))


def without_password(location: Path | str) -> str:
    """The location as messages, logs and recorded commands may show it."""
    if isinstance(location, Path) or "://" not in location:
        return str(location)
    url = _parsed(location)
    return f"{location.partition('://')[0]}://…" if url is None else _shown(url)


def _locate_file(path: Path, artifacts: Path | None, shown: str) -> Location:
    beside = path.with_name(path.name + ".artifacts")
    # Absolute, so that no name means anything special to SQLite (":memory:").
    url = URL.create("sqlite", database=str(path.absolute()))
    return Location(url, artifacts or beside, shown)


def _locate_url(location: str, artifacts: Path | None) -> Location:
    shown = without_password(location)
    url = _parsed(location)
    if url is None:
        raise StoreInvalid(
            shown,
            f"can't be read as a URL, want {_ALLOWED}; in a user's name or a password @ is "
            "written %40, : is %3A and / is %2F",
        )
    if url.drivername == "sqlite":
        if not url.database or url.database == ":memory:" or url.query or url.host:
            raise StoreInvalid(shown, "names no file, want sqlite:///PATH and nothing after it")
        return _locate_file(Path(url.database), artifacts, shown)
    if url.drivername != "postgresql":
        raise StoreInvalid(shown, f"got {url.drivername}://, want {_ALLOWED}")
    if artifacts is None:
        raise StoreInvalid(
            shown,
            "PostgreSQL keeps the facts alone: name a folder for the artifacts that all "
            "processes share (--artifacts)",
        )
    return Location(url.set(drivername="postgresql+psycopg"), artifacts, shown)


def _parsed(location: str) -> URL | None:
    """The URL; None where it can't be read, or where part of a password would pass for the host."""
    try:
        url = make_url(location)
    except (ArgumentError, ValueError):
        return None
    return None if "@" in (url.host or "") or "@" in (url.database or "") else url


def _shown(url: URL) -> str:
    hidden = {name: "***" for name in _SECRETS if name in url.query}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)
