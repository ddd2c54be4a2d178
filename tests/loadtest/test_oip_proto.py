import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from tritonclient.grpc import service_pb2

import loadtest.oip_pb2
import serve.oip_pb2

GENERATE = Path(__file__).parents[2] / "proto" / "generate.py"
METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
)


def fields(message: Descriptor) -> dict[str, tuple[object, ...]]:
    """Number and type of each field, of nested messages too."""
    found: dict[str, tuple[object, ...]] = {}
    for field in message.fields:
        kind = field.message_type.full_name if field.message_type else ""
        found[f"{message.full_name}.{field.name}"] = (field.number, field.type, kind)
    for nested in message.nested_types:
        found |= fields(nested)
    return found


@pytest.mark.parametrize("module", [loadtest.oip_pb2, serve.oip_pb2])
def test_messages_are_the_standard_ones_when_compared_with_tritons(module: object) -> None:
    ours = module.DESCRIPTOR.message_types_by_name  # type: ignore[attr-defined]
    theirs = service_pb2.DESCRIPTOR.message_types_by_name
    assert len(ours) == 14
    for name, message in ours.items():
        assert fields(message) == fields(theirs[name])


def test_service_has_the_standard_methods_when_compared_with_tritons() -> None:
    ours = loadtest.oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert ours.full_name == theirs.full_name
    assert tuple(method.name for method in ours.methods) == METHODS
    for method in ours.methods:
        twin = theirs.methods_by_name[method.name]
        assert method.input_type.full_name == twin.input_type.full_name
        assert method.output_type.full_name == twin.output_type.full_name


def test_generated_modules_are_current_when_generated_again() -> None:
    done = subprocess.run(
        [sys.executable, str(GENERATE), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
