"""Model versions on disk, made from the tiny ONNX models, as the optimizer would publish them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serve.artifact import GOLDEN, Batching, Golden, Manifest, write_golden, write_version
from serve.engines import EngineSpec, load_engine
from serve.tensor import Array
from tests.serve import onnx_models


def slo_document(threshold_ms: float) -> dict[str, Any]:
    return {
        "apiVersion": "trimserve/v1",
        "kind": "SLO",
        "name": "tiny",
        "latency": {"quantile": 0.99, "threshold_ms": threshold_ms},
        "workload": {"rate_per_s": 10.0},
    }


def manifest_of(model: Path, name: str, **changes: Any) -> Manifest:
    """The manifest of an ONNX file in onnxruntime; `changes` are its fields."""
    spec = EngineSpec("onnxruntime", "model.onnx", threads=1)
    engine = load_engine(model.parent, replace(spec, file=model.name))
    engine.close()
    manifest = Manifest(
        model=name,
        version="1",
        signature=engine.signature,
        engine=spec,
        batching=Batching(8 if engine.signature.batched else 0),
    )
    return replace(manifest, **changes)


def publish(
    repository: Path,
    builder: onnx_models.Builder,
    scratch: Path,
    golden: Mapping[str, Array] | None = None,
    golden_outputs: Mapping[str, Array] | None = None,
    **changes: Any,
) -> Path:
    """Write the builder's model as a version. `golden` inputs are stored with `golden_outputs`,
    by default those that the engine gives. `changes` are fields of the manifest."""
    model = builder(scratch / "model.onnx")
    files = {"model.onnx": model}
    if golden is not None:
        if golden_outputs is None:
            golden_outputs = load_engine(scratch, EngineSpec("onnxruntime", model.name)).run(golden)
        write_golden(scratch / GOLDEN, golden, golden_outputs)
        files[GOLDEN] = scratch / GOLDEN
        changes["golden"] = Golden(GOLDEN, tolerance=1e-4)
    manifest = manifest_of(model, builder.__name__, **changes)
    return write_version(repository, manifest, files)


def rows(n: int, width: int = 4, seed: int = 0) -> Array:
    """FP32[n, width] of normal noise."""
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
