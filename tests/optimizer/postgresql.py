"""A PostgreSQL server of one's own, from Debian's package, on a Unix socket: nothing shared."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

BINARIES = Path("/usr/lib/postgresql")
USER = "trimserve"
PASSWORD = "se:cr@t/word"
QUOTED_PASSWORD = "se%3Acr%40t%2Fword"
_PATIENCE_S = 60


@dataclass(frozen=True)
class Cluster:
    """`folder` holds data, socket and log. The server refuses to run as root."""

    binaries: Path
    folder: Path
    user: str | None

    def url(self, store: str, password: str = QUOTED_PASSWORD) -> str:
        """Of a schema in one database: much faster to make than a database for each store."""
        options = f"host={self.folder}&options=-csearch_path%3D{store}"
        return f"postgresql://{USER}:{password}@/postgres?{options}"

    def create(self, store: str) -> str:
        """Make an empty schema; returns its URL."""
        self.query(store, sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(store)))
        return self.url(store)

    def query(self, store: str, statement: LiteralString | sql.Composed) -> list[tuple[Any, ...]]:
        with psycopg.connect(
            host=str(self.folder), dbname="postgres", user=USER, password=PASSWORD,
            options=f"-csearch_path={store}", autocommit=True,
        ) as connection:  # fmt: skip
            answer = connection.execute(statement)
            return answer.fetchall() if answer.description else []

    def initialize(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb", "--auth=scram-sha-256", f"--username={USER}", f"--pwfile={password}",
            "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--pgdata", str(self._data),
        )  # fmt: skip

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        self._run(
            "pg_ctl", "start", "--wait", "--silent", "--pgdata", str(self._data),
            "--log", str(self.folder / "log"), "--options", options,
        )  # fmt: skip

    def crash(self) -> None:
        """End the server without a shutdown: it recovers when it is started again."""
        self._run("pg_ctl", "stop", "--silent", "--mode=immediate", "--pgdata", str(self._data))

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _run(self, program: str, *arguments: str) -> None:
        # Output goes to a file: a server that holds a pipe open would keep us waiting.
        with (self.folder / "output").open("a+") as output:
            ended = subprocess.run(
                [self.binaries / program, *arguments], stdout=output, stderr=output, check=False,
                cwd=self.folder, user=self.user, group=self.user, timeout=_PATIENCE_S,
                extra_groups=None if self.user is None else [],
            )  # fmt: skip
        assert ended.returncode == 0, (self.folder / "output").read_text()


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A server that is up; skips the test where the package isn't there, but not in CI."""
    # pytest's own folders are closed to other users, and too long for a socket's name.
    with tempfile.TemporaryDirectory(prefix="trimserve-postgresql-") as folder:
        cluster = Cluster(_binaries(), Path(folder), "postgres" if os.geteuid() == 0 else None)
        if cluster.user is not None:
            shutil.chown(folder, cluster.user, cluster.user)
        cluster.initialize()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.crash()


def _binaries() -> Path:
    """Of the newest version that is installed."""
    found = sorted(BINARIES.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        message = "initdb is missing: apt-get install postgresql"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    return found[-1].parent
