"""Serving repositories that versions are published to: a folder, or an object store.

In both a reader never sees half a version, since the manifest is its commit and comes last. A
folder is written by one process at a time (flock). An object store has no locks and no rename, so a
version in it is reserved first, by a marker that only one can create (a conditional write) and no
reader sees: what another service publishes just then, with another database, can't mix with ours.
It chooses nothing.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from optimizer.service.object_store import ObjectStore, StoreUnavailable
from serve.artifact import (
    GOLDEN,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    VERSION_NAME,
    Manifest,
    check_file_name,
    check_model_name,
    check_version_name,
    file_digest,
    next_version,
    parse_manifest,
    read_manifest,
    verify_files,
    write_atomically,
    write_version,
)
from serve.errors import ArtifactInvalid

TRITON = "config.pbtxt"
LOCK = ".publishing.lock"
"""In a model's folder, beside its versions."""
MARKER = ".publishing"
"""In a version of an object store: the id of the publication that it is reserved for."""


class Repository(Protocol):
    """Usable from several threads. Raises OSError or StoreUnavailable where it can't be reached."""

    shown: str

    def check(self) -> None:
        """Whether it can be written, where that is worth a look beforehand."""

    def next_version(self, model: str) -> str:
        """After the highest number in use, interrupted writes included."""
        ...

    def newest(self, model: str) -> str | None:
        """The highest version that is whole."""
        ...

    def manifest(self, model: str, version: str) -> Manifest | None:
        """None where the version isn't there, or not whole. Raises ArtifactInvalid."""
        ...

    def write(self, owner: str, manifest: Manifest, files: Mapping[str, Path]) -> None:
        """The whole version, for the publication `owner`; one that it has begun before is begun
        anew. Raises ArtifactInvalid where the version is there or is another's."""

    def write_config(self, model: str, content: bytes) -> None:
        """Triton's configuration beside the versions."""

    def alone(self, model: str, waits: bool = True) -> AbstractContextManager[None]:
        """Raises BlockingIOError where another process writes the model and we don't wait."""
        ...

    def local(self, model: str, version: str, folder: Path) -> Path:
        """A repository on this machine that has the version, compared with its digests: itself, or
        the new `folder` with a copy. Raises ArtifactInvalid."""
        ...


class FolderRepository:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.shown = str(root)

    def check(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise StoreUnavailable(self.shown, "is a file, want a folder")

    def next_version(self, model: str) -> str:
        return next_version(self.root, model)

    def newest(self, model: str) -> str | None:
        folder = self.root / model
        names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
        return _highest(name for name in names if (folder / name / MANIFEST).exists())

    def manifest(self, model: str, version: str) -> Manifest | None:
        directory = self.root / model / version
        return read_manifest(directory) if (directory / MANIFEST).exists() else None

    def write(self, owner: str, manifest: Manifest, files: Mapping[str, Path]) -> None:  # noqa: ARG002 - the lock tells whose it is
        write_version(self.root, manifest, files)

    def write_config(self, model: str, content: bytes) -> None:
        write_atomically(self.root / model / TRITON, content)

    @contextmanager
    def alone(self, model: str, waits: bool = True) -> Iterator[None]:
        """By a lock of the model's folder, which is made if need be."""
        folder = self.root / model
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(file)

    def local(self, model: str, version: str, folder: Path) -> Path:  # noqa: ARG002 - it is here
        directory = self.root / model / version
        verify_files(directory, read_manifest(directory))
        return self.root


class ObjectRepository:
    """At an fsspec address. The driver's `pipe_file(…, mode="create")` must be a conditional write,
    as it is for s3:// and gs://."""

    def __init__(self, url: str) -> None:
        """Raises StoreUnavailable where the address can't be used at all."""
        self._store = ObjectStore(url)
        self.shown = self._store.shown

    def check(self) -> None:
        self._store.check()

    def next_version(self, model: str) -> str:
        taken = {name.partition("/")[0] for name in self._names(model)}
        return str(int(_highest(taken) or 0) + 1)

    def newest(self, model: str) -> str | None:
        suffix = f"/{MANIFEST}"
        return _highest(
            one.removesuffix(suffix) for one in self._names(model) if one.endswith(suffix)
        )

    def manifest(self, model: str, version: str) -> Manifest | None:
        raw = self._raw_manifest(model, version)
        where = f"{self.shown}/{model}/{version}/{MANIFEST}"
        return parse_manifest(raw, where) if raw is not None else None

    def write(self, owner: str, manifest: Manifest, files: Mapping[str, Path]) -> None:
        check_model_name(manifest.model)
        check_version_name(manifest.version)
        folder = f"{self.shown}/{manifest.model}/{manifest.version}"
        for name in files:
            check_file_name(name, folder)
        raw = _committed(manifest, files, folder)
        self._reserve(manifest, owner, folder)
        # The golden input comes first: by it a reader tells an interrupted write from a version of
        # Triton's layout, which has no manifest.
        for name in sorted(files, key=lambda one: (one != GOLDEN, one)):
            with self._store.translated():
                path = self._path(manifest.model, manifest.version, name)
                self._store.fs.put_file(str(files[name]), path)
        self._create(manifest, MANIFEST, raw, folder)

    def write_config(self, model: str, content: bytes) -> None:
        with self._store.translated():
            self._store.fs.pipe_file(self._path(model, TRITON), content)

    @contextmanager
    def alone(self, model: str, waits: bool = True) -> Iterator[None]:  # noqa: ARG002 - nothing to wait for
        """There is no lock: two that write the same publication write the same objects."""
        yield

    def local(self, model: str, version: str, folder: Path) -> Path:
        raw = self._raw_manifest(model, version)
        where, target = f"{self.shown}/{model}/{version}", folder / model / version
        if raw is None:
            raise ArtifactInvalid(where, "isn't there, or not whole")
        manifest = parse_manifest(raw, f"{where}/{MANIFEST}")
        for name in manifest.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._store.translated():
                    self._store.fs.get_file(self._path(model, version, name), str(target / name))
            except FileNotFoundError as error:
                raise ArtifactInvalid(f"{where}/{name}", f"missing, {MANIFEST} names it") from error
        (target / MANIFEST).write_bytes(raw)
        verify_files(target, manifest)
        return folder

    def _raw_manifest(self, model: str, version: str) -> bytes | None:
        path = self._path(model, version, MANIFEST)
        try:
            with self._store.translated():
                size_bytes = self._store.fs.size(path)
                raw: bytes = (
                    self._store.fs.cat_file(path) if size_bytes <= MAX_MANIFEST_BYTES else b""
                )
        except FileNotFoundError:
            return None
        if size_bytes > MAX_MANIFEST_BYTES:
            where = f"{self.shown}/{model}/{version}/{MANIFEST}"
            raise ArtifactInvalid(where, f"over {MAX_MANIFEST_BYTES} bytes")
        return raw

    def _reserve(self, manifest: Manifest, owner: str, folder: str) -> None:
        """For ourselves, or by ourselves before."""
        path = self._path(manifest.model, manifest.version, MARKER)
        try:
            with self._store.translated():
                self._store.fs.pipe_file(path, owner.encode(), mode="create")
        except FileExistsError as error:
            with self._store.translated():
                held: bytes = self._store.fs.cat_file(path)
            if held != owner.encode():
                raise ArtifactInvalid(
                    folder, "another service publishes this version just now: publish again"
                ) from error

    def _create(self, manifest: Manifest, name: str, content: bytes, folder: str) -> None:
        path = self._path(manifest.model, manifest.version, name)
        try:
            with self._store.translated():
                self._store.fs.pipe_file(path, content, mode="create")
        except FileExistsError as error:
            with self._store.translated():
                held: bytes = self._store.fs.cat_file(path)
            if held != content:
                raise ArtifactInvalid(folder, "exists already, versions are immutable") from error

    def _names(self, model: str) -> list[str]:
        """Of all objects of a model, relative to it."""
        root = self._path(model)
        try:
            with self._store.translated():
                found = self._store.fs.find(root)
        except FileNotFoundError:
            return []
        return [str(path).removeprefix(f"{root}/") for path in found]

    def _path(self, *parts: str) -> str:
        return "/".join((self._store.root, *parts))


def open_repository(where: Path | str) -> Repository:
    """A folder, or an address with `://`. Raises StoreUnavailable."""
    if isinstance(where, Path) or "://" not in where:
        return FolderRepository(Path(where))
    if where.startswith("file://"):
        return FolderRepository(Path(where.removeprefix("file://")))
    return ObjectRepository(where)


def _committed(manifest: Manifest, files: Mapping[str, Path], folder: str) -> bytes:
    """The manifest as it is stored, with the digests of the files."""
    digests = {name: asdict(file_digest(files[name])) for name in sorted(files)}
    raw = json.dumps({**asdict(manifest), "files": digests}, indent=1, sort_keys=True).encode()
    parse_manifest(raw, f"{folder}/{MANIFEST}")
    return raw


def _highest(names: Iterable[str]) -> str | None:
    numbers = [int(name) for name in names if VERSION_NAME.fullmatch(name)]
    return str(max(numbers)) if numbers else None
