"""ONNX files from elsewhere: what else they would have an engine read.

A tensor's values may lie in another file, and a node may stand for a blob compiled for some
hardware. It reads just those fields of the format, by their numbers in onnx.proto, since the
agent runs without the package onnx.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from serve.artifact import check_file_name
from serve.errors import ArtifactInvalid

MAX_BYTES = 2**31 - 1
"""Of a message of protobuf."""
COMPILED = frozenset({"EPContext"})
"""Operators that stand for a blob which an execution provider would run."""
_PACKAGE = "trimserve.onnx_files"
_STRING = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_MESSAGE = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
# message -> (field, number, type of message or "" for text), all of them repeated.
_FIELDS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "Entry": (("key", 1, ""), ("value", 2, "")),
    "Tensor": (("external_data", 13, "Entry"),),
    "SparseTensor": (("values", 1, "Tensor"), ("indices", 2, "Tensor")),
    "Attribute": (
        ("t", 5, "Tensor"), ("g", 6, "Graph"), ("tensors", 10, "Tensor"), ("graphs", 11, "Graph"),
        ("sparse_tensor", 22, "SparseTensor"), ("sparse_tensors", 23, "SparseTensor"),
    ),
    "Node": (("op_type", 4, ""), ("attribute", 5, "Attribute")),
    "Graph": (
        ("node", 1, "Node"), ("initializer", 5, "Tensor"),
        ("sparse_initializer", 15, "SparseTensor"),
    ),
    "Function": (("node", 7, "Node"), ("attribute_proto", 11, "Attribute")),
    "Training": (("initialization", 1, "Graph"), ("algorithm", 2, "Graph")),
    "Model": (
        ("graph", 7, "Graph"), ("training_info", 20, "Training"), ("functions", 25, "Function")
    ),
}  # fmt: skip


def check_onnx(path: Path) -> None:
    """Raise ArtifactInvalid where the file isn't ONNX, names data that aren't a file beside it,
    or holds a compiled blob."""
    for location in _locations(path):
        check_file_name(location, str(path))
        if not (path.parent / location).is_file():
            raise ArtifactInvalid(str(path), f"its external data {location!r} aren't beside it")


def _locations(path: Path) -> Iterator[str]:
    """The external files of all tensors, in graphs inside of graphs too."""
    if path.stat().st_size > MAX_BYTES:
        raise ArtifactInvalid(str(path), f"over {MAX_BYTES} bytes")
    try:
        model = _model_class().FromString(path.read_bytes())
    except message.DecodeError as error:
        raise ArtifactInvalid(str(path), f"no ONNX file: {error}") from error
    for one in _messages(model):
        kind = one.DESCRIPTOR.name
        if kind == "Node" and not COMPILED.isdisjoint(one.op_type):
            raise ArtifactInvalid(str(path), "holds a blob compiled for some hardware (EPContext)")
        if kind == "Entry" and "location" in one.key:
            yield from one.value


def _messages(root: Any) -> Iterator[Any]:
    waiting = [root]
    while waiting:
        one = waiting.pop()
        yield one
        for field, values in one.ListFields():
            if field.message_type is not None:
                waiting.extend(values)


@cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto2"
    )
    for name, fields in _FIELDS.items():
        described = file.message_type.add(name=name)
        for field, number, kind in fields:
            # Repeated, so that a field that comes twice hides nothing.
            described.field.add(
                name=field,
                number=number,
                label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
                type=_MESSAGE if kind else _STRING,
                type_name=f".{_PACKAGE}.{kind}" if kind else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
