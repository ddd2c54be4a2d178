"""Read one output's numbers from an answer of the Open Inference Protocol, on either transport."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from loadtest import oip_pb2
from loadtest.inputs import DTYPES
from loadtest.target import Protocol

Numbers = npt.NDArray[np.float64]
CONTENTS: Mapping[str, str] = {
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def rest_numbers(body: bytes, json_bytes: int | None, output: str) -> Numbers | None:
    """The output of that name; none where the answer hasn't got it or can't be understood.

    `json_bytes` is the length of the JSON part where binary tensors follow it.
    """
    try:
        begin = len(body) if json_bytes is None else json_bytes
        for one in json.loads(body[:begin])["outputs"]:
            size = one.get("parameters", {}).get("binary_data_size")
            if one["name"] == output:
                if size is None:
                    return np.asarray(one["data"], np.float64).reshape(one["shape"])
                return _from_bytes(body[begin : begin + size], one["datatype"], one["shape"])
            begin += size or 0
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def grpc_numbers(body: bytes, _json_bytes: int | None, output: str) -> Numbers | None:
    """As `rest_numbers`, from a serialized ModelInferResponse, which has one part."""
    try:
        reply = oip_pb2.ModelInferResponse.FromString(body)
        for index, one in enumerate(reply.outputs):
            if one.name == output:
                if reply.raw_output_contents:
                    raw = reply.raw_output_contents[index]
                    return _from_bytes(raw, one.datatype, one.shape)
                values = getattr(one.contents, CONTENTS[one.datatype])
                return np.asarray(values, np.float64).reshape(one.shape)
    except (DecodeError, ValueError, KeyError, IndexError):
        return None
    return None


READERS: Mapping[Protocol, Callable[[bytes, int | None, str], Numbers | None]] = {
    "rest": rest_numbers,
    "grpc": grpc_numbers,
}


def _from_bytes(raw: bytes, datatype: str, shape: Any) -> Numbers:
    """Little-endian, row-major; raises ValueError or KeyError."""
    if datatype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(shape)
    dtype = np.dtype(DTYPES[datatype]).newbyteorder("<")
    return np.frombuffer(raw, dtype).astype(np.float64).reshape(shape)
