"""Triton's model configuration: read from text and JSON, checked, and shown as Triton shows it.

It knows what this server can honour, not what a model file holds, nor how a model is loaded.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from serve import model_config_pb2 as pb
from serve.errors import ArtifactInvalid
from serve.model_config_pb2 import ModelConfig
from serve.version_policy import VersionPolicy

MAX_CONFIG_CHARACTERS = 256_000
MAX_INSTANCES = 1024
# Problems named in one error; the rest is counted.
MAX_PROBLEMS = 20

# OIP datatype -> the configuration's.
CONFIG_DATATYPES: "dict[str, pb.DataType]" = {
    "BOOL": pb.TYPE_BOOL,
    "UINT8": pb.TYPE_UINT8,
    "UINT16": pb.TYPE_UINT16,
    "UINT32": pb.TYPE_UINT32,
    "UINT64": pb.TYPE_UINT64,
    "INT8": pb.TYPE_INT8,
    "INT16": pb.TYPE_INT16,
    "INT32": pb.TYPE_INT32,
    "INT64": pb.TYPE_INT64,
    "FP16": pb.TYPE_FP16,
    "BF16": pb.TYPE_BF16,
    "FP32": pb.TYPE_FP32,
    "FP64": pb.TYPE_FP64,
    "BYTES": pb.TYPE_STRING,
}
# The configuration's datatype -> OIP's; TYPE_INVALID, which is the default, has none.
OIP_DATATYPES: "dict[pb.DataType, str]" = {kind: name for name, kind in CONFIG_DATATYPES.items()}

# platform -> the backend that it stands for.
PLATFORMS = {"onnxruntime_onnx": "onnxruntime", "openvino_xml": "openvino"}
# backend -> the parameter with the threads of an instance, the one parameter that is honoured.
THREAD_PARAMETERS = {
    "onnxruntime": "intra_op_thread_count",
    "openvino": "INFERENCE_NUM_THREADS",
}

# What can't be honoured wherever it is set: field -> what is wanted in its place.
_REFUSED = {
    "runtime": "none: engines are those built in",
    "batch_input": "none: batches hold requests of one shape",
    "batch_output": "none: batches hold requests of one shape",
    "sequence_batching": "none: requests are independent of each other",
    "ensemble_scheduling": "none: a model is one file",
    "cc_model_filenames": "none: default_model_filename names the one file",
    "model_operations": "none: operators are the engine's own",
    "model_repository_agents": "none: versions are verified by their manifest.json",
}
_REFUSED_IN_TENSORS = {
    "is_shape_tensor": "false: shapes are no values here",
    "allow_ragged_batch": "false: batches hold requests of one shape",
    "optional": "false: a request brings every input",
    "is_non_linear_format_io": "false: tensors are row-major",
}
_REFUSED_IN_BATCHING = {
    "priority_levels": "0: deadlines order the queue",
    "default_priority_level": "0: deadlines order the queue",
    "priority_queue_policy": "none: deadlines order the queue",
}
_REFUSED_IN_GROUPS = {"passive": "false: every instance serves"}

# What changes no answer and is left aside: field -> what happens instead.
_IGNORED = {
    "metric_tags": "metrics are labelled by model and version",
    "model_warmup": "every batch size is warmed up with made-up inputs",
    "model_metrics": "metrics follow the SLO",
}
_IGNORED_IN_INPUTS = {"format": "dims say how the tensor is laid out"}
_IGNORED_IN_BATCHING = {
    "preferred_batch_size": "batches grow as deadlines allow",
    "preserve_ordering": "the answers of a stream always keep their order",
}
_IGNORED_IN_GROUPS = {
    "rate_limiter": "instances run when they have work",
    "secondary_devices": "instances run on one device",
    "profile": "there is no TensorRT plan to choose a profile of",
    "host_policy": "threads and memory are placed by the operating system",
}

# Comments and strings of a configuration's text, in which nothing is a field's name.
_NO_FIELDS = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""")
_FIELD = re.compile(r"([A-Za-z_]\w*)\s*[:\[{]")


def parse_config(text: str, where: str) -> ModelConfig:
    """The configuration in a `config.pbtxt`. Raises ArtifactInvalid, which names line and field;
    a field that Triton doesn't have is an error too."""
    _check_size(text, where)
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactInvalid(where, _text_problem(text, error)) from error


def parse_config_json(text: str, where: str) -> ModelConfig:
    """The configuration in the JSON of a load request. Raises ArtifactInvalid, which names the
    field, or the line where it is no JSON at all."""
    _check_size(text, where)
    if not text.lstrip().startswith("{"):
        raise ArtifactInvalid(where, f"got {_bounded(repr(text[:40]))}, want a JSON object")
    try:
        return json_format.Parse(text, ModelConfig())
    except json_format.ParseError as error:
        # After the first line it lists all fields that there are.
        raise ArtifactInvalid(where, _bounded(str(error).partition("\n")[0])) from error


def config_document(config: ModelConfig) -> dict[str, Any]:
    """The configuration as Triton's REST interface shows it: every field under its name in the
    .proto file, those with defaults too; messages and choices only where they are set."""
    document: dict[str, Any] = json_format.MessageToDict(
        config, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
    )
    return _with_numbers(document, pb.DESCRIPTOR.message_types_by_name["ModelConfig"])


def policy_of(config: ModelConfig, where: str = "config.pbtxt") -> VersionPolicy | None:
    """The version policy, None where the configuration leaves it open. Raises ArtifactInvalid for
    one that names no version."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return VersionPolicy(latest=None)
    if choice is None:
        return None
    try:
        if choice == "latest":
            return VersionPolicy(latest=policy.latest.num_versions)
        if not policy.specific.versions:
            raise ValueError("specific: got no versions, want 1 or more")
        return VersionPolicy(None, tuple(str(version) for version in policy.specific.versions))
    except ValueError as error:
        raise ArtifactInvalid(where, f"version_policy.{error}") from error


def check_supported(config: ModelConfig, where: str) -> None:
    """Refuse what this server can't honour, and what makes no sense. Raises ArtifactInvalid, which
    names every such field, what it was given and what is allowed."""
    problems = list(_problems(config))
    if problems:
        more = len(problems) - MAX_PROBLEMS
        named = [*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ArtifactInvalid(where, "; ".join(named))


def ignored_fields(config: ModelConfig) -> list[str]:
    """A sentence for each field that is set and has no effect here, to be logged as a warning."""
    return [f"{field} has no effect: {instead}" for field, instead in _ignored(config)]


# --- reading


def _check_size(text: str, where: str) -> None:
    if len(text) > MAX_CONFIG_CHARACTERS:
        raise ArtifactInvalid(
            where, f"{len(text)} characters, at most {MAX_CONFIG_CHARACTERS} are allowed"
        )


def _text_problem(text: str, error: text_format.ParseError) -> str:
    """What is wrong, after the line and the last field that begins before it."""
    line, column = error.GetLine() or 1, error.GetColumn() or 1
    lines = text.split("\n")
    reason = str(error).removeprefix(f"{line}:{column} : ")
    # The parser quotes the line, or nothing where the text ends too early.
    reason = reason.removeprefix(f"'{lines[line - 1]}': ").removeprefix("'': ")
    before = "\n".join([*lines[: line - 1], lines[line - 1][: column - 1]])
    fields = _FIELD.findall(_NO_FIELDS.sub("", before))
    return _bounded(f"line {line}{f', after {fields[-1][:64]}' if fields else ''}: {reason}")


def _bounded(text: str) -> str:
    """On one line, without control characters: it goes to clients and logs."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[:300])
    return shown if len(text) <= 300 else f"{shown}..."


# --- showing


def _with_numbers(document: Mapping[str, Any], descriptor: Descriptor) -> dict[str, Any]:
    """`document`, in which 64-bit integers are strings, with numbers in their place."""
    fields = descriptor.fields_by_name
    return {name: _with_number(value, fields[name]) for name, value in document.items()}


def _with_number(value: Any, field: FieldDescriptor) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        item = kind.fields_by_name["value"]
        return {key: _with_one_number(entry, item) for key, entry in value.items()}
    if field.is_repeated:
        return [_with_one_number(entry, field) for entry in value]
    return _with_one_number(value, field)


def _with_one_number(value: Any, field: FieldDescriptor) -> Any:
    if field.message_type is not None:
        return _with_numbers(value, field.message_type)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
        return int(value)
    return value


# --- checking


def _problems(config: ModelConfig) -> Iterator[str]:
    yield from _refused("", config, _REFUSED)
    yield from _backend_problems(config)
    if _leads_out(config.default_model_filename):
        yield _problem(
            "default_model_filename",
            _shown(config.default_model_filename),
            "a file in the version's folder",
        )
    for tensor in config.input:
        yield from _tensor_problems("input", tensor)
    for output in config.output:
        yield from _tensor_problems("output", output)
        if _leads_out(output.label_filename):
            field = f"{_tensor_path('output', output)}.label_filename"
            yield _problem(field, _shown(output.label_filename), "a file in the model's folder")
    yield from _batching_problems(config.dynamic_batching)
    yield from _group_problems(config)
    if config.model_transaction_policy.decoupled:
        yield _problem(
            "model_transaction_policy.decoupled", "true", "false: a request has one response"
        )


def _backend_problems(config: ModelConfig) -> Iterator[str]:
    backends = ", ".join(THREAD_PARAMETERS)
    if config.backend and config.backend not in THREAD_PARAMETERS:
        yield _problem("backend", _shown(config.backend), f"one of {backends}")
    if config.platform and config.platform not in PLATFORMS:
        yield _problem("platform", _shown(config.platform), f"one of {', '.join(PLATFORMS)}")
    elif config.platform and config.backend not in ("", PLATFORMS[config.platform]):
        want = f"that of backend {config.backend}, or none"
        yield _problem("platform", _shown(config.platform), want)


def _tensor_problems(side: str, tensor: pb.ModelInput | pb.ModelOutput) -> Iterator[str]:
    path = _tensor_path(side, tensor)
    if not tensor.name:
        yield f"{side}.name: got none, want a name for each tensor"
    if tensor.data_type not in OIP_DATATYPES:
        names = ", ".join(pb.DataType.Name(kind) for kind in OIP_DATATYPES)
        yield _problem(f"{path}.data_type", _enum_name(tensor, "data_type"), f"one of {names}")
    if any(size < -1 or size == 0 for size in tensor.dims):
        yield _problem(f"{path}.dims", list(tensor.dims), "-1 for any size, or sizes from 1")
    if tensor.HasField("reshape") and list(tensor.reshape.shape) != list(tensor.dims):
        shape = list(tensor.reshape.shape)
        yield _problem(f"{path}.reshape.shape", shape, "none: clients see the model's own shape")
    yield from _refused(f"{path}.", tensor, _REFUSED_IN_TENSORS)


def _batching_problems(batching: pb.ModelDynamicBatching) -> Iterator[str]:
    yield from _refused("dynamic_batching.", batching, _REFUSED_IN_BATCHING)
    if batching.default_queue_policy.timeout_action != pb.ModelQueuePolicy.REJECT:
        yield _problem(
            "dynamic_batching.default_queue_policy.timeout_action",
            _enum_name(batching.default_queue_policy, "timeout_action"),
            "REJECT: what can't be in time is dropped",
        )


def _group_problems(config: ModelConfig) -> Iterator[str]:
    kinds = pb.ModelInstanceGroup.Kind
    for index, group in enumerate(config.instance_group):
        path = f"instance_group[{index}]"
        if group.kind not in kinds.values():
            yield _problem(f"{path}.kind", group.kind, f"one of {', '.join(kinds.keys())}")
        elif group.kind == pb.ModelInstanceGroup.KIND_GPU and _backend(config) == "openvino":
            yield _problem(f"{path}.kind", "KIND_GPU", "KIND_CPU for backend openvino")
        if not 0 <= group.count <= MAX_INSTANCES:
            yield _problem(f"{path}.count", group.count, f"0 to {MAX_INSTANCES}")
        if list(group.gpus) not in ([], [0]):
            yield _problem(f"{path}.gpus", list(group.gpus), "none or [0]: one GPU is used")
        yield from _refused(f"{path}.", group, _REFUSED_IN_GROUPS)
    found = {group.kind for group in config.instance_group}
    if {pb.ModelInstanceGroup.KIND_GPU, pb.ModelInstanceGroup.KIND_CPU} <= found:
        yield "instance_group: got KIND_GPU and KIND_CPU, want one kind for all instances"


def _ignored(config: ModelConfig) -> Iterator[tuple[str, str]]:
    tables = [
        ("", config, _IGNORED),
        ("dynamic_batching.", config.dynamic_batching, _IGNORED_IN_BATCHING),
        *((f"{_tensor_path('input', one)}.", one, _IGNORED_IN_INPUTS) for one in config.input),
        *(
            (f"instance_group[{index}].", group, _IGNORED_IN_GROUPS)
            for index, group in enumerate(config.instance_group)
        ),
    ]
    for path, message, table in tables:
        for name, _, instead in _set_fields(message, table):
            yield path + name, instead
    for field, _ in config.optimization.ListFields():
        yield f"optimization.{field.name}", "engines run with their own settings"
    if config.response_cache.enable:
        yield "response_cache.enable", "answers are cached for all models or none, by option"
    backend = _backend(config)
    honoured = [THREAD_PARAMETERS[backend]] if backend else list(THREAD_PARAMETERS.values())
    for name in sorted(set(config.parameters) - set(honoured)):
        yield f"parameters.{_bounded(name[:64])}", f"only {' and '.join(honoured)} is read"


def _backend(config: ModelConfig) -> str:
    """The backend that a configuration chooses; empty where it leaves it to the model file."""
    name = config.backend or PLATFORMS.get(config.platform, "")
    return name if name in THREAD_PARAMETERS else ""


def _refused(path: str, message: Message, table: Mapping[str, str]) -> Iterator[str]:
    for name, value, want in _set_fields(message, table):
        got = _shown(value) if isinstance(value, bool | int | str) else "some"
        yield _problem(path + name, got, want)


def _set_fields(message: Message, table: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    """The fields of `message` that are set and in `table`, with what it says of them."""
    for field, value in message.ListFields():
        if field.name in table:
            yield field.name, value, table[field.name]


def _tensor_path(side: str, tensor: pb.ModelInput | pb.ModelOutput) -> str:
    return f"{side}.{_bounded(tensor.name[:64])}" if tensor.name else side


def _enum_name(message: Message, field: str) -> str:
    enum = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert enum is not None
    number = getattr(message, field)
    known = enum.values_by_number
    return known[number].name if number in known else str(number)


def _leads_out(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and (
        any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name
    )


def _problem(field: str, got: object, want: str) -> str:
    return f"{field}: got {_bounded(str(got))}, want {want}"


def _shown(value: bool | int | str) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
