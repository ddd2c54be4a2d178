"""Subjects: a published version or a stored variant, with all that is on record of it.

A version is known by its manifest alone; a store adds ids, digests, build times and
measurements. It neither judges nor shows anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from optimizer import fusion, judgement, kernels, timing
from optimizer.errors import OptimizerError
from optimizer.kernels import KernelProof
from optimizer.result import Fusion
from optimizer.store import StoredVariant
from optimizer.tasks import Scores
from optimizer.timing import Timing
from optimizer.variant import EngineModel
from serve.artifact import MANIFEST, VERSION_NAME, Manifest, ServiceTime, Step, read_manifest
from serve.engines import EngineSpec
from serve.machine import Machine

MIN_PREFIX = 4
"""Digits of a variant's id that name it."""
_MAX_NAMED = 12
_HEX = frozenset("0123456789abcdefABCDEF")


class SubjectNotFound(OptimizerError):
    """Nothing, or more than one thing, has the name; the message says what there is."""


class Records(Protocol):
    """What is asked of a store."""

    def find(self, variant_id: str) -> StoredVariant | None: ...

    def lineage(self, variant_id: str) -> tuple[StoredVariant, ...]:
        """The variant, its parent, and so on to the first step of its recipe."""
        ...

    def resolve(self, prefix: str) -> list[str]:
        """Ids of variants that start so."""
        ...

    def values(
        self, metric: str, protocol_version: int, machine: Machine | None = None
    ) -> tuple[tuple[str, Mapping[str, object], Any], ...]:
        """(variant id, serving configuration, value) of every measurement, oldest first."""
        ...


@dataclass(frozen=True)
class Origin:
    """A step with what it made. Ids and digests are empty, and the build time is None, where
    only the recipe is known."""

    step: Step
    variant_id: str = ""
    parent_id: str = ""
    artifact: str = ""
    build_s: float | None = None


@dataclass(frozen=True)
class Subject:
    """`times` are by (instances, threads); `scores` by digest of the split that they are on.
    `kernels` is None where the engine's profile isn't on record; `notes` are what its steps had to
    say of what they made."""

    name: str
    variant_id: str
    origins: tuple[Origin, ...]
    manifest: Manifest | None = None
    engine: EngineSpec | None = None
    size_bytes: int | None = None
    times: Mapping[tuple[int, int], tuple[ServiceTime, ...]] = field(default_factory=dict)
    kernels: KernelProof | None = None
    fusions: tuple[Fusion, ...] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_subject(text: str, repository: Path, records: Records | None, store: str) -> Subject:
    """`MODEL/VERSION`, `MODEL` for its newest version, or a variant's id or the start of it.

    Models come first: a folder of that name is meant. `store` names the store in errors, open as
    `records` or None where there is none. Raises SubjectNotFound, and ArtifactInvalid for a
    manifest that can't be read.
    """
    model, _, version = text.strip("/").partition("/")
    if version or (repository / model).is_dir():
        return _published(repository, model, version, records)
    if len(text) < MIN_PREFIX or not _HEX.issuperset(text):
        raise SubjectNotFound(_no_model(repository, model))
    if records is None:
        raise SubjectNotFound(
            f"{_no_model(repository, model)}; as the id of a variant it needs the store that knows "
            f"it, and there is none at {store}: name it with --store"
        )
    return _stored(text, records, store)


def _published(repository: Path, model: str, version: str, records: Records | None) -> Subject:
    versions = _versions(repository / model)
    if not versions:
        raise SubjectNotFound(_no_model(repository, model))
    version = version or versions[-1]
    if version not in versions:
        raise SubjectNotFound(
            f"{model} has no version {version!r} in {repository}; there are: {_named(versions)}"
        )
    manifest = read_manifest(repository / model / version)
    engine, profile = manifest.engine, manifest.profile
    times = {(engine.instances, engine.threads): profile.service_times} if profile else {}
    known = _on_record(manifest.variant_id, records) if records and manifest.variant_id else None
    recipe = tuple(Origin(step) for step in manifest.recipe)
    if recipe:
        last = Origin(manifest.recipe[-1], manifest.variant_id, manifest.parent_id)
        recipe = (*recipe[:-1], last)
    return Subject(
        name=f"{model}/{version}",
        variant_id=manifest.variant_id,
        origins=known.origins if known else recipe,
        manifest=manifest,
        engine=engine,
        size_bytes=_model_bytes(manifest),
        times={**(known.times if known else {}), **times},
        kernels=known.kernels if known else None,
        scores=known.scores if known else {},
        notes=known.notes if known else (),
    )


def _stored(prefix: str, records: Records, store: str) -> Subject:
    found = records.resolve(prefix)
    if not found:
        raise SubjectNotFound(
            f"no variant's id starts with {prefix!r} in {store}: another one is named with --store"
        )
    if len(found) > 1:
        raise SubjectNotFound(
            f"{prefix!r} is the start of {len(found)} ids in {store}, want more digits: "
            f"{_named([one[: len(prefix) + 8] for one in found])}"
        )
    subject = _on_record(found[0], records)
    assert subject is not None, "it was just resolved"
    return subject


def _on_record(variant_id: str, records: Records) -> Subject | None:
    """What the store has of the variant, or None."""
    line = records.lineage(variant_id)
    if not line:
        return None
    model = line[0].model
    whole = records.find(variant_id)
    return Subject(
        name=variant_id[:12],
        variant_id=variant_id,
        origins=tuple(_origin(one) for one in reversed(line)),
        engine=model.spec if isinstance(model, EngineModel) else None,
        size_bytes=whole.model.size_bytes()
        if whole and isinstance(whole.model, EngineModel)
        else None,
        times=_times(variant_id, records),
        kernels=_kernels(variant_id, records),
        fusions=_fusions(variant_id, records),
        scores={
            str(serving["split"]): Scores.from_dict(value)
            for owner, serving, value in records.values("scores", judgement.PROTOCOL_VERSION)
            if owner == variant_id and "split" in serving
        },
        notes=tuple(model.notes),
    )


def _origin(variant: StoredVariant) -> Origin:
    return Origin(
        variant.step, variant.id, variant.parent_id, variant.model.digest, variant.build_s
    )


def _times(variant_id: str, records: Records) -> dict[tuple[int, int], tuple[ServiceTime, ...]]:
    """The newest of each configuration."""
    found = {}
    for owner, _, value in records.values("timing", timing.PROTOCOL_VERSION):
        if owner == variant_id:
            times = Timing.from_dict(value).times
            found[(times.instances, times.threads)] = times.times
    return found


def _kernels(variant_id: str, records: Records) -> KernelProof | None:
    stored = [
        value
        for owner, _, value in records.values("kernels", kernels.PROTOCOL_VERSION)
        if owner == variant_id
    ]
    return KernelProof.from_dict(stored[-1]) if stored else None


def _fusions(variant_id: str, records: Records) -> tuple[Fusion, ...]:
    """The newest on record; empty for a variant that was never an answer."""
    found = [
        value
        for owner, _, value in records.values("fusion", fusion.PROTOCOL_VERSION)
        if owner == variant_id
    ]
    stored: Any = found[-1] if found else []
    return fusion.from_stored(stored)


def _versions(folder: Path) -> list[str]:
    """Those whose manifest is there, rising."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if (entry / MANIFEST).is_file()]
    return sorted((name for name in names if VERSION_NAME.fullmatch(name)), key=int)


def _model_bytes(manifest: Manifest) -> int:
    """Of the model's files, as a study counts them: without the golden input."""
    golden = manifest.golden.file if manifest.golden else ""
    return sum(file.size_bytes for name, file in manifest.files.items() if name != golden)


def _no_model(repository: Path, model: str) -> str:
    if not repository.is_dir():
        return f"no repository at {repository}: name it with --repository"
    models = sorted(entry.name for entry in repository.iterdir() if _versions(entry))
    return f"no model {model!r} in {repository}; there are: {_named(models)}"


def _named(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    shown = ", ".join(names[:_MAX_NAMED]) or "none"
    return f"{shown} and {more} more" if more > 0 else shown
