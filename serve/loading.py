"""Loading a version: everything that must be true before it may answer.

Files are compared with their digests, the signature with the model file, the golden output with
what every instance gives; then every batch size is warmed up and timed. Blocks, in a thread of
whoever calls; it knows no table of models.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pydantic

from loadtest.slo import Slo
from serve.artifact import Manifest, read_golden, verify_files
from serve.batcher import Batch, Batcher
from serve.engines import Engine, Signature, load_engine
from serve.errors import ArtifactInvalid
from serve.machine import Machine, this_machine
from serve.model import Model
from serve.tensor import TensorSpec, relative_difference
from serve.transform import Transform, load_transform
from serve.transform.labels import read_labels
from serve.warmup import measured_queue

_log = logging.getLogger(__name__)


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


def _check_fill_values(directory: Path, manifest: Manifest, transform: Transform) -> None:
    """Rows of a text are filled up with the tokenizer's value, and must be so across requests."""
    for one in manifest.padding.inputs if manifest.padding else ():
        value = transform.fill_values.get(one.tensor, one.value)
        if value != one.value:
            raise ArtifactInvalid(
                str(directory),
                f"padding.inputs.{one.tensor}.value: got {one.value}, want the tokenizer's {value}",
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
            difference = relative_difference(outputs[name], want)
            if not difference <= manifest.golden.tolerance:
                raise ArtifactInvalid(
                    str(path),
                    f"output {name!r} differs by {difference:.3g} of its range here, want at most "
                    f"{manifest.golden.tolerance:.3g}",
                )


def _warn_of_other_machine(manifest: Manifest, here: Machine) -> None:
    assert manifest.profile is not None
    differences = here.differences(manifest.profile.machine)
    if differences:
        _log.warning(
            "measured on another machine; batching adapts, the SLO is unproven here: %s",
            "; ".join(differences),
            extra={"model": f"{manifest.model}:{manifest.version}"},
        )
