"""Encode tensors as requests of the Open Inference Protocol, once, before the test.

Binary over REST is Triton's binary tensor data extension; gRPC always carries raw contents.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import orjson

from loadtest import oip_pb2
from loadtest.inputs import InputsInvalid, Tensor, Tensors
from loadtest.plan import Payload
from loadtest.signature import Signature
from loadtest.slo import Workload
from loadtest.target import Protocol

MAX_PAYLOADS = 64
MAX_LABELLED_PAYLOADS = 4096
"""Where answers are graded: more rows say more of the accuracy."""
MIN_PAYLOADS = 4
BUDGET_BYTES = 64_000_000
"""About how much memory the payloads of one protocol may take, above MIN_PAYLOADS."""


def encode_payloads(
    drawn: Iterator[Tensors],
    signature: Signature,
    workload: Workload,
    protocols: Iterable[Protocol],
    model: str,
    version: str,
    max_payloads: int = MAX_PAYLOADS,
) -> dict[Protocol, tuple[Payload, ...]]:
    """Several distinct requests, the same ones for every protocol."""
    requests = [next(drawn)]
    row_bytes = sum(len(raw_bytes(tensor)) for tensor in requests[0].values())
    n = max(MIN_PAYLOADS, min(max_payloads, BUDGET_BYTES // max(1, row_bytes)))
    requests.extend(islice(drawn, n - 1))
    return {
        protocol: tuple(
            grpc_payload(tensors, signature, model, version)
            if protocol == "grpc"
            else rest_payload(tensors, signature, workload)
            for tensors in requests
        )
        for protocol in protocols
    }


def rest_payload(tensors: Tensors, signature: Signature, workload: Workload) -> Payload:
    binary = workload.encoding == "binary"
    inputs: list[dict[str, object]] = []
    raw: list[bytes] = []
    for spec in signature.inputs:
        tensor = tensors[spec.name]
        described: dict[str, object] = {
            "name": spec.name,
            "shape": list(tensor.shape),
            "datatype": spec.datatype,
        }
        if binary:
            raw.append(raw_bytes(tensor, spec.datatype))
            described["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            described["data"] = json_data(spec.name, tensor)
        inputs.append(described)
    content: dict[str, object] = {"inputs": inputs}
    if binary:
        content["parameters"] = {"binary_data_output": True}
    header = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Payload(header + b"".join(raw), len(header) if binary else None)


def grpc_payload(tensors: Tensors, signature: Signature, model: str, version: str) -> Payload:
    request = oip_pb2.ModelInferRequest(model_name=model, model_version=version)
    for spec in signature.inputs:
        tensor = tensors[spec.name]
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=tensor.shape)
        request.raw_input_contents.append(raw_bytes(tensor, spec.datatype))
    return Payload(request.SerializeToString())


def raw_bytes(tensor: Tensor, datatype: str = "") -> bytes:
    """Little-endian, row-major; BYTES with a 4-byte length before each element."""
    if tensor.dtype == np.object_:
        return b"".join(len(one).to_bytes(4, "little") + one for one in tensor.ravel())
    if datatype == "BF16":
        return bfloat16_bits(tensor).astype("<u2").tobytes()
    return tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()


def bfloat16_bits(tensor: Tensor) -> Tensor:
    """float32 rounded to nearest, ties to even, as its upper 16 bits (uint16); finite values."""
    bits = np.ascontiguousarray(tensor, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def json_data(name: str, tensor: Tensor) -> object:
    """Flat, row-major; texts as strings, numbers for orjson, which writes their shortest form.

    Raises InputsInvalid for what JSON has no form for: other bytes than UTF-8, NaN, infinity.
    """
    if tensor.dtype == np.object_:
        try:
            return [one.decode("utf-8") for one in tensor.ravel()]
        except UnicodeDecodeError as error:
            raise InputsInvalid(
                f"workload.encoding: got json, but input '{name}' holds bytes that are not "
                "UTF-8, want binary"
            ) from error
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise InputsInvalid(
            f"workload.encoding: got json, but input '{name}' holds NaN or infinity, want binary"
        )
    return np.ascontiguousarray(tensor).ravel()
