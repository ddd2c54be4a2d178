"""One open store: facts are written to and read from a database, files to and from a folder.

A variant is there once its row is: files come first. It knows no technique and no engine.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import count, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Row, select, update

from optimizer.store.artifacts import Artifacts
from optimizer.store.database import Database
from optimizer.store.facts import (
    Key,
    Look,
    StoredVariant,
    TrialLoggedOtherwise,
    machine_fingerprint,
)
from optimizer.store.location import StoreInvalid, locate
from optimizer.store.schema import looks, machines, measurements, now, trials, variants
from optimizer.variant import canonical_json, model_from_dict, model_to_dict
from serve.artifact import Step
from serve.machine import Machine

_HEX = frozenset("0123456789abcdef")


class Store:
    """Used from one thread at a time; several processes may have it open.

    Every method raises StoreInvalid where the database fails (disk full, server gone). What was
    written when a method returns survives the process.
    """

    def __init__(self, location: Path | str, artifacts: Path | None = None) -> None:
        """Open the store at `location`, made if need be.

        A path or `sqlite:///PATH` is an SQLite file, with its artifacts beside it unless
        `artifacts` names another folder; `postgresql://USER:PASSWORD@HOST/DATABASE` needs
        `artifacts`. What libpq takes (`?sslmode=require`, PGPASSWORD, ~/.pgpass) works there too.
        """
        where = locate(location, artifacts)
        self.location = where.shown
        """As it was given, without a password."""
        try:
            if where.file is not None:
                where.file.parent.mkdir(parents=True, exist_ok=True)
            self._artifacts = Artifacts(where.artifacts)
        except OSError as error:
            raise StoreInvalid(self.location, f"can't be opened as a store: {error}") from error
        self._database = Database(where)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- variants

    @property
    def checkpoints(self) -> Path:
        """See `Artifacts.checkpoints`."""
        return self._artifacts.checkpoints

    def workshop(self) -> AbstractContextManager[Path]:
        """An empty folder to build an artifact in; what is left in it goes."""
        return self._artifacts.workshop()

    def add(self, variant: StoredVariant) -> StoredVariant:
        """Keep a variant whose files lie in a workshop of this store; the returned handle is on
        where they lie now. Where the variant is there already, whole, that one is returned: the
        first of several processes wins."""
        model = replace(variant.model, directory=self._artifacts.keep(variant.model))
        row = {
            "id": variant.id,
            "parent_id": variant.parent_id,
            "step": canonical_json(asdict(variant.step)),
            "data_digest": variant.data_digest,
            "model": canonical_json(model_to_dict(model)),
            "artifact": model.digest,
            "build_s": variant.build_s,
            "created_at": now(),
        }
        if not self._database.insert_new(variants, row):
            first = self.find(variant.id)
            if first is not None:
                return first
            with self._database.connected() as connection:  # the one fact that may be mended
                connection.execute(update(variants).where(variants.c.id == variant.id).values(row))
        return replace(variant, model=model)

    def find(self, variant_id: str) -> StoredVariant | None:
        """The variant, or None where it isn't there or its files aren't what they were."""
        found = self._variant(variant_id)
        return found if found is not None and self._artifacts.has(found.model) else None

    def lineage(self, variant_id: str) -> tuple[StoredVariant, ...]:
        """The variant, its parent, and so on up to the first step of its recipe, or to where a
        parent isn't stored; empty where the variant isn't. Files aren't looked at."""
        line: dict[str, StoredVariant] = {}
        while variant_id not in line and (found := self._variant(variant_id)) is not None:
            line[variant_id] = found
            variant_id = found.parent_id
        return tuple(line.values())

    def resolve(self, prefix: str) -> list[str]:
        """The ids of variants that start with some hex digits, in order; case doesn't matter."""
        prefix = prefix.lower()
        if not _HEX.issuperset(prefix):
            return []
        # "g" comes right after the last hex digit; a LIKE would use no index.
        query = select(variants.c.id).where(
            variants.c.id >= prefix, variants.c.id < f"{prefix}g"
        )  # fmt: skip
        with self._database.connected() as connection:
            return list(connection.scalars(query.order_by(variants.c.id)))

    def _variant(self, variant_id: str) -> StoredVariant | None:
        row = self._first(select(variants).where(variants.c.id == variant_id))
        if row is None:
            return None
        model = model_from_dict(
            json.loads(row.model), self._artifacts.directory(row.artifact), row.artifact
        )
        step = Step(**json.loads(row.step))
        return StoredVariant(row.id, row.parent_id, step, row.data_digest, model, row.build_s)

    # --- measurements

    def record(self, key: Key, value: object) -> None:
        """Add a measurement; `value` is anything that JSON can hold, but NaN and infinity."""
        fingerprint = machine_fingerprint(key.machine)
        row = {
            "variant_id": key.variant_id,
            "machine": fingerprint,
            "serving": canonical_json(dict(key.serving)),
            "metric": key.metric,
            "protocol_version": key.protocol_version,
            "value": canonical_json(value),
            "taken_at": now(),
        }
        machine = canonical_json(key.machine.to_dict())
        self._database.insert_new(machines, {"fingerprint": fingerprint, "machine": machine})
        with self._database.connected() as connection:
            connection.execute(measurements.insert().values(row))

    def recorded(self, key: Key) -> Any:
        """The newest measurement of the key, or None."""
        query = select(measurements.c.value).where(
            measurements.c.variant_id == key.variant_id,
            measurements.c.machine == machine_fingerprint(key.machine),
            measurements.c.serving == canonical_json(dict(key.serving)),
            measurements.c.metric == key.metric,
            measurements.c.protocol_version == key.protocol_version,
        )
        row = self._first(query.order_by(measurements.c.id.desc()).limit(1))
        return None if row is None else json.loads(row.value)

    def values(
        self, metric: str, protocol_version: int, machine: Machine | None = None
    ) -> tuple[tuple[str, Mapping[str, object], object], ...]:
        """Variant, serving configuration and value of every measurement of a metric, oldest
        first, of any study; `machine` None means of any machine."""
        query = select(
            measurements.c.variant_id, measurements.c.serving, measurements.c.value
        ).where(
            measurements.c.metric == metric, measurements.c.protocol_version == protocol_version
        )  # fmt: skip
        if machine is not None:
            query = query.where(measurements.c.machine == machine_fingerprint(machine))
        with self._database.connected() as connection:
            return tuple(
                (row.variant_id, json.loads(row.serving), json.loads(row.value))
                for row in connection.execute(query.order_by(measurements.c.id))
            )

    # --- studies

    def log_look(self, study_id: str, variant_id: str, split_digest: str) -> None:
        """Note that a study looks at a locked split; each look counts, also of the same study."""
        row = {"study_id": study_id, "variant_id": variant_id, "split_digest": split_digest}
        with self._database.connected() as connection:
            connection.execute(looks.insert().values({**row, "at": now()}))

    def looks(self, split_digest: str) -> tuple[Look, ...]:
        """Every look at the split, of any study, oldest first."""
        query = select(looks).where(looks.c.split_digest == split_digest).order_by(looks.c.id)
        with self._database.connected() as connection:
            return tuple(
                Look(row.study_id, row.variant_id, row.split_digest, row.at)
                for row in connection.execute(query)
            )

    def log_trial(self, study_id: str, number: int, entry: Mapping[str, object]) -> None:
        """Note how a trial of a study went; numbers count from 1.

        Logging an equal entry again does nothing, so that a trial which is run again after a
        crash can be. Raises TrialLoggedOtherwise for another entry: the first one stays.
        """
        assert number >= 1, f"trial {number}: trials count from 1"
        text = canonical_json(dict(entry))
        row = {"study_id": study_id, "number": number, "entry": text, "at": now()}
        if not self._database.insert_new(trials, row) and text != self._trial(study_id, number):
            raise TrialLoggedOtherwise(study_id, number)

    def trials(self, study_id: str) -> tuple[Mapping[str, Any], ...]:
        """The entries of a study's trials from 1 up to where the first one is missing."""
        found = self.numbered_trials(study_id)
        return tuple(found[number] for number in takewhile(found.__contains__, count(1)))

    def numbered_trials(self, study_id: str) -> Mapping[int, Mapping[str, Any]]:
        """The entries of all of a study's trials, by their numbers and in their order. Of trials
        that ran at once when the study was killed, some may be missing."""
        query = (
            select(trials.c.number, trials.c.entry)
            .where(trials.c.study_id == study_id)
            .order_by(trials.c.number)
        )
        with self._database.connected() as connection:
            return {row.number: json.loads(row.entry) for row in connection.execute(query)}

    def _trial(self, study_id: str, number: int) -> str | None:
        row = self._first(
            select(trials.c.entry).where(trials.c.study_id == study_id, trials.c.number == number)
        )
        return None if row is None else str(row.entry)

    def _first(self, query: Any) -> Row[Any] | None:
        with self._database.connected() as connection:
            return connection.execute(query).first()
