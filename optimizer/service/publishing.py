"""Publishing what a job found to a serving repository, so that it happens once and whole.

A version is a row first and files afterwards. The row reserves the version's number; the files
are written by `optimizer.service.repositories`, with the manifest last, so that a server never
sees half of them. Whoever dies in between leaves a row that says `writing`: the next one that looks
finishes it, and finds by the manifest whether there is anything left to do. Who is slow isn't taken
for dead: it says in the row that it is at it still, and in a folder it holds a kernel's lock.
"""

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Integer, Row, cast, func, insert, select, update

from optimizer.service import audit, schema, scratch
from optimizer.service.audit import Note
from optimizer.service.blobs import Blobs
from optimizer.service.child import REPOSITORY
from optimizer.service.database import Database, DatabaseUnavailable
from optimizer.service.object_store import StoreUnavailable
from optimizer.service.repeats import Repeatable, has_made, made_before
from optimizer.service.repositories import Repository, open_repository
from serve.artifact import MANIFEST, Manifest, check_model_name, read_manifest, verify_files
from serve.errors import ArtifactInvalid

log = logging.getLogger(__name__)

_TAKEN_OVER_S = 10.0
"""After which a publication that nobody is at is finished by another process."""
_AT_IT_S = 2.0
"""How often its process says that it is at it."""
_MAX_LOOKS = 5
"""At a model's newest version, which others publish meanwhile."""


class PublicationNotFound(Exception):
    def __init__(self, publication_id: str) -> None:
        super().__init__(f"there is no publication {publication_id}")


class NothingToPublish(Exception):
    """The job found no variant, or its repository isn't one of the service's."""


@dataclass(frozen=True)
class Publication:
    """A version that a job's candidate became, or becomes: `state` is writing, done or failed,
    `digest` that of its files (`digest_of`) where it is known."""

    id: str
    job_id: str
    repository: str
    model: str
    version: str
    state: str
    subject: str
    error: str | None
    created_s: float
    updated_s: float
    digest: str | None = None


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of the names, digests and sizes of a version's files, in whatever repository."""
    files = {name: asdict(one) for name, one in manifest.files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Wish:
    """That `subject` wants a job's candidate, made under `claim`, to be the next version of
    `model` (its own name where that is None). The same `key` with the same wish is one wish."""

    job_id: str
    claim: str
    repository: str
    model: str | None
    subject: str
    key: str | None = None

    @property
    def repeatable(self) -> Repeatable | None:
        if self.key is None:
            return None
        asked = json.dumps(["publish", self.job_id, self.repository, self.model])
        return Repeatable(self.subject, self.key, hashlib.sha256(asked.encode()).hexdigest())


class Publisher:
    """`repositories`: name -> folder or fsspec address that servers read. `folder` is this
    machine's, for what is under way."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        repositories: Mapping[str, Path | str],
        folder: Path,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._scratch = folder
        self.repositories = {name: open_repository(one) for name, one in repositories.items()}

    def check(self) -> None:
        """Raises StoreUnavailable where a repository can't be written."""
        for repository in self.repositories.values():
            repository.check()

    def publish(self, wish: Wish) -> Publication:
        """What became of the wish, or of the same one before, which may be under way.

        Raises NothingToPublish, ArtifactInvalid, KeyReused, OSError, StoreUnavailable."""
        self._repository(wish.repository)
        with self._under_way() as folder:
            manifest = self._fetch(wish.job_id, wish.claim, folder)
            model = wish.model or manifest.model
            check_model_name(model)
            publication, is_new = self._reserved(wish, model, digest_of(manifest))
            return self._written(publication, folder) if is_new else publication

    def finish(self, claim_of: Mapping[str, str]) -> int:
        """Finish what another process began and didn't end; how many that were. `claim_of` gives
        the claim of a job that ended well."""
        table = schema.publications
        with self._database.reading() as connection:
            before_s = self._database.now_s(connection) - _TAKEN_OVER_S
            rows = connection.execute(
                select(table).where(table.c.state == "writing", table.c.updated_s < before_s)
            ).all()
        n_finished = 0
        for publication in map(_publication, rows):
            if self._taken_over(publication):
                n_finished += self._finish(publication, claim_of.get(publication.job_id))
        return n_finished

    def clear(self) -> int:
        """Remove what publishing processes of this machine left that have died."""
        return scratch.clear(self._scratch)

    def unfinished(self) -> list[Publication]:
        table = schema.publications
        with self._database.reading() as connection:
            rows = connection.execute(select(table).where(table.c.state == "writing")).all()
        return [_publication(row) for row in rows]

    def get(self, publication_id: str) -> Publication:
        """Raises PublicationNotFound."""
        table = schema.publications
        with self._database.reading() as connection:
            row = connection.execute(select(table).where(table.c.id == publication_id)).first()
        if row is None:
            raise PublicationNotFound(publication_id)
        return _publication(row)

    def of_job(self, job_id: str) -> list[Publication]:
        table = schema.publications
        with self._database.reading() as connection:
            rows = connection.execute(
                select(table).where(table.c.job_id == job_id).order_by(table.c.created_s)
            ).all()
        return [_publication(row) for row in rows]

    def slo(self, publication: Publication) -> Mapping[str, Any]:
        """The SLO that the version was made for. Raises ArtifactInvalid, NothingToPublish."""
        repository = self._repository(publication.repository)
        manifest = repository.manifest(publication.model, publication.version)
        if manifest is None:
            raise NothingToPublish("the version isn't there any more")
        if manifest.slo is None:
            raise NothingToPublish("the version names no SLO")
        return manifest.slo

    def _repository(self, name: str) -> Repository:
        """Raises NothingToPublish where it isn't one of the service's (any more)."""
        repository = self.repositories.get(name)
        if repository is None:
            allowed = ", ".join(sorted(self.repositories)) or "this service has none"
            raise NothingToPublish(f"repository: got {name!r}, want one of: {allowed}")
        return repository

    def _reserved(self, wish: Wish, model: str, digest: str) -> tuple[Publication, bool]:
        """The row, with the next number that neither the table nor the repository has; and
        whether it is new."""
        table, repository, request = schema.publications, wish.repository, wish.repeatable
        # Before the transaction: a store may take its time, and the row's number is its own.
        taken = int(self._repository(repository).next_version(model))
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            known = made_before(connection, request, now_s) if request is not None else None
            if known is not None:
                row = connection.execute(select(table).where(table.c.id == known)).one()
                return _publication(row), False
            if not self._database.is_sqlite:  # SQLite's transaction is alone already
                connection.exec_driver_sql("LOCK TABLE publications IN EXCLUSIVE MODE")
            highest = connection.execute(
                select(func.max(cast(table.c.version, Integer))).where(
                    table.c.repository == repository, table.c.model == model
                )
            ).scalar_one()
            version = str(max(taken, int(highest or 0) + 1))
            publication = Publication(
                secrets.token_hex(8), wish.job_id, repository, model, version, "writing",
                wish.subject, None, now_s, now_s, digest,
            )  # fmt: skip
            connection.execute(insert(table).values(**vars(publication)))
            if request is not None:
                has_made(connection, request, publication.id)
            note = Note(wish.subject, "publish", {"job": wish.job_id})
            audit.write(connection, note, f"{repository}/{model}/{version}", now_s)
        return publication, True

    @contextmanager
    def _under_way(self) -> Iterator[Path]:
        with scratch.held(self._scratch, f"publish-{secrets.token_hex(8)}") as folder:
            yield folder / "version"

    def _written(self, publication: Publication, source: Path) -> Publication:
        """The publication as done: by us, or by another process that was quicker."""
        repository = self._repository(publication.repository)
        try:
            with self._at_it(publication), repository.alone(publication.model):
                now = self.get(publication.id)
                return now if now.state != "writing" else self._write(publication, source)
        except (ArtifactInvalid, OSError, StoreUnavailable) as error:
            self._set(publication, "failed", str(error))
            raise

    def _write(self, publication: Publication, source: Path) -> Publication:
        """The files, as far as they aren't there, and the row."""
        repository = self._repository(publication.repository)
        if repository.manifest(publication.model, publication.version) is None:
            manifest = replace(
                read_manifest(source), model=publication.model, version=publication.version
            )
            files = {name: source / name for name in manifest.files}
            repository.write(publication.id, manifest, files)
        _write_config(repository, publication.model)
        return self._set(publication, "done", None)

    @contextmanager
    def _at_it(self, publication: Publication) -> Iterator[None]:
        """Say in the row, again and again, that it is being written."""
        done = threading.Event()

        def say() -> None:
            table = schema.publications
            while not done.wait(_AT_IT_S):
                with suppress(DatabaseUnavailable), self._database.writing() as connection:
                    connection.execute(
                        update(table)
                        .where(table.c.id == publication.id, table.c.state == "writing")
                        .values(updated_s=self._database.now_s(connection))
                    )

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _fetch(self, job_id: str, claim: str, target: Path) -> Manifest:
        """The candidate's files into `target`, compared with their digests."""
        found = self._blobs.files(job_id, claim, REPOSITORY)
        manifests = [name for name in found if name.endswith(f"/{MANIFEST}")]
        if len(manifests) != 1:
            raise NothingToPublish(f"job {job_id} has found nothing that could be published")
        root = manifests[0].removesuffix(MANIFEST)
        for name, path in found.items():
            if name.startswith(root):
                self._blobs.fetch(path, target / name.removeprefix(root))
        manifest = read_manifest(target)
        verify_files(target, manifest)
        return manifest

    def _taken_over(self, publication: Publication) -> bool:
        """Whether it is ours to finish: of several processes one gets it."""
        table = schema.publications
        with self._database.writing() as connection:
            taken = connection.execute(
                update(table)
                .where(
                    table.c.id == publication.id,
                    table.c.state == "writing",
                    table.c.updated_s == publication.updated_s,
                )
                .values(updated_s=self._database.now_s(connection))
            )
        return taken.rowcount == 1

    def _finish(self, publication: Publication, claim: str | None) -> bool:
        """Whether it could be: another process may be at it still."""
        try:
            repository = self._repository(publication.repository)
            with (
                repository.alone(publication.model, waits=False),
                self._at_it(publication),
                self._under_way() as folder,
            ):
                if self.get(publication.id).state != "writing":
                    return False
                if repository.manifest(publication.model, publication.version) is None:
                    if claim is None:
                        raise NothingToPublish("its job is gone")
                    self._fetch(publication.job_id, claim, folder)
                self._write(publication, folder)
        except BlockingIOError:
            return False
        except StoreUnavailable as error:  # the next look may find it there
            log.warning("publication %s can't be finished now: %s", publication.id, error)
            return False
        except (NothingToPublish, ArtifactInvalid, OSError) as error:
            log.error("publication %s can't be finished: %s", publication.id, error)
            self._set(publication, "failed", str(error))
        return True

    def _set(self, publication: Publication, state: str, error: str | None) -> Publication:
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(
                update(schema.publications)
                .where(schema.publications.c.id == publication.id)
                .values(state=state, error=error, updated_s=now_s)
            )
        return replace(publication, state=state, error=error, updated_s=now_s)


def _write_config(repository: Repository, model: str) -> None:
    """Triton's configuration, for the newest version, which may be another's by now."""
    from optimizer.publish import TRITON_BACKENDS, triton_config

    for _ in range(_MAX_LOOKS):
        newest = repository.newest(model)
        manifest = repository.manifest(model, newest) if newest is not None else None
        if manifest is not None and manifest.engine.name in TRITON_BACKENDS:
            repository.write_config(model, triton_config(manifest).encode())
        if repository.newest(model) == newest:
            return


def _publication(row: Row[Any]) -> Publication:
    return Publication(**row._mapping)
