"""Publishing: a variant as a version of a model in a repository.

It makes the manifest and the golden input, has `serve.artifact` write the version, and leaves
Triton's `config.pbtxt` beside it. It chooses nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from optimizer.parity import TOLERANCES, fixed_sizes
from optimizer.result import InstanceTimes, ServingChoice, Variant
from optimizer.spec import Spec
from optimizer.store import StoredVariant
from optimizer.variant import EngineModel
from optimizer.verify import Candidate
from serve.artifact import (
    GOLDEN,
    Batching,
    Golden,
    Manifest,
    Profile,
    next_version,
    write_atomically,
    write_golden,
    write_version,
)
from serve.engines import EngineSpec, Signature, load_engine
from serve.machine import Machine
from serve.tensor import Array

_UNPUBLISHED = "1"
TRITON_BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
_TRITON_TYPES = {"BYTES": "TYPE_STRING"}


def make_candidate(
    variant: Variant,
    stored: StoredVariant,
    spec: Spec,
    machine: Machine,
    golden_inputs: Mapping[str, Array],
    scratch: Path,
    command: tuple[str, ...] = (),
) -> Candidate:
    """The variant as it would be published; the golden input is written to `scratch`.

    `golden_inputs` are a few real samples. The tolerance of their outputs is the one of parity:
    another machine's kernels may sum in another order, but not compute something else.
    """
    serving, model = variant.serving, stored.model
    assert serving is not None
    assert isinstance(model, EngineModel)
    sizes = tuple(size for size in _measured_sizes(variant) if size <= serving.max_batch_size)
    engine = model.served(serving.instances, serving.threads, fixed_sizes(model.spec.name, sizes))
    signature, outputs = _run_golden(model, engine, golden_inputs)
    write_golden(scratch / GOLDEN, golden_inputs, outputs)
    manifest = Manifest(
        model=spec.name,
        version=_UNPUBLISHED,
        signature=signature,
        engine=engine,
        batching=Batching(serving.max_batch_size, serving.max_queue_delay_s),
        variant_id=variant.id,
        parent_id=stored.parent_id,
        recipe=variant.recipe,
        quality=variant.quality,
        profile=Profile(_times(variant, serving).times, machine),
        slo=spec.slo.to_dict(),
        golden=Golden(GOLDEN, TOLERANCES[model.precision]),
        made_by=command,
        evidence={
            "verification": asdict(variant.verification) if variant.verification else None,
            "serving": asdict(serving),
        },
    )
    files = {
        file.relative_to(model.directory).as_posix(): file
        for file in sorted(model.directory.rglob("*"))
        if file.is_file()
    }
    return Candidate(manifest, {**files, GOLDEN: scratch / GOLDEN}, serving.replicas)


def publish(candidate: Candidate, repository: Path) -> str:
    """Write the candidate as the model's next version, and Triton's configuration; returns the
    version. Raises ArtifactInvalid, and OSError where the repository can't be written."""
    name = candidate.manifest.model
    version = next_version(repository, name)
    manifest = replace(candidate.manifest, version=version)
    write_version(repository, manifest, candidate.files)
    if manifest.engine.name in TRITON_BACKENDS:  # those that Triton has, too
        write_atomically(repository / name / "config.pbtxt", triton_config(manifest).encode())
    return version


def triton_config(manifest: Manifest) -> str:
    """`config.pbtxt` with which Triton serves the version as the manifest says.

    One file covers all versions of a model, so it names the one that it is for. Triton counts
    the batch apart: its shapes are without it.
    """
    engine, batching = manifest.engine, manifest.batching
    delay_us = round(batching.max_queue_delay_s * 1e6)
    threads = {"onnxruntime": "intra_op_thread_count", "openvino": "INFERENCE_NUM_THREADS"}
    lines = [
        f"name: {json.dumps(manifest.model)}",
        f"backend: {json.dumps(TRITON_BACKENDS[engine.name])}",
        f"default_model_filename: {json.dumps(engine.file)}",
        f"max_batch_size: {batching.max_batch_size if manifest.signature.batched else 0}",
        *_triton_tensors("input", manifest),
        *_triton_tensors("output", manifest),
        f"instance_group [ {{ count: {engine.instances} kind: KIND_CPU }} ]",
        f"version_policy: {{ specific {{ versions: [ {manifest.version} ] }} }}",
        f'parameters {{ key: "{threads[engine.name]}" '
        f'value: {{ string_value: "{engine.threads}" }} }}',
    ]
    if manifest.signature.batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}")
    return "\n".join(lines) + "\n"


def _triton_tensors(what: str, manifest: Manifest) -> list[str]:
    tensors = getattr(manifest.signature, f"{what}s")
    first = 1 if manifest.signature.batched else 0
    return [
        f"{what} [ {{ name: {json.dumps(tensor.name)} "
        f"data_type: {_TRITON_TYPES.get(tensor.datatype, f'TYPE_{tensor.datatype}')} "
        f"dims: {json.dumps(list(tensor.shape[first:]) or [1])} }} ]"
        for tensor in tensors
    ]


def _run_golden(
    model: EngineModel, spec: EngineSpec, inputs: Mapping[str, Array]
) -> tuple[Signature, dict[str, Array]]:
    engine = load_engine(model.directory, spec)
    try:
        return engine.signature, engine.run(inputs)
    finally:
        engine.close()


def _times(variant: Variant, serving: ServingChoice) -> InstanceTimes:
    return next(
        times
        for times in variant.service_times
        if (times.instances, times.threads) == (serving.instances, serving.threads)
    )


def _measured_sizes(variant: Variant) -> Sequence[int]:
    return [time.batch_size for time in variant.service_times[0].times]
