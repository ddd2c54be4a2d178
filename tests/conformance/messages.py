"""Requests and answers in a neutral form, which the four encodings carry.

Arrays and names, as a client thinks of them; it doesn't know JSON, protobuf or the server.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parameter = bool | int | float | str

# Written down a second time on purpose: the server's own table is under test.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
FLOATING = ("FP16", "BF16", "FP32", "FP64")


@dataclass(frozen=True, eq=False)
class Input:
    """A tensor to send. `datatype` and `shape` are what the request says of it, by default the
    truth."""

    name: str
    array: Array
    datatype: str = ""
    shape: tuple[int, ...] | None = None

    @property
    def said_datatype(self) -> str:
        return self.datatype or datatype_of(self.array)

    @property
    def said_shape(self) -> tuple[int, ...]:
        return self.array.shape if self.shape is None else self.shape


@dataclass(frozen=True)
class Output:
    """A tensor that is wanted. `binary` asks for its raw form where the encoding has another."""

    name: str
    classification: Parameter | None = None
    binary: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """`outputs` None says nothing of them; an empty tuple is an empty list."""

    model: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...] | None = None
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensor:
    """A tensor that came: its elements little-endian and row-major, those of BYTES each behind
    its length, 4 bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def array(self) -> Array:
        """The numbers; not for BYTES."""
        return np.frombuffer(self.raw, DTYPES[self.datatype]).reshape(self.shape)


@dataclass(frozen=True)
class Answer:
    model: str
    version: str
    id: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Refusal:
    status: int | grpc.StatusCode
    message: str


def datatype_of(array: Array) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def tensor_of(name: str, array: Array) -> Tensor:
    return Tensor(name, datatype_of(array), array.shape, raw_of(array))


def raw_of(array: Array) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel().tolist())
    return np.ascontiguousarray(array).tobytes()


def text_array(values: Sequence[bytes | str], shape: tuple[int, ...] | None = None) -> Array:
    """BYTES of `values`, by default one axis of them."""
    array = np.empty(len(values), object)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return array if shape is None else array.reshape(shape)
