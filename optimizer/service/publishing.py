"""Publishing what a job found to a serving repository, so that it happens once and whole.

A version is a row first and files afterwards. The row reserves the version's number; the files
are written by `serve.artifact.write_version`, whose manifest comes last, so that a server never
sees half of them. Whoever dies in between leaves a row that says `writing`: the next one that looks
finishes it, and finds by the manifest whether there is anything left to do.
"""

import logging
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Integer, Row, cast, func, insert, select, update

from optimizer.service import schema
from optimizer.service.blobs import Blobs
from optimizer.service.child import REPOSITORY
from optimizer.service.database import Database
from serve.artifact import (
    Manifest,
    check_model_name,
    next_version,
    read_manifest,
    verify_files,
    write_atomically,
    write_version,
)
from serve.errors import ArtifactInvalid

log = logging.getLogger(__name__)

MANIFEST, TRITON = "manifest.json", "config.pbtxt"
_TAKEN_OVER_S = 60.0
"""After which a publication that nobody finished is finished by another process."""


class PublicationNotFound(Exception):
    def __init__(self, publication_id: str) -> None:
        super().__init__(f"there is no publication {publication_id}")


class NothingToPublish(Exception):
    """The job found no variant, or its repository isn't one of the service's."""


@dataclass(frozen=True)
class Publication:
    """A version that a job's candidate became, or becomes: `state` is writing, done or failed."""

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


class Publisher:
    """`repositories`: name -> folder that servers read."""

    def __init__(self, database: Database, blobs: Blobs, repositories: Mapping[str, Path]) -> None:
        self._database = database
        self._blobs = blobs
        self.repositories = dict(repositories)

    def publish(
        self, job_id: str, claim: str, repository: str, model: str | None, subject: str
    ) -> Publication:
        """Make the job's candidate the next version of `model` (its own name without).

        Raises NothingToPublish, ArtifactInvalid, OSError."""
        folder = self._folder(repository)
        with tempfile.TemporaryDirectory(prefix="trimserve-publish-") as scratch:
            manifest = self._fetched(job_id, claim, Path(scratch))
            name = model or manifest.model
            check_model_name(name)
            publication = self._reserved(job_id, repository, folder, name, subject)
            return self._written(publication, manifest, Path(scratch))

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
                self._finish(publication, claim_of.get(publication.job_id))
                n_finished += 1
        return n_finished

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
        folder = self._folder(publication.repository)
        manifest = read_manifest(folder / publication.model / publication.version)
        if manifest.slo is None:
            raise NothingToPublish("the version names no SLO")
        return manifest.slo

    def _folder(self, repository: str) -> Path:
        folder = self.repositories.get(repository)
        if folder is None:
            allowed = ", ".join(sorted(self.repositories)) or "this service has none"
            raise NothingToPublish(f"repository: got {repository!r}, want one of: {allowed}")
        return folder

    def _reserved(
        self, job_id: str, repository: str, folder: Path, model: str, subject: str
    ) -> Publication:
        """The row, with the next number that neither the table nor the folder has."""
        table = schema.publications
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            if not self._database.is_sqlite:  # SQLite's transaction is alone already
                connection.exec_driver_sql("LOCK TABLE publications IN EXCLUSIVE MODE")
            highest = connection.execute(
                select(func.max(cast(table.c.version, Integer))).where(
                    table.c.repository == repository, table.c.model == model
                )
            ).scalar_one()
            version = str(max(int(next_version(folder, model)), int(highest or 0) + 1))
            publication = Publication(
                secrets.token_hex(8), job_id, repository, model, version, "writing", subject,
                None, now_s, now_s,
            )  # fmt: skip
            connection.execute(insert(table).values(**vars(publication)))
        return publication

    def _written(self, publication: Publication, manifest: Manifest, source: Path) -> Publication:
        from optimizer.publish import TRITON_BACKENDS, triton_config

        folder = self._folder(publication.repository)
        version = replace(manifest, model=publication.model, version=publication.version)
        files = {
            file.relative_to(source).as_posix(): file
            for file in sorted(source.rglob("*"))
            if file.is_file() and file.name != MANIFEST
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_version(folder, version, files)
            if version.engine.name in TRITON_BACKENDS:
                config = triton_config(version).encode()
                write_atomically(folder / publication.model / TRITON, config)
        except (ArtifactInvalid, OSError) as error:
            self._set(publication, "failed", str(error))
            raise
        return self._set(publication, "done", None)

    def _fetched(self, job_id: str, claim: str, target: Path) -> Manifest:
        """The candidate's files in `target`, compared with their digests."""
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

    def _finish(self, publication: Publication, claim: str | None) -> None:
        try:
            folder = self._folder(publication.repository)
            if (folder / publication.model / publication.version / MANIFEST).exists():
                self._set(publication, "done", None)
                return
            if claim is None:
                raise NothingToPublish("its job is gone")
            with tempfile.TemporaryDirectory(prefix="trimserve-publish-") as scratch:
                manifest = self._fetched(publication.job_id, claim, Path(scratch))
                self._written(publication, manifest, Path(scratch))
        except (NothingToPublish, ArtifactInvalid, OSError) as error:
            log.error("publication %s can't be finished: %s", publication.id, error)
            self._set(publication, "failed", str(error))

    def _set(self, publication: Publication, state: str, error: str | None) -> Publication:
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(
                update(schema.publications)
                .where(schema.publications.c.id == publication.id)
                .values(state=state, error=error, updated_s=now_s)
            )
        return replace(publication, state=state, error=error, updated_s=now_s)


def _publication(row: Row[Any]) -> Publication:
    return Publication(**row._mapping)
