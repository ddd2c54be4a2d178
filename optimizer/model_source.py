"""The model that a study starts from: built or opened, and checked against the data.

Building torch modules is `optimizer.torch_source`'s matter; torch is imported only by what needs
it.
"""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Samples
from optimizer.errors import SpecInvalid
from optimizer.exported import signature_of
from optimizer.spec import (
    Datatype,
    ExportedSource,
    InputSpec,
    ModelSource,
    ModuleSource,
    OnnxSource,
    OutputSpec,
    TorchKind,
    TorchSource,
)
from optimizer.torch_source import load_source, module_digest, named_outputs, shown

if TYPE_CHECKING:
    import torch

_ONNX_DATATYPES: Mapping[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}

_NUMPY_DATATYPES: Mapping[Datatype, str] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}


@dataclass(frozen=True)
class Signature:
    """What goes into a model and comes out; the first output holds the logits."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)


def read_signature(source: ModelSource) -> Signature:
    """The signature: of a factory or an object as it was stated, of an ONNX model or an exported
    program from the file.

    Raises SpecInvalid for a file that can't be opened or has a fixed batch axis.
    """
    if isinstance(source, TorchSource | ModuleSource):
        return Signature(source.inputs, source.outputs)
    if isinstance(source, ExportedSource):
        return Signature(*signature_of(source))
    session = _onnx_session(source.path)
    inputs = tuple(_onnx_input(tensor, source.path) for tensor in session.get_inputs())
    return Signature(
        inputs, tuple(OutputSpec(name=tensor.name) for tensor in session.get_outputs())
    )


def source_digest(source: ModelSource) -> str:
    """SHA-256 (hex) of what the model is made of.

    That is the ONNX file with the files of weights beside it that it names; or the weights, the
    factory's name and the source of its module where that lies beside the spec (modules that it
    imports in turn are not covered); or the archive; or what `module_digest` says of an object.
    """
    digest = hashlib.sha256()
    if isinstance(source, OnnxSource):
        digest.update(b"onnx\0" + _file_digest(source.path))
        for path in _external_files(source.path):
            digest.update(path.name.encode() + b"\0" + _file_digest(path))
        return digest.hexdigest()
    if isinstance(source, ExportedSource):
        digest.update(b"exported\0" + _file_digest(source.path))
        return digest.hexdigest()
    if isinstance(source, ModuleSource):
        return module_digest(source.module)
    code = hashlib.sha256(source.factory.source_bytes()).digest()
    digest.update(b"torch\0" + _file_digest(source.weights) + code + str(source.factory).encode())
    return digest.hexdigest()


def check_model(source: ModelSource, samples: Samples, n_classes: int) -> None:
    """Run a few samples through the model and compare shapes with the data's.

    A handful of `samples` is enough: at least 2, since a batch of 1 hides an output without a
    batch axis. `n_classes` is 0 for data without labels, whose outputs need only the batch axis.
    Raises SpecInvalid, saying which shape came and which one the data needs.
    """
    signature = read_signature(source)
    _check_inputs(source, signature, samples)
    if isinstance(source, OnnxSource):
        outputs = _run_onnx(source, signature, samples)
    else:
        outputs = _run_torch(source, signature, samples)
    n_samples = len(next(iter(samples.inputs.values())))
    _check_outputs(source, signature, [output.shape for output in outputs], n_samples, n_classes)
    _check_values(source, signature, outputs)


def _run_torch(source: TorchKind, signature: Signature, samples: Samples) -> list[NDArray[Any]]:
    import torch

    module = load_source(source)
    name = shown(source)
    keywords = _needed_keywords(module)
    if keywords:
        raise _invalid(
            name,
            f"model: forward of {name} needs {', '.join(keywords)} by keyword, want all inputs by "
            "position: wrap it in a module whose forward passes them on",
        )
    arguments = [torch.from_numpy(samples.inputs[tensor]) for tensor in signature.input_names]
    try:
        with torch.inference_mode():
            result = module(*arguments)
    except Exception as error:
        raise _invalid(
            name,
            f"model: {name} can't compute a batch of {[list(a.shape) for a in arguments]}: {error}",
        ) from error
    try:
        outputs = named_outputs(result, signature.output_names)
    except ValueError as error:
        raise _invalid(name, f"model.outputs: {name} {error}") from error
    return [output.numpy() for output in outputs.values()]


def _needed_keywords(module: "torch.nn.Module") -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [
        one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty
    ]


def _onnx_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises many kinds, none of them documented
        raise _invalid(str(path), f"model.onnx: {path} can't be opened: {error}") from error


def _onnx_input(tensor: Any, path: Path) -> InputSpec:
    """The input without its batch axis, which has to be symbolic."""
    datatype = _ONNX_DATATYPES.get(tensor.type)
    if datatype is None:
        known = ", ".join(_ONNX_DATATYPES)
        raise _invalid(
            str(path), f"model.onnx: input {tensor.name} is {tensor.type}, want one of {known}"
        )
    if not tensor.shape or isinstance(tensor.shape[0], int):
        raise _invalid(
            str(path),
            f"model.onnx: input {tensor.name} has the shape {tensor.shape}, want a symbolic "
            "first axis for the batch: export it again with a dynamic batch",
        )
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in tensor.shape[1:])
    return InputSpec(name=tensor.name, datatype=datatype, shape=shape)


def _run_onnx(source: OnnxSource, signature: Signature, samples: Samples) -> list[NDArray[Any]]:
    session = _onnx_session(source.path)
    feeds = {name: samples.inputs[name] for name in signature.input_names}
    try:
        outputs: list[NDArray[Any]] = session.run(list(signature.output_names), feeds)
    except Exception as error:  # as above
        raise _invalid(
            str(source.path), f"model.onnx: {source.path} can't compute a batch: {error}"
        ) from error
    return outputs


def _check_inputs(source: ModelSource, signature: Signature, samples: Samples) -> None:
    problems = []
    for tensor in signature.inputs:
        given = samples.inputs.get(tensor.name)
        if given is None:
            known = ", ".join(samples.inputs)
            problems.append(f"model: input {tensor.name} isn't in the data, which has {known}")
            continue
        if not _fits(given.shape[1:], tensor.shape):
            problems.append(
                f"model: input {tensor.name} wants [n, {_axes(tensor.shape)}], "
                f"the data has {list(given.shape)}"
            )
        if given.dtype != np.dtype(_NUMPY_DATATYPES[tensor.datatype]):
            problems.append(
                f"model: input {tensor.name} wants {tensor.datatype}, the data has {given.dtype}"
            )
    if problems:
        raise SpecInvalid(_shown(source), problems)


def _check_outputs(
    source: ModelSource,
    signature: Signature,
    shapes: Sequence[tuple[int, ...]],
    n_samples: int,
    n_classes: int,
) -> None:
    names = signature.output_names
    if len(shapes) != len(names):
        raise _invalid(
            _shown(source),
            f"model.outputs: the model returned {len(shapes)} tensors, "
            f"the spec names {len(names)}: {', '.join(names)}",
        )
    problems = [
        f"model: output {name} has the shape {list(shape)} for {n_samples} samples, "
        f"want [{n_samples}, ...]"
        for name, shape in zip(names, shapes, strict=True)
        if not shape or shape[0] != n_samples
    ]
    if n_classes and not problems and tuple(shapes[0]) != (n_samples, n_classes):
        problems.append(
            f"model: output {names[0]} has the shape {list(shapes[0])} for {n_samples} samples, "
            f"but the labels are of {n_classes} classes, want [{n_samples}, {n_classes}]"
        )
    if problems:
        raise SpecInvalid(_shown(source), problems)


def _check_values(
    source: ModelSource, signature: Signature, outputs: Sequence[NDArray[Any]]
) -> None:
    problems = []
    for name, output in zip(signature.output_names, outputs, strict=True):
        n_bad = int(np.count_nonzero(~np.isfinite(output)))
        if n_bad:
            problems.append(
                f"model: output {name} has {n_bad} of {output.size} values NaN or infinite for "
                f"{len(output)} samples, want finite ones: are the weights and the preprocessing "
                "of the data what the model was trained with?"
            )
    if problems:
        raise SpecInvalid(_shown(source), problems)


def _fits(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(given) == len(wanted) and all(
        want in (-1, axis) for axis, want in zip(given, wanted, strict=True)
    )


def _axes(shape: tuple[int, ...]) -> str:
    return ", ".join(str(axis) for axis in shape)


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _external_files(path: Path) -> list[Path]:
    """The files beside an ONNX model that hold some of its weights."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(path.parent / name for name in names)


def _shown(source: ModelSource) -> str:
    return str(source.path) if isinstance(source, OnnxSource) else shown(source)


def _invalid(source: str, problem: str) -> SpecInvalid:
    return SpecInvalid(source, [problem])
