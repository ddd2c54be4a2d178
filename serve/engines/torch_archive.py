"""What the engines on torch share: archives (`.pt2`), the signature beside one, and threads.

torch is imported when a version is loaded, since the server runs without it. An archive doesn't
tell names and shapes as clients know them, so the optimizer writes them beside it. It doesn't
know what is in an archive beyond its checks.
"""

import importlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from serve.engines import EngineOption, EngineSpec, EngineUnavailable, Signature
from serve.errors import ArtifactInvalid
from serve.tensor import Array

if TYPE_CHECKING:
    import torch

SIGNATURE_FILE = "signature.json"
DEVICES = ("cpu", "cuda")
DATATYPES = ("BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
"""Those that numpy and torch share."""
_MAX_SIGNATURE_BYTES = 1_000_000
_MAX_CONFIG_BYTES = 64_000_000
_MAX_ENTRIES = 100_000
_SIGNATURES = pydantic.TypeAdapter(Signature)


def import_torch(engine: str) -> Any:
    """The module torch; raises EngineUnavailable, which says what to install."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise EngineUnavailable(
            f"engine {engine!r} can't be loaded ({error}); pip install 'trimserve[torch]'"
        ) from error


def write_signature(directory: Path, signature: Signature) -> None:
    document = json.dumps(asdict(signature), sort_keys=True, indent=1)
    (directory / SIGNATURE_FILE).write_text(document + "\n", "utf-8")


def read_signature(directory: Path) -> Signature:
    """Names, datatypes and shapes of the archive's tensors. Raises ArtifactInvalid."""
    path = directory / SIGNATURE_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_SIGNATURE_BYTES + 1)
        if len(raw) > _MAX_SIGNATURE_BYTES:
            raise ValueError(f"over {_MAX_SIGNATURE_BYTES} bytes")
        signature = _SIGNATURES.validate_json(raw)
    except (OSError, ValueError) as error:
        raise ArtifactInvalid(str(path), f"no signature: {first_line(error)}") from error
    for one in (*signature.inputs, *signature.outputs):
        if one.datatype not in DATATYPES:
            raise ArtifactInvalid(
                str(path), f"{one.name}: got {one.datatype}, want one of {', '.join(DATATYPES)}"
            )
    return signature


def check_options(path: Path, spec: EngineSpec) -> str:
    """The device that the spec's options name. Raises ArtifactInvalid for any other option, and
    for a device that this machine lacks."""
    allowed: Mapping[str, tuple[EngineOption, ...]] = {"device": DEVICES}
    for name, value in spec.options.items():
        if value not in allowed.get(name, ()):
            raise ArtifactInvalid(
                str(path),
                f"engine.options.{name}: got {value!r}, want one of device: {', '.join(DEVICES)}",
            )
    device = str(spec.options.get("device", "cpu"))
    if device == "cuda" and not import_torch(spec.name).cuda.is_available():
        raise ArtifactInvalid(
            str(path), "engine.options.device: 'cuda' needs an NVIDIA GPU and a torch built for it"
        )
    return device


def check_archive(path: Path) -> tuple[str, ...]:
    """Names of the archive's entries below its one folder, after every byte was compared with its
    checksum: native readers come to this file next. Raises ArtifactInvalid."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) > _MAX_ENTRIES:
                raise ValueError(f"over {_MAX_ENTRIES} entries")
            for name in names:
                _check_name(name)
            broken = archive.testzip()
    except Exception as error:  # a broken archive raises whatever zlib and struct do
        raise ArtifactInvalid(str(path), f"can't load it: no whole archive: {error}") from error
    if broken is not None:
        raise ArtifactInvalid(str(path), f"can't load it: {broken} is damaged")
    return tuple(name.partition("/")[2] for name in names)


def _check_name(name: str) -> None:
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"the entry {name!r} leads out of it")


def refuse_pickles(path: Path) -> None:
    """Raises ValueError for what torch.export.load would unpickle without a limit, or run.

    Example inputs it reads with `weights_only`, but falls back to all of pickle where that
    fails: hence they are read here the strict way first.
    """
    torch = import_torch("torch")
    with zipfile.ZipFile(path) as archive:
        names = [info.filename.partition("/")[2] for info in archive.infolist()]
        for info, name in zip(archive.infolist(), names, strict=True):
            if name.startswith(("data/weights/", "data/constants/")):
                if name.endswith(".pt"):
                    raise ValueError(f"{name} is pickled, want an archive of torch 2.9 or newer")
                if name.endswith("_config.json"):
                    _refuse_pickled_payloads(_content(archive, info))
            elif name.startswith("data/aotinductor/"):
                raise ValueError("it holds compiled code, want the exported program alone")
            elif name.startswith("data/sample_inputs/") and info.file_size:
                torch.load(io.BytesIO(_content(archive, info)), weights_only=True)
        if "models/model.json" not in names:
            raise ValueError("it holds no exported program of torch 2.9 or newer")


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{info.filename} has over {_MAX_CONFIG_BYTES} bytes")
    return archive.read(info)


def _refuse_pickled_payloads(config: bytes) -> None:
    for name, payload in json.loads(config)["config"].items():
        if payload["use_pickle"]:
            raise ValueError(f"{name} is a pickled object, want plain tensors only")


def limit_threads(torch: Any, n: int) -> None:
    """Have what this thread calls next compute on `n` threads. torch keeps the number for each
    thread, so that instances of other numbers stay as they are."""
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def to_tensors(
    torch: Any, signature: Signature, inputs: Mapping[str, Array], device: str
) -> "list[torch.Tensor]":
    """In the order of the signature, on the device; on the CPU they share the arrays' memory."""
    tensors = []
    for spec in signature.inputs:
        array = np.asarray(inputs[spec.name], order="C")
        # torch warns of memory that it must not write to, which it doesn't do here.
        tensors.append(torch.from_numpy(array if array.flags.writeable else array.copy()))
    return tensors if device == "cpu" else [tensor.to(device) for tensor in tensors]


def to_arrays(signature: Signature, tensors: "Sequence[torch.Tensor]") -> dict[str, Array]:
    """By name, in memory of their own: a model may give a view of what it was given."""
    named = zip(signature.outputs, tensors, strict=True)
    return {spec.name: tensor.detach().cpu().numpy().copy() for spec, tensor in named}


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"


def cpu_precision(dtype: str) -> str:
    """What torch's name for a type ("torch.float32") is called here."""
    names = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16",
             "half": "fp16", "c10::bfloat16": "bf16", "c10::half": "fp16", "double": "fp64",
             "float64": "fp64", "qint8": "int8", "quint8": "int8", "int8": "int8",
             "uint8": "int8", "signed char": "int8", "unsigned char": "int8"}  # fmt: skip
    bare = dtype.removeprefix("torch.").lower()
    return names.get(bare, bare or "unknown")
