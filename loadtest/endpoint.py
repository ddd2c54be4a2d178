"""Ask a server, before the first request, whether it can be tested: there, ready, which inputs."""

import http.client
import json
from typing import Any
from urllib.parse import quote

import grpc

from loadtest import oip_pb2
from loadtest.signature import Signature, SignatureUnusable, TensorSpec, checked, read_inputs
from loadtest.target import Target

TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 10_000_000
SERVICE = "/inference.GRPCInferenceService/"


class TargetUnusable(Exception):
    """A target that can't be tested; `str()` says which, why and what to change."""


def describe(target: Target, model: str, version: str) -> Signature:
    """The model's inputs, if it is there and ready; `version` may be empty.

    Raises TargetUnusable or SignatureUnusable.
    """
    if target.protocol == "rest":
        return _describe_rest(target, model, version)
    return _describe_grpc(target, model, version)


def describe_all(targets: tuple[Target, ...], model: str, version: str) -> Signature:
    """The inputs and outputs that all targets agree on."""
    first = describe(targets[0], model, version)
    for target in targets[1:]:
        other = describe(target, model, version)
        if other != first:
            raise TargetUnusable(
                f"--target: {target.url} and {targets[0].url} serve '{model}' with different "
                "inputs or outputs, want the same model behind every target"
            )
    return first


def _describe_rest(target: Target, model: str, version: str) -> Signature:
    versioned = f"/versions/{quote(version, safe='')}" if version else ""
    path = f"/v2/models/{quote(model, safe='')}{versioned}"
    status, body = _get(target, path)
    if status in (400, 404):
        raise _unknown(target, model, version, _error_of(body))
    if status != 200:
        raise TargetUnusable(f"--target: {target.url}{path}: HTTP {status}, want 200")
    if _get(target, f"{path}/ready")[0] != 200:
        raise _not_ready(target, model)
    try:
        metadata = json.loads(body)
        return read_inputs(metadata["inputs"], metadata.get("outputs", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SignatureUnusable):
            raise
        raise TargetUnusable(
            f"--target: {target.url}{path}: no model metadata in the answer, want a server "
            "that speaks the Open Inference Protocol, version 2"
        ) from error


def _describe_grpc(target: Target, model: str, version: str) -> Signature:
    with grpc.insecure_channel(target.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            described = _call(
                channel,
                "ModelMetadata",
                oip_pb2.ModelMetadataRequest(name=model, version=version),
                oip_pb2.ModelMetadataResponse,
            )
            ready = _call(
                channel,
                "ModelReady",
                oip_pb2.ModelReadyRequest(name=model, version=version),
                oip_pb2.ModelReadyResponse,
            )
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                raise _unknown(target, model, version, error.details() or "") from error
            raise _unreachable(target, f"{error.code().name}: {error.details()}") from error
    if not ready.ready:
        raise _not_ready(target, model)
    return checked(
        *(
            [TensorSpec(one.name, one.datatype, tuple(one.shape)) for one in tensors]
            for tensors in (described.inputs, described.outputs)
        )
    )


def _call(channel: grpc.Channel, method: str, request: Any, answer: Any) -> Any:
    call = channel.unary_unary(SERVICE + method, type(request).SerializeToString, answer.FromString)
    return call(request, timeout=TIMEOUT_S)


def _get(target: Target, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(target, str(error) or type(error).__name__) from error
    finally:
        connection.close()


def _error_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:120].decode("utf-8", "replace")


def _unreachable(target: Target, cause: str) -> TargetUnusable:
    return TargetUnusable(
        f"--target: {target.url} can't be reached ({cause}), want the address of a running server"
    )


def _unknown(target: Target, model: str, version: str, cause: str) -> TargetUnusable:
    named = f"--model '{model}'" + (f" --version '{version}'" if version else "")
    return TargetUnusable(
        f"{named}: {target.url} doesn't serve it ({cause}), want a model of that server"
    )


def _not_ready(target: Target, model: str) -> TargetUnusable:
    return TargetUnusable(
        f"--model '{model}': {target.url} says that it isn't ready, want a model that is loaded"
    )
