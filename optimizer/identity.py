"""Identity of a study: what decides how its search goes, as one digest, and what it ran on."""

import hashlib
from dataclasses import asdict
from importlib import metadata

from optimizer.builder import Builder
from optimizer.data.splits import DataSplits
from optimizer.serving import Serving
from optimizer.spec import Spec
from optimizer.variant import canonical_json
from serve.machine import Machine

VERSION = 1
"""Changes with the way a study is led, so that old logs aren't taken for its own."""
_PACKAGES = ("trimserve", "torch", "onnx", "onnxruntime", "openvino", "optuna", "numpy")


def study_id(
    spec: Spec, builder: Builder, splits: DataSplits, machine: Machine, serving: Serving
) -> str:
    """SHA-256 (hex) of all that decides how the search goes, but its budget: a study goes on
    where one of the same id ended."""
    techniques = {name: one.traits.version for name, one in builder.techniques.items()}
    content = {
        "version": VERSION,
        "base": builder.base.digest,
        "slo": spec.slo.to_dict(),
        "objective": spec.objective,
        "task": spec.task.model_dump(mode="json"),
        "constraints": spec.constraints.model_dump(),
        "training": spec.training.model_dump(),
        "training_epochs": spec.budget.training_epochs,
        "sampler": spec.search.sampler,
        "price": spec.target.price_per_core_hour,
        "cores": serving.cores,
        "front_end": asdict(serving.front_end),
        "seed": spec.seed,
        "techniques": techniques,
        "data": splits.digest,
        "machine": machine.to_dict(),
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def spec_digest(spec: Spec) -> str:
    """SHA-256 (hex) of the spec and its SLO as they are written."""
    digest = hashlib.sha256()
    for path in (spec.source, spec.slo_path):
        digest.update(path.read_bytes() if path.is_file() else repr(spec).encode())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Installed packages that a study's results depend on."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
