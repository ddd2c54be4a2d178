"""A model version ready to answer: its manifest, engine instances and batcher.

Loading verifies the files, runs the golden input, warms every batch size up and measures it.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pydantic

from loadtest.slo import Slo
from serve.artifact import Batching, FileDigest, Manifest, read_golden, verify_files
from serve.batch_policy import BatchQueue, Entry, Limits, ServiceTimes
from serve.batcher import Batch, Batcher, Work
from serve.engines import Engine, EngineSpec, Signature, load_engine
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.machine import Machine, allowed_cores, this_machine
from serve.messages import InferRequest
from serve.tensor import NUMPY_DTYPES, Array, Tensor, TensorSpec

_log = logging.getLogger(__name__)

WARMUP_RUNS = 3
DEFAULT_MAX_BATCH_SIZE = 32
_VARIABLE_AXIS_LENGTH = 8  # of the zeros that warm a model with variable axes up


class Model:
    """One loaded version. Made by `load_model`; `close` ends it after what it admitted."""

    def __init__(
        self, manifest: Manifest, engines: list[Engine], batcher: Batcher, slo: Slo | None
    ) -> None:
        self.manifest = manifest
        self.signature = engines[0].signature
        self.batcher = batcher
        self.slo = slo
        self._engines = engines
        self._inputs = {spec.name: spec for spec in self.signature.inputs}
        self._output_names = tuple(spec.name for spec in self.signature.outputs)
        self._datatypes = {spec.name: spec.datatype for spec in self.signature.outputs}

    @property
    def platform(self) -> str:
        return f"{self.manifest.engine.name}_{Path(self.manifest.engine.file).suffix[1:]}"

    def entry(self, request: InferRequest, arrival_s: float, context: object) -> Entry[Work]:
        """Check `request` against the signature and make it ready for the batcher.

        Raises InvalidRequest, which names the field, what was given and what is allowed.
        """
        self._check_outputs(request)
        inputs = self._checked_inputs(request.inputs)
        n_rows = self._n_rows(inputs)
        threshold_s = self.slo.latency.threshold_s if self.slo else math.inf
        return Entry(
            Work({tensor.name: tensor.array for tensor in inputs}, n_rows, context),
            n_rows,
            arrival_s,
            target_s=arrival_s + threshold_s,
            deadline_s=math.inf if request.deadline_s is None else request.deadline_s,
        )

    def outputs(self, request: InferRequest, arrays: Mapping[str, Array]) -> tuple[Tensor, ...]:
        """The requested output tensors, in the order asked for."""
        names = self._output_names if request.outputs is None else request.outputs
        return tuple(Tensor(name, self._datatypes[name], arrays[name]) for name in names)

    def close(self, finish: bool = True) -> None:
        """End it, after what it admitted or, without `finish`, after what runs."""
        self.batcher.close(finish)
        for engine in self._engines:
            engine.close()

    def _check_outputs(self, request: InferRequest) -> None:
        for name in request.outputs or ():
            if name not in self._datatypes:
                raise InvalidRequest(
                    "outputs.name", name, f"one of {', '.join(self._output_names)}"
                )
        if request.outputs is not None and len(set(request.outputs)) != len(request.outputs):
            raise InvalidRequest("outputs", list(request.outputs), "each output once")

    def _checked_inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given: dict[str, Tensor] = {}
        for tensor in tensors:
            spec = self._inputs.get(tensor.name)
            if spec is None:
                raise InvalidRequest(
                    "inputs.name", tensor.name, f"one of {', '.join(self._inputs)}"
                )
            if tensor.name in given:
                raise InvalidRequest("inputs.name", tensor.name, "each input once")
            _check_tensor(tensor, spec)
            given[tensor.name] = tensor
        missing = [name for name in self._inputs if name not in given]
        if missing:
            raise InvalidRequest("inputs", list(given), f"also {', '.join(missing)}")
        return tuple(given[name] for name in self._inputs)

    def _n_rows(self, inputs: tuple[Tensor, ...]) -> int:
        limit = self.manifest.batching.max_batch_size
        if not limit:
            return 1
        rows = {tensor.name: tensor.shape[0] for tensor in inputs}
        sizes = set(rows.values())
        if len(sizes) != 1:
            raise InvalidRequest("inputs.shape", rows, "equal batch dimensions")
        n_rows = sizes.pop()
        if not 1 <= n_rows <= limit:
            raise InvalidRequest(
                f"inputs.{inputs[0].name}.shape", list(inputs[0].shape), f"a batch of 1 to {limit}"
            )
        return n_rows


def load_model(
    directory: Path,
    manifest: Manifest,
    deliver: Callable[[Batch], None],
    slo: Slo | None = None,
) -> Model:
    """Load a version and return it ready, with its threads running. Blocks; raises
    ArtifactInvalid or EngineUnavailable. `slo` overrides the one in the manifest."""
    verify_files(directory, manifest)
    if manifest.profile is not None:
        _warn_of_other_machine(manifest, this_machine())
    objective = slo or embedded_slo(manifest)
    engines = [load_engine(directory, manifest.engine) for _ in range(manifest.engine.instances)]
    _check_signature(directory, manifest, engines[0].signature)
    if manifest.golden is not None:
        _check_golden(directory, manifest, engines)
    times = _warmed_up(manifest, engines)
    limits = Limits(
        max_batch_size=manifest.batching.max_batch_size or 1,
        max_queue_size=manifest.batching.max_queue_size,
        max_queue_delay_s=manifest.batching.max_queue_delay_s,
        n_instances=manifest.engine.instances,
    )
    batcher = Batcher(
        (manifest.model, manifest.version),
        engines,
        BatchQueue(limits, times),
        deliver,
        batched=manifest.batching.max_batch_size > 0,
    )
    batcher.start()
    return Model(manifest, engines, batcher, objective)


def manifest_for_onnx(path: Path, model: str, digest: FileDigest) -> Manifest:
    """The manifest of a plain ONNX file: signature from the file, one instance on all cores."""
    spec = EngineSpec("onnxruntime", path.name, threads=allowed_cores())
    engine = load_engine(path.parent, spec)
    signature = engine.signature
    engine.close()
    return Manifest(
        model=model,
        version="1",
        signature=signature,
        engine=spec,
        batching=Batching(DEFAULT_MAX_BATCH_SIZE if signature.batched else 0),
        files={path.name: digest},
    )


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
    declared = manifest.signature
    if declared != found:
        raise ArtifactInvalid(str(directory), f"signature: {declared} declared, {found} in file")
    if manifest.batching.max_batch_size and not found.batched:
        raise ArtifactInvalid(
            str(directory),
            f"batching.max_batch_size: got {manifest.batching.max_batch_size}, want 0 for a model "
            "without a batch dimension",
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
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(got, want) else math.inf
    exact = want.astype(np.float64)
    scale = max(float(np.abs(exact).max(initial=0.0)), 1e-12)
    return float(np.abs(got.astype(np.float64) - exact).max(initial=0.0)) / scale


def _warmed_up(manifest: Manifest, engines: list[Engine]) -> ServiceTimes:
    """Run every batch size on every instance, and return how long they take here."""
    sizes = _batch_sizes(manifest)
    seconds = []
    for size in sizes:
        inputs = {spec.name: _zeros(spec, size) for spec in engines[0].signature.inputs}
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


def _zeros(spec: TensorSpec, size: int) -> Array:
    shape = [_VARIABLE_AXIS_LENGTH if axis == -1 else axis for axis in spec.shape]
    if spec.shape and spec.shape[0] == -1:
        shape[0] = size
    if spec.datatype == "BYTES":
        return np.full(shape, b"", object)
    return np.zeros(shape, NUMPY_DTYPES[spec.datatype])


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
