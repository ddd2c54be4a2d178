"""Triton's model configuration: what people write is read, and nothing is ignored in silence."""

import json
from typing import Any

import pytest

from serve.errors import ArtifactInvalid
from serve.model_config import (
    CONFIG_DATATYPES,
    MAX_CONFIG_CHARACTERS,
    MAX_PROBLEMS,
    OIP_DATATYPES,
    check_supported,
    config_document,
    ignored_fields,
    parse_config,
    parse_config_json,
    policy_of,
)
from serve.model_config_pb2 import DataType, ModelConfig
from serve.tensor import NUMPY_DTYPES
from serve.version_policy import VersionPolicy

LISTS = """
name: "resnet50"
platform: "onnxruntime_onnx"
max_batch_size : 32
input [
  {
    name: "pixels"
    data_type: TYPE_FP32
    dims: [ 3, 224, 224 ]
  }
]
output [
  {
    name: "logits"
    data_type: TYPE_FP32
    dims: [ 1000 ]
    label_filename: "imagenet.txt"
  }
]
"""

REPEATED = """
# Two inputs, each a block of its own.
backend: "onnxruntime"   # no name: the folder's
max_batch_size: 64
input { name: 'input_ids' data_type: TYPE_INT64 dims: [ -1 ] }
input { name: 'attention_mask' data_type: TYPE_INT64 dims: -1 }
output { name: "last_hidden_state" data_type: TYPE_FP16 dims: -1 dims: 384 }
instance_group { count: 2, kind: KIND_CPU }
dynamic_batching { }
version_policy: { specific: { versions: [ 1, 3 ] } }
"""

COMMAS = """
name: "detector",
backend: "openvino",
max_batch_size: 0,
input: [
  { name: "image", data_type: TYPE_UINT8, dims: [ 1, -1, -1, 3 ], format: FORMAT_NONE },
  { name: "prompt", data_type: TYPE_STRING, dims: [ 1 ] }
],
output: [
  { name: "boxes", data_type: TYPE_BF16, dims: [ -1, 4 ] }
],
instance_group: [ { kind: KIND_CPU; count: 1 } ]
version_policy: { all { } }
"""

TUNED = """
name: "ranker"
backend: "onnxruntime"
default_model_filename: "ranker.onnx"
max_batch_size: 128
instance_group [
  { count: 1 kind: KIND_GPU gpus: [ 0 ] host_policy: "near" rate_limiter { priority: 2 } }
]
dynamic_batching {
  preferred_batch_size: [ 16, 32 ]
  max_queue_delay_microseconds: 1500
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 250000
    allow_timeout_override: true
    max_queue_size: 512
  }
}
optimization {
  graph { level: 1 }
  execution_accelerators {
    gpu_execution_accelerator : [ {
      name : "tensorrt"
      parameters { key: "precision_mode" value: "FP16" }
      parameters { key: "max_workspace_size_bytes" value: "1073741824" } } ]
  }
}
parameters { key: "intra_op_thread_count" value: { string_value: "4" } }
parameters: {
  key: "execution_mode"
  value: {
    string_value: "0"
  }
}
model_warmup [ {
  name: "zeros" batch_size: 1
  inputs { key: "x" value { data_type: TYPE_FP32 dims: 16 zero_data: true } }
} ]
response_cache { enable: true }
metric_tags { key: "team" value: "search" }
version_policy { latest { num_versions: 2 } }
"""

TEXTS = [
    pytest.param(LISTS, id="tensors are in lists"),
    pytest.param(REPEATED, id="tensors are repeated blocks among comments"),
    pytest.param(COMMAS, id="commas and semicolons separate fields"),
    pytest.param(TUNED, id="everything is tuned"),
    pytest.param("", id="the text is empty"),
    pytest.param("max_batch_size: 8", id="only the batch size is said"),
]


def read(text: str) -> ModelConfig:
    return parse_config(text, "m/config.pbtxt")


# --- reading


@pytest.mark.parametrize("text", TEXTS)
def test_configuration_is_read_and_supported_when(text: str) -> None:
    check_supported(read(text), "here")


def test_parse_config_keeps_what_is_said_when_styles_differ() -> None:
    lists, repeated, commas, tuned = map(read, (LISTS, REPEATED, COMMAS, TUNED))
    assert (lists.name, lists.max_batch_size) == ("resnet50", 32)
    assert lists.output[0].label_filename == "imagenet.txt"
    assert [(one.name, list(one.dims)) for one in repeated.input] == [
        ("input_ids", [-1]), ("attention_mask", [-1])
    ]  # fmt: skip
    assert list(repeated.output[0].dims) == [-1, 384]
    assert repeated.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert OIP_DATATYPES[commas.output[0].data_type] == "BF16"
    assert tuned.parameters["intra_op_thread_count"].string_value == "4"
    assert tuned.dynamic_batching.default_queue_policy.default_timeout_microseconds == 250_000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param('name: "m"\nmax_batch: 8', 'line 2.*no field named "max_batch"',
                     id="a field is unknown"),
        pytest.param("input {\n  name: 'x'\n  dim: [1]\n}", 'line 3.*ModelInput.*"dim"',
                     id="a nested field is unknown"),
        pytest.param("input { data_type: FP32 }", "line 1, after data_type: .*named FP32",
                     id="a datatype lacks its prefix"),
        pytest.param("input {\n  dims: [ 1,\n    # name: no field\n  }\n}", "line 4, after dims: ",
                     id="a list isn't closed"),
        pytest.param("max_batch_size: 'many'", "line 1, after max_batch_size: .*integer",
                     id="a number is text"),
        pytest.param("name: 'a: {'\nmax_batch_size: 99999999999",
                     "line 2, after max_batch_size: .*out of range", id="a number is too large"),
        pytest.param('name: "a"\nname: "b"', 'line 2.*multiple "name" fields',
                     id="a field is there twice"),
        pytest.param("dynamic_batching {} sequence_batching {}", "line 1.*scheduling_choice",
                     id="a model is batched in two ways"),
        pytest.param('name: "unclosed', "line 1, after name: ", id="a string isn't closed"),
        pytest.param(r'name: "\xff"', "line 1, after name: .*utf-8", id="a string is no text"),
        pytest.param("max_batch_size: 1\ninput {", "line 2, after max_batch_size: ",
                     id="the text is cut"),
        pytest.param("{}", "line 1: ", id="it is JSON"),
        pytest.param("\x00", "line 1: ", id="it is binary"),
        pytest.param("name: 'x' # \ud800\n\ud800", "line 2", id="a character is half a pair"),
        pytest.param("[type.googleapis.com/google.protobuf.Any] {}", "line 1: .*extensions",
                     id="there is an extension"),
        pytest.param("input {" * 30_000, "line 1.*no field", id="it is nested without end"),
        pytest.param(" " * (MAX_CONFIG_CHARACTERS + 1), "characters, at most", id="it is too long"),
    ],
)  # fmt: skip
def test_parse_config_names_line_and_field_when(text: str, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=problem) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("m/config.pbtxt: ")
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "want"),
    [
        pytest.param('{"max_batch_size": 8}', "max_batch_size: 8", id="names are the proto's"),
        pytest.param('{"maxBatchSize": "8"}', "max_batch_size: 8", id="names are JSON's"),
        pytest.param('{"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1", 3]}]}',
                     "input { name: 'x' data_type: TYPE_FP32 dims: [ -1, 3 ] }",
                     id="64-bit integers are strings"),
        pytest.param('{"parameters": {"a": {"string_value": "1"}}}',
                     "parameters { key: 'a' value { string_value: '1' } }", id="there is a map"),
        pytest.param('\n {"dynamic_batching": {}}', "dynamic_batching {}", id="a message is empty"),
        pytest.param("{}", "", id="nothing is said"),
    ],
)  # fmt: skip
def test_parse_config_json_reads_when(text: str, want: str) -> None:
    assert parse_config_json(text, "parameters.config") == read(want)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param('{"max_batch": 8}', 'no field named "max_batch"', id="a field is unknown"),
        pytest.param('{"input": [{"name": "x"}, {"dims": "x"}]}', r"ModelConfig\.input\[1\]",
                     id="a list is none"),
        pytest.param('{"input": [{"data_type": "FP32"}]}', r"input\[0\]\.data_type.*FP32|FP32.*",
                     id="a datatype lacks its prefix"),
        pytest.param('{"max_batch_size": true}', "max_batch_size.*True", id="a number is a bool"),
        pytest.param('{"max_batch_size": 1.5}', "max_batch_size.*1.5", id="a number is broken"),
        pytest.param('{"max_batch_size": 3000000000}', "max_batch_size.*out of range",
                     id="a number is too large"),
        pytest.param('{"max_batch_size": NaN}', "max_batch_size.*nan", id="a number is none"),
        pytest.param('{"name": "a", "name": "b"}', "duplicate key name",
                     id="a field is there twice"),
        pytest.param('{"dynamic_batching": {}, "sequence_batching": {}}', "scheduling_choice",
                     id="a model is batched in two ways"),
        pytest.param('{"name": "\\ud800"}', "name.*surrogate", id="a character is half a pair"),
        pytest.param('{\n"name": ', "line 2 column", id="it is cut"),
        pytest.param("", "want a JSON object", id="it is empty"),
        pytest.param("null", "want a JSON object", id="it is null"),
        pytest.param("[]", "want a JSON object", id="it is a list"),
        pytest.param(LISTS, "want a JSON object", id="it is a config.pbtxt"),
        pytest.param('{"max_batch_size": ' + "9" * 5000 + "}", "digits",
                     id="a number has no end"),
        pytest.param('{"input":' * 25_000, "Failed to load", id="it is nested without end"),
        pytest.param(" " * (MAX_CONFIG_CHARACTERS + 1), "characters, at most", id="it is too long"),
    ],
)  # fmt: skip
def test_parse_config_json_names_the_field_when(text: str, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=problem) as caught:
        parse_config_json(text, "parameters.config")
    message = str(caught.value)
    assert message.startswith("parameters.config: ")
    assert message.isprintable()
    assert len(message) < 400


# --- showing


def test_config_document_is_tritons_when_a_model_is_described() -> None:
    document = config_document(
        read(
            """
            name: "m" backend: "onnxruntime" max_batch_size: 8
            input { name: "x" data_type: TYPE_FP32 dims: [ -1, 9007199254740993 ] }
            output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
            instance_group { count: 2 kind: KIND_CPU }
            dynamic_batching { max_queue_delay_microseconds: 100 }
            version_policy { specific { versions: [ 1, 3 ] } }
            parameters { key: "a" value { string_value: "1" } }
            """
        )
    )
    assert document == {
        "name": "m",
        "platform": "",
        "backend": "onnxruntime",
        "runtime": "",
        "version_policy": {"specific": {"versions": [1, 3]}},
        "max_batch_size": 8,
        "input": [
            {
                "name": "x",
                "data_type": "TYPE_FP32",
                "format": "FORMAT_NONE",
                "dims": [-1, 9007199254740993],
                "is_shape_tensor": False,
                "allow_ragged_batch": False,
                "optional": False,
                "is_non_linear_format_io": False,
            }
        ],
        "output": [
            {
                "name": "y",
                "data_type": "TYPE_STRING",
                "dims": [1],
                "label_filename": "",
                "is_shape_tensor": False,
                "is_non_linear_format_io": False,
            }
        ],
        "batch_input": [],
        "batch_output": [],
        "dynamic_batching": {
            "preferred_batch_size": [],
            "max_queue_delay_microseconds": 100,
            "preserve_ordering": False,
            "priority_levels": 0,
            "default_priority_level": 0,
            "priority_queue_policy": {},
        },
        "instance_group": [
            {
                "name": "",
                "kind": "KIND_CPU",
                "count": 2,
                "gpus": [],
                "secondary_devices": [],
                "profile": [],
                "passive": False,
                "host_policy": "",
            }
        ],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {"a": {"string_value": "1"}},
        "model_warmup": [],
    }


def test_config_document_has_numbers_when_they_are_nested() -> None:
    document = config_document(
        read(
            """
            dynamic_batching {
              priority_levels: 2
              priority_queue_policy { key: 1 value { default_timeout_microseconds: 5 } }
            }
            model_warmup { inputs { key: "x" value { dims: [ 2, 3 ] zero_data: true } } }
            optimization { cuda { graph_spec { input { key: "x" value { dim: 7 } } } } }
            instance_group { secondary_devices { device_id: 4 } }
            """
        )
    )
    batching = document["dynamic_batching"]
    assert batching["priority_levels"] == 2
    assert batching["priority_queue_policy"]["1"]["default_timeout_microseconds"] == 5
    warmup: dict[str, Any] = document["model_warmup"][0]["inputs"]["x"]
    assert warmup == {"data_type": "TYPE_INVALID", "dims": [2, 3], "zero_data": True}
    assert document["optimization"]["cuda"]["graph_spec"][0]["input"] == {"x": {"dim": [7]}}
    assert document["instance_group"][0]["secondary_devices"][0]["device_id"] == 4


@pytest.mark.parametrize("text", TEXTS)
def test_config_document_is_read_again_when(text: str) -> None:
    config = read(text)
    assert parse_config_json(json.dumps(config_document(config)), "here") == config


def test_datatypes_have_one_another_when_looked_up() -> None:
    assert CONFIG_DATATYPES.keys() == NUMPY_DTYPES.keys()
    assert {OIP_DATATYPES[kind]: kind for kind in OIP_DATATYPES} == CONFIG_DATATYPES
    assert {*OIP_DATATYPES, DataType.TYPE_INVALID} == set(DataType.values())
    for name, kind in CONFIG_DATATYPES.items():
        assert DataType.Name(kind) == ("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")


# --- checking


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("sequence_batching {}", "sequence_batching: got some, want none",
                     id="requests form sequences"),
        pytest.param('platform: "ensemble" ensemble_scheduling { step { model_name: "a" } }',
                     "ensemble_scheduling: got some, want none", id="it is an ensemble"),
        pytest.param("model_transaction_policy { decoupled: true }",
                     "model_transaction_policy.decoupled: got true, want false",
                     id="responses are decoupled"),
        pytest.param('model_operations { op_library_filename: "ops.so" }',
                     "model_operations: got some, want none", id="operators are loaded"),
        pytest.param('model_repository_agents { agents { name: "checksum" } }',
                     "model_repository_agents: got some", id="an agent reads the repository"),
        pytest.param('cc_model_filenames { key: "8.0" value: "a.plan" }',
                     "cc_model_filenames: got some", id="files depend on the GPU"),
        pytest.param('runtime: "libother.so"', "runtime: got 'libother.so', want none",
                     id="the backend's library is another"),
        pytest.param("batch_input { kind: BATCH_ELEMENT_COUNT }", "batch_input: got some",
                     id="batches have inputs of their own"),
        pytest.param("batch_output {}", "batch_output: got some",
                     id="batches have outputs of their own"),
        pytest.param('backend: "python"', "backend: got 'python', want one of onnxruntime, openv",
                     id="the backend is unknown"),
        pytest.param('platform: "tensorrt_plan"', "platform: got 'tensorrt_plan', want one of onnx",
                     id="the platform is unknown"),
        pytest.param('platform: "onnxruntime_onnx" backend: "openvino"',
                     "platform: got 'onnxruntime_onnx', want that of backend openvino",
                     id="platform and backend differ"),
        pytest.param('default_model_filename: "../other/model.onnx"',
                     "default_model_filename: got '../other/model.onnx', want a file in",
                     id="the file leads out of the version"),
        pytest.param('default_model_filename: "/etc/passwd"', "default_model_filename: got '/etc/p",
                     id="the file is at the root"),
        pytest.param("dynamic_batching { priority_levels: 2 default_priority_level: 1 }",
                     "dynamic_batching.priority_levels: got 2, want 0.*default_priority_level",
                     id="requests have priorities"),
        pytest.param("dynamic_batching { priority_queue_policy { key: 1 value {} } }",
                     "dynamic_batching.priority_queue_policy: got some",
                     id="priorities have rules"),
        pytest.param("dynamic_batching { default_queue_policy { timeout_action: DELAY } }",
                     "default_queue_policy.timeout_action: got DELAY, want REJECT",
                     id="late requests are kept"),
        pytest.param("instance_group { kind: 7 }", r"instance_group\[0\].kind: got 7, want one of",
                     id="an instance's kind is unknown"),
        pytest.param("instance_group {} instance_group { count: -1 }",
                     r"instance_group\[1\].count: got -1, want 0 to",
                     id="instances are less than none"),
        pytest.param("instance_group { count: 100000 }", "count: got 100000, want 0 to 1024",
                     id="instances are too many"),
        pytest.param("instance_group { kind: KIND_GPU gpus: [ 0, 1 ] }",
                     r"gpus: got \[0, 1\], want none or \[0\]", id="there are several GPUs"),
        pytest.param("instance_group [ { kind: KIND_GPU }, { kind: KIND_CPU } ]",
                     "instance_group: got KIND_GPU and KIND_CPU", id="instances differ in kind"),
        pytest.param("backend: 'openvino' instance_group { kind: KIND_GPU }",
                     "kind: got KIND_GPU, want KIND_CPU for backend openvino",
                     id="the backend has no GPU"),
        pytest.param("instance_group { passive: true }", "passive: got true, want false",
                     id="an instance is passive"),
    ],
)  # fmt: skip
def test_check_supported_names_the_field_when(text: str, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=f"^m/config.pbtxt: .*{problem}"):
        check_supported(read(text), "m/config.pbtxt")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        pytest.param("is_shape_tensor: true", "is_shape_tensor: got true, want false",
                     id="its values are a shape"),
        pytest.param("is_non_linear_format_io: true", "is_non_linear_format_io: got true",
                     id="its layout is the device's"),
        pytest.param("reshape { shape: [ 1, 4 ] }", r"reshape.shape: got \[1, 4\], want none",
                     id="it is reshaped"),
        pytest.param("reshape { shape: [ ] }", r"reshape.shape: got \[\], want none",
                     id="its only axis is dropped"),
        pytest.param("dims: 0", r"dims: got \[4, 0\], want -1 for any size", id="an axis is 0"),
        pytest.param("dims: -2", r"dims: got \[4, -2\], want", id="an axis is negative"),
    ],
)  # fmt: skip
def test_check_supported_names_the_tensor_when(side: str, fields: str, problem: str) -> None:
    config = read(f"{side} {{ name: 'x' data_type: TYPE_FP32 dims: 4 {fields} }}")
    with pytest.raises(ArtifactInvalid, match=rf"^here: {side}\.x\.{problem}"):
        check_supported(config, "here")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("input { name: 'x' data_type: TYPE_FP32 optional: true }",
                     "input.x.optional: got true, want false", id="an input is optional"),
        pytest.param("input { name: 'x' data_type: TYPE_FP32 allow_ragged_batch: true }",
                     "input.x.allow_ragged_batch: got true, want false", id="a batch is ragged"),
        pytest.param("input { name: 'x' dims: 1 }",
                     "input.x.data_type: got TYPE_INVALID, want one of TYPE_BOOL, ",
                     id="an input has no datatype"),
        pytest.param("output { name: 'x' data_type: 99 }", "output.x.data_type: got 99, want",
                     id="an output's datatype is unknown"),
        pytest.param("output { data_type: TYPE_FP32 }", "output.name: got none, want a name",
                     id="an output has no name"),
        pytest.param("output { name: 'x' data_type: TYPE_FP32 label_filename: '../../labels' }",
                     "output.x.label_filename: got '../../labels', want a file in the model's",
                     id="an output's labels lead out"),
    ],
)  # fmt: skip
def test_check_supported_names_the_tensors_field_when(text: str, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=f"^here: {problem}"):
        check_supported(read(text), "here")


def test_check_supported_names_every_field_when_several_are_refused() -> None:
    config = read("sequence_batching {} runtime: 'x' model_transaction_policy { decoupled: true }")
    with pytest.raises(ArtifactInvalid) as caught:
        check_supported(config, "here")
    assert [part.split(":")[0] for part in caught.value.problem.split("; ")] == [
        "sequence_batching", "runtime", "model_transaction_policy.decoupled"
    ]  # fmt: skip


def test_check_supported_counts_the_rest_when_hundreds_are_refused() -> None:
    config = read("instance_group { passive: true }\n" * (MAX_PROBLEMS + 80))
    with pytest.raises(ArtifactInvalid, match=r"; and 80 more$") as caught:
        check_supported(config, "here")
    assert caught.value.problem.count("passive") == MAX_PROBLEMS


def test_check_supported_shows_names_in_bounds_when_they_are_wild() -> None:
    config = read("")
    config.input.add(name="x\n\x1b[2J" * 1000, optional=True)
    with pytest.raises(ArtifactInvalid) as caught:
        check_supported(config, "here")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_reshape_is_fine_when_it_changes_nothing() -> None:
    check_supported(
        read("input { name: 'x' data_type: TYPE_FP32 dims: [ 4 ] reshape { shape: [ 4 ] } }"), "m"
    )


# --- what has no effect


def test_ignored_fields_are_all_named_when_everything_is_tuned() -> None:
    sentences = ignored_fields(read(TUNED))
    assert [sentence.partition(" has no effect: ")[0] for sentence in sentences] == [
        "metric_tags",
        "model_warmup",
        "dynamic_batching.preferred_batch_size",
        "instance_group[0].rate_limiter",
        "instance_group[0].host_policy",
        "optimization.graph",
        "optimization.execution_accelerators",
        "response_cache.enable",
        "parameters.execution_mode",
    ]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        pytest.param(LISTS, [], id="none is set"),
        pytest.param("response_cache { enable: false }", [], id="the cache is off"),
        pytest.param("input { name: 'x' format: FORMAT_NCHW }", ["input.x.format"],
                     id="an input has a format"),
        pytest.param("model_metrics { metric_control {} }", ["model_metrics"],
                     id="metrics are configured"),
        pytest.param("instance_group { profile: '1' secondary_devices {} }",
                     ["instance_group[0].profile", "instance_group[0].secondary_devices"],
                     id="instances have devices and profiles"),
        pytest.param("backend: 'openvino' parameters { key: 'INFERENCE_NUM_THREADS' value {} }"
                     "parameters { key: 'intra_op_thread_count' value {} }",
                     ["parameters.intra_op_thread_count"], id="a parameter is another backend's"),
        pytest.param("parameters { key: 'intra_op_thread_count' value {} }", [],
                     id="no backend is named"),
    ],
)  # fmt: skip
def test_ignored_fields_names_them_when(text: str, fields: list[str]) -> None:
    found = ignored_fields(read(text))
    assert [sentence.partition(" has no effect: ")[0] for sentence in found] == fields


# --- versions


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        pytest.param("", None, id="nothing is said"),
        pytest.param("version_policy {}", None, id="the policy is empty"),
        pytest.param("version_policy { all {} }", VersionPolicy(None), id="all are wanted"),
        pytest.param("version_policy: { latest: { num_versions: 3 } }", VersionPolicy(3),
                     id="the latest three are"),
        pytest.param("version_policy { specific { versions: 2 versions: 10 } }",
                     VersionPolicy(None, ("2", "10")), id="two are named"),
    ],
)  # fmt: skip
def test_policy_of_a_configuration_is_known_when(text: str, policy: VersionPolicy | None) -> None:
    assert policy_of(read(text)) == policy


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("latest {}", "latest: got 0, want 1 to", id="no latest is wanted"),
        pytest.param("specific {}", "specific: got no versions, want 1", id="none is named"),
        pytest.param(
            "specific { versions: [ 1, -3 ] }",
            "specific: got version '-3', want whole",
            id="one is negative",
        ),
    ],
)
def test_policy_of_a_configuration_is_refused_when(text: str, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=rf"^m: version_policy\.{problem}"):
        policy_of(read(f"version_policy {{ {text} }}"), "m")
