"""Derivation: what a model file says of itself where nobody has described it.

It knows one file and the engine that reads it, no repository.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from serve.artifact import Batching, FileDigest, Manifest
from serve.engines import Engine, EngineSpec, Signature, load_engine
from serve.machine import allowed_cores
from serve.tensor import (
    DATATYPES,
    FLOATING,
    NUMPY_DTYPES,
    Array,
    TensorSpec,
    relative_difference,
)
from serve.warmup import shape_of, trial_length

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


def file_signature(directory: Path, spec: EngineSpec) -> Signature:
    """The signature as the file and the engine have it."""
    engine = load_engine(directory, spec)
    try:
        return engine.signature
    finally:
        engine.close()


def derived_signature(directory: Path, spec: EngineSpec) -> Signature:
    """The signature of a model that nobody has described, read off its file.

    A first axis that varies in all tensors is taken for the batch only if the model treats rows
    apart: where two rows together give something else than each alone, batching would mix
    requests, so they run one at a time.
    """
    engine = load_engine(directory, spec)
    try:
        signature = engine.signature
        if not signature.batched or _treats_rows_apart(engine, spec.file):
            return signature
        _log.warning("%s mixes the rows of a batch: requests will run one at a time", spec.file)
        return replace(signature, batched=False)
    finally:
        engine.close()


def _treats_rows_apart(engine: Engine, file: str) -> bool:
    """Whether two different rows of noise give together what they give one by one.

    Integers are 0 and 1, which are indices in any table. A model that fails on all of that is
    taken at its word; one that answers with nothing but NaN can't be told from one that mixes.
    """
    specs = engine.signature.inputs
    for positive in (False, True):
        random = np.random.default_rng(0)

        def inputs(length: int, random: np.random.Generator = random) -> dict[str, Array]:
            return {s.name: _noise(s, shape_of(s, 2, length), random) for s in specs}

        try:
            both = inputs(trial_length(engine, inputs))
            if positive:
                both = {name: _positive(array) for name, array in both.items()}
            together = engine.run(both)
            apart = [engine.run({n: a[row : row + 1] for n, a in both.items()}) for row in (0, 1)]
        except Exception as error:  # noqa: BLE001 - engines raise anything
            _log.warning("%s: trying it for a batch failed (%s), its shapes decide", file, error)
            return True
        if not any(_has_nan(array) for array in together.values()):
            return _are_equal(engine, both, together, apart)
    return False


def _are_equal(
    engine: Engine,
    both: Mapping[str, Array],
    together: Mapping[str, Array],
    apart: Sequence[Mapping[str, Array]],
) -> bool:
    for name, array in together.items():
        if len(array) != 2 or any(len(one[name]) != 1 for one in apart):
            return False
        difference = relative_difference(array, np.concatenate([one[name] for one in apart]))
        if not difference <= _ROWS_TOLERANCE and not _is_random(engine, both, name, array):
            return False
    return True


def _noise(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Two rows that differ, in their first element at least."""
    if spec.datatype in FLOATING:
        return np.asarray(random.normal(size=shape).astype(NUMPY_DTYPES[spec.datatype]))
    bits = random.integers(0, 2, shape)
    if bits.size:
        rows = bits.reshape(2, -1)
        rows[:, 0] = (1, 0)
    if spec.datatype == "BYTES":
        return np.array([b"a", b"b"], object)[bits]
    return np.asarray(bits.astype(NUMPY_DTYPES[spec.datatype]))


def _positive(array: Array) -> Array:
    return np.abs(array) if DATATYPES[array.dtype] in FLOATING else array


def _has_nan(array: Array) -> bool:
    is_floating = DATATYPES.get(array.dtype) in FLOATING
    return is_floating and bool(np.isnan(array.astype(np.float64)).any())


def _is_random(engine: Engine, inputs: Mapping[str, Array], name: str, first: Array) -> bool:
    """Whether the same inputs give something else when asked again: then comparing says nothing
    about rows."""
    return not relative_difference(engine.run(inputs)[name], first) <= _ROWS_TOLERANCE
