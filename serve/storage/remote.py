"""A model repository at any address that fsspec reads: s3://, memory://, and others.

Scans read listings and config.pbtxt only; a version is downloaded when it is fetched, into a
cache. Calls block, so they belong in worker threads. It knows neither models nor event loops.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from serve.artifact import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MODEL_NAME,
    check_model_name,
    check_version_name,
    parse_manifest,
    read_manifest,
)
from serve.errors import ArtifactInvalid
from serve.storage.cache import Cache
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
    fingerprint,
    is_visible,
    model_listing,
    side_files,
)

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 16 * 2**20  # of one ranged request
_BODY_ATTEMPTS = 2  # for an answer that breaks off, in s3fs; requests are retried below it
_MAX_CAUSE_LENGTH = 300
# Keys of a driver's file information that change with the content: the first one there is used.
# Drivers name them as their service does.
_STAMPS = ("ETag", "etag", "checksum", "md5Hash", "mtime", "LastModified", "last_modified",
           "updated", "created")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Of one request; `n_attempts` counts the first. s3:// keeps to it, other drivers have
    bounds of their own."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    n_attempts: int = 3


DEFAULT_NETWORK = Network()


class FileSystem(Protocol):
    """What is used of fsspec's file systems."""

    def find(self, path: str, detail: bool, **options: Any) -> dict[str, dict[str, Any]]: ...
    def isdir(self, path: str) -> bool: ...
    def cat_file(self, path: str, start: int, end: int) -> bytes: ...
    def open(self, path: str, mode: str, **options: Any) -> BinaryIO: ...


@dataclass(frozen=True)
class Driver:
    """What trimserve knows of a protocol's driver: the extra that installs it, its options, those
    of its `find`, and what to look at when it can't read."""

    extra: str
    options: Callable[[Network], dict[str, Any]]
    find_options: Callable[[Limits], dict[str, Any]]
    advice: str


def _s3_options(network: Network) -> dict[str, Any]:
    return {
        "config_kwargs": {
            "connect_timeout": network.connect_timeout_s,
            "read_timeout": network.read_timeout_s,
            "retries": {"total_max_attempts": network.n_attempts, "mode": "standard"},
        }
    }


_S3 = Driver(
    extra="s3",
    options=_s3_options,
    find_options=lambda limits: {"max_items": limits.max_files + 1},
    advice="check the bucket, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
)
# By default a failed listing of a folder would look like an empty folder.
_OTHER = Driver(
    extra="",
    options=lambda _: {},
    find_options=lambda _: {"on_error": "raise"},
    advice="check the address, the network and the credentials",
)
DRIVERS: dict[str, Driver] = {"s3": _S3, "s3a": _S3}


class RemoteStorage:
    """See `serve.storage.Storage`. Made by `open_remote`."""

    def __init__(
        self,
        url: str,
        driver: Driver,
        file_system: FileSystem,
        root: str,
        cache: Cache,
        limits: Limits,
    ) -> None:
        self._url = url
        self._driver = driver
        self._file_system = file_system
        self._root = root
        self._cache = cache
        self._limits = limits
        # model -> (fingerprint, text) of its config as last read, so that polling reads no file.
        self._configs: dict[str, tuple[str, str]] = {}

    @property
    def url(self) -> str:
        return self._url

    def scan(self) -> dict[str, ModelListing]:
        by_model: dict[str, list[FoundFile]] = {}
        for file in self._found(""):
            name, _, inner = file.name.partition("/")
            if inner and MODEL_NAME.fullmatch(name):
                by_model.setdefault(name, []).append(FoundFile(inner, file.size_bytes, file.stamp))
            else:
                _log.debug("skipped: %s/%s is not in a model's folder", self._url, file.name)
        listings = (self._listing(name, by_model[name]) for name in sorted(by_model))
        found = {listing.name: listing for listing in listings if listing is not None}
        self._configs = {name: text for name, text in self._configs.items() if name in found}
        return found

    def scan_model(self, name: str) -> ModelListing | None:
        if not MODEL_NAME.fullmatch(name):
            return None
        return self._listing(name, self._found(name))

    def fetch(self, model: str, listing: VersionListing) -> Path:
        check_model_name(model)
        check_version_name(listing.version)
        folder = f"{model}/{listing.version}"
        files, where = self._found(folder), f"{self._url}/{folder}"
        check_unchanged(where, files, listing.fingerprint)

        def write(to: Path) -> None:
            if listing.has_manifest:
                self._download_declared(folder, files, to)
                return
            self._download_all(folder, files, self._limits.max_version_bytes, to)
            # Without digests, only a second listing tells that no file changed meanwhile.
            check_unchanged(where, self._found(folder), listing.fingerprint)

        key = f"{listing.version}-{self._key(listing.fingerprint)}"
        return self._cached(model, key, None if listing.has_manifest else files, write)

    def fetch_side_files(self, listing: ModelListing, names: Sequence[str]) -> Path:
        check_model_name(listing.name)
        where = f"{self._url}/{listing.name}"
        check_side_names(where, names)
        found = {file.name: file for file in side_files(self._found(listing.name))}
        check_unchanged(where, found.values(), listing.side_fingerprint)
        missing = [name for name in names if name not in found]
        if missing:
            raise ArtifactInvalid(f"{where}/{missing[0]}", "no such file")
        wanted = [found[name] for name in sorted(set(names))]

        def write(to: Path) -> None:
            self._download_all(listing.name, wanted, self._limits.max_side_bytes, to)

        key = f"side-{self._key(listing.side_fingerprint, *sorted(set(names)))}"
        return self._cached(listing.name, key, wanted, write)

    def prune(self, keep: Collection[Path]) -> None:
        self._cache.prune(keep)

    def close(self) -> None:
        self._cache.close()

    def _cached(
        self, model: str, key: str, files: Sequence[FoundFile] | None, write: Callable[[Path], None]
    ) -> Path:
        """An entry of the cache with `files`, or without them with those of its manifest."""
        ready = self._cache.get(model, key)
        if ready is not None:
            if _is_complete(ready, files):
                return ready
            _log.warning("%s is damaged, downloading it again", ready)
            self._cache.discard(ready)
        return self._cache.fill(model, key, write)

    def _found(self, folder: str) -> list[FoundFile]:
        """The visible files below a folder, with names relative to it; none where it isn't there.
        Raises ArtifactInvalid where it can't be listed, or the repository isn't there."""
        path = f"{self._root}/{folder}".rstrip("/")
        options = self._driver.find_options(self._limits)
        where = f"{self._url}/{folder}".rstrip("/")
        with self._translated(where):
            entries = self._file_system.find(path, detail=True, **options)
            is_there = bool(entries) or self._file_system.isdir(self._root)
        if not is_there or self._root in entries:
            raise ArtifactInvalid(
                self._url, f"no such folder, want <model>/<version>/ in it; {self._driver.advice}"
            )
        if len(entries) > self._limits.max_files:
            raise ArtifactInvalid(where, f"holds over {self._limits.max_files} files")
        return [
            FoundFile(name, int(entry["size"]), _stamp(entry))
            for full_name, entry in entries.items()
            if entry["type"] == "file"
            and full_name != path
            and is_visible(name := full_name.removeprefix(f"{path}/"))
        ]

    def _listing(self, name: str, files: list[FoundFile]) -> ModelListing | None:
        try:
            return model_listing(name, files, self._config(name, files))
        except ArtifactInvalid as error:
            return ModelListing(name, problem=str(error))

    def _config(self, model: str, files: list[FoundFile]) -> str | None:
        found = [file for file in files if file.name == CONFIG]
        if not found:
            return None
        mark, (known, text) = fingerprint(found), self._configs.get(model, ("", ""))
        if mark != known:
            raw = self._read(f"{model}/{CONFIG}", found[0], self._limits.max_config_bytes)
            text = config_text(f"{self._url}/{model}/{CONFIG}", raw, self._limits)
            self._configs[model] = (mark, text)
        return text

    def _read(self, name: str, file: FoundFile, max_bytes: int) -> bytes:
        """A small file's content, by one byte too long where it has more than `max_bytes`."""
        if file.size_bytes == 0:  # of which no range can be asked for
            return b""
        with self._translated(f"{self._url}/{name}"):
            return self._file_system.cat_file(f"{self._root}/{name}", start=0, end=max_bytes + 1)

    def _download_declared(self, folder: str, files: list[FoundFile], to: Path) -> None:
        """The manifest and what it names, compared with their digests on the way."""
        where = f"{self._url}/{folder}"
        found = {file.name: file for file in files}
        raw = self._read(f"{folder}/{MANIFEST}", found[MANIFEST], MAX_MANIFEST_BYTES)
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ArtifactInvalid(f"{where}/{MANIFEST}", f"over {MAX_MANIFEST_BYTES} bytes")
        manifest = parse_manifest(raw, where=f"{where}/{MANIFEST}")
        check_declared(where, files, manifest)
        wanted = [found[name] for name in manifest.files]
        self._check_total(where, wanted, self._limits.max_version_bytes)
        for name, want in manifest.files.items():
            got = self._download(f"{folder}/{name}", want.size_bytes, to / name)
            if got != want.sha256:
                raise ArtifactInvalid(f"{where}/{name}", f"sha256 {got}, want {want.sha256}")
        (to / MANIFEST).write_bytes(raw)

    def _download_all(
        self, folder: str, files: Sequence[FoundFile], max_bytes: int, to: Path
    ) -> None:
        self._check_total(f"{self._url}/{folder}", files, max_bytes)
        for file in files:
            self._download(f"{folder}/{file.name}", file.size_bytes, to / file.name)

    def _check_total(self, where: str, files: Sequence[FoundFile], max_bytes: int) -> None:
        total = sum(file.size_bytes for file in files)
        if total > max_bytes:
            raise ArtifactInvalid(where, f"{total} bytes to download, at most {max_bytes}")

    def _download(self, name: str, size_bytes: int, target: Path) -> str:
        """Copy a file of exactly `size_bytes`; returns its SHA-256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, n_bytes = hashlib.sha256(), 0
        with target.open("xb") as local:
            for chunk in self._chunks(name, size_bytes):
                n_bytes += len(chunk)
                if n_bytes > size_bytes:
                    break
                digest.update(chunk)
                local.write(chunk)
        if n_bytes != size_bytes:
            amount = "more" if n_bytes > size_bytes else f"{n_bytes}"
            raise ArtifactInvalid(f"{self._url}/{name}", f"{amount} bytes, want {size_bytes}")
        return digest.hexdigest()

    def _chunks(self, name: str, size_bytes: int) -> Iterator[bytes]:
        if size_bytes == 0:
            return
        with (
            self._translated(f"{self._url}/{name}"),
            self._file_system.open(f"{self._root}/{name}", "rb", block_size=_BLOCK_BYTES) as remote,
        ):
            while chunk := remote.read(_BLOCK_BYTES):
                yield chunk

    def _key(self, *parts: str) -> str:
        return hashlib.sha256("\n".join((self._url, *parts)).encode()).hexdigest()[:32]

    @contextlib.contextmanager
    def _translated(self, where: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # drivers raise whatever their client libraries do
            raise ArtifactInvalid(
                where, f"can't be read: {_cause(error)}; {self._driver.advice}"
            ) from error


def open_remote(url: str, cache: Path | None, limits: Limits, network: Network) -> RemoteStorage:
    """Raises ArtifactInvalid where the protocol is unknown or its driver not installed."""
    from fsspec.core import url_to_fs

    shown = without_credentials(url)
    if "::" in url:
        raise ArtifactInvalid(shown, "a chain of protocols, want one address")
    driver = DRIVERS.get(url.partition("://")[0], _OTHER)
    # Instances are cached by fsspec with their credentials, listings with what was there before.
    options = {"skip_instance_cache": True, "use_listings_cache": False, **driver.options(network)}
    try:
        file_system, root = url_to_fs(url, **options)
    except ImportError as error:
        install = f"; pip install 'trimserve[{driver.extra}]'" if driver.extra else ""
        raise ArtifactInvalid(shown, f"{error}{install}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ArtifactInvalid(shown, f"can't be opened: {_cause(error)}") from error
    if driver is _S3:
        file_system.retries = _BODY_ATTEMPTS
    return RemoteStorage(shown, driver, file_system, root.rstrip("/"), Cache(cache), limits)


def without_credentials(url: str) -> str:
    """The address as it may be logged: without user, password and query, and no '/' at its end."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/")


def _stamp(entry: Mapping[str, Any]) -> str:
    return next((str(entry[key]) for key in _STAMPS if entry.get(key) is not None), "")


def _is_complete(folder: Path, files: Sequence[FoundFile] | None) -> bool:
    """Whether an entry of the cache still has all files at their sizes."""
    try:
        if files is None:
            declared = read_manifest(folder).files
            sizes = {name: file.size_bytes for name, file in declared.items()}
        else:
            sizes = {file.name: file.size_bytes for file in files}
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (ArtifactInvalid, OSError):
        return False


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) <= _MAX_CAUSE_LENGTH else f"{text[: _MAX_CAUSE_LENGTH - 3]}..."
    return f"{type(error).__name__}: {shown}"
