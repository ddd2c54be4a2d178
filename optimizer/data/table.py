"""Tables of raw samples, before they are divided into splits.

A table knows where its samples came from, their labels and hashes, and decodes inputs only for
the rows that it is asked for.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.data.images import ImageUnreadable, decode, from_pixels
from optimizer.errors import SpecInvalid
from optimizer.spec import ImageSpec

Labels = NDArray[np.int64]
Indices = NDArray[np.intp]


class RowsMissing(SpecInvalid):
    """A split wants rows that its file hasn't."""

    def __init__(self, source: str, n_rows: int, wanted: tuple[int, int]) -> None:
        self.problem = f"got {list(wanted)}, want at most {n_rows}, the rows of {source}"
        super().__init__(source, [f"rows: {self.problem}"])


class Table(Protocol):
    """Samples of one file or function, in its order."""

    @property
    def source(self) -> str:
        """What errors call it."""

    @property
    def hashes(self) -> Sequence[bytes]:
        """SHA-256 of each raw sample, without its label."""

    @property
    def labels(self) -> Labels | None:
        """int64 [n], or None without labels."""

    @property
    def n_classes(self) -> int | None:
        """How many classes the file itself names, None where it doesn't."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, where labels are made of them."""

    def read(self, indices: Indices) -> dict[str, NDArray[Any]]:
        """Model input → preprocessed array [len(indices), *shape]."""


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Encoded images, which make the one input of a model.

    The hash is that of the encoded bytes: the same picture encoded anew counts as another.
    """

    source: str
    input_name: str
    encoded: Sequence[bytes]
    labels: Labels | None
    n_classes: int | None
    image: ImageSpec
    first_row: int
    """Row of the first sample in its file, for errors."""
    names: Sequence[str] | None = None
    """What errors call each, where it isn't the row of a file."""
    classes: tuple[str, ...] | None = None

    @property
    def hashes(self) -> Sequence[bytes]:
        return [hashlib.sha256(image).digest() for image in self.encoded]

    def read(self, indices: Indices) -> dict[str, NDArray[Any]]:
        decoded = [self._decoded(int(index)) for index in indices]
        if not decoded:
            return {self.input_name: np.empty((0, 0, 0, 0), dtype=np.float32)}
        return {self.input_name: stacked(decoded, self.source)}

    def _decoded(self, index: int) -> NDArray[np.float32]:
        try:
            return decode(self.encoded[index], self.image)
        except ImageUnreadable as error:
            raise SpecInvalid(self.source, [f"{self._place(index)}: {error}"]) from error

    def _place(self, index: int) -> str:
        if self.names is not None:
            return self.names[index]
        return f"{self.source}: row {self.first_row + index}"


@dataclass(frozen=True, eq=False)
class ArrayTable:
    """Arrays [n, *shape], one for each model input.

    Without `image`, floats are given as float32 and all else as it is. The hash is that of a
    row's type, shape and bytes in every input.
    """

    source: str
    inputs: Mapping[str, NDArray[Any]]
    labels: Labels | None
    image: ImageSpec | None
    n_classes: int | None = None
    classes: tuple[str, ...] | None = None

    @property
    def hashes(self) -> Sequence[bytes]:
        n_rows = len(next(iter(self.inputs.values())))
        return [self._hash(row) for row in range(n_rows)]

    def read(self, indices: Indices) -> dict[str, NDArray[Any]]:
        return {name: self._converted(array[indices]) for name, array in self.inputs.items()}

    def _converted(self, rows: NDArray[Any]) -> NDArray[Any]:
        if self.image is not None and len(rows):
            image = self.image
            return stacked([from_pixels(pixels, image) for pixels in rows], self.source)
        return converted(rows)

    def _hash(self, row: int) -> bytes:
        return hash_of({name: array[row] for name, array in self.inputs.items()})


def converted(array: NDArray[Any]) -> NDArray[Any]:
    """As models take it: floats as float32, all else as it is."""
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def hash_of(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """SHA-256 of one sample's type, shape and bytes in every input."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = np.ascontiguousarray(inputs[name])
        digest.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.digest()


def row_range(source: str, n_rows: int, rows: tuple[int, int] | None) -> tuple[int, int]:
    """The wanted rows of a table of `n_rows`. Raises RowsMissing where it has fewer, SpecInvalid
    where it has none."""
    first, stop = rows if rows is not None else (0, n_rows)
    if stop > n_rows:
        raise RowsMissing(source, n_rows, (first, stop))
    if stop == first:
        raise SpecInvalid(source, [f"{source}: has no rows"])
    return first, stop


def stacked(samples: Sequence[NDArray[Any]], source: str) -> NDArray[Any]:
    """At least one sample to [n, *shape]. Raises SpecInvalid where their shapes differ."""
    shapes = sorted({sample.shape for sample in samples})
    if len(shapes) > 1:
        shown = " and ".join(str(list(shape)) for shape in shapes[:2])
        raise SpecInvalid(
            source,
            [f"{source}: got samples of {shown}, want one size: set data.image.size"],
        )
    return np.stack(samples)
