"""A plain ONNX file as a repository of one model with one version, named like the file."""

from collections.abc import Collection, Sequence
from pathlib import Path

from serve.artifact import check_model_name
from serve.errors import ArtifactInvalid
from serve.storage.listing import FoundFile, ModelListing, VersionListing, fingerprint

VERSION = "1"


class OnnxFile:
    """See `serve.storage.Storage`. Raises ArtifactInvalid where `path` is no file, or named like
    no model could be."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ArtifactInvalid(str(path), "not a file, want an ONNX model")
        check_model_name(path.stem)
        self.path = path

    @property
    def url(self) -> str:
        return str(self.path)

    def scan(self) -> dict[str, ModelListing]:
        name = self.path.stem
        try:
            stat = self.path.stat()
        except OSError as error:
            raise ArtifactInvalid(self.url, error.strerror or str(error)) from error
        mark = fingerprint([FoundFile(self.path.name, stat.st_size, str(stat.st_mtime_ns))])
        version = VersionListing(VERSION, has_manifest=False, fingerprint=mark)
        return {name: ModelListing(name, versions=(version,))}

    def scan_model(self, name: str) -> ModelListing | None:
        return self.scan().get(name)

    def fetch(self, model: str, listing: VersionListing) -> Path:
        """The folder that the file lies in, among others that are none of its business."""
        del model, listing
        return self.path.parent

    def fetch_side_files(self, listing: ModelListing, names: Sequence[str]) -> Path:
        del listing, names
        return self.path.parent

    def prune(self, keep: Collection[Path]) -> None:
        """Nothing is copied."""

    def close(self) -> None:
        """Nothing is held."""
