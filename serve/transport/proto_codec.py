"""Inference over gRPC: protobuf messages to an `InferRequest`, an `InferResponse` to a message.

Tensors come typed (`contents`) or raw (`raw_input_contents`), all of one kind. Answers are raw,
since that is all that tritonclient's `as_numpy` reads.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from serve import oip_pb2 as pb
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


def decode_request(
    message: pb.ModelInferRequest, arrival_s: float, timeout_s: float | None
) -> InferRequest:
    """Read a ModelInferRequest. Raw tensors are views of the message's bytes."""
    if len(message.inputs) + len(message.outputs) > MAX_TENSORS:
        raise InvalidRequest("inputs", f"{len(message.inputs)} tensors", f"at most {MAX_TENSORS}")
    refuse_unsupported(message.parameters, (output.parameters for output in message.outputs))
    parameters = _parameters(message.parameters)
    inputs = _raw_inputs(message) if message.raw_input_contents else _typed_inputs(message)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        inputs=inputs,
        outputs=tuple(output.name for output in message.outputs) or None,
        id=message.id,
        parameters=parameters,
        deadline_s=earliest_deadline(parameters, arrival_s, timeout_s),
    )


def encode_response(response: InferResponse) -> pb.ModelInferResponse:
    """The message for a response: one raw entry for each output, in their order."""
    message = pb.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.id
    )
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(encode_raw(tensor))
    return message


def _raw_inputs(message: pb.ModelInferRequest) -> tuple[Tensor, ...]:
    if len(message.raw_input_contents) != len(message.inputs):
        raise InvalidRequest(
            "raw_input_contents",
            f"{len(message.raw_input_contents)} entries",
            f"one for each of the {len(message.inputs)} inputs",
        )
    for given in message.inputs:
        if given.HasField("contents"):
            raise InvalidRequest(
                f"inputs.{given.name}.contents", "contents", "none beside raw_input_contents"
            )
    return tuple(
        decode_raw(given.name, given.datatype, given.shape, memoryview(raw))
        for given, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    )


def _typed_inputs(message: pb.ModelInferRequest) -> tuple[Tensor, ...]:
    return tuple(_typed_input(given) for given in message.inputs)


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
