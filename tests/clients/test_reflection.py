"""A gRPC client that knows nothing but the address, as grpcurl: it learns all by reflection."""

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from serve import oip_pb2
from tests.clients.api import assert_close
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import PATIENCE_S, RunningServer, channel_to
from tests.serve.versions import rows

SERVICE = "inference.GRPCInferenceService"
SERVICES = {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


class Reflected:
    """A channel, and what the server says of itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self.database)

    def method(self, service: str, name: str) -> Any:
        return self.pool.FindServiceByName(service).methods_by_name[name]

    def call(self, service: str, name: str, /, **fields: Any) -> Any:
        """The answer to a message of those fields, both of classes made from descriptors."""
        method = self.method(service, name)
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = self.channel.unary_unary(
            f"/{service}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call(request(**fields), timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def reflected(server: RunningServer) -> Iterator[Reflected]:
    with channel_to(server.grpc_port) as channel:
        yield Reflected(channel)


def test_reflection_lists_the_services_when_asked(reflected: Reflected) -> None:
    assert set(reflected.database.get_services()) == SERVICES


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_reflection_describes_a_service_when_it_lists_it(
    reflected: Reflected, service: str
) -> None:
    for method in reflected.pool.FindServiceByName(service).methods:
        assert GetMessageClass(method.input_type)().ByteSize() == 0
        assert GetMessageClass(method.output_type)().ByteSize() == 0


def test_reflection_describes_every_method_when_they_are_served(reflected: Reflected) -> None:
    served = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    found = reflected.pool.FindServiceByName(SERVICE).methods
    assert {m.name for m in found} == {m.name for m in served}
    assert reflected.method(SERVICE, "ModelStreamInfer").client_streaming


def test_reflected_messages_infer_when_they_are_sent(reflected: Reflected) -> None:
    x = rows(2)
    answer = reflected.call(
        SERVICE,
        "ModelInfer",
        model_name="linear",
        id="7",
        inputs=[
            {
                "name": "x",
                "datatype": "FP32",
                "shape": x.shape,
                "contents": {"fp32_contents": x.ravel().tolist()},
            }
        ],
    )
    assert (answer.model_name, answer.model_version, answer.id) == ("linear", "1", "7")
    y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
    assert_close(y, linear_by_hand(x))


def test_reflected_messages_tell_the_configuration_when_asked(reflected: Reflected) -> None:
    """It lies in a file of its own, which the service's file imports."""
    answer = reflected.call(SERVICE, "ModelConfig", name="pair")
    config = MessageToDict(answer, preserving_proto_field_name=True)["config"]
    assert (config["name"], config["max_batch_size"]) == ("pair", 8)
    assert [one["data_type"] for one in config["input"]] == ["TYPE_FP32", "TYPE_INT64"]


def test_reflected_messages_tell_health_when_asked(reflected: Reflected) -> None:
    for service in ("", SERVICE):
        answer = reflected.call("grpc.health.v1.Health", "Check", service=service)
        assert MessageToDict(answer) == {"status": "SERVING"}


def test_reflection_is_refused_when_the_service_is_unknown(reflected: Reflected) -> None:
    with pytest.raises(KeyError):
        reflected.pool.FindServiceByName("inference.Absent")
