"""Parquet files: encoded images as in the Hugging Face layout, texts, or columns of numbers.

Only the wanted rows and columns are read, and kept in memory as they are in the file; decoding
and tokenizing are left to the table.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from optimizer.data.arrays import table_of
from optimizer.data.table import ArrayTable, EncodedImages, Labels, row_range
from optimizer.data.text import Texts, load_tokenizer
from optimizer.errors import SpecInvalid
from optimizer.spec import Columns, ImageSpec, TextSpec

Rows = tuple[int, int] | None
_IMAGES = "struct<bytes: binary, path: string> or binary"
_NUMBERS = "numbers or lists of them (images want data.image, texts data.text to become numbers)"


def read_images(
    path: Path, rows: Rows, columns: Columns, image: ImageSpec, input_name: str
) -> EncodedImages:
    """Read `rows` of an image column (struct of bytes and path, or binary) and a label column.

    Only row groups and columns that hold them are read. Raises SpecInvalid.
    """
    column = columns.of_input(input_name)
    found = _read(path, rows, [column], columns.label, _holds_bytes, _IMAGES)
    return EncodedImages(
        source=str(path),
        input_name=input_name,
        encoded=_encoded(path, found.table[column], found.first_row),
        labels=found.labels,
        n_classes=found.n_classes,
        image=image,
        first_row=found.first_row,
    )


def read_texts(path: Path, rows: Rows, columns: Columns, text: TextSpec) -> Texts:
    """Read `rows` of a column of strings and a label column. Raises SpecInvalid, of a tokenizer
    that can't be used too."""
    found = _read(path, rows, [text.column], columns.label, _holds_text, "string")
    values: list[str | None] = found.table[text.column].to_pylist()
    for index, value in enumerate(values):
        if value is None:
            row = found.first_row + index
            raise SpecInvalid(str(path), [f"{path}: row {row}: no text, want one"])
    return Texts(
        source=str(path),
        texts=[value.encode() for value in values if value is not None],
        labels=found.labels,
        n_classes=found.n_classes,
        spec=text,
        tokenizer=load_tokenizer(text),
        first_row=found.first_row,
    )


def read_columns(
    path: Path, rows: Rows, columns: Columns, input_names: Sequence[str]
) -> ArrayTable:
    """Read `rows` of one column of numbers, or of lists of them, for each input, and of a label
    column. Lists within a column must be of one length. Raises SpecInvalid."""
    names = {name: columns.of_input(name) for name in input_names}
    wanted = list(dict.fromkeys(names.values()))
    found = _read(path, rows, wanted, columns.label, _holds_numbers, _NUMBERS)
    arrays = {
        column: _array(path, column, found.table[column], found.first_row) for column in wanted
    }
    inputs = {name: arrays[column] for name, column in names.items()}
    return table_of(str(path), inputs, found.labels, None, None, found.n_classes)


@dataclass(frozen=True, eq=False)
class _Found:
    """The wanted rows of the wanted columns."""

    table: pa.Table
    labels: Labels | None
    n_classes: int | None
    first_row: int


def _read(
    path: Path,
    rows: Rows,
    wanted: Sequence[str],
    label: str | None,
    fits: Callable[[pa.DataType], bool],
    want: str,
) -> _Found:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SpecInvalid(str(path), [f"{path}: not a parquet file: {error}"]) from error
    with file:
        schema = file.schema_arrow
        problems = [
            *(problem for name in wanted for problem in _misfits(path, schema, name, fits, want)),
            *_label_misfits(path, schema, label),
        ]
        if problems:
            raise SpecInvalid(str(path), problems)
        first, stop = row_range(str(path), file.metadata.num_rows, rows)
        names = [*wanted, *([label] if label is not None and label not in wanted else [])]
        try:
            table = _rows(file, first, stop, names)
        except (OSError, pa.ArrowException) as error:
            raise SpecInvalid(str(path), [f"{path}: damaged: {error}"]) from error
    labels = _labels(path, table[label], first) if label is not None else None
    return _Found(table, labels, _n_classes(schema, label), first)


def _misfits(
    path: Path, schema: pa.Schema, name: str, fits: Callable[[pa.DataType], bool], want: str
) -> list[str]:
    if name not in schema.names:
        setting = "data.text.column" if want == "string" else "data.columns.inputs"
        known = ", ".join(schema.names)
        return [f"{path}: no column '{name}', set {setting}; it has: {known}"]
    kind = schema.field(name).type
    return [] if fits(kind) else [f"{path}: column '{name}' is {kind}, want {want}"]


def _label_misfits(path: Path, schema: pa.Schema, label: str | None) -> list[str]:
    if label is None:
        return []
    if label not in schema.names:
        known = ", ".join(schema.names)
        return [
            f"{path}: no column '{label}', set data.columns.label "
            f"(null for data without labels); it has: {known}"
        ]
    kind = schema.field(label).type
    return [] if pa.types.is_integer(kind) else [f"{path}: column '{label}' is {kind}, want int64"]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_numbers(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _holds_numbers(kind.value_type)
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _rows(file: pq.ParquetFile, first: int, stop: int, columns: list[str]) -> pa.Table:
    """Rows [first, stop), reading no row group outside of them."""
    groups: list[int] = []
    group_start = offset = 0
    for group in range(file.metadata.num_row_groups):
        group_stop = group_start + file.metadata.row_group(group).num_rows
        if group_stop > first and group_start < stop:
            if not groups:
                offset = first - group_start
            groups.append(group)
        group_start = group_stop
    return file.read_row_groups(groups, columns=columns).slice(offset, stop - first)


def _encoded(path: Path, column: pa.ChunkedArray, first: int) -> list[bytes]:
    values: list[Any] = column.to_pylist()
    if pa.types.is_struct(column.type):
        values = [value and value["bytes"] for value in values]
    for index, value in enumerate(values):
        if not value:
            raise SpecInvalid(
                str(path),
                [f"{path}: row {first + index}: no image bytes, want them embedded in the file"],
            )
    return values


def _array(path: Path, name: str, column: pa.ChunkedArray, first: int) -> NDArray[Any]:
    """A column as [n], or [n, length, ...] where it holds lists."""
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    shape = [len(values)]
    while True:
        if values.null_count:
            n_each = max(1, len(values) // shape[0])
            row = first + values.is_null().to_pylist().index(True) // n_each
            raise SpecInvalid(
                str(path), [f"{path}: row {row}: nothing in column '{name}', want a number"]
            )
        if not _is_list(values.type):
            found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
            return found.reshape(shape)
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1:
            shown = " and ".join(str(length) for length in sorted(lengths)[:2])
            raise SpecInvalid(
                str(path),
                [f"{path}: column '{name}' has lists of {shown} values, want one length"],
            )
        shape.append(lengths[0])
        values = values.flatten()


def _labels(path: Path, column: pa.ChunkedArray, first: int) -> Labels:
    if column.null_count:
        index = column.is_null().to_pylist().index(True)
        raise SpecInvalid(
            str(path), [f"{path}: row {first + index}: no label, want a class of 0 or more"]
        )
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _n_classes(schema: pa.Schema, label: str | None) -> int | None:
    """From the features that the Hugging Face hub writes into a file, if it names classes."""
    try:
        content: Any = json.loads((schema.metadata or {})[b"huggingface"])
        return len(content["info"]["features"][label]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None
