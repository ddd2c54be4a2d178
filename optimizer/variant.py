"""Variants of a model: immutable handles on what a recipe made, by kind, and their ids.

A handle points at files and carries their digest; it holds no live model. It knows nothing of
how it was made (`optimizer.recipe`) or where it is kept (`optimizer.store`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimizer.spec import ModelSource, OnnxSource, TorchKind
from serve.engines import EngineSpec

if TYPE_CHECKING:
    from optimizer.techniques import Restructuring

Json = Any
"""A value that JSON can hold."""


class Kind(StrEnum):
    """The form that a model is in."""

    TORCH = "torch"
    ONNX = "onnx"
    ENGINE = "engine"


class Stage(Enum):
    """Where a technique stands in a recipe; see `Stage.rank`."""

    SUPERNET = "supernet"
    ARCHITECTURE = "architecture"
    SPARSIFY = "sparsify"
    PRUNE = "prune"
    DECOMPOSE = "decompose"
    RECOVER = "recover"
    EXPORT = "export"
    PRECISION = "precision"
    COMPILE = "compile"

    @property
    def rank(self) -> int:
        """A recipe's ranks never fall. Prune and decompose share one: either may come first."""
        return _RANKS[self]


STRUCTURAL = (Stage.ARCHITECTURE, Stage.PRUNE, Stage.DECOMPOSE)
"""Stages that change a network's structure, so that its latency changes and its accuracy falls."""
CHANGING = (Stage.SUPERNET, Stage.SPARSIFY, *STRUCTURAL, Stage.RECOVER)
"""Stages that change the structure or the weights: what isn't had off the shelf."""
_RANKS = {
    Stage.SUPERNET: 0,
    Stage.ARCHITECTURE: 1,
    Stage.SPARSIFY: 2,
    Stage.PRUNE: 3,
    Stage.DECOMPOSE: 3,
    Stage.RECOVER: 4,
    Stage.EXPORT: 5,
    Stage.PRECISION: 6,
    Stage.COMPILE: 7,
}


@dataclass(frozen=True)
class TorchModel:
    """A module that can be built again, by `optimizer.torch_variant.load_torch`. This one is as
    its source gives it."""

    kind: ClassVar[Kind] = Kind.TORCH
    source: TorchKind
    digest: str
    precision: str = "fp32"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TorchVariant(TorchModel):
    """The source's module after the structural plan in `directory`, with the weights there.
    `techniques` replay the plan, by their names."""

    directory: Path
    techniques: Mapping[str, "Restructuring"] = field(compare=False, repr=False)


@dataclass(frozen=True)
class StoredTorch:
    """A torch variant as the store gives it: source and techniques are the study's, and not
    stored. `optimizer.torch_variant.bound` makes a `TorchVariant` of it."""

    kind: ClassVar[Kind] = Kind.TORCH
    directory: Path
    digest: str
    precision: str = "fp32"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnnxModel:
    """`directory/file`, self-contained; `precision` is what its heavy operators compute in."""

    kind: ClassVar[Kind] = Kind.ONNX
    directory: Path
    file: str
    digest: str
    precision: str = "fp32"
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.directory / self.file


@dataclass(frozen=True)
class EngineModel:
    """The files that an engine loads. `spec` says how, but for the serving configuration
    (threads, instances, batch sizes), which isn't the variant's."""

    kind: ClassVar[Kind] = Kind.ENGINE
    directory: Path
    spec: EngineSpec
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        return self.spec.precision

    def served(self, instances: int, threads: int, batch_sizes: tuple[int, ...]) -> EngineSpec:
        """The spec in a serving configuration."""
        return replace(self.spec, instances=instances, threads=threads, batch_sizes=batch_sizes)

    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.directory.iterdir() if file.is_file())


StoredModel = TorchVariant | StoredTorch | OnnxModel | EngineModel
Model = TorchModel | StoredModel


def onnx_model(
    directory: Path, file: str, precision: str = "fp32", notes: tuple[str, ...] = ()
) -> OnnxModel:
    """A handle on the ONNX file in `directory`, digested now."""
    return OnnxModel(directory, file, directory_digest(directory), precision, notes)


def engine_model(directory: Path, spec: EngineSpec, notes: tuple[str, ...] = ()) -> EngineModel:
    """A handle on the engine files in `directory`, digested now together with `spec`."""
    content = directory_digest(directory) + canonical_json(asdict(spec))
    return EngineModel(directory, spec, hashlib.sha256(content.encode()).hexdigest(), notes)


def source_model(
    source: ModelSource, digest: str, precision: str = "fp32"
) -> TorchModel | OnnxModel:
    """The model that a study starts from; `digest` as `optimizer.model_source.source_digest`."""
    if isinstance(source, OnnxSource):
        return OnnxModel(source.path.parent, source.path.name, digest, precision)
    return TorchModel(source, digest, precision)


def digest_of(model: StoredModel, directory: Path) -> str:
    """The digest that the model would have with the files in `directory`; empty for none."""
    if not directory.is_dir():
        return ""
    if isinstance(model, EngineModel):
        return engine_model(directory, model.spec).digest
    return directory_digest(directory)


def model_to_dict(model: StoredModel) -> dict[str, object]:
    """The handle as JSON can hold it, without its folder and digest."""
    stored: dict[str, object] = {"kind": model.kind, "notes": model.notes}
    if isinstance(model, EngineModel):
        return stored | {"spec": asdict(model.spec)}
    stored["precision"] = model.precision
    return stored | {"file": model.file} if isinstance(model, OnnxModel) else stored


def model_from_dict(stored: dict[str, Any], directory: Path, digest: str) -> StoredModel:
    """What `model_to_dict` wrote, as a handle on `directory`."""
    notes = tuple(stored["notes"])
    if stored["kind"] == EngineModel.kind:
        spec = dict(stored["spec"])
        spec["batch_sizes"] = tuple(spec["batch_sizes"])
        return EngineModel(directory, EngineSpec(**spec), digest, notes)
    if stored["kind"] == StoredTorch.kind:
        return StoredTorch(directory, digest, stored["precision"], notes)
    return OnnxModel(directory, stored["file"], digest, stored["precision"], notes)


def directory_digest(directory: Path) -> str:
    """SHA-256 (hex) of the names and contents of the files in `directory`, subfolders included."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """JSON that is the same for equal values: for digests and keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def variant_id(parent_id: str, step: Mapping[str, object], data_digest: str) -> str:
    """The id of what `step` (an `artifact.Step` as a mapping) makes of the parent.

    It covers technique and version, parameters, seed, package versions, and the data where
    they are used (else `data_digest` is empty): all that decides the result.
    """
    content = {"parent": parent_id, "step": dict(step), "data": data_digest}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
