"""What a scan of a model repository finds: models, their versions, and marks that change with them.

Both layouts are told apart here, trimserve's (a version's manifest is its commit) and Triton's
(no manifest). It knows files by name, size and stamp, not where they lie nor how to read them.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from serve.artifact import GOLDEN, MANIFEST, VERSION_NAME, Manifest
from serve.errors import ArtifactInvalid

_log = logging.getLogger(__name__)

CONFIG = "config.pbtxt"
RELEASE = "release.json"  # says which versions are live, not how one of them is loaded


@dataclass(frozen=True)
class Limits:
    """`max_files` counts the files of one listing (the whole repository at a remote address, one
    model in a folder); `max_version_bytes` and `max_side_bytes` bound what is downloaded."""

    max_files: int = 100_000
    max_config_bytes: int = 1_000_000
    max_side_bytes: int = 64_000_000
    max_version_bytes: int = 64_000_000_000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class FoundFile:
    """`name` is relative, with '/' between its parts; `stamp` changes when the content does."""

    name: str
    size_bytes: int
    stamp: str


@dataclass(frozen=True)
class VersionListing:
    """`fingerprint` changes when a file of the version appears, goes or changes."""

    version: str
    has_manifest: bool
    fingerprint: str


@dataclass(frozen=True)
class ModelListing:
    """`config` is the text of config.pbtxt, `versions` rise by number, `side_fingerprint` covers
    the config and all other files outside the versions. With a `problem` the rest is unknown."""

    name: str
    config: str | None = None
    versions: tuple[VersionListing, ...] = ()
    side_fingerprint: str = ""
    problem: str = ""


def is_visible(name: str) -> bool:
    """Every part of a file's name is plain: not empty, not hidden, and so never '.' or '..'."""
    parts = name.split("/")
    hidden = any(not part or part.startswith(".") for part in parts)
    return not hidden and "\\" not in name and "\0" not in name


def fingerprint(files: Iterable[FoundFile]) -> str:
    """SHA-256 over names, sizes and stamps, in whatever order the files come."""
    rows = sorted((file.name, file.size_bytes, file.stamp) for file in files)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def side_files(files: Iterable[FoundFile]) -> list[FoundFile]:
    """Those of a model's files that decide how its versions are loaded and are in none of them."""
    return [file for file in files if not _version_of(file) and file.name != RELEASE]


def _version_of(file: FoundFile) -> str:
    folder, _, inner = file.name.partition("/")
    return folder if inner and VERSION_NAME.fullmatch(folder) else ""


def model_listing(name: str, files: Iterable[FoundFile], config: str | None) -> ModelListing | None:
    """The listing of a model from the files in its folder; None where they are no model.

    A folder named by a whole number is a version if it holds a manifest. Without one it is
    Triton's, if it holds any file at all, and unless there is evidence of an interrupted write:
    a golden input, which only trimserve stores, or a manifest in another version of the model.
    """
    files = list(files)
    by_version: dict[str, list[FoundFile]] = {}
    for file in files:
        if version := _version_of(file):
            inner = file.name.removeprefix(f"{version}/")
            by_version.setdefault(version, []).append(replace(file, name=inner))
    listed = [_version_listing(version, found) for version, found in by_version.items()]
    versions = _without_interrupted(name, listed, by_version)
    if not versions and config is None:
        _log.debug("skipped: %s holds neither a version nor %s", name, CONFIG)
        return None
    return ModelListing(name, config, versions, fingerprint(side_files(files)))


def _version_listing(version: str, files: list[FoundFile]) -> VersionListing:
    has_manifest = any(file.name == MANIFEST for file in files)
    return VersionListing(version, has_manifest, fingerprint(files))


def _without_interrupted(
    name: str, listed: list[VersionListing], files: Mapping[str, list[FoundFile]]
) -> tuple[VersionListing, ...]:
    is_trimserves = any(version.has_manifest for version in listed)
    kept = []
    for version in sorted(listed, key=lambda listing: int(listing.version)):
        has_golden = any(file.name == GOLDEN for file in files[version.version])
        if version.has_manifest or not (is_trimserves or has_golden):
            kept.append(version)
        else:
            _log.debug("skipped: %s/%s has no %s (yet)", name, version.version, MANIFEST)
    return tuple(kept)


def settled(
    now: Mapping[str, ModelListing],
    before: Mapping[str, ModelListing],
    accepted: Mapping[str, ModelListing],
) -> dict[str, ModelListing]:
    """What a poll may act on: `now`, less what may still be written.

    A version without a manifest counts only once the scan `before` saw the same fingerprint; until
    then it stays as last `accepted`, or out. A model that can't be read now stays as accepted,
    with its problem. The result is what the next poll gives as `accepted`.
    """
    return {
        name: _settled(listing, before.get(name), accepted.get(name))
        for name, listing in now.items()
    }


def _settled(
    now: ModelListing, before: ModelListing | None, accepted: ModelListing | None
) -> ModelListing:
    if now.problem:
        return replace(accepted or now, problem=now.problem)
    seen = {(v.version, v.fingerprint) for v in before.versions} if before else set()
    old = {v.version: v for v in accepted.versions} if accepted else {}
    versions = []
    for version in now.versions:
        if version.has_manifest or (version.version, version.fingerprint) in seen:
            versions.append(version)
        elif version.version in old:
            versions.append(old[version.version])
    return replace(now, versions=tuple(versions))


def check_unchanged(where: str, files: Iterable[FoundFile], listed: str) -> None:
    """Raise ArtifactInvalid unless the files have the fingerprint that was listed."""
    if fingerprint(files) != listed:
        raise ArtifactInvalid(where, "gone or changed since it was listed; scan again")


def check_declared(where: str, files: Iterable[FoundFile], manifest: Manifest) -> None:
    """Raise ArtifactInvalid on the first file of the manifest that is missing or, by its size,
    another one."""
    sizes = {file.name: file.size_bytes for file in files}
    for name, want in manifest.files.items():
        if name not in sizes:
            raise ArtifactInvalid(f"{where}/{name}", f"missing, {MANIFEST} names it")
        if sizes[name] != want.size_bytes:
            raise ArtifactInvalid(
                f"{where}/{name}", f"{sizes[name]} bytes, {MANIFEST} says {want.size_bytes}"
            )


def check_side_names(where: str, names: Iterable[str]) -> None:
    """Raise ArtifactInvalid on a name that isn't of a plain file in the model's folder."""
    for name in names:
        if not is_visible(name):
            raise ArtifactInvalid(where, f"file name {name!r}, want one in the model's folder")


def config_text(where: str, raw: bytes, limits: Limits) -> str:
    """Decode config.pbtxt. Raises ArtifactInvalid if it is too large or no UTF-8."""
    if len(raw) > limits.max_config_bytes:
        raise ArtifactInvalid(where, f"over {limits.max_config_bytes} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ArtifactInvalid(where, f"not UTF-8: {error}") from error
