"""The tensors that requests carry: seeded random ones, or rows of a file of real inputs."""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.document import nearest
from loadtest.labels import LabelsInvalid, check_labels
from loadtest.signature import VARIABLE, Signature, TensorSpec
from loadtest.slo import InputLengths

Tensor = npt.NDArray[Any]
Tensors = dict[str, Tensor]

DTYPES: Mapping[str, npt.DTypeLike] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    # numpy has no bfloat16: held as float32 and rounded when encoded.
    "BF16": np.float32,
    "BYTES": np.object_,
}
INTEGERS_BELOW = 100
"""Random integers may be token ids, and every vocabulary holds the first hundred."""
WORDS_PER_TEXT = 8
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


class InputsInvalid(ValueError):
    """A file of inputs that doesn't fit the model."""


@dataclass(frozen=True)
class RandomInputs:
    """Random tensors of the model's datatypes and shapes, without end.

    Floats are standard normal, integers small, images (UINT8) cover their range. An integer
    input called a mask is all ones, one called a token type all zeros.
    """

    signature: Signature
    rows: int
    lengths: InputLengths | None

    def draw(self, rng: np.random.Generator) -> Iterator[Tensors]:
        """One request's tensors after the other."""
        while True:
            length = 1
            if self.lengths is not None:
                length = int(rng.integers(self.lengths.min, self.lengths.max + 1))
            yield {
                spec.name: random_tensor(spec, spec.concrete(self.rows, length), rng)
                for spec in self.signature.inputs
            }


@dataclass(frozen=True)
class FileInputs:
    """Rows of recorded inputs, drawn at random, the same rows for all inputs of a request."""

    signature: Signature
    rows: int
    arrays: Tensors
    """[n, ...] by input"""

    def draw_rows(self, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
        """[rows] of one request after the other, every row once before any comes again."""
        n = len(next(iter(self.arrays.values())))
        waiting = np.empty(0, np.int64)
        while True:
            while len(waiting) < self.rows:
                waiting = np.concatenate([waiting, rng.permutation(n)])
            yield waiting[: self.rows]
            waiting = waiting[self.rows :]

    def draw(self, rng: np.random.Generator) -> Iterator[Tensors]:
        for chosen in self.draw_rows(rng):
            yield {
                spec.name: self.arrays[spec.name][chosen if spec.has_batch_axis else chosen[0]]
                for spec in self.signature.inputs
            }


def random_tensor(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    dtype = DTYPES[spec.datatype]
    if spec.datatype == "BYTES":
        return random_texts(shape, rng)
    if spec.datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if spec.datatype in ("FP16", "BF16", "FP32", "FP64"):
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in spec.name.lower():
        return np.ones(shape, dtype)
    if "token_type" in spec.name.lower():
        return np.zeros(shape, dtype)
    below = 256 if spec.datatype == "UINT8" else INTEGERS_BELOW
    return rng.integers(0, below, shape).astype(dtype)


def random_texts(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    texts = np.empty(shape, np.object_)
    for index in np.ndindex(shape):
        words = [rng.choice(LETTERS, int(rng.integers(2, 9))) for _ in range(WORDS_PER_TEXT)]
        texts[index] = b" ".join(word.tobytes() for word in words)
    return texts


def read_inputs_file(path: Path, signature: Signature) -> Tensors:
    """Arrays [n, ...] named like the model's inputs, from an .npz file without pickles.

    Raises InputsInvalid, naming the array, what it is and what the model wants.
    """
    return _checked_arrays(path, _read_arrays(path), signature)


def read_labelled_file(
    path: Path, signature: Signature, labels: str, output: TensorSpec
) -> tuple[Tensors, npt.NDArray[np.int64]]:
    """As `read_inputs_file`, and the classes [n] in the array called `labels`, of `output`.

    Raises InputsInvalid or LabelsInvalid.
    """
    arrays = _read_arrays(path)
    if labels not in arrays:
        close = nearest(labels, list(arrays))
        hint = f" (did you mean '{close}'?)" if close else ""
        raise LabelsInvalid(
            f"--labels: no array '{labels}' in {path}{hint}, want one of {', '.join(arrays)}"
        )
    if labels in [spec.name for spec in signature.inputs]:
        raise LabelsInvalid(f"--labels: got '{labels}', an input of the model, want another array")
    classes = arrays.pop(labels)
    checked = _checked_arrays(path, arrays, signature)
    n = len(next(iter(checked.values())))
    return checked, check_labels(f"--labels: array '{labels}' of {path}", classes, n, output)


def _read_arrays(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputsInvalid(f"--inputs {path}: a single array, want an .npz file of arrays")
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputsInvalid(f"--inputs {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputsInvalid):
            raise
        raise InputsInvalid(
            f"--inputs {path}: not an .npz file without pickled objects ({error})"
        ) from error


def _checked_arrays(path: Path, arrays: Tensors, signature: Signature) -> Tensors:
    _check_names(path, set(arrays), signature)
    checked = {
        spec.name: _checked_array(path, spec, arrays[spec.name]) for spec in signature.inputs
    }
    lengths = {name: len(array) for name, array in checked.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise InputsInvalid(
            f"--inputs {path}: got rows {lengths}, want the same number, at least 1"
        )
    return checked


def _check_names(path: Path, given: set[str], signature: Signature) -> None:
    known = [spec.name for spec in signature.inputs]
    for name in sorted(given - set(known)):
        close = nearest(name, known)
        hint = f" (did you mean '{close}'?)" if close else ""
        raise InputsInvalid(
            f"--inputs {path}: array '{name}' is no input of the model{hint}, "
            f"want {', '.join(known)}"
        )
    for name in known:
        if name not in given:
            raise InputsInvalid(f"--inputs {path}: no array '{name}', want {', '.join(known)}")


def _checked_array(path: Path, spec: TensorSpec, array: Tensor) -> Tensor:
    row = spec.shape[1:] if spec.has_batch_axis else spec.shape
    fits = len(array.shape) == 1 + len(row) and all(
        want in (VARIABLE, got) for got, want in zip(array.shape[1:], row, strict=True)
    )
    if not fits:
        raise InputsInvalid(
            f"--inputs {path}: array '{spec.name}': got shape {list(array.shape)}, "
            f"want [n, {', '.join(str(axis) for axis in row)}]"
        )
    if spec.datatype == "BYTES":
        if array.dtype.kind not in "SU":
            raise InputsInvalid(
                f"--inputs {path}: array '{spec.name}': got {array.dtype}, want bytes or strings"
            )
        encoded = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
        return encoded.astype(np.object_)
    wanted = np.dtype(DTYPES[spec.datatype])
    if not _can_hold(array, wanted):
        raise InputsInvalid(
            f"--inputs {path}: array '{spec.name}': got {array.dtype} values that "
            f"{spec.datatype} can't hold, want {wanted}"
        )
    return array.astype(wanted)


def _can_hold(array: Tensor, wanted: np.dtype[Any]) -> bool:
    """Floats may lose precision; integers must keep their values; kinds never mix."""
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        return bool(np.array_equal(array, array.astype(wanted)))
    return array.dtype.kind == wanted.kind
