"""What a job's child is ordered to do, with all that it needs fetched to the worker's disk: the
child, in which users' code runs, has no credentials.

It starts no process and knows no ledger.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from optimizer.execution.cluster import Cluster
from optimizer.service.addresses import AddressRefused, Stores
from optimizer.service.child import Order
from optimizer.service.jobs import Job
from optimizer.service.publishing import digest_of
from optimizer.service.repositories import open_repository
from optimizer.service.submitted import SLO_FILE, UPLOAD, materialize
from optimizer.service.uploads import UploadNotFound, Uploads
from serve.artifact import read_manifest, verify_files
from serve.engines import RUNS_CODE
from serve.errors import ArtifactInvalid

T = TypeVar("T")


class Unusable(Exception):
    """The job can't be begun or kept: another attempt would end the same."""


@dataclass(frozen=True)
class Surroundings:
    """What is the same for all jobs of a worker: `store` and `artifacts` are those of all studies,
    `repositories` name -> folder or address."""

    uploads: Uploads
    stores: Stores
    store: str
    artifacts: Path | None = None
    repositories: Mapping[str, Path | str] = field(default_factory=dict)
    max_fetched_bytes: int = 20 << 30
    verify: bool = True
    cluster: Cluster | None = None
    """Where studies are built and measured, if not on the worker."""


@dataclass(frozen=True)
class Orders:
    """Of one job: `spec` is what the ledger holds of it, `folder` its own, `out` for what it makes.
    `patiently` makes a call again while a store of files is away."""

    surroundings: Surroundings
    job: Job
    spec: Mapping[str, Any]
    folder: Path
    out: Path
    patiently: Callable[[Callable[[], Any]], Any]

    def study(self) -> Order:
        """Raises Unusable."""
        around = self.surroundings
        (self.folder / "inputs").mkdir(exist_ok=True)
        files = {name: self._fetched(name) for name in self.spec["references"]}
        spec = materialize(self.spec["spec"], files, self.folder)
        return Order(
            kind=self.job.kind,
            spec=str(spec),
            out=str(self.out),
            lifeline=-1,
            events=-1,
            store=around.store,
            artifacts=None if around.artifacts is None else str(around.artifacts),
            verify=around.verify and bool(self.spec.get("verify", True)),
            cluster=None if around.cluster is None else asdict(around.cluster),
            command=("trimserve", "jobs", "clone", self.job.id),
        )

    def load_test(self) -> Order:
        """Raises Unusable."""
        asked = self.spec
        where = self.surroundings.repositories.get(asked["repository"])
        if where is None:
            raise Unusable(f"this worker has no repository {asked['repository']!r}")
        model, version = asked["model"], asked["version"]
        folder = self.folder / "repository"
        try:
            served: Path = self.patiently(
                lambda: open_repository(where).local(model, version, folder)
            )
            carries_code = read_manifest(served / model / version).engine.name in RUNS_CODE
            if carries_code:
                served = self._trusted(served, model, version)
        except (ArtifactInvalid, OSError) as error:
            raise Unusable(str(error)) from error
        (self.folder / SLO_FILE).write_text(json.dumps(asked["slo"]), "utf-8")  # JSON is YAML
        return Order(
            kind=self.job.kind,
            spec=str(self.folder / SLO_FILE),
            out=str(self.out),
            lifeline=-1,
            events=-1,
            model=model,
            version=version,
            repository=str(served),
            trusts_code=carries_code,
        )

    def _trusted(self, served: Path, model: str, version: str) -> Path:
        """A repository of the job's own with the version, whose code is run if it is the one that
        was published: others may write to the repository. Raises ArtifactInvalid."""
        own = self.folder / "trusted"
        copied = own / model / version
        shutil.copytree(served / model / version, copied)
        manifest = read_manifest(copied)
        verify_files(copied, manifest)
        if digest_of(manifest) != self.spec.get("digest"):
            raise ArtifactInvalid(
                f"{model}/{version}",
                f"{manifest.engine.name} files can carry code, and these aren't those that a job "
                "of this service has published",
            )
        return own

    def _fetched(self, reference: str) -> Path:
        inputs, around = self.folder / "inputs", self.surroundings
        try:
            if reference.startswith(UPLOAD):
                upload_id = reference.removeprefix(UPLOAD)
                fetched: Path = self.patiently(lambda: around.uploads.fetch(upload_id, inputs))
                return fetched
            name = around.stores.check(reference)
            if reference.startswith("file:"):
                return around.stores.local(reference)
            folder = inputs / f"{len(list(inputs.iterdir())):04d}"
            folder.mkdir()
            target = folder / name
            around.stores.fetch(reference, target, around.max_fetched_bytes)
        except (AddressRefused, UploadNotFound, OSError) as error:
            raise Unusable(f"{reference}: {error}") from error
        return target
