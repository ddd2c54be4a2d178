"""A model version ready to answer: its manifest, engine instances and batcher.

Loading verifies the files, runs the golden input, warms every batch size up and measures it.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydantic

from loadtest.slo import Slo
from serve.artifact import Batching, FileDigest, Manifest, read_golden, verify_files
from serve.batch_policy import BatchQueue, Entry, Limits, ServiceTimes
from serve.batcher import Batch, Batcher, Work
from serve.classification import classify
from serve.engines import Engine, EngineSpec, Signature, load_engine
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.machine import Machine, allowed_cores, this_machine
from serve.messages import InferRequest
from serve.padding import Padding
from serve.tensor import DATATYPES, FLOATING, NUMPY_DTYPES, Array, Tensor, TensorSpec
from serve.transform import Transform, load_transform
from serve.transform.labels import read_labels

_log = logging.getLogger(__name__)

WARMUP_RUNS = 3
DEFAULT_MAX_BATCH_SIZE = 32
_VARIABLE_AXIS_LENGTH = 8  # of the zeros that warm a model with variable axes up
_ROWS_TOLERANCE = 5e-2  # of the output's range: kernels round differently, mixing is far coarser


class Model:
    """One loaded version. Made by `load_model`; `close` ends it after what it admitted.

    `signature` is the client's side: that of the engine, but for what the manifest's transform
    makes. `n_leases` counts the requests that are at work with it, kept by the service.
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: Path,
        engines: list[Engine],
        batcher: Batcher,
        slo: Slo | None,
        transform: Transform | None = None,
        labels: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.manifest = manifest
        self.directory = directory
        self.engine_signature = engines[0].signature
        self.signature = transform.signature if transform else manifest.signature
        self.batcher = batcher
        self.slo = slo
        self.transform = transform
        self.n_leases = 0
        self._engines = engines
        self._labels = labels or {}
        self._inputs = {spec.name: spec for spec in self.signature.inputs}
        self._outputs = {spec.name: spec for spec in self.signature.outputs}
        self._optional = {manifest.padding.mask} if manifest.padding else set()
        self._shapes_vary = any(-1 in spec.shape[1:] for spec in self.engine_signature.inputs)

    @property
    def platform(self) -> str:
        return f"{self.manifest.engine.name}_{Path(self.manifest.engine.file).suffix[1:]}"

    @property
    def max_batch_size(self) -> int:
        """0 where the model has no batch dimension."""
        return self.manifest.batching.max_batch_size

    def labels(self, output: str) -> tuple[str, ...]:
        """The names of an output's classes; empty where it has none."""
        given = self._labels.get(output, ())
        return given or (self.transform.labels(output) if self.transform else ())

    def checked_inputs(self, request: InferRequest) -> dict[str, Array]:
        """The request's arrays by input, in the signature's order.

        Raises InvalidRequest, which names the field, what was given and what is allowed.
        """
        self._check_outputs(request)
        given: dict[str, Array] = {}
        for tensor in request.inputs:
            spec = self._inputs.get(tensor.name)
            if spec is None:
                raise InvalidRequest(
                    "inputs.name", tensor.name, f"one of {', '.join(self._inputs)}"
                )
            if tensor.name in given:
                raise InvalidRequest("inputs.name", tensor.name, "each input once")
            _check_tensor(tensor, spec)
            given[tensor.name] = tensor.array
        missing = [n for n in self._inputs if n not in given and n not in self._optional]
        if missing:
            raise InvalidRequest("inputs", list(given), f"also {', '.join(missing)}")
        return {name: given[name] for name in self._inputs if name in given}

    def n_rows(self, inputs: Mapping[str, Array]) -> int:
        """Rows of a request: the length of its batch dimension, 1 where there is none."""
        limit = self.max_batch_size
        if not limit:
            return 1
        first = next(iter(inputs))
        n_rows: int = inputs[first].shape[0]
        for array in inputs.values():
            if array.shape[0] != n_rows:
                rows = {name: other.shape[0] for name, other in inputs.items()}
                raise InvalidRequest("inputs.shape", rows, "equal batch dimensions")
        if self.manifest.batching.oversize == "split":
            limit *= self.manifest.batching.max_queue_size
        if not 1 <= n_rows <= limit:
            raise InvalidRequest(
                f"inputs.{first}.shape", list(inputs[first].shape), f"a batch of 1 to {limit}"
            )
        return n_rows

    def entries(
        self, inputs: Mapping[str, Array], n_rows: int, arrival_s: float, deadline_s: float
    ) -> list[Entry[Work]]:
        """What the batcher runs for a request with the engine's `inputs`: one entry, or several
        where it has more rows than a batch. Raises InvalidRequest where lengths don't fit."""
        threshold_s = self.slo.latency.threshold_s if self.slo else math.inf
        length = 0
        lane: Hashable = None
        padding = self.manifest.padding
        if padding is not None:
            inputs = self._with_mask(padding, inputs, n_rows)
            length = padding.length_of(inputs)
            lane = padding.bucket_of(length)
        elif self._shapes_vary:
            lane = tuple(array.shape[1:] for array in inputs.values())
        return [
            Entry(
                Work(part, rows, None, length),
                rows,
                arrival_s,
                target_s=arrival_s + threshold_s,
                deadline_s=deadline_s,
                lane=lane,
            )
            for part, rows in _pieces(inputs, n_rows, self.max_batch_size or 1)
        ]

    def tensors(self, request: InferRequest, arrays: Mapping[str, Array]) -> tuple[Tensor, ...]:
        """The requested output tensors, in the order asked for, or their best classes."""
        names = tuple(self._outputs) if request.outputs is None else request.outputs
        return tuple(self._tensor(name, request, arrays[name]) for name in names)

    def close(self, finish: bool = True) -> None:
        """End it, after what it admitted or, without `finish`, after what runs."""
        self.batcher.close(finish)
        for engine in self._engines:
            engine.close()

    def _tensor(self, name: str, request: InferRequest, array: Array) -> Tensor:
        k = request.classification.get(name)
        if k is None:
            return Tensor(name, self._outputs[name].datatype, array)
        classes = classify(name, array, k, self.labels(name), batched=self.max_batch_size > 0)
        return Tensor(name, "BYTES", classes)

    def _with_mask(
        self, padding: Padding, inputs: Mapping[str, Array], n_rows: int
    ) -> Mapping[str, Array]:
        """`inputs` with the mask that says that all of them is real, where the request has none."""
        if padding.mask is None or padding.mask in inputs:
            return inputs
        length = padding.length_of(inputs)
        spec = next(s for s in self.engine_signature.inputs if s.name == padding.mask)
        mask = np.ones((n_rows, length), NUMPY_DTYPES[spec.datatype])
        return {**inputs, padding.mask: mask}

    def _check_outputs(self, request: InferRequest) -> None:
        for name in request.outputs or ():
            if name not in self._outputs:
                raise InvalidRequest("outputs.name", name, f"one of {', '.join(self._outputs)}")
        if request.outputs is not None and len(set(request.outputs)) != len(request.outputs):
            raise InvalidRequest("outputs", list(request.outputs), "each output once")


def load_model(
    directory: Path,
    manifest: Manifest,
    deliver: Callable[[Batch], None],
    slo: Slo | None = None,
    labels: Mapping[str, tuple[str, ...]] | None = None,
) -> Model:
    """Load a version and return it ready, with its threads running. Blocks; raises
    ArtifactInvalid or EngineUnavailable. `slo` overrides the one in the manifest, `labels` are the
    class names of outputs where they aren't files of the version."""
    verify_files(directory, manifest)
    if manifest.profile is not None:
        _warn_of_other_machine(manifest, this_machine())
    objective = slo or embedded_slo(manifest)
    engines = [
        load_engine(directory, manifest.engine, manifest.padding)
        for _ in range(manifest.engine.instances)
    ]
    _check_signature(directory, manifest, engines[0].signature)
    names = dict(labels or {})
    names |= {name: read_labels(directory / file) for name, file in manifest.labels.items()}
    transform = None
    if manifest.transform is not None:
        transform = load_transform(directory, manifest.transform, manifest.signature)
        _check_fill_values(directory, manifest, transform)
    if manifest.golden is not None:
        _check_golden(directory, manifest, engines)
    batcher = Batcher(
        (manifest.model, manifest.version),
        engines,
        measured_queue(manifest, engines),
        deliver,
        padding=manifest.padding,
        fixed_shapes=bool(manifest.engine.batch_sizes),
    )
    batcher.start()
    return Model(manifest, directory, engines, batcher, objective, transform, names)


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


def embedded_slo(manifest: Manifest) -> Slo | None:
    """The SLO that the version was made for, if its manifest has one."""
    if not manifest.slo:
        return None
    try:
        return Slo.model_validate(dict(manifest.slo))
    except pydantic.ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in ("slo", *detail["loc"]))
        where = f"model {manifest.model} version {manifest.version}"
        raise ArtifactInvalid(where, f"{key}: {detail['msg']}") from error


def _check_tensor(tensor: Tensor, spec: TensorSpec) -> None:
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(f"inputs.{tensor.name}.datatype", tensor.datatype, spec.datatype)
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, got) for got, want in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(
            f"inputs.{tensor.name}.shape", list(tensor.shape), f"{list(spec.shape)}, -1 for any"
        )


def _check_signature(directory: Path, manifest: Manifest, found: Signature) -> None:
    """What is declared must be in the file. It may leave outputs out, fix an axis that the file
    leaves open, and forgo the batch."""
    declared = manifest.signature
    outputs = {spec.name: spec for spec in found.outputs}
    fits = (
        len(declared.inputs) == len(found.inputs)
        and all(map(_is_narrowing, declared.inputs, found.inputs))
        and all(
            spec.name in outputs and _is_narrowing(spec, outputs[spec.name])
            for spec in declared.outputs
        )
    )
    if not fits or (declared.batched and not _has_first_axis(found)):
        raise ArtifactInvalid(str(directory), f"signature: {declared} declared, {found} in file")
    if manifest.batching.max_batch_size and not declared.batched:
        raise ArtifactInvalid(
            str(directory),
            f"batching.max_batch_size: got {manifest.batching.max_batch_size}, want 0 for a model "
            "without a batch dimension",
        )


def _check_fill_values(directory: Path, manifest: Manifest, transform: Transform) -> None:
    """Rows of a text are filled up with the tokenizer's value, and must be so across requests."""
    for one in manifest.padding.inputs if manifest.padding else ():
        value = transform.fill_values.get(one.tensor, one.value)
        if value != one.value:
            raise ArtifactInvalid(
                str(directory),
                f"padding.inputs.{one.tensor}.value: got {one.value}, want the tokenizer's {value}",
            )


def _has_first_axis(signature: Signature) -> bool:
    """Whether every tensor has a first axis that varies, as a batch must."""
    specs = (*signature.inputs, *signature.outputs)
    return all(spec.shape and spec.shape[0] == -1 for spec in specs)


def _is_narrowing(declared: TensorSpec, found: TensorSpec) -> bool:
    return (
        (declared.name, declared.datatype) == (found.name, found.datatype)
        and len(declared.shape) == len(found.shape)
        and all(
            theirs in (ours, -1) for ours, theirs in zip(declared.shape, found.shape, strict=True)
        )
    )


def _check_golden(directory: Path, manifest: Manifest, engines: list[Engine]) -> None:
    """Every instance must reproduce the stored outputs: the wrong file, a wrong kernel or a
    silently different precision shows here, before the first client's request."""
    assert manifest.golden is not None
    path = directory / manifest.golden.file
    inputs, expected = read_golden(path)
    for engine in engines:
        try:
            outputs = engine.run(inputs)
        except Exception as error:
            raise ArtifactInvalid(str(path), f"the golden input doesn't run: {error}") from error
        for name, want in expected.items():
            if name not in outputs:
                raise ArtifactInvalid(str(path), f"output {name!r} isn't the model's")
            difference = _relative_difference(outputs[name], want)
            if not difference <= manifest.golden.tolerance:
                raise ArtifactInvalid(
                    str(path),
                    f"output {name!r} differs by {difference:.3g} of its range here, want at most "
                    f"{manifest.golden.tolerance:.3g}",
                )


def _relative_difference(got: Array, want: Array) -> float:
    if got.shape != want.shape:
        return math.inf
    if DATATYPES.get(want.dtype) not in FLOATING:
        return 0.0 if np.array_equal(got, want) else math.inf
    exact = want.astype(np.float64)
    scale = max(float(np.abs(exact).max(initial=0.0)), 1e-12)
    return float(np.abs(got.astype(np.float64) - exact).max(initial=0.0)) / scale


def measured_queue(manifest: Manifest, engines: list[Engine]) -> BatchQueue[Work]:
    """The queue with the service times that warming up measured, by bucket where lengths are
    padded."""
    limits = Limits(
        max_batch_size=manifest.batching.max_batch_size or 1,
        max_queue_size=manifest.batching.max_queue_size,
        max_queue_delay_s=manifest.batching.max_queue_delay_s,
        n_instances=manifest.engine.instances,
    )
    if manifest.padding is None:
        return BatchQueue(limits, _warmed_up(manifest, engines, {}))
    by_bucket: dict[Hashable, ServiceTimes] = {}
    for bucket in manifest.padding.buckets:
        lengths = {(one.tensor, one.axis): bucket for one in manifest.padding.inputs}
        by_bucket[bucket] = _warmed_up(manifest, engines, lengths)
    return BatchQueue(limits, by_bucket[manifest.padding.max_length], by_bucket)


def _warmed_up(
    manifest: Manifest, engines: list[Engine], lengths: Mapping[tuple[str, int], int]
) -> ServiceTimes:
    """Run every batch size on every instance, and return how long they take here."""
    sizes = _batch_sizes(manifest)
    seconds = []
    for size in sizes:
        inputs = {
            spec.name: np.zeros(_shape(spec, size, lengths), NUMPY_DTYPES[spec.datatype])
            for spec in engines[0].signature.inputs
        }
        for name, array in inputs.items():
            if array.dtype.kind == "O":
                inputs[name] = np.full(array.shape, b"", object)
        for engine in engines:
            runs = [_timed(engine, inputs) for _ in range(WARMUP_RUNS)]
        seconds.append(max(statistics.median(runs), 1e-6))
    # Times must rise with the size; what noise says otherwise is smoothed away.
    return ServiceTimes(sizes, np.maximum.accumulate(seconds).tolist(), _is_padded(manifest))


def _batch_sizes(manifest: Manifest) -> tuple[int, ...]:
    largest = manifest.batching.max_batch_size or 1
    if _is_padded(manifest):
        return tuple(sorted({*manifest.engine.batch_sizes, largest}))
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return (*powers, largest)


def _is_padded(manifest: Manifest) -> bool:
    return bool(manifest.engine.batch_sizes) and manifest.batching.max_batch_size > 0


def _shape(spec: TensorSpec, size: int, lengths: Mapping[tuple[str, int], int]) -> tuple[int, ...]:
    """A shape to try a model with: `size` rows, `lengths` on the axes they are given for."""
    shape = [_VARIABLE_AXIS_LENGTH if axis == -1 else axis for axis in spec.shape]
    if spec.shape and spec.shape[0] == -1:
        shape[0] = size
    for axis, length in ((axis, n) for (name, axis), n in lengths.items() if name == spec.name):
        shape[axis] = length
    return tuple(shape)


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
        difference = _relative_difference(array, np.concatenate([one[name] for one in apart]))
        if not difference <= _ROWS_TOLERANCE and not _is_random(engine, both, name, array):
            return False
    return True


def _noise(spec: TensorSpec, random: np.random.Generator) -> Array:
    shape = _shape(spec, 2, {})
    if spec.datatype == "BYTES":
        return np.array([b"a", b"b"], object)[random.integers(0, 2, shape)]
    if spec.datatype in FLOATING:
        return np.asarray(random.normal(size=shape).astype(NUMPY_DTYPES[spec.datatype]))
    return np.asarray(random.integers(0, 2, shape).astype(NUMPY_DTYPES[spec.datatype]))


def _is_random(engine: Engine, inputs: Mapping[str, Array], name: str, first: Array) -> bool:
    """Whether the same inputs give something else when asked again (noise, NaN): then comparing
    says nothing about rows."""
    return not _relative_difference(engine.run(inputs)[name], first) <= _ROWS_TOLERANCE


def _pieces(
    inputs: Mapping[str, Array], n_rows: int, limit: int
) -> list[tuple[Mapping[str, Array], int]]:
    """The inputs in pieces of at most `limit` rows, with the rows of each."""
    if n_rows <= limit:
        return [(inputs, n_rows)]
    return [
        (
            {name: array[start : start + limit] for name, array in inputs.items()},
            min(limit, n_rows - start),
        )
        for start in range(0, n_rows, limit)
    ]


def _timed(engine: Engine, inputs: Mapping[str, Array]) -> float:
    started = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - started


def _warn_of_other_machine(manifest: Manifest, here: Machine) -> None:
    assert manifest.profile is not None
    differences = here.differences(manifest.profile.machine)
    if differences:
        _log.warning(
            "measured on another machine; batching adapts, the SLO is unproven here: %s",
            "; ".join(differences),
            extra={"model": f"{manifest.model}:{manifest.version}"},
        )
