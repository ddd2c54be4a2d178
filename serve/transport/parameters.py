"""What tensors' parameters say in either transport: shared memory and classification.

Both encodings bring parameters as names and plain values; JSON and protobuf are theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from serve.errors import InvalidRequest
from serve.messages import Parameter
from serve.shared_memory import SharedMemory
from serve.tensor import Tensor, decode_raw, element_count, encode_raw, numpy_dtype

Parameters = Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a registered region of shared memory."""

    region: str
    offset: int
    byte_size: int


def place_of(field: str, parameters: Parameters, shared_memory: SharedMemory) -> Place | None:
    """Where a tensor lies in shared memory; None where it doesn't. Raises NotSupported where
    shared memory is off, before anything is computed."""
    region = parameters.get("shared_memory_region")
    if region is None:
        if "shared_memory_byte_size" in parameters or "shared_memory_offset" in parameters:
            raise InvalidRequest(f"{field}.parameters", "no region", "shared_memory_region too")
        return None
    shared_memory.status()
    if not isinstance(region, str):
        raise InvalidRequest(f"{field}.parameters.shared_memory_region", region, "a name")
    return Place(
        region,
        _size(f"{field}.parameters.shared_memory_offset", parameters, 0),
        _size(f"{field}.parameters.shared_memory_byte_size", parameters, None),
    )


def read_tensor(
    shared_memory: SharedMemory, name: str, datatype: str, shape: list[int], place: Place
) -> Tensor:
    """A tensor from shared memory: a copy, whatever its client does with the original."""
    if datatype != "BYTES":
        count = element_count(f"inputs.{name}.shape", shape)
        want = count * numpy_dtype(f"inputs.{name}.datatype", datatype).itemsize
        if place.byte_size != want:
            raise InvalidRequest(
                f"inputs.{name}.parameters.shared_memory_byte_size",
                place.byte_size,
                f"{want} for shape {shape}",
            )
    raw = shared_memory.read(place.region, place.offset, place.byte_size)
    return decode_raw(name, datatype, shape, memoryview(raw))


def write_tensor(shared_memory: SharedMemory, tensor: Tensor, place: Place) -> int:
    """Write a tensor's raw form; returns its bytes."""
    raw = encode_raw(tensor)
    if len(raw) > place.byte_size:
        raise InvalidRequest(
            f"outputs.{tensor.name}.parameters.shared_memory_byte_size",
            place.byte_size,
            f"at least the {len(raw)} bytes of the output",
        )
    shared_memory.write(place.region, place.offset, raw)
    return len(raw)


def classes_of(name: str, parameters: Parameters) -> int | None:
    """How many classes an output is wanted as; None for the tensor itself."""
    k = parameters.get("classification")
    if k is None:
        return None
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidRequest(
            f"outputs.{name}.parameters.classification", k, "a number of classes from 1"
        )
    return k


def _size(field: str, parameters: Parameters, default: int | None) -> int:
    value = parameters.get(field.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise InvalidRequest(field, value, "a number of bytes from 0")
    return value
