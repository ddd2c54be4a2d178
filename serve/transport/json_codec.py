"""Inference over REST: a body to an `InferRequest` and an `InferResponse` to a body.

Bodies are JSON, with binary tensors behind it where `Inference-Header-Content-Length` says how
long the JSON is (Triton's binary tensor data extension). It knows bytes, not ASGI.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import orjson

from serve.errors import InvalidRequest
from serve.messages import (
    InferRequest,
    InferResponse,
    Parameter,
    earliest_deadline,
    refuse_unsupported,
)
from serve.tensor import Array, Tensor, decode_raw, element_count, encode_raw, numpy_dtype

MAX_TENSORS = 1024
MAX_NESTING = 32
# Datatypes without a JSON form: they travel as binary tensor data only.
BINARY_ONLY = frozenset({"FP16"})
# OIP datatype -> type of an element in JSON.
JSON_ELEMENTS: dict[str, type] = {
    "BOOL": bool,
    "UINT8": int,
    "UINT16": int,
    "UINT32": int,
    "UINT64": int,
    "INT8": int,
    "INT16": int,
    "INT32": int,
    "INT64": int,
    "FP32": float,
    "FP64": float,
    "BYTES": str,
}
_MISFIT = re.compile(r"Expected (?P<want>.*?), got (?P<got>.*?)(?: - at `\$?\.?(?P<field>.*)`)?$")


class _InputDocument(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Parameter] = {}
    data: msgspec.Raw = msgspec.Raw()


class _OutputDocument(msgspec.Struct):
    name: str
    parameters: dict[str, Parameter] = {}


class _RequestDocument(msgspec.Struct):
    inputs: list[_InputDocument]
    id: str | int = ""
    parameters: dict[str, Parameter] = {}
    outputs: list[_OutputDocument] | None = None


_request_decoder = msgspec.json.Decoder(_RequestDocument)


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """Which outputs the client wants as binary tensors: those named, and by default the rest."""

    binary: Mapping[str, bool]
    binary_by_default: bool

    def is_binary(self, name: str) -> bool:
        return self.binary.get(name, self.binary_by_default)


def decode_request(
    model: str,
    version: str,
    body: bytes,
    json_bytes: int | None,
    arrival_s: float,
    timeout_s: float | None = None,
) -> tuple[InferRequest, ResponseForm]:
    """Read a request body whose first `json_bytes` are JSON (None: all of it).

    Tensors are views of `body` where they came as binary. The deadline is the earlier of
    `timeout_s` and the request's `timeout` parameter after `arrival_s`. Raises InvalidRequest, or
    NotSupported for parameters of extensions that aren't there.
    """
    view = memoryview(body)
    if json_bytes is not None and not 0 <= json_bytes <= len(view):
        raise InvalidRequest(
            "Inference-Header-Content-Length", json_bytes, f"0 to the body's {len(view)} bytes"
        )
    document = _decode_document(view if json_bytes is None else view[:json_bytes])
    refuse_unsupported(document.parameters, (one.parameters for one in document.outputs or ()))
    binary = view[len(view) if json_bytes is None else json_bytes :]
    tensors = []
    for given in document.inputs:
        tensor, binary = _decode_input(given, binary)
        tensors.append(tensor)
    if binary:
        raise InvalidRequest("body", f"{len(binary)} bytes left over", "the inputs' bytes only")
    request = InferRequest(
        model=model,
        version=version,
        inputs=tuple(tensors),
        outputs=None if not document.outputs else tuple(o.name for o in document.outputs),
        id=str(document.id),
        parameters=document.parameters,
        deadline_s=earliest_deadline(document.parameters, arrival_s, timeout_s),
    )
    return request, _response_form(document)


def encode_response(response: InferResponse, form: ResponseForm) -> tuple[list[bytes], int | None]:
    """The parts of the body, and the length of their JSON where binary tensors follow it."""
    documents: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for tensor in response.outputs:
        document: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        if form.is_binary(tensor.name):
            raw = encode_raw(tensor)
            document["parameters"] = {"binary_data_size": len(raw)}
            tails.append(raw)
        else:
            document["data"] = _json_data(tensor)
        documents.append(document)
    head: dict[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        "outputs": documents,
    }
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    json = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    return [json, *tails], (len(json) if tails else None)


def _decode_document(json: memoryview) -> _RequestDocument:
    try:
        document = _request_decoder.decode(json)
    except msgspec.ValidationError as error:
        raise _misfit(str(error), "body") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(bytes(json), error) from error
    except RecursionError as error:
        raise InvalidRequest("body", "JSON nested too deeply", "the protocol's depth") from error
    n_tensors = len(document.inputs) + len(document.outputs or ())
    if n_tensors > MAX_TENSORS:
        raise InvalidRequest("body", f"{n_tensors} tensors", f"at most {MAX_TENSORS}")
    return document


def _malformed(json: bytes, error: Exception) -> InvalidRequest:
    if any(word in json for word in (b"NaN", b"Infinity")):
        return InvalidRequest(
            "body", "NaN or Infinity", "finite numbers in JSON; send others as binary tensor data"
        )
    return InvalidRequest("body", "malformed JSON", f"an inference request ({error})")


def _misfit(message: str, field: str) -> InvalidRequest:
    """msgspec's message, taken apart into field, got and want."""
    match = _MISFIT.match(message)
    if match is None:
        return InvalidRequest(field, "a JSON value that doesn't fit", message)
    inner = match["field"]
    return InvalidRequest(inner or field, match["got"].strip("`"), match["want"])


def _decode_input(given: _InputDocument, binary: memoryview) -> tuple[Tensor, memoryview]:
    """One input, and what is left of the binary part behind it."""
    size = given.parameters.get("binary_data_size")
    if size is None:
        return _decode_json_input(given), binary
    field = f"inputs.{given.name}"
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
        raise InvalidRequest(
            f"{field}.parameters.binary_data_size",
            size,
            f"a number of bytes up to the {len(binary)} that are left of the body",
        )
    if bytes(given.data):
        raise InvalidRequest(f"{field}.data", "data and binary_data_size", "one of them")
    return decode_raw(given.name, given.datatype, given.shape, binary[:size]), binary[size:]


def _decode_json_input(given: _InputDocument) -> Tensor:
    field = f"inputs.{given.name}"
    dtype = numpy_dtype(f"{field}.datatype", given.datatype)
    count = element_count(f"{field}.shape", given.shape)
    if given.datatype in BINARY_ONLY:
        raise InvalidRequest(f"{field}.datatype", given.datatype, "binary tensor data for it")
    array = _decode_data(f"{field}.data", given.datatype, dtype, bytes(given.data))
    if array.size != count:
        raise InvalidRequest(
            f"{field}.data", f"{array.size} elements", f"{count} for shape {given.shape}"
        )
    return Tensor(given.name, given.datatype, array.reshape(given.shape))


def _decode_data(field: str, datatype: str, dtype: np.dtype[Any], json: bytes) -> Array:
    """Flat or nested JSON data as an array in row-major order."""
    if not json:
        raise InvalidRequest(field, "nothing", "data, or parameters.binary_data_size")
    nesting = _nesting(json)
    if nesting > MAX_NESTING:
        raise InvalidRequest(field, f"{nesting} nested lists", f"at most {MAX_NESTING}")
    try:
        values = _data_decoder(datatype, nesting).decode(json)
    except msgspec.ValidationError as error:
        raise _misfit(str(error).replace("$", f"$.{field}", 1), field) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(field, "malformed JSON", f"values of {datatype}") from error
    try:
        with np.errstate(over="ignore"):  # infinities are refused below
            array = np.array(values, dtype)
    except OverflowError as error:
        raise InvalidRequest(field, "an integer out of range", f"values of {datatype}") from error
    except ValueError as error:
        raise InvalidRequest(field, "lists of unequal lengths", "a full array") from error
    if array.ndim != nesting:  # numpy takes unequal lists for elements of an object array
        raise InvalidRequest(field, "lists of unequal lengths", "a full array")
    if datatype == "BYTES":
        return _encoded_text(array)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(field, "a number out of range", f"values of {datatype}")
    return array


def _nesting(json: bytes) -> int:
    return json[: len(json) - len(json.lstrip(b"[ \t\r\n"))].count(b"[")


@functools.cache
def _data_decoder(datatype: str, nesting: int) -> msgspec.json.Decoder[Any]:
    kind: Any = JSON_ELEMENTS[datatype]
    for _ in range(nesting):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _encoded_text(array: Array) -> Array:
    flat = np.empty(array.size, object)
    flat[:] = [text.encode() for text in array.ravel().tolist()]
    return flat


def _response_form(document: _RequestDocument) -> ResponseForm:
    default = document.parameters.get("binary_data_output", False)
    binary: dict[str, bool] = {}
    for output in document.outputs or ():
        wanted = output.parameters.get("binary_data", default)
        if not isinstance(wanted, bool):
            raise InvalidRequest(
                f"outputs.{output.name}.parameters.binary_data", wanted, "true or false"
            )
        binary[output.name] = wanted
    if not isinstance(default, bool):
        raise InvalidRequest("parameters.binary_data_output", default, "true or false")
    return ResponseForm(binary, default)


def _json_data(tensor: Tensor) -> Array | Sequence[str]:
    field = f"outputs.{tensor.name}"
    if tensor.datatype in BINARY_ONLY:
        raise InvalidRequest(field, f"{tensor.datatype} as JSON", "binary_data: true")
    if tensor.datatype == "BYTES":
        try:
            return [item.decode() for item in tensor.array.ravel().tolist()]
        except UnicodeDecodeError as error:
            raise InvalidRequest(field, "bytes that are no UTF-8", "binary_data: true") from error
    array = np.ascontiguousarray(tensor.array).reshape(math.prod(tensor.shape))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(field, "NaN or Infinity, which JSON can't carry", "binary_data: true")
    return array
