"""The model repository: folders of versions on disk, and those of them that are loaded.

A version that fails to load is reported with its reason and hides no other. It knows nothing of
requests; the service asks it for models by name and version.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loadtest.slo import Slo
from serve.artifact import (
    MANIFEST,
    MODEL_NAME,
    VERSION_NAME,
    Manifest,
    check_model_name,
    file_digest,
    read_manifest,
)
from serve.batcher import Batch
from serve.engines import EngineUnavailable
from serve.errors import ArtifactInvalid, ModelNotFound, ModelNotReady
from serve.model import Model, embedded_slo, load_model, manifest_for_onnx

_log = logging.getLogger(__name__)

State = Literal["LOADING", "READY", "UNAVAILABLE"]


@dataclass(frozen=True)
class Source:
    """Where a version comes from: its folder, and its manifest where that isn't in the folder."""

    name: str
    version: str
    directory: Path
    manifest: Manifest | None = None

    def threshold_s(self) -> float | None:
        """The latency threshold of the SLO in its manifest; None without one, or if unreadable."""
        try:
            manifest = self.manifest or read_manifest(self.directory)
            objective = embedded_slo(manifest)
        except ArtifactInvalid:
            return None
        return objective.latency.threshold_s if objective else None


@dataclass(frozen=True)
class Slot:
    """A version of a model in the index. `model` is there in state READY only."""

    source: Source
    state: State
    reason: str = ""
    model: Model | None = None


class Repository:
    """Loaded versions by model name and version. `load` and `close` block; look-ups don't."""

    def __init__(self, deliver: Callable[[Batch], None], slo: Slo | None = None) -> None:
        self._deliver = deliver
        self._slo = slo
        self._slots: dict[str, dict[str, Slot]] = {}

    def load(self, sources: list[Source]) -> None:
        """Load the sources one after the other; failures end in their slot's reason."""
        for source in sources:
            self._set(Slot(source, "LOADING", "loading"))
        for source in sources:
            self._set(self._loaded(source))

    def get(self, name: str, version: str = "") -> Model:
        """The ready model, by default of the highest version that is ready.

        Raises ModelNotFound, or ModelNotReady with the reason.
        """
        slot = self._slot(name, version)
        if slot.model is None:
            raise ModelNotReady(name, slot.source.version, slot.reason)
        return slot.model

    def versions(self, name: str) -> list[str]:
        """The ready versions of a model, lowest first."""
        if name not in self._slots:
            raise ModelNotFound(name)
        ready = [v for v, slot in self._slots[name].items() if slot.state == "READY"]
        return sorted(ready, key=int)

    def slots(self) -> Iterator[Slot]:
        for versions in self._slots.values():
            yield from versions.values()

    @property
    def is_ready(self) -> bool:
        """Nothing is loading any more, and some model answers. A broken one is reported with its
        reason and doesn't keep the others' clients away."""
        states = {slot.state for slot in self.slots()}
        return "READY" in states and "LOADING" not in states

    def close(self, finish: bool = True) -> None:
        """Finish what the models have admitted, or only what runs, and unload them."""
        for slot in list(self.slots()):
            if slot.model is not None:
                slot.model.close(finish)

    def _slot(self, name: str, version: str) -> Slot:
        versions = self._slots.get(name)
        if versions is None:
            raise ModelNotFound(name)
        if version:
            if version not in versions:
                raise ModelNotFound(name, version)
            return versions[version]
        ready = [v for v, slot in versions.items() if slot.model is not None]
        return versions[max(ready or versions, key=int)]

    def _set(self, slot: Slot) -> None:
        self._slots.setdefault(slot.source.name, {})[slot.source.version] = slot

    def _loaded(self, source: Source) -> Slot:
        try:
            manifest = source.manifest or read_manifest(source.directory)
            if (manifest.model, manifest.version) != (source.name, source.version):
                raise ArtifactInvalid(
                    str(source.directory),
                    f"the manifest is of model {manifest.model!r} version {manifest.version!r}",
                )
            model = load_model(source.directory, manifest, self._deliver, self._slo)
        except (ArtifactInvalid, EngineUnavailable) as error:
            _log.error("not loaded: %s", error, extra={"model": f"{source.name}:{source.version}"})
            return Slot(source, "UNAVAILABLE", str(error))
        except Exception as error:  # noqa: BLE001 - a broken version must not hide the others
            _log.exception("not loaded", extra={"model": f"{source.name}:{source.version}"})
            return Slot(source, "UNAVAILABLE", f"{type(error).__name__} while loading, see the log")
        _log.info("ready", extra={"model": f"{source.name}:{source.version}"})
        return Slot(source, "READY", model=model)


def find_versions(root: Path) -> list[Source]:
    """The highest version of every model under `root`, models in order of their names.

    Raises ArtifactInvalid where `root` is no folder or holds no version.
    """
    if not root.is_dir():
        raise ArtifactInvalid(str(root), "not a folder, want a model repository")
    sources = []
    for folder in sorted(path for path in root.iterdir() if MODEL_NAME.fullmatch(path.name)):
        versions = [
            path.name
            for path in (folder.iterdir() if folder.is_dir() else ())
            if VERSION_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()
        ]
        if versions:
            highest = max(versions, key=int)
            sources.append(Source(folder.name, highest, folder / highest))
    if not sources:
        raise ArtifactInvalid(
            str(root), "no model version, want <model>/<version>/manifest.json in it"
        )
    return sources


def onnx_source(path: Path) -> Source:
    """A plain ONNX file as version 1 of a model named like the file."""
    if not path.is_file():
        raise ArtifactInvalid(str(path), "not a file, want an ONNX model")
    check_model_name(path.stem)
    manifest = manifest_for_onnx(path, path.stem, file_digest(path))
    return Source(path.stem, "1", path.parent, manifest)
