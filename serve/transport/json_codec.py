"""Inference over REST: a body to an `InferRequest` and an `InferResponse` to a body.

Bodies are JSON, with binary tensors behind it where `Inference-Header-Content-Length` says how
long the JSON is (Triton's binary tensor data extension). It knows bytes, not ASGI.
"""

import functools
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import orjson

from serve.engines import Signature
from serve.errors import InvalidRequest
from serve.messages import (
    InferRequest,
    InferResponse,
    InputCheck,
    Parameter,
    earliest_deadline,
    refuse_unsupported,
)
from serve.shared_memory import SharedMemory
from serve.tensor import (
    NUMPY_DTYPES,
    Array,
    Tensor,
    TensorSpec,
    decode_raw,
    element_count,
    encode_raw,
    numpy_dtype,
)
from serve.transport.parameters import Place, classes_of, place_of, read_tensor, write_tensor

MAX_TENSORS = 1024
MAX_NESTING = 32
MAX_CHARACTERS = 128  # of a number or a list in JSON, with the white space around it
# Datatypes without a JSON form: they travel as binary tensor data only.
BINARY_ONLY = frozenset({"FP16", "BF16"})
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


class InputDocument(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Parameter] = {}
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class OutputDocument(msgspec.Struct):
    name: str
    parameters: dict[str, Parameter] = {}


class RequestDocument(msgspec.Struct):
    """The JSON of a request; tensors' data stay raw until their datatype says how to read them."""

    inputs: list[InputDocument]
    id: str | int = ""
    parameters: dict[str, Parameter] = {}
    outputs: list[OutputDocument] | None = None


_request_decoder = msgspec.json.Decoder(RequestDocument)


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """Which outputs the client wants as binary tensors: those named, and by default the rest; and
    which it wants in shared memory."""

    binary: Mapping[str, bool]
    binary_by_default: bool
    places: Mapping[str, Place] = field(default_factory=dict)

    def is_binary(self, name: str) -> bool:
        return self.binary.get(name, self.binary_by_default)


def decode_request(
    model: str,
    version: str,
    body: bytes,
    json_bytes: int | None,
    arrival_s: float,
    timeout_s: float | None = None,
    shared_memory: SharedMemory | None = None,
    tenant: str = "",
    check: InputCheck | None = None,
) -> tuple[InferRequest, ResponseForm]:
    """Read a request body whose first `json_bytes` are JSON (None: all of it).

    `check` sees every input before its data are decoded, which may take long and much memory.
    Tensors are views of `body` where they came as binary. The deadline is the earlier of
    `timeout_s` and the request's `timeout` parameter after `arrival_s`. Raises InvalidRequest, or
    NotSupported for parameters of extensions that aren't there.
    """
    shared_memory = shared_memory or SharedMemory(None)
    view = memoryview(body)
    if json_bytes is not None and not 0 <= json_bytes <= len(view):
        raise InvalidRequest(
            "Inference-Header-Content-Length", json_bytes, f"0 to the body's {len(view)} bytes"
        )
    document = _decode_document(view if json_bytes is None else view[:json_bytes])
    refuse_unsupported(document.parameters)
    binary = view[len(view) if json_bytes is None else json_bytes :]
    tensors = []
    for given in document.inputs:
        if check is not None:
            check(given.name, given.datatype, given.shape)
        tensor, binary = _decode_input(given, binary, shared_memory)
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
        classification={
            one.name: k
            for one in document.outputs or ()
            if (k := classes_of(one.name, one.parameters)) is not None
        },
        tenant=tenant,
    )
    return request, _response_form(document, shared_memory)


def decode_raw_request(
    model: str,
    version: str,
    body: bytes,
    signature: Signature,
    batched: bool,
    arrival_s: float,
    timeout_s: float | None = None,
    tenant: str = "",
) -> tuple[InferRequest, ResponseForm]:
    """Read a body that is nothing but the one input's tensor, as a batch of 1.

    At most one more axis may vary; the number of bytes says how long it is. A BYTES tensor is one
    element, the body without a length before it. All outputs come back as binary.
    """
    if len(signature.inputs) != 1:
        raise InvalidRequest(
            "Inference-Header-Content-Length", 0, "a JSON header for a model of several inputs"
        )
    spec = signature.inputs[0]
    shape = _raw_shape(spec, len(body), batched)
    raw = memoryview(body)
    if spec.datatype == "BYTES":
        raw = memoryview(struct.pack("<I", len(body)) + body)
    request = InferRequest(
        model=model,
        version=version,
        inputs=(decode_raw(spec.name, spec.datatype, shape, raw),),
        deadline_s=earliest_deadline({}, arrival_s, timeout_s),
        tenant=tenant,
    )
    return request, ResponseForm({}, binary_by_default=True)


def encode_response(
    response: InferResponse, form: ResponseForm, shared_memory: SharedMemory | None = None
) -> tuple[list[bytes], int | None]:
    """The parts of the body, and the length of their JSON where binary tensors follow it. Outputs
    that are wanted in shared memory are written there."""
    documents: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for tensor in response.outputs:
        document: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        place = form.places.get(tensor.name)
        if place is not None:
            assert shared_memory is not None
            document["parameters"] = {
                "shared_memory_region": place.region,
                "shared_memory_offset": place.offset,
                "shared_memory_byte_size": write_tensor(shared_memory, tensor, place),
            }
        elif form.is_binary(tensor.name):
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
    return [json, *tails], (len(json) if any(tails) else None)


def _decode_document(json: memoryview) -> RequestDocument:
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


def _raw_shape(spec: TensorSpec, n_bytes: int, batched: bool) -> list[int]:
    shape = [1, *spec.shape[1:]] if batched else list(spec.shape)
    variable = [index for index, size in enumerate(shape) if size == -1]
    if spec.datatype == "BYTES":
        shape = [1 if size == -1 else size for size in shape]
        if math.prod(shape) != 1:
            raise InvalidRequest("body", "a raw body", f"a JSON header for shape {spec.shape}")
        return shape
    if len(variable) > 1:
        raise InvalidRequest("body", "a raw body", f"a JSON header for shape {list(spec.shape)}")
    if variable:
        known = (
            math.prod(size for size in shape if size != -1) * NUMPY_DTYPES[spec.datatype].itemsize
        )
        shape[variable[0]] = n_bytes // known if known else 0
    return shape


def _decode_input(
    given: InputDocument, binary: memoryview, shared_memory: SharedMemory
) -> tuple[Tensor, memoryview]:
    """One input, and what is left of the binary part behind it."""
    size = given.parameters.get("binary_data_size")
    field = f"inputs.{given.name}"
    place = place_of(field, given.parameters, shared_memory)
    if place is not None:
        if size is not None or bytes(given.data):
            raise InvalidRequest(field, "shared memory and data", "one of them")
        shape, datatype = given.shape, given.datatype
        return read_tensor(shared_memory, given.name, datatype, shape, place), binary
    if size is None:
        return _decode_json_input(given), binary
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
        raise InvalidRequest(
            f"{field}.parameters.binary_data_size",
            size,
            f"a number of bytes up to the {len(binary)} that are left of the body",
        )
    if bytes(given.data):
        raise InvalidRequest(f"{field}.data", "data and binary_data_size", "one of them")
    return decode_raw(given.name, given.datatype, given.shape, binary[:size]), binary[size:]


def _decode_json_input(given: InputDocument) -> Tensor:
    field = f"inputs.{given.name}"
    dtype = numpy_dtype(f"{field}.datatype", given.datatype)
    count = element_count(f"{field}.shape", given.shape)
    if given.datatype in BINARY_ONLY:
        raise InvalidRequest(f"{field}.datatype", given.datatype, "binary tensor data for it")
    json = bytes(given.data)
    if given.datatype != "BYTES" and len(json) > _most_characters(given.shape):
        raise InvalidRequest(
            f"{field}.data", f"{len(json)} bytes of JSON", f"values for shape {given.shape}"
        )
    array = _decode_data(f"{field}.data", given.datatype, dtype, json)
    if array.size != count:
        raise InvalidRequest(
            f"{field}.data", f"{array.size} elements", f"{count} for shape {given.shape}"
        )
    return Tensor(given.name, given.datatype, array.reshape(given.shape))


def _most_characters(shape: Sequence[int]) -> int:
    """What numbers of that shape take in JSON at the very most, written as widely as anybody does:
    more is something else, and may take long to find out about."""
    n_lists = n_values = 1
    for size in shape:
        n_values *= size
        n_lists += n_values
    return 1024 + MAX_CHARACTERS * (n_lists + n_values)


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


def _response_form(document: RequestDocument, shared_memory: SharedMemory) -> ResponseForm:
    default = document.parameters.get("binary_data_output", False)
    binary: dict[str, bool] = {}
    places: dict[str, Place] = {}
    for output in document.outputs or ():
        wanted = output.parameters.get("binary_data", default)
        if not isinstance(wanted, bool):
            raise InvalidRequest(
                f"outputs.{output.name}.parameters.binary_data", wanted, "true or false"
            )
        binary[output.name] = wanted
        place = place_of(f"outputs.{output.name}", output.parameters, shared_memory)
        if place is not None:
            places[output.name] = place
    if not isinstance(default, bool):
        raise InvalidRequest("parameters.binary_data_output", default, "true or false")
    return ResponseForm(binary, default, places)


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
