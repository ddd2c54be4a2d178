"""The four encodings of the protocol, each by a client written with the plainest of means.

Requests are put together with json, struct and the protocol's standard messages (those compiled
into Triton's client), answers are taken apart and checked for their form. Nothing here shares code
with the server; what an encoding has no form for stands in `GAPS` and `CHANGES`.
"""

import contextlib
import json
import math
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from serve.errors import InvalidRequest, ServeError
from tests.conformance.messages import (
    DTYPES,
    FLOATING,
    Answer,
    Array,
    Input,
    Output,
    Parameter,
    Refusal,
    Request,
    Tensor,
    datatype_of,
    raw_of,
    text_array,
)
from tests.serve import running_server
from tests.serve.running_server import RunningServer, ask, channel_to, connect

REST_JSON, REST_BINARY = "REST JSON", "REST binary"
GRPC_RAW, GRPC_TYPED = "gRPC raw", "gRPC typed"
ENCODINGS = (REST_JSON, REST_BINARY, GRPC_RAW, GRPC_TYPED)
JSON_LENGTH = "Inference-Header-Content-Length"


class Encoding(Protocol):
    """A client of one server in one encoding. One thread at a time."""

    @property
    def name(self) -> str: ...

    def infer(self, request: Request) -> Answer | Refusal: ...


@contextlib.contextmanager
def connected(name: str, server: RunningServer) -> Iterator[Encoding]:
    """A client of `server` in the encoding `name`."""
    if name in (REST_JSON, REST_BINARY):
        yield Rest(name, server.http_port)
    else:
        with channel_to(server.grpc_port) as channel:
            yield Grpc(name, channel)


# --- what an encoding can't carry


@dataclass(frozen=True)
class Gap:
    """Values without a form in `encoding`: requests with them, and where `in_answers` requests
    for them, end with `error`."""

    encoding: str
    values: str
    holds: Callable[[Array], bool]
    in_answers: bool
    error: type[ServeError] = InvalidRequest


def _is_half(array: Array) -> bool:
    return datatype_of(array) in ("FP16", "BF16")


def _is_infinite(array: Array) -> bool:
    return datatype_of(array) in FLOATING and not np.isfinite(array).all()


def _is_no_text(array: Array) -> bool:
    return array.dtype == object and not all(map(_is_utf8, array.ravel().tolist()))


def _is_utf8(item: bytes) -> bool:
    try:
        item.decode()
    except UnicodeDecodeError:
        return False
    return True


GAPS = (
    Gap(REST_JSON, "FP16 and BF16", _is_half, in_answers=True),
    Gap(REST_JSON, "NaN and infinities", _is_infinite, in_answers=True),
    Gap(REST_JSON, "BYTES that are no UTF-8", _is_no_text, in_answers=True),
    Gap(GRPC_TYPED, "FP16 and BF16", _is_half, in_answers=False),
)


def _quieted(array: Array) -> Array:
    """Python has no single precision: on their way through a double, as in protobuf's messages,
    signalling NaNs become quiet ones."""
    bits = array.view(np.uint32).copy()
    bits[np.isnan(array)] |= 1 << 22
    return bits.view(np.float32)


# (encoding, datatype) -> what arrives of a tensor. The models of these cases echo.
CHANGES: Mapping[tuple[str, str], Callable[[Array], Array]] = {(GRPC_TYPED, "FP32"): _quieted}


def gap_in_request(encoding: str, request: Request) -> type[ServeError] | None:
    """The error of a request whose inputs `encoding` has no form for."""
    return _gap(one for one in GAPS if one.encoding == encoding)([i.array for i in request.inputs])


def gap_in_answer(
    encoding: str, request: Request, outputs: Mapping[str, Array]
) -> type[ServeError] | None:
    """The error of a request for outputs that `encoding` has no form for."""
    binary = {output.name for output in request.outputs or () if output.binary}
    arrays = [array for name, array in outputs.items() if name not in binary]
    return _gap(one for one in GAPS if one.encoding == encoding and one.in_answers)(arrays)


def _gap(gaps: Iterable[Gap]) -> Callable[[Sequence[Array]], type[ServeError] | None]:
    return lambda arrays: next(
        (gap.error for gap in gaps if any(gap.holds(array) for array in arrays)), None
    )


def arrived(encoding: str, array: Array) -> Array:
    """What comes back of a tensor that a model echoes."""
    change = CHANGES.get((encoding, datatype_of(array)))
    return array if change is None else change(array)


# --- REST


class Rest:
    """JSON, or JSON with the tensors in binary behind it; a connection for each request."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self._port = port

    def infer(self, request: Request) -> Answer | Refusal:
        body, headers = rest_body(request, self.name == REST_BINARY)
        with contextlib.closing(connect(self._port)) as connection:
            answer = ask(connection, "POST", rest_path(request), body, headers)
        if answer.status != 200:
            assert answer.headers["content-type"] == "application/json"
            return Refusal(answer.status, answer.error)
        return rest_answer(request, answer, self.name == REST_BINARY)


def rest_path(request: Request) -> str:
    name, version = (urllib.parse.quote(one, safe="") for one in (request.model, request.version))
    return f"/v2/models/{name}" + (f"/versions/{version}" if version else "") + "/infer"


def rest_body(request: Request, binary: bool) -> tuple[bytes, dict[str, str]]:
    """The body, and the headers that it needs."""
    parameters: dict[str, Parameter] = dict(request.parameters)
    tails = [raw_of(given.array) for given in request.inputs] if binary else []
    head: dict[str, Any] = {"inputs": [_rest_input(given, binary) for given in request.inputs]}
    if request.outputs is not None:
        head["outputs"] = [_rest_output(wanted, binary) for wanted in request.outputs]
    if not request.outputs and binary:
        parameters["binary_data_output"] = True
    if request.id:
        head["id"] = request.id
    if parameters:
        head["parameters"] = parameters
    # What isn't UTF-8 goes out as it is, as a careless client would do it.
    text = json.dumps(head, ensure_ascii=False).encode(errors="surrogateescape")
    return b"".join([text, *tails]), {JSON_LENGTH: str(len(text))} if binary else {}


def _rest_input(given: Input, binary: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": given.name,
        "shape": given.said_shape,
        "datatype": given.said_datatype,
    }
    if binary:
        document["parameters"] = {"binary_data_size": len(raw_of(given.array))}
    else:
        document["data"] = nested(_json_values(given.array), given.array.shape)
    return document


def _rest_output(wanted: Output, binary: bool) -> dict[str, Any]:
    parameters: dict[str, Parameter] = {}
    if binary or wanted.binary:
        parameters["binary_data"] = True
    if wanted.classification is not None:
        parameters["classification"] = wanted.classification
    return {"name": wanted.name} | ({"parameters": parameters} if parameters else {})


def _json_values(array: Array) -> list[Any]:
    if array.dtype == object:
        return [item.decode(errors="surrogateescape") for item in array.ravel().tolist()]
    wide = array.astype(np.float32) if _is_half(array) else array
    values: list[Any] = wide.ravel().tolist()
    return values


def nested(values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Row-major values as lists in lists."""
    if len(shape) < 2:
        return values
    size = math.prod(shape[1:])
    rows = (values[row * size : (row + 1) * size] for row in range(shape[0]))
    return [nested(row, shape[1:]) for row in rows]


def rest_answer(request: Request, answer: running_server.Answer, binary: bool) -> Answer:
    """Take an answer apart; what isn't of the protocol's form fails an assertion."""
    length = answer.headers[JSON_LENGTH]
    json_bytes = len(answer.body) if length is None else int(length)
    document = json.loads(answer.body[:json_bytes])
    tail = answer.body[json_bytes:]
    assert set(document) == {"model_name", "model_version", "outputs"} | (
        {"id"} if request.id else set()
    )
    kind = "application/json" if length is None else "application/octet-stream"
    assert answer.headers["content-type"] == kind
    binaries = {output.name for output in request.outputs or () if output.binary or binary}
    tensors = []
    for output in document["outputs"]:
        wants_binary = output["name"] in binaries or (binary and not request.outputs)
        tensor, tail = _rest_tensor(output, tail, wants_binary)
        tensors.append(tensor)
    assert not tail, "bytes are left over"
    return Answer(
        document["model_name"], document["model_version"], document.get("id", ""), tuple(tensors)
    )


def _rest_tensor(output: Mapping[str, Any], tail: bytes, binary: bool) -> tuple[Tensor, bytes]:
    """One output, and the binary part behind it."""
    assert set(output) == {"name", "datatype", "shape", "parameters" if binary else "data"}
    shape = tuple(output["shape"])
    if not binary:
        raw = raw_of(_from_json(output["datatype"], output["data"]).reshape(shape))
        return Tensor(output["name"], output["datatype"], shape, raw), tail
    assert set(output["parameters"]) == {"binary_data_size"}
    size = output["parameters"]["binary_data_size"]
    assert 0 <= size <= len(tail)
    return Tensor(output["name"], output["datatype"], shape, tail[:size]), tail[size:]


def _from_json(datatype: str, data: list[Any]) -> Array:
    """A flat list of the one type of JSON that the datatype has."""
    kind: type = int
    if datatype in ("BOOL", "BYTES", *FLOATING):
        kind = {"BOOL": bool, "BYTES": str}.get(datatype, float)
    assert {type(value) for value in data} <= {kind}
    return text_array(data) if datatype == "BYTES" else np.array(data, DTYPES[datatype])


# --- gRPC

# OIP datatype -> field of InferTensorContents.
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP16": "fp32_contents",  # as a client might try
    "BF16": "fp32_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Grpc:
    """Tensors as raw bytes, or in the typed fields; answers are raw in both."""

    def __init__(self, name: str, channel: grpc.Channel) -> None:
        self.name = name
        self._call: Callable[..., Any] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )

    def infer(self, request: Request) -> Answer | Refusal:
        message = grpc_message(request, self.name == GRPC_RAW)
        try:
            response = self._call(message, timeout=running_server.PATIENCE_S)
        except grpc.RpcError as error:
            ended: Any = error  # of a class that grpc doesn't show
            return Refusal(ended.code(), ended.details())
        return grpc_answer(response)


def grpc_message(request: Request, raw: bool) -> Any:
    message = pb.ModelInferRequest(
        model_name=request.model, model_version=request.version, id=request.id
    )
    _set_parameters(message.parameters, request.parameters)
    for given in request.inputs:
        tensor = message.inputs.add(
            name=given.name, datatype=given.said_datatype, shape=given.said_shape
        )
        if raw:
            message.raw_input_contents.append(raw_of(given.array))
        else:
            field = getattr(tensor.contents, CONTENTS[datatype_of(given.array)])
            field.extend(given.array.ravel().tolist())
    for wanted in request.outputs or ():
        output = message.outputs.add(name=wanted.name)
        if wanted.classification is not None:
            _set_parameters(output.parameters, {"classification": wanted.classification})
    return message


def _set_parameters(message: Any, parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        field = {bool: "bool_param", float: "double_param", str: "string_param"}.get(
            type(value), "int64_param"
        )
        if field == "int64_param" and int(value) >= 2**63:
            field = "uint64_param"
        setattr(message[name], field, value)


def grpc_answer(response: Any) -> Answer:
    """Take an answer apart: a raw entry for each output, in their order, and nothing typed."""
    assert len(response.raw_output_contents) == len(response.outputs)
    assert not any(output.HasField("contents") for output in response.outputs)
    assert not any(output.parameters for output in response.outputs)
    assert not response.parameters
    tensors = tuple(
        Tensor(output.name, output.datatype, tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    )
    return Answer(response.model_name, response.model_version, response.id, tensors)
