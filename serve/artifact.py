"""Artifacts: the folder of one model version and the manifest that describes it.

`<repository>/<model>/<version>/` holds the model files, a golden input with its outputs, and
`manifest.json`, which is written last and is the commit: a folder without it is no version.
Versions are immutable. It knows files and their digests, not engines at work.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from serve.engines import EngineSpec, Signature
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.machine import Machine
from serve.padding import CutOutput, PaddedInput, Padding
from serve.tensor import DATATYPES, Array, Tensor, decode_raw, encode_raw
from serve.transform import ImageInput, LabelOutput, TextInput, TransformSpec, check_spec, files_of

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
MAX_MANIFEST_BYTES = 4_000_000
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Datatypes that npz has no type for.
_STORED_RAW = frozenset({"BYTES", "BF16"})
VERSION_NAME = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Batching:
    """`max_batch_size` 0 means a model without a batch dimension; the delay is counted from the
    oldest request in the queue, the queue's size in requests. Requests of more rows than the
    maximum are refused or, with `oversize` "split", run in several batches. `default_timeout_s`
    is the deadline of requests that bring none; 0 for none."""

    max_batch_size: int = 0
    max_queue_delay_s: float = 0.0
    max_queue_size: int = 1024
    oversize: Literal["refuse", "split"] = "refuse"
    default_timeout_s: float = 0.0


@dataclass(frozen=True)
class ServiceTime:
    """Seconds that one instance takes for a batch, with all instances busy."""

    batch_size: int
    p50_s: float
    p99_s: float
    n_samples: int


@dataclass(frozen=True)
class Profile:
    service_times: tuple[ServiceTime, ...]
    machine: Machine


@dataclass(frozen=True)
class Quality:
    """Accuracy in the engine that serves. `drop` is the base's value minus the variant's, and
    [`drop_lower`, `drop_upper`] its two-sided interval at `confidence`; `drop_bound` is the
    one-sided upper bound at `confidence` that the SLO's accuracy objective judges."""

    metric: str
    value: float
    drop: float
    drop_lower: float
    drop_upper: float
    drop_bound: float
    confidence: float
    n_samples: int
    split: str
    data_digest: str
    guarantee: Literal["labels", "fidelity", "metric"] = "labels"
    """What the drop says: measured against labels, or bounded without any by how faithfully the
    variant answers what its base does, or measured without any by a metric of the user's."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further measures by name, such as the mean KL divergence from the base."""


@dataclass(frozen=True)
class Step:
    """One technique of a recipe with everything that decides its result."""

    technique: str
    technique_version: str
    parameters: Mapping[str, str | int | float | bool]
    seed: int
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileDigest:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Golden:
    """A stored input with its outputs, which the loaded engine must reproduce: every output
    within `tolerance` times the largest absolute expected value of that tensor."""

    file: str
    tolerance: float


@dataclass(frozen=True)
class Manifest:
    """One version: what serves it and how. `signature` is the engine's. `labels` names, for an
    output, the file with its classes' names, one a line. `made_by` is the command that publishes
    such a version again, and `evidence` what the study that published it knew of it (how it was
    loaded, what it costs), both for people: nothing is served by them."""

    model: str
    version: str
    signature: Signature
    engine: EngineSpec
    batching: Batching
    files: Mapping[str, FileDigest] = field(default_factory=dict)
    variant_id: str = ""
    parent_id: str = ""
    recipe: tuple[Step, ...] = ()
    quality: Quality | None = None
    profile: Profile | None = None
    slo: Mapping[str, Any] | None = None
    golden: Golden | None = None
    padding: Padding | None = None
    transform: TransformSpec | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    made_by: tuple[str, ...] = ()
    evidence: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION


for _kind in (
    Batching,
    CutOutput,
    FileDigest,
    Golden,
    ImageInput,
    LabelOutput,
    Manifest,
    PaddedInput,
    Padding,
    Profile,
    Quality,
    ServiceTime,
    Step,
    TextInput,
    TransformSpec,
):
    setattr(_kind, "__pydantic_config__", pydantic.ConfigDict(extra="forbid"))  # noqa: B010
_MANIFESTS = pydantic.TypeAdapter(Manifest)


def read_manifest(directory: Path) -> Manifest:
    """Read and check `directory/manifest.json` without touching the files that it names."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ArtifactInvalid(str(path), error.strerror or str(error)) from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactInvalid(str(path), f"over {MAX_MANIFEST_BYTES} bytes")
    return parse_manifest(raw, where=str(path))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Parse manifest JSON. A newer schema is refused; older ones will be migrated here."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactInvalid(where, f"not valid JSON: {error}") from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise ArtifactInvalid(where, f"schema_version: got {found!r}, want {SCHEMA_VERSION}")
    try:
        manifest = _MANIFESTS.validate_python(document)
    except pydantic.ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"])
        raise ArtifactInvalid(where, f"{key}: {detail['msg']}") from error
    for name in manifest.files:
        check_file_name(name, where)
    for field_name, name in _named_files(manifest).items():
        if name not in manifest.files:
            raise ArtifactInvalid(where, f"{field_name}: {name!r} is not in files")
    _check_numbers(manifest, where)
    _check_padding(manifest, where)
    _check_labels(manifest, where)
    if manifest.transform is not None:
        check_spec(manifest.transform, where)
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file of the version with its digest. Raises ArtifactInvalid on the first
    that is missing, a link out of the folder, or different."""
    for name, want in manifest.files.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ArtifactInvalid(str(path), "leads out of the version's folder")
        try:
            got = file_digest(path)
        except OSError as error:
            raise ArtifactInvalid(str(path), error.strerror or str(error)) from error
        if got != want:
            raise ArtifactInvalid(
                str(path), f"sha256 {got.sha256} ({got.size_bytes} bytes), want {want.sha256}"
            )


def file_digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(digest, path.stat().st_size)


def write_version(repository: Path, manifest: Manifest, files: Mapping[str, Path]) -> Path:
    """Publish a version: copy `files` (name in the version -> source), then commit the manifest.

    Returns the version's folder. The digests are taken here. Raises ArtifactInvalid where the
    version exists already or a name is not allowed; leftovers of an interrupted write go.
    """
    check_model_name(manifest.model)
    check_version_name(manifest.version)
    directory = repository / manifest.model / manifest.version
    if (directory / MANIFEST).exists():
        raise ArtifactInvalid(str(directory), "exists already, versions are immutable")
    for name in files:
        check_file_name(name, str(directory))
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    try:
        for name, source in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, directory / name)
        digests = {name: file_digest(directory / name) for name in sorted(files)}
        committed = {**asdict(manifest), "files": {n: asdict(d) for n, d in digests.items()}}
        raw = json.dumps(committed, indent=1, sort_keys=True).encode()
        parse_manifest(raw, where=str(directory / MANIFEST))
        write_atomically(directory / MANIFEST, raw)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def next_version(repository: Path, model: str) -> str:
    """The version after the highest number in use, interrupted writes included."""
    folder = repository / model
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    taken = [int(name) for name in names if VERSION_NAME.fullmatch(name)]
    return str(max(taken, default=0) + 1)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, whole."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def check_model_name(name: str) -> None:
    if not MODEL_NAME.fullmatch(name):
        raise ArtifactInvalid(f"model name {name!r}", "want letters, digits, '.', '_' or '-'")


def check_version_name(name: str) -> None:
    if not VERSION_NAME.fullmatch(name):
        raise ArtifactInvalid(f"version {name!r}", "want a whole number from 1")


def write_golden(path: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Store a golden input with its outputs as an npz file without pickles.

    Tensors that npz has no type for (BYTES, BF16) are stored in the protocol's raw form, with
    their shape beside it.
    """
    arrays: dict[str, Array] = {}
    for side, tensors in (("inputs", inputs), ("outputs", outputs)):
        for name, array in tensors.items():
            datatype = DATATYPES[array.dtype]
            if datatype in _STORED_RAW:
                raw = encode_raw(Tensor(name, datatype, array))
                arrays[f"{side}.{datatype}/{name}"] = np.frombuffer(raw, np.uint8)
                arrays[f"{side}.shape/{name}"] = np.array(array.shape, np.int64)
            else:
                arrays[f"{side}/{name}"] = array
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_golden(path: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """The golden inputs and the outputs expected of them."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return _golden_side(arrays, "inputs"), _golden_side(arrays, "outputs")
    except (EOFError, InvalidRequest, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactInvalid(str(path), f"no readable golden input: {error}") from error


def _golden_side(arrays: Mapping[str, Array], side: str) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        if kind == side:
            tensors[name] = array
        elif kind.removeprefix(f"{side}.") in _STORED_RAW and kind.startswith(f"{side}."):
            shape = arrays[f"{side}.shape/{name}"].tolist()
            raw = memoryview(array.tobytes())
            tensors[name] = decode_raw(name, kind.removeprefix(f"{side}."), shape, raw).array
    return tensors


def _named_files(manifest: Manifest) -> dict[str, str]:
    """The files that parts of the manifest name, by field: they must be among its files."""
    named = {"engine.file": manifest.engine.file}
    if manifest.golden is not None:
        named["golden.file"] = manifest.golden.file
    if manifest.transform is not None:
        named |= {f"transform: {name}": name for name in files_of(manifest.transform)}
    named |= {f"labels.{output}": name for output, name in manifest.labels.items()}
    return named


def _check_padding(manifest: Manifest, where: str) -> None:
    if manifest.padding is None:
        return
    if not manifest.batching.max_batch_size:
        raise ArtifactInvalid(where, "padding: want batching.max_batch_size of at least 1 with it")
    problem = manifest.padding.problem(manifest.signature.inputs, manifest.signature.outputs)
    if problem is not None:
        raise ArtifactInvalid(where, ": ".join(problem))


def _check_labels(manifest: Manifest, where: str) -> None:
    unknown = sorted(set(manifest.labels) - {one.name for one in manifest.signature.outputs})
    if unknown:
        raise ArtifactInvalid(where, f"labels: got {unknown[0]!r}, want names of outputs")


def _check_numbers(manifest: Manifest, where: str) -> None:
    engine, batching = manifest.engine, manifest.batching
    numbers: dict[str, tuple[float, float]] = {  # field -> (value, the least allowed)
        "engine.threads": (engine.threads, 1),
        "engine.instances": (engine.instances, 1),
        "engine.batch_sizes": (min(engine.batch_sizes, default=1), 1),
        "batching.max_batch_size": (batching.max_batch_size, 0),
        "batching.max_queue_delay_s": (batching.max_queue_delay_s, 0),
        "batching.max_queue_size": (batching.max_queue_size, 1),
        "batching.default_timeout_s": (batching.default_timeout_s, 0),
    }
    for field_name, (value, least) in numbers.items():
        if not least <= value < math.inf:
            raise ArtifactInvalid(where, f"{field_name}: got {value}, want at least {least}")


def check_file_name(name: str, where: str) -> None:
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name:
        raise ArtifactInvalid(where, f"file name {name!r} leads out of the version's folder")
