"""Triton's view of a version: manifests of folders in its layout, and configurations of manifests.

`<model>/<version>/model.onnx` with an optional `config.pbtxt` becomes a manifest, derived from the
file where the configuration says nothing; every served version, whatever its layout, has a
configuration for clients that ask for one. It knows no transport.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from serve.artifact import Batching, Manifest, file_digest
from serve.derivation import DEFAULT_MAX_BATCH_SIZE, derived_signature, file_signature
from serve.engines import EngineSpec, Signature
from serve.errors import ArtifactInvalid
from serve.machine import allowed_cores
from serve.model import Model
from serve.model_config import (
    CONFIG_DATATYPES,
    OIP_DATATYPES,
    PLATFORMS,
    THREAD_PARAMETERS,
    check_supported,
    ignored_fields,
)
from serve.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput
from serve.storage.listing import is_visible
from serve.tensor import TensorSpec
from serve.transform.labels import read_labels

_log = logging.getLogger(__name__)

# backend -> the file that it looks for where the configuration names none.
DEFAULT_FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}
MAX_FILES = 10_000


def manifest_of_layout(
    directory: Path, name: str, version: str, config: ModelConfig | None
) -> Manifest:
    """The manifest of a version folder without one, as `config` and the model file say.

    Raises ArtifactInvalid naming the field of `config` that the file or this server can't follow.
    """
    where = f"{name}/config.pbtxt"
    settings = config if config is not None else ModelConfig()
    check_supported(settings, where)
    for sentence in ignored_fields(settings):
        _log.warning("config.pbtxt: %s", sentence, extra={"model": f"{name}:{version}"})
    if settings.name not in ("", name):
        raise ArtifactInvalid(where, f"name: got {settings.name!r}, want the folder's {name!r}")
    engine = _engine(directory, settings, where)
    is_described = bool(settings.max_batch_size or settings.input or settings.output)
    found = (file_signature if is_described else derived_signature)(directory, engine)
    max_batch_size = _max_batch_size(settings, found, where)
    if engine.name == "openvino" and max_batch_size:
        powers = {2**power for power in range(max_batch_size.bit_length())}
        sizes = sorted({size for size in powers if size < max_batch_size} | {max_batch_size})
        engine = replace(engine, batch_sizes=tuple(sizes))
    files = {
        file: path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and is_visible(file := path.relative_to(directory).as_posix())
    }
    if len(files) > MAX_FILES:
        raise ArtifactInvalid(f"{name}/{version}", f"{len(files)} files, want at most {MAX_FILES}")
    return Manifest(
        model=name,
        version=version,
        signature=_declared(settings, found, max_batch_size > 0, where),
        engine=engine,
        batching=_batching(settings, max_batch_size),
        files={name: file_digest(path) for name, path in files.items()},
    )


def label_files(config: ModelConfig | None) -> list[str]:
    """The files of class names that the configuration's outputs name, in the model's folder."""
    outputs = config.output if config is not None else ()
    return sorted({output.label_filename for output in outputs if output.label_filename})


def labels_of_layout(config: ModelConfig | None, folder: Path) -> dict[str, tuple[str, ...]]:
    """The class names of the outputs that name a `label_filename`, which lies in `folder`."""
    outputs = config.output if config is not None else ()
    return {
        output.name: read_labels(folder / output.label_filename)
        for output in outputs
        if output.label_filename
    }


def config_of(model: Model) -> ModelConfig:
    """The configuration with which Triton would serve the version. Shapes leave the batch
    dimension out where there is one."""
    manifest = model.manifest
    first = 1 if model.max_batch_size else 0
    config = ModelConfig(
        name=manifest.model,
        platform=model.platform,
        backend=manifest.engine.name,
        max_batch_size=model.max_batch_size,
        default_model_filename=manifest.engine.file,
        instance_group=[
            ModelInstanceGroup(
                name=manifest.model, kind=_kind(manifest.engine), count=manifest.engine.instances
            )
        ],
    )
    config.version_policy.specific.versions.append(int(manifest.version))
    optional = {manifest.padding.mask} if manifest.padding else set()
    for spec in model.signature.inputs:
        config.input.append(
            ModelInput(
                name=spec.name,
                data_type=CONFIG_DATATYPES[spec.datatype],
                dims=spec.shape[first:],
                optional=spec.name in optional,
            )
        )
    for spec in model.signature.outputs:
        config.output.append(
            ModelOutput(
                name=spec.name,
                data_type=CONFIG_DATATYPES[spec.datatype],
                dims=spec.shape[first:],
            )
        )
    if model.max_batch_size:
        batching = config.dynamic_batching
        batching.max_queue_delay_microseconds = round(manifest.batching.max_queue_delay_s * 1e6)
        policy = batching.default_queue_policy
        policy.max_queue_size = manifest.batching.max_queue_size
        policy.default_timeout_microseconds = round(manifest.batching.default_timeout_s * 1e6)
    config.model_transaction_policy.decoupled = False
    threads = THREAD_PARAMETERS[manifest.engine.name]
    config.parameters[threads].string_value = str(manifest.engine.threads)
    if manifest.variant_id:
        config.parameters["trimserve_variant"].string_value = manifest.variant_id
    return config


def _engine(directory: Path, config: ModelConfig, where: str) -> EngineSpec:
    backend = config.backend or PLATFORMS.get(config.platform, "")
    if not backend:
        present = (name for name, file in DEFAULT_FILES.items() if (directory / file).exists())
        backend = next(present, "onnxruntime")
    file = config.default_model_filename or DEFAULT_FILES[backend]
    if not (directory / file).exists():
        raise ArtifactInvalid(where, f"default_model_filename: {file!r} is not in the version")
    if (directory / file).is_dir():  # a model with external data is a folder of that name
        file = f"{file}/{file}"
    instances = sum(max(group.count, 1) for group in config.instance_group) or 1
    on_gpu = any(g.kind == ModelInstanceGroup.KIND_GPU for g in config.instance_group)
    if on_gpu and backend != "onnxruntime":
        raise ArtifactInvalid(where, f"instance_group.kind: got KIND_GPU, {backend} runs on CPUs")
    return EngineSpec(
        backend,
        file,
        threads=_threads(config, backend, instances, where),
        instances=instances,
        options={"provider": "cuda"} if on_gpu else {},
    )


def _threads(config: ModelConfig, backend: str, instances: int, where: str) -> int:
    """As configured, 0 meaning as many as there are; by default the cores in equal shares."""
    share = max(1, allowed_cores() // instances)
    name = THREAD_PARAMETERS[backend]
    if name not in config.parameters:
        return share
    text = config.parameters[name].string_value
    if not text.isdecimal() or int(text) > 1024:
        raise ArtifactInvalid(where, f"parameters.{name}: got {text!r}, want 0 to 1024 threads")
    return int(text) or share


def _max_batch_size(config: ModelConfig, found: Signature, where: str) -> int:
    """0 in a configuration that lists its tensors says that there is no batch dimension; in one
    that doesn't it says nothing."""
    if config.max_batch_size < 0:
        raise ArtifactInvalid(where, f"max_batch_size: got {config.max_batch_size}, want 0 or more")
    if config.max_batch_size and not all(
        spec.shape and spec.shape[0] == -1 for spec in (*found.inputs, *found.outputs)
    ):
        raise ArtifactInvalid(
            where,
            f"max_batch_size: got {config.max_batch_size}, want 0 for a model whose first axes "
            "don't all vary",
        )
    if config.max_batch_size or config.input or config.output:
        return config.max_batch_size
    return DEFAULT_MAX_BATCH_SIZE if found.batched else 0


def _declared(config: ModelConfig, found: Signature, batched: bool, where: str) -> Signature:
    inputs = _declared_side("input", list(config.input), found.inputs, batched, where)
    if len(inputs) != len(found.inputs):
        missing = {spec.name for spec in found.inputs} - {spec.name for spec in inputs}
        raise ArtifactInvalid(where, f"input: want also {', '.join(sorted(missing))}")
    outputs = _declared_side("output", list(config.output), found.outputs, batched, where)
    return Signature(inputs, outputs, batched)


def _declared_side(
    field: str,
    tensors: Sequence[ModelInput | ModelOutput],
    found: tuple[TensorSpec, ...],
    batched: bool,
    where: str,
) -> tuple[TensorSpec, ...]:
    """The tensors that the configuration lists, in the file's order; all where it lists none."""
    known = {spec.name: spec for spec in found}
    declared = {tensor.name: tensor for tensor in tensors}
    if len(declared) != len(tensors):
        raise ArtifactInvalid(where, f"{field}: got a name twice, want each tensor once")
    for name, tensor in declared.items():
        spec = known.get(name)
        if spec is None:
            raise ArtifactInvalid(where, f"{field}: got {name!r}, want one of {', '.join(known)}")
        shape = (-1, *tensor.dims) if batched else tuple(tensor.dims)
        datatype = OIP_DATATYPES.get(tensor.data_type)
        if datatype != spec.datatype:
            raise ArtifactInvalid(
                where, f"{field}.{name}.data_type: got {datatype}, want {spec.datatype}"
            )
        if len(shape) != len(spec.shape) or any(
            theirs not in (ours, -1) for ours, theirs in zip(shape, spec.shape, strict=True)
        ):
            raise ArtifactInvalid(
                where,
                f"{field}.{name}.dims: got {list(tensor.dims)}, want {list(spec.shape)}"
                + (" without its first axis, the batch" if batched else ""),
            )
        known[name] = replace(spec, shape=shape)
    return tuple(known[spec.name] for spec in found if not declared or spec.name in declared)


def _batching(config: ModelConfig, max_batch_size: int) -> Batching:
    policy = config.dynamic_batching.default_queue_policy
    defaults = Batching()
    return Batching(
        max_batch_size=max_batch_size,
        max_queue_delay_s=config.dynamic_batching.max_queue_delay_microseconds * 1e-6,
        max_queue_size=policy.max_queue_size or defaults.max_queue_size,
        default_timeout_s=policy.default_timeout_microseconds * 1e-6,
    )


def _kind(engine: EngineSpec) -> ModelInstanceGroup.Kind:
    on_gpu = engine.options.get("provider", "cpu") != "cpu"
    return ModelInstanceGroup.KIND_GPU if on_gpu else ModelInstanceGroup.KIND_CPU
