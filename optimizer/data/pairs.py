"""Datasets of the user's that give one sample at a time, as PyTorch's do.

Anything with a length and items that are pairs (input, label). Items are asked for when they are
needed and not kept; where they come from isn't known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.images import ImageUnreadable, from_pixels
from optimizer.data.table import Indices, Labels, converted, hash_of, row_range, stacked
from optimizer.errors import SpecInvalid
from optimizer.spec import ImageSpec

MAX_ITEMS = 10_000_000
"""Of a split."""
MAX_ITEM_BYTES = 256 * 2**20
"""Of one sample's inputs together."""
Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class PairTable:
    """Items first, first + 1, … of a dataset. Labels and hashes were taken in one pass over it.

    What is read is compared with the hash: a dataset that gives something else the second time,
    as random augmentation does, is refused, since no two variants would see the same samples.
    """

    source: str
    dataset: Any
    input_names: tuple[str, ...]
    image: ImageSpec | None
    first: int
    hashes: Sequence[bytes]
    labels: Labels | None
    n_classes: int | None = None
    classes: tuple[str, ...] | None = None

    def read(self, indices: Indices) -> Inputs:
        """Raises SpecInvalid where a sample isn't what it was, or can't be stacked."""
        rows = [self._inputs(int(index)) for index in indices]
        if not rows:
            return {name: np.empty((0,), dtype=np.float32) for name in self.input_names}
        return {
            name: stacked([row[name] for row in rows], self.source) for name in self.input_names
        }

    def _inputs(self, index: int) -> Inputs:
        place = f"{self.source}: item {self.first + index}"
        inputs, _ = _item(self.dataset, self.first + index, self.source, self.input_names)
        if hash_of(inputs) != self.hashes[index]:
            raise SpecInvalid(
                self.source,
                [f"{place} isn't what it was when it was first read, want no random augmentation"],
            )
        if self.image is None:
            return {name: converted(array) for name, array in inputs.items()}
        try:
            return {name: from_pixels(pixels, self.image) for name, pixels in inputs.items()}
        except ImageUnreadable as error:
            raise SpecInvalid(self.source, [f"{place}: {error}"]) from error


def is_dataset(found: object) -> bool:
    """Whether it has a length and items by number; of built-in kinds only lists do."""
    if isinstance(found, tuple | str | bytes | Mapping | np.ndarray):
        return False
    return hasattr(found, "__len__") and hasattr(found, "__getitem__")


def read_pairs(
    dataset: Any,
    source: str,
    rows: tuple[int, int] | None,
    image: ImageSpec | None,
    input_names: Sequence[str],
) -> PairTable:
    """Look at every wanted item once. Raises SpecInvalid for those that are no pairs of an input
    and a class, and for whatever the dataset raises."""
    n_items = _length(dataset, source)
    first, stop = row_range(source, n_items, rows)
    names = tuple(input_names)
    hashes: list[bytes] = []
    labels: list[int | None] = []
    shapes: dict[str, str] = {}
    for index in range(first, stop):
        inputs, label = _item(dataset, index, source, names)
        problem = _problem(inputs, image)
        if problem is None and image is None:
            shapes = shapes or _shapes(inputs)
            problem = _difference(_shapes(inputs), shapes)
        if problem is not None:
            raise SpecInvalid(source, [f"{source}: item {index}: {problem}"])
        hashes.append(hash_of(inputs))
        labels.append(label)
    return PairTable(source, dataset, names, image, first, hashes, _labels(labels, source, first))


def _length(dataset: Any, source: str) -> int:
    try:
        n_items = len(dataset)
    except Exception as error:
        raise SpecInvalid(
            source, [f"{source}: len() of the dataset failed: {type(error).__name__}: {error}"]
        ) from error
    if n_items > MAX_ITEMS:
        raise SpecInvalid(source, [f"{source}: has {n_items} items, want at most {MAX_ITEMS}"])
    return n_items


def _item(
    dataset: Any, index: int, source: str, input_names: Sequence[str]
) -> tuple[Inputs, int | None]:
    place = f"{source}: item {index}"
    try:
        found = dataset[index]
    except Exception as error:
        raise SpecInvalid(source, [f"{place} failed: {type(error).__name__}: {error}"]) from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise SpecInvalid(
            source, [f"{place} is {type(found).__name__}, want a pair (input, label)"]
        )
    given, label = found
    if not isinstance(given, Mapping):
        given = dict.fromkeys(input_names[:1], given)
    missing = [name for name in input_names if name not in given]
    if missing:
        raise SpecInvalid(source, [f"{place}: no inputs for {', '.join(missing)}"])
    try:
        inputs = {name: np.asarray(given[name]) for name in input_names}
        return inputs, None if label is None else _class(label)
    except Exception as error:  # whatever a foreign tensor's conversion raises
        raise SpecInvalid(source, [f"{place}: {type(error).__name__}: {error}"]) from error


def _class(label: Any) -> int:
    found = np.asarray(label)
    if found.size != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"got the label {label!r}, want an integer or None")
    return int(found.item())


def _problem(inputs: Inputs, image: ImageSpec | None) -> str | None:
    n_bytes = sum(array.nbytes for array in inputs.values())
    if n_bytes > MAX_ITEM_BYTES:
        return f"got {n_bytes} bytes, want at most {MAX_ITEM_BYTES}"
    for name, array in inputs.items():
        if array.dtype.kind not in "biuf":
            return f"{name} is {array.dtype} {list(array.shape)}, want numbers"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{name} has values that are NaN or infinite"
        if image is None:
            continue
        is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
        if array.dtype != np.uint8 or not is_image:
            return (
                f"{name} is {array.dtype} {list(array.shape)}, "
                "want uint8 [y, x] or [y, x, channel] with data.image"
            )
        if array.ndim == 2 and len(image.mean) == 3:
            return f"{name} is grey, want one mean and std in data.image"
    return None


def _shapes(inputs: Inputs) -> dict[str, str]:
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in inputs.items()}


def _difference(shapes: dict[str, str], wanted: dict[str, str]) -> str | None:
    differ = (name for name in wanted if shapes[name] != wanted[name])
    name = next(differ, None)
    return None if name is None else f"{name} is {shapes[name]}, want {wanted[name]} as before"


def _labels(labels: Sequence[int | None], source: str, first: int) -> Labels | None:
    if all(label is None for label in labels):
        return None
    for index, label in enumerate(labels):
        if label is None:
            raise SpecInvalid(
                source, [f"{source}: item {first + index} has no label, though others have"]
            )
    return np.asarray(labels, dtype=np.int64)
