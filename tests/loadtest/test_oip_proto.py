"""The protocol's definitions: ours are Triton's, and live beside them in one process."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.grpc import service_pb2 as triton_service

import loadtest.model_config_pb2
import loadtest.oip_pb2
import serve.model_config_pb2
import serve.oip_pb2

GENERATE = Path(__file__).parents[2] / "proto" / "generate.py"
PAIRS = [
    pytest.param(loadtest.oip_pb2, triton_service, id="the load test's protocol"),
    pytest.param(serve.oip_pb2, triton_service, id="the server's protocol"),
    pytest.param(loadtest.model_config_pb2, triton_config, id="the load test's configuration"),
    pytest.param(serve.model_config_pb2, triton_config, id="the server's configuration"),
]
PACKAGES = [
    pytest.param(loadtest.oip_pb2, loadtest.model_config_pb2, id="the load test's"),
    pytest.param(serve.oip_pb2, serve.model_config_pb2, id="the server's"),
]
CONFIG = """
name: "m"
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 9007199254740993 ] } ]
parameters { key: "k" value { string_value: "v" } }
dynamic_batching { priority_queue_policy { key: 2 value { timeout_action: DELAY } } }
"""


def described(file: FileDescriptor) -> dict[str, object]:
    """Everything that a file defines by its full name: fields, enums' values, methods."""
    found: dict[str, object] = {}
    for message in file.message_types_by_name.values():
        found |= described_message(message)
    for enum in file.enum_types_by_name.values():
        found[enum.full_name] = values(enum)
    for service in file.services_by_name.values():
        for method in service.methods:
            found[method.full_name] = (
                method.input_type.full_name,
                method.output_type.full_name,
                method.client_streaming,
                method.server_streaming,
            )
    return found


def described_message(message: Descriptor) -> dict[str, object]:
    """A message, its fields, and what is nested in it; maps' entries are messages too."""
    found: dict[str, object] = {message.full_name: message.GetOptions().map_entry}
    for field in message.fields:
        found[field.full_name] = described_field(field)
    for enum in message.enum_types:
        found[enum.full_name] = values(enum)
    for nested in message.nested_types:
        found |= described_message(nested)
    return found


def described_field(field: FieldDescriptor) -> tuple[object, ...]:
    return (
        field.number,
        field.type,
        field.is_repeated,
        field.is_packed,
        field.has_presence,
        field.json_name,
        field.message_type.full_name if field.message_type else "",
        field.enum_type.full_name if field.enum_type else "",
        field.containing_oneof.name if field.containing_oneof else "",
    )


def values(enum: EnumDescriptor) -> dict[str, int]:
    return {value.name: value.number for value in enum.values}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_definitions_are_the_standard_ones_when_compared_with_tritons(
    ours: ModuleType, theirs: ModuleType
) -> None:
    assert described(ours.DESCRIPTOR) == described(theirs.DESCRIPTOR)


def test_comparison_sees_everything_when_it_describes_tritons() -> None:
    found = described(triton_service.DESCRIPTOR) | described(triton_config.DESCRIPTOR)
    assert found["inference.GRPCInferenceService.ModelStreamInfer"] == (
        "inference.ModelInferRequest", "inference.ModelStreamInferResponse", True, True
    )  # fmt: skip
    assert found["inference.ModelInstanceGroup.Kind"] == {
        "KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3
    }  # fmt: skip
    assert "inference.ModelOptimizationPolicy.Cuda.GraphSpec.LowerBound.InputEntry.value" in found
    assert found["inference.ModelConfig.ParametersEntry"] is True


@pytest.mark.parametrize(("protocol", "config"), PACKAGES)
def test_modules_of_a_package_share_one_pool_when_imported(
    protocol: ModuleType, config: ModuleType
) -> None:
    assert protocol.DESCRIPTOR.pool == config.DESCRIPTOR.pool
    assert protocol.DESCRIPTOR.pool != triton_service.DESCRIPTOR.pool
    assert protocol.ModelConfigResponse(config=config.ModelConfig(name="m")).config.name == "m"


def test_packages_have_pools_of_their_own_when_both_are_imported() -> None:
    assert loadtest.oip_pb2.DESCRIPTOR.pool != serve.oip_pb2.DESCRIPTOR.pool


@pytest.mark.parametrize(("protocol", "config"), PACKAGES)
def test_configuration_is_the_same_when_it_passes_through_triton(
    protocol: ModuleType, config: ModuleType
) -> None:
    given = text_format.Parse(CONFIG, config.ModelConfig())
    answer = protocol.ModelConfigResponse(config=given)
    theirs = triton_service.ModelConfigResponse.FromString(answer.SerializeToString())
    assert protocol.ModelConfigResponse.FromString(theirs.SerializeToString()) == answer
    assert text_format.MessageToString(theirs.config) == text_format.MessageToString(given)
    assert json_format.MessageToDict(theirs) == json_format.MessageToDict(answer)
    assert json_format.Parse(json_format.MessageToJson(given), config.ModelConfig()) == given


@pytest.mark.parametrize("first", ["loadtest.oip_pb2", "serve.oip_pb2", "tritonclient.grpc"])
def test_modules_can_be_imported_together_when_the_first_is(first: str) -> None:
    program = f"import {first}, loadtest.oip_pb2, serve.oip_pb2, tritonclient.grpc"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_generated_modules_are_current_when_generated_again() -> None:
    done = subprocess.run(
        [sys.executable, str(GENERATE), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
