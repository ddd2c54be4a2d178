"""Samples that are arrays already: .npz files and functions of the user's."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from optimizer.data.pairs import PairTable, is_dataset, read_pairs
from optimizer.data.table import ArrayTable, Labels, row_range
from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.spec import Columns, ImageSpec

Rows = tuple[int, int] | None
_ARCHIVE, _ARRAY = b"PK", b"\x93NUMPY"
"""What .npz and .npy files begin with."""


def read_npz(
    path: Path,
    rows: Rows,
    columns: Columns,
    image: ImageSpec | None,
    input_names: Sequence[str],
) -> ArrayTable:
    """Read one array for each input and one of labels from an .npz file; nothing is unpickled.

    Raises SpecInvalid.
    """
    names = {name: columns.of_input(name) for name in input_names}
    wanted = list(names.values()) + ([columns.label] if columns.label is not None else [])
    arrays = _arrays(path, wanted)
    inputs = {name: arrays[column] for name, column in names.items()}
    labels = arrays[columns.label] if columns.label is not None else None
    return table_of(str(path), inputs, labels, rows, image)


def _arrays(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        # Opened here, since NumPy leaves a file open that turns out to be damaged.
        with path.open("rb") as opened:
            _check_magic(path, opened)
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise SpecInvalid(str(path), [f"{path}: got one array, want an .npz of several"])
            known = ", ".join(file.files)
            problems = [
                f"{path}: no array '{name}', set data.columns; it has: {known}"
                for name in wanted
                if name not in file.files
            ]
            if problems:
                raise SpecInvalid(str(path), problems)
            return {name: file[name] for name in wanted}
    except ValueError as error:  # in NumPy's words, which advise to unpickle what it is
        problem = f"{path}: an array can't be read, want numbers alone"
        raise SpecInvalid(str(path), [problem]) from error
    except (OSError, EOFError, BadZipFile, zlib.error) as error:
        raise SpecInvalid(str(path), [f"{path}: not a readable .npz file: {error}"]) from error


def _check_magic(path: Path, opened: BinaryIO) -> None:
    """NumPy takes whatever it doesn't know for a pickle."""
    found = opened.read(len(_ARRAY))
    opened.seek(0)
    if not found.startswith((_ARCHIVE, _ARRAY)):
        problem = f"{path}: not a readable .npz file, want one as numpy.savez writes it"
        raise SpecInvalid(str(path), [problem])


def call_importable(
    function: Importable,
    rows: Rows,
    image: ImageSpec | None,
    input_names: Sequence[str],
) -> ArrayTable | PairTable:
    """Call the user's function, which returns (inputs, labels) or a dataset of pairs.

    `inputs` is an array, or a mapping of one for each model input; `labels` may be None. A
    dataset has a length and gives (input, label) for a number, as PyTorch's do; it is read a
    sample at a time. Raises SpecInvalid for whatever the function raises.
    """
    source = str(function)
    try:
        result = function.call()
    except Exception as error:
        raise SpecInvalid(
            source, [f"{source}: the function failed: {type(error).__name__}: {error}"]
        ) from error
    if is_dataset(result):
        return read_pairs(result, source, rows, image, input_names)
    if not isinstance(result, tuple) or len(result) != 2:
        raise SpecInvalid(
            source,
            [
                f"{source}: got {type(result).__name__}, want a tuple (inputs, labels), or a "
                "dataset of pairs (input, label)"
            ],
        )
    given, labels = result
    if not isinstance(given, Mapping):
        given = dict.fromkeys(input_names[:1], given)
    missing = [name for name in input_names if name not in given]
    if missing:
        raise SpecInvalid(source, [f"{source}: no inputs for {', '.join(missing)}"])
    inputs = {name: np.asarray(given[name]) for name in input_names}
    return table_of(source, inputs, None if labels is None else np.asarray(labels), rows, image)


def table_of(
    source: str,
    inputs: dict[str, NDArray[Any]],
    labels: NDArray[Any] | None,
    rows: Rows,
    image: ImageSpec | None,
    n_classes: int | None = None,
) -> ArrayTable:
    """Checked arrays as a table. Raises SpecInvalid with all that is wrong with them."""
    problems = [
        problem
        for name, array in inputs.items()
        for problem in _input_problems(source, name, array, image)
    ]
    lengths = {name: len(array) for name, array in inputs.items() if array.ndim}
    if labels is not None:
        problems += _label_problems(source, labels)
        lengths["labels"] = len(labels) if labels.ndim else 0
    if not problems and len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        problems.append(f"{source}: arrays have unequal lengths: {shown}")
    if problems:
        raise SpecInvalid(source, problems)
    first, stop = row_range(source, next(iter(lengths.values())), rows)
    return ArrayTable(
        source=source,
        inputs={name: array[first:stop] for name, array in inputs.items()},
        labels=None if labels is None else _sliced(labels, first, stop),
        image=image,
        n_classes=n_classes,
    )


def _sliced(labels: NDArray[Any], first: int, stop: int) -> Labels:
    return labels[first:stop].astype(np.int64)


def _input_problems(
    source: str, name: str, array: NDArray[Any], image: ImageSpec | None
) -> list[str]:
    if array.ndim < 1 or array.dtype.kind not in "biuf":
        return [f"{source}: {name} is {array.dtype} {list(array.shape)}, want numbers [n, ...]"]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [f"{source}: {name} has values that are NaN or infinite"]
    if image is None:
        return []
    n_channels = len(image.mean)
    is_image = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    if array.dtype != np.uint8 or not is_image:
        return [
            f"{source}: {name} is {array.dtype} {list(array.shape)}, "
            f"want uint8 [n, y, x] or [n, y, x, channel] with data.image"
        ]
    if array.ndim == 3 and n_channels == 3:
        return [f"{source}: {name} is grey, want one mean and std in data.image"]
    return []


def _label_problems(source: str, labels: NDArray[Any]) -> list[str]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return [f"{source}: labels are {labels.dtype} {list(labels.shape)}, want integers [n]"]
    return []
