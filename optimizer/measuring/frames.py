"""Frames: messages of a JSON header and tensors, for pipes and HTTP bodies alike.

Tensors are in the Open Inference Protocol's raw form (`serve.tensor`), which has a form for text
and bfloat16 too, where npy has none without pickles. It knows no call and no transport.
"""

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizer.measuring import Batch
from serve.errors import InvalidRequest
from serve.tensor import DATATYPES, Array, Tensor, decode_raw, encode_raw

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""A profile of a large network has some ten thousand kernels."""
MAX_FRAME_BYTES = 2 * 1024**3
MAX_TENSORS = 65_536
_LENGTHS = struct.Struct("<4sIQ")
"""Magic, bytes of the header, bytes of all tensors."""
_MAGIC = b"TSM1"


class FrameInvalid(Exception):
    """What came is no frame, or one beyond the limits."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One message. `batches` are tensors by name, any number of times."""

    header: Mapping[str, Any]
    batches: Sequence[Batch] = field(default=())


def encode(frame: Frame) -> Iterator[bytes]:
    """The frame in pieces, one for each tensor, so that they needn't be joined. Raises
    FrameInvalid for an array that is no tensor of the protocol."""
    described: list[list[dict[str, object]]] = []
    raws: list[bytes] = []
    for batch in frame.batches:
        of_batch = {name: _raw(name, array) for name, array in batch.items()}
        described.append([_tensor(name, batch[name], len(raw)) for name, raw in of_batch.items()])
        raws += of_batch.values()
    header = json.dumps({"header": dict(frame.header), "batches": described}).encode()
    yield _LENGTHS.pack(_MAGIC, len(header), sum(map(len, raws))) + header
    yield from raws


def read(source: Callable[[int], bytes], max_bytes: int = MAX_FRAME_BYTES) -> Frame | None:
    """The next frame, or None at the end. `source` gives up to as many bytes as it is asked for,
    none at its end. Raises FrameInvalid."""
    lengths = _exactly(source, _LENGTHS.size, may_end=True)
    if not lengths:
        return None
    magic, n_header, n_body = _LENGTHS.unpack(lengths)
    if magic != _MAGIC:
        raise FrameInvalid(f"begins with {magic!r}, want {_MAGIC!r}")
    if n_header > MAX_HEADER_BYTES or n_header + n_body > max_bytes:
        raise FrameInvalid(f"{n_header + n_body} bytes, at most {max_bytes} are allowed")
    described = _described(_exactly(source, n_header))
    body = memoryview(_exactly(source, n_body))
    return Frame(described["header"], _batches(described["batches"], body))


def decode(raw: bytes, max_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """The one frame in `raw`. Raises FrameInvalid."""
    stream = io.BytesIO(raw)
    frame = read(stream.read, max_bytes)
    if frame is None or stream.read(1):
        raise FrameInvalid(f"{len(raw)} bytes, want exactly one frame")
    return frame


def _raw(name: str, array: Array) -> bytes:
    if array.dtype not in DATATYPES:
        raise FrameInvalid(f"tensor {name!r}: no datatype for numpy's {array.dtype}")
    return encode_raw(Tensor(name, DATATYPES[array.dtype], array))


def _tensor(name: str, array: Array, size: int) -> dict[str, object]:
    datatype = DATATYPES[array.dtype]
    return {"name": name, "datatype": datatype, "shape": array.shape, "size": size}


def _exactly(source: Callable[[int], bytes], n: int, may_end: bool = False) -> bytes:
    parts: list[bytes] = []
    missing = n
    while missing:
        part = source(missing)
        if not part:
            if may_end and missing == n:
                return b""
            raise FrameInvalid(f"ends {missing} bytes too early")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _described(raw: bytes) -> dict[str, Any]:
    try:
        described = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FrameInvalid(f"header is no JSON: {error}") from error
    if not isinstance(described, dict) or not isinstance(described.get("header"), dict):
        raise FrameInvalid("header: want an object with `header` and `batches`")
    batches = described.get("batches")
    if not isinstance(batches, list) or not all(isinstance(one, list) for one in batches):
        raise FrameInvalid("batches: want a list of lists of tensors")
    if sum(map(len, batches)) > MAX_TENSORS:
        raise FrameInvalid(f"batches: more than {MAX_TENSORS} tensors")
    return described


def _batches(described: list[list[dict[str, Any]]], body: memoryview) -> list[dict[str, Array]]:
    batches, offset = [], 0
    for tensors in described:
        batch: dict[str, Array] = {}
        for tensor in tensors:
            try:
                name, datatype = str(tensor["name"]), str(tensor["datatype"])
                shape, size = [int(n) for n in tensor["shape"]], int(tensor["size"])
                if not 0 <= size <= len(body) - offset:
                    raise FrameInvalid(f"tensor {name!r}: {size} bytes are more than there are")
                batch[name] = decode_raw(name, datatype, shape, body[offset : offset + size]).array
            except (InvalidRequest, KeyError, TypeError, ValueError) as error:
                raise FrameInvalid(f"a tensor can't be read: {error}") from error
            offset += size
        batches.append(batch)
    if offset != len(body):
        raise FrameInvalid(f"{len(body) - offset} bytes belong to no tensor")
    return batches
