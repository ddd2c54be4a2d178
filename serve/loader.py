"""The loader: one version of a plan, from the storage to a model ready to answer.

Runs in worker threads. What fails ends in a reason for clients, which names no folder of this
machine; the log has the whole of it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loadtest.slo import Slo
from serve.artifact import Manifest, file_digest, read_manifest
from serve.batcher import Batch
from serve.derivation import manifest_for_onnx
from serve.engines import RUNS_CODE, EngineUnavailable
from serve.errors import ArtifactInvalid
from serve.loading import load_model
from serve.model import Model
from serve.planning import Plan
from serve.storage import Storage
from serve.storage.digest import files_digest, parse_digest, version_digest
from serve.storage.listing import VersionListing
from serve.storage.onnx_file import OnnxFile
from serve.triton import label_files, labels_of_layout, manifest_of_layout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model and the digest of its content, or the reason for there being none. `is_final` is
    said of reasons that stay as long as the files do; others may be gone at the next try."""

    model: Model | None = None
    digest: str = ""
    reason: str = ""
    is_final: bool = False


class Loader:
    """Brings versions of a storage to models that deliver to one place. `slo` and `oversize`
    override the manifests'. Versions that can carry code are refused without `trust_code`."""

    def __init__(
        self,
        storage: Storage,
        deliver: Callable[[Batch], None],
        slo: Slo | None,
        oversize: Literal["refuse", "split"] | None,
        trust_code: bool = False,
    ) -> None:
        self._storage = storage
        self._deliver = deliver
        self._slo = slo
        self._oversize = oversize
        self._trust_code = trust_code

    def load(self, plan: Plan, version: VersionListing) -> Loaded:
        """Fetch, read and load a version."""
        name = plan.listing.name
        label = {"model": f"{name}:{version.version}"}
        directory: Path | None = None
        try:
            directory = self._storage.fetch(name, version)
            manifest, labels = self._read(plan, version, directory)
            if self._oversize is not None:
                batching = replace(manifest.batching, oversize=self._oversize)
                manifest = replace(manifest, batching=batching)
            if not self._trust_code:
                _refuse_code(directory, manifest)
            model = load_model(directory, manifest, self._deliver, self._slo, labels)
        except (ArtifactInvalid, EngineUnavailable) as error:
            _log.error("not loaded: %s", error, extra=label)
            reason = self.client_text(error, f"{name}/{version.version}", directory)
            return Loaded(reason=reason, is_final=directory is not None)
        except Exception as error:  # noqa: BLE001 - a broken version must not hide the others
            _log.exception("not loaded", extra=label)
            return Loaded(reason=f"{type(error).__name__} while loading, see the log")
        _log.info("ready", extra=label)
        return Loaded(model, self._digest(version, directory, manifest))

    def pinned(self, plan: Plan, digest: str) -> Plan:
        """The plan for the one version whose content has `digest`. Raises ArtifactInvalid."""
        wanted = parse_digest(digest)
        found = []
        for version in reversed(plan.listing.versions):
            got = version_digest(self._storage.fetch(plan.listing.name, version))
            if got == wanted:
                return replace(plan, versions=(version,), override=plan.override + digest)
            found.append(f"{version.version} has {got}")
        raise ArtifactInvalid(plan.listing.name, f"no version has {wanted}; {', '.join(found)}")

    def client_text(self, error: Exception, name: str = "", directory: Path | None = None) -> str:
        """An error's text without the folders and addresses of this machine; `directory` is where
        the version `name` ("model/version") lies."""
        places: dict[str, str] = {self._storage.url: "repository"}
        if directory is not None:
            places[str(directory)] = name
            if not isinstance(self._storage, OnnxFile):
                places[str(directory.parent)] = name.rpartition("/")[0]
                places[str(directory.parent.parent)] = "repository"
        places |= {str(Path(p).resolve()): n for p, n in places.items() if "://" not in p}
        return _replaced(str(error), places)

    def _read(
        self, plan: Plan, version: VersionListing, directory: Path
    ) -> tuple[Manifest, Mapping[str, tuple[str, ...]]]:
        """The version's manifest, and the class names that lie beside it."""
        name = plan.listing.name
        if isinstance(self._storage, OnnxFile):
            path = self._storage.path
            return manifest_for_onnx(path, name, file_digest(path)), {}
        if not version.has_manifest:
            manifest = manifest_of_layout(directory, name, version.version, plan.config)
            side = self._storage.fetch_side_files(plan.listing, label_files(plan.config))
            return manifest, labels_of_layout(plan.config, side)
        manifest = read_manifest(directory)
        if (manifest.model, manifest.version) != (name, version.version):
            raise ArtifactInvalid(
                str(directory),
                f"the manifest is of model {manifest.model!r} version {manifest.version!r}",
            )
        return manifest, {}

    def _digest(self, version: VersionListing, directory: Path, manifest: Manifest) -> str:
        if version.has_manifest:
            return version_digest(directory)
        return files_digest(manifest.files)


def _refuse_code(directory: Path, manifest: Manifest) -> None:
    engine = manifest.engine.name
    if engine in RUNS_CODE:
        raise ArtifactInvalid(
            str(directory),
            f"engine.name: loading a version of {engine!r} runs code from its files; start the "
            "server with --trust-code if you trust whoever writes to the repository",
        )


def _replaced(text: str, places: Mapping[str, str]) -> str:
    """`text` with each place's name for its path, the longest paths first. A path of one part
    (".", "models") could be any word, and tells nothing."""
    for path in sorted(places, key=len, reverse=True):
        if "/" in path.strip("/"):
            text = text.replace(path, places[path])
    return text
