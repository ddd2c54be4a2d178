"""Storage: where a model repository lies, how versions are found and brought to local disk.

A repository is a local folder or an address that fsspec reads. It knows no engine, no event loop,
and nothing of loaded models.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from serve.errors import ArtifactInvalid
from serve.storage.listing import DEFAULT_LIMITS, Limits, ModelListing, VersionListing
from serve.storage.local import LocalStorage
from serve.storage.remote import DEFAULT_NETWORK, Network, open_remote


class Storage(Protocol):
    """A model repository. Its calls block; every failure is an ArtifactInvalid."""

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        ...

    def scan(self) -> dict[str, ModelListing]:
        """All models by name. One that can't be read is listed with its problem; raises where the
        repository isn't there, or can't be read at all."""
        ...

    def scan_model(self, name: str) -> ModelListing | None:
        """One model, without looking at the others; None if it isn't in the repository."""
        ...

    def fetch(self, model: str, listing: VersionListing) -> Path:
        """A local folder with the whole version, which must be as it was listed. Whoever loads
        it still verifies its files: here a local file is only compared by size."""
        ...

    def fetch_side_files(self, listing: ModelListing, names: Sequence[str]) -> Path:
        """A local folder with these files of the model's folder (labels, for example)."""
        ...

    def prune(self, keep: Collection[Path]) -> None:
        """Remove local copies other than `keep`, which are folders that were fetched, and other
        than those that another process uses. Not while another thread fetches."""
        ...

    def close(self) -> None:
        """Let go of all that was fetched."""
        ...


def open_storage(
    url: str | Path,
    cache: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    network: Network = DEFAULT_NETWORK,
) -> Storage:
    """The repository in a folder or at an address (file:// or any that fsspec has a driver for).

    Remote versions are copied into `cache`, which processes may share, and by default into a
    temporary folder that `close` removes. Nothing is read yet. Raises ArtifactInvalid where the
    address can't be understood or its driver isn't installed.
    """
    text = str(url)
    if isinstance(url, Path) or "://" not in text:
        return LocalStorage(Path(url), limits)
    if urlsplit(text).scheme in ("file", "local"):
        return LocalStorage(_local_path(text), limits)
    return open_remote(text, cache, limits, network)


def _local_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ArtifactInvalid(url, "want file:///<absolute path>, or a plain path")
    return Path(url2pathname(parts.path))
