"""Classification: the best classes of an output as text, Triton's extension of the protocol.

It knows scores and the names of classes; where the names come from is the model's matter.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.errors import InvalidRequest
from serve.tensor import DATATYPES, FLOATING, Array

# Longer rows are searched for their best elements before anything is sorted; about where it pays.
_MAX_SORTED_LENGTH = 512


def classify(output: str, array: Array, k: int, labels: Sequence[str], batched: bool) -> Array:
    """The best `k` of each row as BYTES "value:index", with ":label" where the class has one.

    Rows are those of the first axis where `batched`, flattened, and the result is [rows, k];
    otherwise it is [k] of the whole array. `k` is cut to the elements there are. The largest come
    first, of equal ones the lower index, NaN last. Values are written as std::to_string does.
    Raises InvalidRequest, which names `output`, for another `k` or an array that isn't of numbers.
    """
    field = f"outputs.{output}.parameters.classification"
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidRequest(field, k, "a whole number from 1")
    datatype = DATATYPES[array.dtype]
    if datatype in ("BOOL", "BYTES"):
        raise InvalidRequest(field, f"an output of {datatype}", "an output of numbers")
    rows = array.reshape(
        (array.shape[0], math.prod(array.shape[1:])) if batched else (1, array.size)
    )
    k = min(k, rows.shape[1])
    is_floating = datatype in FLOATING
    best = _best(_descending(rows, is_floating), k)  # [rows, k]
    values = np.take_along_axis(rows, best, axis=1)
    texts = [
        _text(value, index, labels, is_floating)
        for value, index in zip(values.ravel().tolist(), best.ravel().tolist(), strict=True)
    ]
    classes = np.empty(len(texts), object)
    classes[:] = texts
    return classes.reshape(best.shape if batched else (k,))


def _descending(rows: Array, is_floating: bool) -> Array:
    """Keys that rise where `rows` fall, exactly; NaN last."""
    if not is_floating:
        return np.asarray(np.invert(rows))  # -x has no place for the least integer
    with np.errstate(invalid="ignore"):  # a signalling NaN is one like any other
        wide = rows if rows.dtype == np.float64 else rows.astype(np.float32)
    return np.asarray(np.negative(wide))


def _best(keys: Array, k: int) -> NDArray[np.intp]:
    """Columns of the `k` lowest keys of each row, of equal ones the first."""
    if keys.shape[1] <= _MAX_SORTED_LENGTH:
        return np.argsort(keys, axis=1, kind="stable")[:, :k]
    best = np.empty((len(keys), k), np.intp)
    for row, chosen in zip(keys, best, strict=True):
        kth = row[np.argpartition(row, k - 1)[k - 1]]
        # All that tie with the last one stay in the race; beyond a NaN nothing is lower.
        candidates = np.arange(row.size) if kth != kth else np.flatnonzero(row <= kth)
        order = np.argsort(row[candidates], kind="stable")[:k]
        chosen[:] = candidates[order]
    return best


def _text(value: float, index: int, labels: Sequence[str], is_floating: bool) -> bytes:
    text = f"{value:f}:{index}" if is_floating else f"{value}:{index}"
    label = labels[index] if index < len(labels) else ""
    return (f"{text}:{label}" if label else text).encode()
