"""A model repository in a local folder: versions are used where they lie, nothing is copied.

Links may lead anywhere inside the repository, and nowhere else. It knows nothing of caches.
"""

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from serve.artifact import (
    MODEL_NAME,
    check_model_name,
    check_version_name,
    read_manifest,
)
from serve.errors import ArtifactInvalid
from serve.storage.listing import (
    CONFIG,
    FoundFile,
    Limits,
    ModelListing,
    VersionListing,
    check_declared,
    check_side_names,
    check_unchanged,
    config_text,
    is_visible,
    model_listing,
)

_log = logging.getLogger(__name__)

MAX_DEPTH = 16  # of folders below a model's; ends a cycle of links too


class LocalStorage:
    """See `serve.storage.Storage`."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self._root = root
        self._limits = limits

    @property
    def url(self) -> str:
        return str(self._root)

    def scan(self) -> dict[str, ModelListing]:
        try:
            names = sorted(os.listdir(self._root))
        except OSError as error:
            raise ArtifactInvalid(
                self.url, f"{error.strerror}; want a folder with <model>/<version>/ in it"
            ) from error
        listings = (self._listing(name) for name in names)
        return {listing.name: listing for listing in listings if listing is not None}

    def scan_model(self, name: str) -> ModelListing | None:
        if not self._root.is_dir():
            raise ArtifactInvalid(self.url, "not a folder, want a model repository")
        return self._listing(name)

    def fetch(self, model: str, listing: VersionListing) -> Path:
        check_model_name(model)
        check_version_name(listing.version)
        directory = self._root / model / listing.version
        try:
            _check_inside(directory, self._root)
            files = list(files_below(directory, self._root, self._limits))
        except OSError as error:
            raise ArtifactInvalid(str(directory), error.strerror or str(error)) from error
        check_unchanged(str(directory), files, listing.fingerprint)
        if listing.has_manifest:
            check_declared(str(directory), files, read_manifest(directory))
        return directory

    def fetch_side_files(self, listing: ModelListing, names: Sequence[str]) -> Path:
        check_model_name(listing.name)
        folder = self._root / listing.name
        check_side_names(str(folder), names)
        for name in names:
            _check_inside(folder / name, self._root)
            if not (folder / name).is_file():
                raise ArtifactInvalid(str(folder / name), "no such file")
        return folder

    def prune(self, keep: Collection[Path]) -> None:
        """Nothing to do: there are no copies."""

    def close(self) -> None:
        """Nothing to do: nothing is held."""

    def _listing(self, name: str) -> ModelListing | None:
        folder = self._root / name
        try:
            if not MODEL_NAME.fullmatch(name) or not folder.is_dir():
                _log.debug("skipped: %s is not a model's folder", folder)
                return None
            _check_inside(folder, self._root)
            files = list(files_below(folder, self._root, self._limits))
            return model_listing(name, files, self._config(folder))
        except ArtifactInvalid as error:
            return ModelListing(name, problem=str(error))
        except OSError as error:
            return ModelListing(name, problem=f"{error.filename or folder}: {error.strerror}")

    def _config(self, folder: Path) -> str | None:
        path = folder / CONFIG
        try:
            with path.open("rb") as file:
                raw = file.read(self._limits.max_config_bytes + 1)
        except FileNotFoundError:
            return None
        return config_text(str(path), raw, self._limits)


def files_below(folder: Path, root: Path, limits: Limits) -> Iterator[FoundFile]:
    """Every file below `folder` that isn't hidden.

    Raises OSError where a folder can't be read, and ArtifactInvalid where a link leads out of
    `root`, or where there are too many files or levels.
    """
    for n_files, (name, status) in enumerate(_walk(folder, root, "")):
        if n_files >= limits.max_files:
            raise ArtifactInvalid(str(folder), f"holds over {limits.max_files} files")
        yield FoundFile(name, status.st_size, str(status.st_mtime_ns))


def _walk(folder: Path, root: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    if prefix.count("/") > MAX_DEPTH:
        raise ArtifactInvalid(str(folder), f"over {MAX_DEPTH} folders deep")
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if is_visible(entry.name)]
    for entry in visible:
        path, name = folder / entry.name, f"{prefix}{entry.name}"
        if entry.is_symlink():
            _check_inside(path, root)
        if entry.is_dir():
            yield from _walk(path, root, f"{name}/")
            continue
        try:
            yield name, entry.stat()
        except FileNotFoundError:  # removed since, or a link to nothing
            _log.debug("skipped: %s is not there", path)


def _check_inside(path: Path, root: Path) -> None:
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ArtifactInvalid(str(path), "a link that leads out of the repository")
