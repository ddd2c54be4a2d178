"""Parquet files in the Hugging Face layout: encoded images in a struct column, integer labels.

Encoded images of the wanted rows are kept in memory; decoding is left to the table.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from optimizer.data.table import EncodedImages, Labels, row_range
from optimizer.errors import SpecInvalid
from optimizer.spec import Columns, ImageSpec


def read_parquet(
    path: Path,
    rows: tuple[int, int] | None,
    columns: Columns,
    image: ImageSpec,
    input_name: str,
) -> EncodedImages:
    """Read `rows` of an image column (struct of bytes and path, or binary) and a label column.

    Only row groups and columns that hold them are read. Raises SpecInvalid.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SpecInvalid(str(path), [f"{path}: not a parquet file: {error}"]) from error
    with file:
        image_column = columns.of_input(input_name)
        _check_columns(path, file.schema_arrow, image_column, columns.label)
        first, stop = row_range(str(path), file.metadata.num_rows, rows)
        wanted = [image_column] + ([columns.label] if columns.label is not None else [])
        try:
            table = _rows(file, first, stop, wanted)
        except (OSError, pa.ArrowException) as error:
            raise SpecInvalid(str(path), [f"{path}: damaged: {error}"]) from error
        return EncodedImages(
            source=str(path),
            input_name=input_name,
            encoded=_encoded(path, table[image_column], first),
            labels=_labels(path, table[columns.label], first) if columns.label else None,
            n_classes=_n_classes(file.schema_arrow, columns.label),
            image=image,
            first_row=first,
        )


def _check_columns(path: Path, schema: pa.Schema, image: str, label: str | None) -> None:
    problems = []
    known = ", ".join(schema.names)
    if image not in schema.names:
        problems.append(f"{path}: no column '{image}', set data.columns.inputs; it has: {known}")
    elif not _holds_bytes(schema.field(image).type):
        problems.append(
            f"{path}: column '{image}' is {schema.field(image).type}, "
            "want struct<bytes: binary, path: string> or binary"
        )
    if label is not None and label not in schema.names:
        problems.append(
            f"{path}: no column '{label}', set data.columns.label "
            f"(null for data without labels); it has: {known}"
        )
    elif label is not None and not pa.types.is_integer(schema.field(label).type):
        problems.append(f"{path}: column '{label}' is {schema.field(label).type}, want int64")
    if problems:
        raise SpecInvalid(str(path), problems)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


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
