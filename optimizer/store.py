"""The store: variants with their provenance, and what was measured of them.

A SQLite file for the facts and a folder beside it, addressed by content, for the artifacts. A
variant is there once its row is: files come first, by a rename. Measurements are only added,
never changed. It knows no technique and no engine.
"""

import hashlib
import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optimizer.errors import OptimizerError
from optimizer.variant import (
    StoredModel,
    canonical_json,
    digest_of,
    model_from_dict,
    model_to_dict,
)
from serve.artifact import Step
from serve.machine import Machine

SCHEMA_VERSION = 1
DEFAULT_PATH = Path(".trimserve", "store.sqlite")
"""Relative to the working directory."""
_BUSY_TIMEOUT_S = 30.0
_WORKSHOP = ".building-"
_LEFTOVER_S = 7 * 86_400.0
_SCHEMA = """
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
"""


class StoreInvalid(OptimizerError):
    """The store's file can't be used; `problem` says why and what to do."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


@dataclass(frozen=True)
class StoredVariant:
    """A variant's provenance and a handle on its artifact."""

    id: str
    parent_id: str
    step: Step
    data_digest: str
    model: StoredModel
    build_s: float


@dataclass(frozen=True)
class Key:
    """What a measurement is of. `serving` is the serving configuration as plain values (empty
    where the metric doesn't depend on it); `protocol_version` changes with the way of measuring,
    so that old values aren't mistaken for new ones."""

    variant_id: str
    machine: Machine
    metric: str
    protocol_version: int
    serving: Mapping[str, object]


class Store:
    """One open store. Used from one thread; several processes may have it open."""

    def __init__(self, path: Path) -> None:
        """Open the store at `path`, made if need be. Raises StoreInvalid."""
        self.path = path
        self._artifacts = path.with_name(path.name + ".artifacts")
        try:
            self._artifacts.mkdir(parents=True, exist_ok=True)
            self._connection = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise StoreInvalid(path, f"can't be opened as a store: {error}") from error
        self._remove_leftovers()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """An empty folder to build an artifact in; what is left in it goes."""
        with tempfile.TemporaryDirectory(prefix=_WORKSHOP, dir=self._artifacts) as directory:
            yield Path(directory)

    def add(self, variant: StoredVariant) -> StoredVariant:
        """Keep a variant whose files lie in a workshop of this store; the returned handle is on
        where they lie now. Adding what is there already changes nothing."""
        kept = self._artifacts / variant.model.digest
        if digest_of(variant.model, kept) != variant.model.digest:
            shutil.rmtree(kept, ignore_errors=True)  # damaged from outside, if there at all
            variant.model.directory.rename(kept)
            variant.model.directory.mkdir()
        model = replace(variant.model, directory=kept)
        row = (
            variant.id, variant.parent_id, canonical_json(asdict(variant.step)),
            variant.data_digest, canonical_json(model_to_dict(model)), model.digest,
            variant.build_s, _now(),
        )  # fmt: skip
        self._connection.execute("INSERT OR REPLACE INTO variants VALUES (?,?,?,?,?,?,?,?)", row)
        return replace(variant, model=model)

    def find(self, variant_id: str) -> StoredVariant | None:
        """The variant, or None where it isn't there or its files aren't what they were."""
        row = self._connection.execute(
            "SELECT parent_id, step, data_digest, model, artifact, build_s FROM variants "
            "WHERE id = ?",
            (variant_id,),
        ).fetchone()
        if row is None:
            return None
        parent_id, step, data_digest, model, artifact, build_s = row
        directory = self._artifacts / artifact
        found = model_from_dict(json.loads(model), directory, artifact)
        if digest_of(found, directory) != artifact:
            return None
        return StoredVariant(
            variant_id, parent_id, Step(**json.loads(step)), data_digest, found, build_s
        )

    def record(self, key: Key, value: object) -> None:
        """Add a measurement; `value` is anything that JSON can hold, but NaN and infinity."""
        fingerprint = self._fingerprint(key.machine)
        row = (
            key.variant_id, fingerprint, canonical_json(dict(key.serving)), key.metric,
            key.protocol_version, canonical_json(value), _now(),
        )  # fmt: skip
        self._connection.execute(
            "INSERT INTO measurements (variant_id, machine, serving, metric, protocol_version, "
            "value, taken_at) VALUES (?,?,?,?,?,?,?)",
            row,
        )

    def recorded(self, key: Key) -> Any:
        """The newest measurement of the key, or None."""
        row = self._connection.execute(
            "SELECT value FROM measurements WHERE variant_id = ? AND machine = ? AND "
            "serving = ? AND metric = ? AND protocol_version = ? ORDER BY id DESC LIMIT 1",
            (
                key.variant_id,
                machine_fingerprint(key.machine),
                canonical_json(dict(key.serving)),
                key.metric,
                key.protocol_version,
            ),
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def _fingerprint(self, machine: Machine) -> str:
        fingerprint = machine_fingerprint(machine)
        self._connection.execute(
            "INSERT OR IGNORE INTO machines VALUES (?, ?)",
            (fingerprint, canonical_json(machine.to_dict())),
        )
        return fingerprint

    def _remove_leftovers(self) -> None:
        """Workshops of processes that were killed; younger ones may be in use."""
        for workshop in self._artifacts.glob(f"{_WORKSHOP}*"):
            with suppress(OSError):
                if time.time() - workshop.stat().st_mtime > _LEFTOVER_S:
                    shutil.rmtree(workshop, ignore_errors=True)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        # With WAL, readers don't wait for the writer, and NORMAL loses at most the last commits
        # in a power cut, never consistency.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        version = _create_schema(connection)
        if version not in (0, SCHEMA_VERSION):
            raise StoreInvalid(
                path, f"has schema {version}, this version of trimserve reads {SCHEMA_VERSION}"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _create_schema(connection: sqlite3.Connection) -> int:
    """Make the tables of an empty file, in one transaction; returns the version found, 0 there."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return int(version)


def machine_fingerprint(machine: Machine) -> str:
    """SHA-256 (hex) of all that makes timings of two machines comparable."""
    return hashlib.sha256(canonical_json(machine.to_dict()).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat()
