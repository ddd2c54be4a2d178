"""Rows: the BYTES input that a transform reads, and the tensor that it fills from them.

Both are bounded here, since a small request can ask for much memory. It doesn't know what the
bytes mean.
"""

import math
from collections.abc import Mapping

import numpy as np

from serve.errors import InvalidRequest
from serve.tensor import Array

MAX_TENSOR_BYTES = 2**30
"""Of one tensor made from one request, so that many short rows can't fill the memory."""


def rows_of(name: str, inputs: Mapping[str, Array]) -> list[bytes]:
    """The elements of public input `name`, BYTES [row, 1]. Raises InvalidRequest where it is
    missing, has another shape or datatype, or no rows."""
    if name not in inputs:
        raise InvalidRequest("inputs", list(inputs), f"also {name}")
    array = inputs[name]
    if array.dtype.kind != "O":
        raise InvalidRequest(f"inputs.{name}.datatype", str(array.dtype), "BYTES")
    if array.ndim != 2 or array.shape[1] != 1 or not len(array):
        want = "[-1, 1] with at least one row"
        raise InvalidRequest(f"inputs.{name}.shape", list(array.shape), want)
    rows: list[bytes] = array[:, 0].tolist()
    return rows


def allocated(name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An uninitialized tensor for the rows of input `name`; InvalidRequest where they are too
    many."""
    if math.prod(shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise InvalidRequest(
            f"inputs.{name}",
            f"{shape[0]} rows of {list(shape[1:])} elements",
            f"at most {MAX_TENSOR_BYTES} bytes in all",
        )
    return np.empty(shape, dtype)
