"""Inference over gRPC: protobuf messages to an `InferRequest`, an `InferResponse` to a message.

Tensors come typed (`contents`) or raw (`raw_input_contents`), all of one kind. Answers are raw,
since that is all that tritonclient's `as_numpy` reads.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from serve import oip_pb2 as pb
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
from serve.tensor import Array, Tensor, decode_raw, element_count, encode_raw, numpy_dtype
from serve.transport.parameters import Place, classes_of, place_of, read_tensor, write_tensor

MAX_TENSORS = 1024
# Fields of one message: a few, parameters, and two for each tensor.
MAX_FIELDS = 4 * MAX_TENSORS
# A message takes up to 50 times its bytes once it is read; of smaller ones that is little.
CHECKED_BYTES = 64 * 1024
# OIP datatype -> field of InferTensorContents that carries it; the others exist only raw.
TYPED_FIELDS: dict[str, str] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# Kind of a numpy dtype -> the widest of it, which holds every value of its fields.
WIDE_DTYPES = {"i": np.dtype(np.int64), "u": np.dtype(np.uint64)}


def read_request(data: bytes) -> pb.ModelInferRequest:
    """The message in `data`. Raises DecodeError where it is none, InvalidRequest where it has too
    many fields."""
    if len(data) > CHECKED_BYTES:
        _check_fields(data)
    return pb.ModelInferRequest.FromString(data)


def decode_request(
    message: pb.ModelInferRequest,
    arrival_s: float,
    timeout_s: float | None,
    shared_memory: SharedMemory | None = None,
    tenant: str = "",
    check: InputCheck | None = None,
) -> tuple[InferRequest, dict[str, Place]]:
    """Read a ModelInferRequest: the request, and the outputs that are wanted in shared memory.

    Raw tensors are views of the message's bytes. `check` sees every input before it is decoded, or
    copied from shared memory.
    """
    if check is not None:
        for given in message.inputs:
            check(given.name, given.datatype, given.shape)
    n_tensors = len(message.inputs) + len(message.outputs)
    if n_tensors > MAX_TENSORS:
        raise InvalidRequest("inputs and outputs", f"{n_tensors} tensors", f"at most {MAX_TENSORS}")
    refuse_unsupported(message.parameters)
    memory = shared_memory or SharedMemory(None)
    parameters = _parameters(message.parameters)
    wanted = {output.name: _parameters(output.parameters) for output in message.outputs}
    request = InferRequest(
        model=message.model_name,
        version=message.model_version,
        inputs=_inputs(message, memory),
        outputs=tuple(output.name for output in message.outputs) or None,
        id=message.id,
        parameters=parameters,
        deadline_s=earliest_deadline(parameters, arrival_s, timeout_s),
        classification={
            name: k for name, given in wanted.items() if (k := classes_of(name, given)) is not None
        },
        tenant=tenant,
    )
    places = {
        name: place
        for name, given in wanted.items()
        if given and (place := place_of(f"outputs.{name}", given, memory)) is not None
    }
    return request, places


def encode_response(
    response: InferResponse,
    places: Mapping[str, Place] | None = None,
    shared_memory: SharedMemory | None = None,
) -> pb.ModelInferResponse:
    """The message for a response: one raw entry for each output, in their order, empty for those
    that are wanted in shared memory, which are written there: clients count them all."""
    message = pb.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.id
    )
    for tensor in response.outputs:
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        place = (places or {}).get(tensor.name)
        if place is None:
            message.raw_output_contents.append(encode_raw(tensor))
            continue
        message.raw_output_contents.append(b"")
        assert shared_memory is not None
        size = write_tensor(shared_memory, tensor, place)
        output.parameters["shared_memory_region"].string_param = place.region
        output.parameters["shared_memory_offset"].int64_param = place.offset
        output.parameters["shared_memory_byte_size"].int64_param = size
    return message


def _check_fields(data: bytes) -> None:
    """Refuse thousands of empty tensors, of two bytes each, before they are made."""
    position = 0
    for _ in range(MAX_FIELDS):
        if position >= len(data):
            return
        tag, position = _varint(data, position)
        match tag & 7:
            case 0:  # of the wire's types: a number
                _, position = _varint(data, position)
            case 1:  # 64 bits
                position += 8
            case 2:  # bytes, a text or a message
                size, position = _varint(data, position)
                position += size
            case 5:  # 32 bits
                position += 4
            case _:
                raise DecodeError("an unknown wire type")
    if position < len(data):
        raise InvalidRequest("message", f"more than {MAX_FIELDS} fields", f"at most {MAX_FIELDS}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte and the lowest first, and where it ends."""
    number = 0
    for index, byte in enumerate(data[position : position + 10]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, position + index + 1
    raise DecodeError("a number without an end")


def _inputs(message: pb.ModelInferRequest, shared_memory: SharedMemory) -> tuple[Tensor, ...]:
    """All inputs in their order: those in shared memory, and the others raw or typed."""
    places = {
        index: place
        for index, given in enumerate(message.inputs)
        if given.parameters
        and (
            place := place_of(f"inputs.{given.name}", _parameters(given.parameters), shared_memory)
        )
    }
    raws = iter(_checked_raws(message, places)) if message.raw_input_contents else None
    tensors = []
    for index, given in enumerate(message.inputs):
        if index in places:
            if given.HasField("contents"):
                raise InvalidRequest(
                    f"inputs.{given.name}", "shared memory and data", "one of them"
                )
            shape, datatype = list(given.shape), given.datatype
            tensors.append(read_tensor(shared_memory, given.name, datatype, shape, places[index]))
        elif raws is not None:
            raw = memoryview(next(raws))
            tensors.append(decode_raw(given.name, given.datatype, given.shape, raw))
        else:
            tensors.append(_typed_input(given))
    return tuple(tensors)


def _checked_raws(message: pb.ModelInferRequest, places: Mapping[int, Place]) -> Sequence[bytes]:
    n_wanted = len(message.inputs) - len(places)
    if len(message.raw_input_contents) != n_wanted:
        raise InvalidRequest(
            "raw_input_contents",
            f"{len(message.raw_input_contents)} entries",
            f"one for each of the {n_wanted} inputs"
            + (" that aren't in shared memory" if places else ""),
        )
    for given in message.inputs:
        if given.HasField("contents"):
            raise InvalidRequest(
                f"inputs.{given.name}.contents", "contents", "none beside raw_input_contents"
            )
    return message.raw_input_contents


def _typed_input(given: pb.ModelInferRequest.InferInputTensor) -> Tensor:
    dtype = numpy_dtype(f"inputs.{given.name}.datatype", given.datatype)
    count = element_count(f"inputs.{given.name}.shape", given.shape)
    field = TYPED_FIELDS.get(given.datatype)
    if field is None:
        raise InvalidRequest(
            f"inputs.{given.name}.datatype", given.datatype, "raw_input_contents for it"
        )
    where = f"inputs.{given.name}.contents.{field}"
    for other, _ in given.contents.ListFields():
        if other.name != field:
            raise InvalidRequest(f"inputs.{given.name}.contents", other.name, field)
    values = getattr(given.contents, field)
    if len(values) != count:
        raise InvalidRequest(
            where, f"{len(values)} elements", f"{count} for shape {list(given.shape)}"
        )
    array = _typed_array(where, given.datatype, dtype, values)
    return Tensor(given.name, given.datatype, array.reshape(tuple(given.shape)))


def _typed_array(
    where: str, datatype: str, dtype: np.dtype[np.generic], values: Sequence[object]
) -> Array:
    if datatype == "BYTES":
        elements = np.empty(len(values), object)
        elements[:] = list(values)
        return elements
    # The type of the field, not numpy's guess: for mixed large integers that is a double.
    wide: Array = np.array(values, WIDE_DTYPES.get(dtype.kind, dtype))
    array = wide.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(array, wide):
        raise InvalidRequest(where, "an integer out of range", f"values of {datatype}")
    return array


def _parameters(given: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    return {name: getattr(value, _chosen(name, value)) for name, value in given.items()}


def _chosen(name: str, value: pb.InferParameter) -> str:
    chosen: str | None = value.WhichOneof("parameter_choice")
    if chosen is None:
        raise InvalidRequest(f"parameters.{name}", "no value", "one of the parameter types")
    return chosen
