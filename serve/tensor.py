"""Named tensors and the Open Inference Protocol's datatypes.

It knows how values are laid out in memory and on the wire's raw form; JSON and protobuf are
the transports' matter.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from serve.errors import InvalidRequest

Array = NDArray[np.generic]

# OIP datatype -> numpy's. BYTES elements are Python bytes in an object array; BF16 is a dtype that
# ml_dtypes adds to numpy.
NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
DATATYPES: dict[np.dtype[np.generic], str] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
FLOATING = frozenset({"FP16", "BF16", "FP32", "FP64"})
MAX_ELEMENTS = 2**40
MAX_DIMENSIONS = 32
_BYTES_PREFIX = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model says of one tensor: `shape` has -1 for every variable dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in NUMPY_DTYPES:
            raise ValueError(
                f"tensor {self.name!r}: datatype {self.datatype!r}, want one of "
                f"{', '.join(NUMPY_DTYPES)}"
            )


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named array; its dtype is the one of `datatype`."""

    name: str
    datatype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def element_count(field: str, shape: Sequence[int]) -> int:
    """Number of elements of `shape`; refuses negative and absurd ones before any allocation,
    absurd ones beside a dimension of 0 included, since numpy can't make them either."""
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(field, f"{len(shape)} dimensions", f"at most {MAX_DIMENSIONS}")
    if any(size < 0 for size in shape):
        raise InvalidRequest(field, list(shape), "dimensions of at least 0")
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise InvalidRequest(field, list(shape), f"at most {MAX_ELEMENTS} elements")
    return math.prod(shape)


def numpy_dtype(field: str, datatype: str) -> np.dtype[np.generic]:
    """The numpy dtype of an OIP datatype, or InvalidRequest naming those allowed."""
    try:
        return NUMPY_DTYPES[datatype]
    except (KeyError, TypeError):
        raise InvalidRequest(field, datatype, f"one of {', '.join(NUMPY_DTYPES)}") from None


def decode_raw(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> Tensor:
    """A tensor from its raw form: little-endian, row-major, no padding.

    The array is a read-only view of `raw` where the datatype allows it. Raises InvalidRequest
    where bytes and shape disagree, or a BOOL is neither 0 nor 1.
    """
    dtype = numpy_dtype(f"inputs.{name}.datatype", datatype)
    count = element_count(f"inputs.{name}.shape", shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, _decode_bytes(name, count, raw).reshape(shape))
    want = count * dtype.itemsize
    if raw.nbytes != want:
        raise InvalidRequest(
            f"inputs.{name}", f"{raw.nbytes} bytes", f"{want} bytes for shape {list(shape)}"
        )
    if datatype == "BOOL" and count and np.frombuffer(raw, np.uint8).max() > 1:
        raise InvalidRequest(f"inputs.{name}", "a byte above 1", "bytes 0 or 1 for BOOL")
    return Tensor(name, datatype, np.frombuffer(raw, dtype).reshape(shape))


def encode_raw(tensor: Tensor) -> bytes:
    """The raw form of a tensor; BYTES elements carry a 4-byte little-endian length."""
    if tensor.datatype == "BYTES":
        elements: list[bytes] = tensor.array.ravel().tolist()
        return b"".join(_BYTES_PREFIX.pack(len(item)) + item for item in elements)
    return np.ascontiguousarray(tensor.array, NUMPY_DTYPES[tensor.datatype]).tobytes()


def relative_difference(got: Array, want: Array) -> float:
    """The largest difference of two arrays by the largest absolute value of `want`; infinite where
    shapes differ, or anything of a datatype that isn't floating."""
    if got.shape != want.shape:
        return math.inf
    if DATATYPES.get(want.dtype) not in FLOATING:
        return 0.0 if np.array_equal(got, want) else math.inf
    exact = want.astype(np.float64)
    scale = max(float(np.abs(exact).max(initial=0.0)), 1e-12)
    return float(np.abs(got.astype(np.float64) - exact).max(initial=0.0)) / scale


def _decode_bytes(name: str, count: int, raw: memoryview) -> Array:
    if count * _BYTES_PREFIX.size > raw.nbytes:
        raise InvalidRequest(
            f"inputs.{name}", f"{raw.nbytes} bytes", f"{count} length-prefixed elements"
        )
    elements = np.empty(count, object)
    offset = 0
    for index in range(count):
        start = offset + _BYTES_PREFIX.size
        if start > raw.nbytes:
            raise InvalidRequest(f"inputs.{name}", f"{index} elements", f"{count} elements")
        offset = start + _BYTES_PREFIX.unpack_from(raw, offset)[0]
        if offset > raw.nbytes:
            raise InvalidRequest(
                f"inputs.{name}", f"element {index} past the end", "lengths within the tensor"
            )
        elements[index] = bytes(raw[start:offset])
    if offset != raw.nbytes:
        raise InvalidRequest(
            f"inputs.{name}", f"{raw.nbytes - offset} bytes left over", f"{count} elements"
        )
    return elements
