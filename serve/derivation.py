"""Derivation: what a model file says of itself where nobody has described it.

It knows one file and the engine that reads it, no repository.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from serve.artifact import Batching, FileDigest, Manifest
from serve.engines import Engine, EngineSpec, Signature, load_engine
from serve.machine import allowed_cores
from serve.tensor import FLOATING, NUMPY_DTYPES, Array, TensorSpec, relative_difference
from serve.warmup import shape_of

_log = logging.getLogger(__name__)

DEFAULT_MAX_BATCH_SIZE = 32
_ROWS_TOLERANCE = 5e-2  # of the output's range: kernels round differently, mixing is far coarser


def manifest_for_onnx(path: Path, model: str, digest: FileDigest) -> Manifest:
    """The manifest of a plain ONNX file: signature from the file, one instance on all cores."""
    spec = EngineSpec("onnxruntime", path.name, threads=allowed_cores())
    signature = derived_signature(path.parent, spec)
    return Manifest(
        model=model,
        version="1",
        signature=signature,
        engine=spec,
        batching=Batching(DEFAULT_MAX_BATCH_SIZE if signature.batched else 0),
        files={path.name: digest},
    )


def derived_signature(directory: Path, spec: EngineSpec) -> Signature:
    """The signature of a model that nobody has described, read off its file.

    A first axis that varies in all tensors is taken for the batch only if the model treats rows
    apart: where two rows together give something else than each alone, batching would mix
    requests, so they run one at a time.
    """
    engine = load_engine(directory, spec)
    try:
        signature = engine.signature
        if not signature.batched or _treats_rows_apart(engine):
            return signature
        _log.warning("%s mixes the rows of a batch: requests will run one at a time", spec.file)
        return replace(signature, batched=False)
    finally:
        engine.close()


def _treats_rows_apart(engine: Engine) -> bool:
    """Whether two rows of noise give together what they give one by one. Integers are 0 and 1,
    which are indices in any table; a model that fails on them is taken at its word."""
    random = np.random.default_rng(0)
    both = {spec.name: _noise(spec, random) for spec in engine.signature.inputs}
    try:
        together = engine.run(both)
        apart = [engine.run({n: a[row : row + 1] for n, a in both.items()}) for row in (0, 1)]
    except Exception:  # noqa: BLE001 - engines raise anything; warming up will tell what is wrong
        return True
    for name, array in together.items():
        if len(array) != 2 or any(len(one[name]) != 1 for one in apart):
            return False
        difference = relative_difference(array, np.concatenate([one[name] for one in apart]))
        if not difference <= _ROWS_TOLERANCE and not _is_random(engine, both, name, array):
            return False
    return True


def _noise(spec: TensorSpec, random: np.random.Generator) -> Array:
    shape = shape_of(spec, 2, {})
    if spec.datatype == "BYTES":
        return np.array([b"a", b"b"], object)[random.integers(0, 2, shape)]
    if spec.datatype in FLOATING:
        return np.asarray(random.normal(size=shape).astype(NUMPY_DTYPES[spec.datatype]))
    return np.asarray(random.integers(0, 2, shape).astype(NUMPY_DTYPES[spec.datatype]))


def _is_random(engine: Engine, inputs: Mapping[str, Array], name: str, first: Array) -> bool:
    """Whether the same inputs give something else when asked again (noise, NaN): then comparing
    says nothing about rows."""
    return not relative_difference(engine.run(inputs)[name], first) <= _ROWS_TOLERANCE
