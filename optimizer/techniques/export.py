"""Export: a torch model to ONNX with a dynamic batch.

By `torch.onnx.export(dynamo=True)`; where that fails by the older TorchScript exporter, which
the variant then notes. What the file computes is compared with torch by whoever builds it.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.errors import ParityMismatch, TechniqueFailed
from optimizer.model_source import Signature, read_signature
from optimizer.onnx_names import name_tensors, placeholders
from optimizer.parity import check_parity
from optimizer.recipe import Needs, Traits
from optimizer.space import Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_example import dynamic_shapes, example_inputs
from optimizer.torch_source import named_outputs
from optimizer.torch_variant import load_torch
from optimizer.variant import Kind, Model, OnnxModel, Stage, TorchModel, onnx_model

if TYPE_CHECKING:
    import onnx
    import torch

_NAME = "export"
_FILE = "model.onnx"
_FALLBACK_OPSET = 18
"""What the dynamo exporter writes too."""


class Export:
    traits = Traits(
        name=_NAME,
        version="2",
        stage=Stage.EXPORT,
        accepts=Kind.TORCH,
        gives=Kind.ONNX,
        needs=Needs.NOTHING,
        packages=("torch", "onnx", "onnxscript"),
        optional=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        return None

    def space(self, model: Model, context: Context) -> Space:
        return {}

    def describe(self, parameters: Parameters) -> str:
        return ""

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> OnnxModel:
        assert isinstance(model, TorchModel)
        signature = read_signature(model.source)
        example = example_inputs(signature)
        module = _in_order(load_torch(model), example, signature.output_names)
        notes: tuple[str, ...] = ()
        first = ""
        try:
            exported = _by_dynamo(module, example, signature)
        except Exception as dynamo_error:  # noqa: BLE001  the exporter raises whatever it meets
            first = _first_line(dynamo_error)
            try:
                exported = _by_torchscript(module, example, signature, directory)
            except Exception as error:
                raise TechniqueFailed(
                    _NAME,
                    f"the dynamo exporter says: {first}; the TorchScript exporter says: "
                    f"{_first_line(error)}. Export the model to ONNX by other means and name the "
                    "file as model.onnx in the spec",
                ) from error
            notes = (f"exported by the TorchScript exporter, since dynamo's failed: {first}",)
        name_tensors(exported, signature.input_names, signature.output_names)
        _strip_origin(exported)
        (directory / _FILE).write_bytes(exported.SerializeToString(deterministic=True))
        made = onnx_model(directory, _FILE, model.precision, notes)
        if notes:
            _check_trace(made, model, context, first)
        return made


def _in_order(
    module: "torch.nn.Module", example: tuple["torch.Tensor", ...], names: tuple[str, ...]
) -> "torch.nn.Module":
    """Of a module that returns a dict, one that returns a tuple in the signature's order: the
    exporters number outputs as they come. Any other as it is."""
    import torch

    with torch.inference_mode():
        if not isinstance(module(*example), Mapping):
            return module

    class InOrder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(named_outputs(self.module(*arguments), names).values())

    return InOrder().eval()


def _check_trace(made: OnnxModel, model: TorchModel, context: Context, first: str) -> None:
    """A trace holds the one path that the example took: other samples may need another."""
    indices = np.arange(context.max_batch_size) % len(context.calibration)
    inputs = context.calibration.read(indices).inputs
    try:
        check_parity(made, model, inputs, context.max_batch_size)
    except ParityMismatch as error:
        raise TechniqueFailed(
            _NAME,
            f"the dynamo exporter says: {first}; what the TorchScript exporter traced computes "
            f"something else ({error}). Where forward decides by values of tensors, write it with "
            "torch.where or torch.cond; or export the model to ONNX by other means and name the "
            "file as model.onnx in the spec",
        ) from error


def _by_dynamo(
    module: "torch.nn.Module", example: tuple["torch.Tensor", ...], signature: Signature
) -> "onnx.ModelProto":
    import torch

    with _quiet():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=dynamic_shapes(signature),
            input_names=placeholders("input", len(signature.inputs)),
            output_names=placeholders("output", len(signature.outputs)),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    exported: onnx.ModelProto = program.model_proto
    fixed = [value.name for value in exported.graph.input if _batch_is_fixed(value)]
    if fixed:
        raise ValueError(f"the batch axis of {', '.join(fixed)} came out fixed")
    return exported


def _by_torchscript(
    module: "torch.nn.Module",
    example: tuple["torch.Tensor", ...],
    signature: Signature,
    directory: Path,
) -> "onnx.ModelProto":
    import onnx
    import torch

    inputs = placeholders("input", len(signature.inputs))
    axes = {
        name: {0: "batch"}
        | {axis + 1: f"length_{axis + 1}" for axis, size in enumerate(tensor.shape) if size == -1}
        for name, tensor in zip(inputs, signature.inputs, strict=True)
    }
    axes |= {name: {0: "batch"} for name in placeholders("output", len(signature.outputs))}
    path = directory / "torchscript.onnx"
    with _quiet():
        torch.onnx.export(
            module,
            example,
            path,
            dynamo=False,
            dynamic_axes=axes,
            input_names=placeholders("input", len(signature.inputs)),
            output_names=placeholders("output", len(signature.outputs)),
            opset_version=_FALLBACK_OPSET,
            verbose=False,
        )
    exported = onnx.load(path)
    path.unlink()
    return exported


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say on every call and no user can act on."""
    from torch.jit._trace import TracerWarning  # torch.jit doesn't re-export it by type stubs

    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed", four times
    try:
        with warnings.catch_warnings():
            # torch.export copies a type that torch itself deprecates.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            # The fallback is chosen on purpose, and what it traces is compared with torch.
            warnings.filterwarnings("ignore", ".*legacy TorchScript-based", DeprecationWarning)
            warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
            warnings.filterwarnings("ignore", category=TracerWarning)
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            yield
    finally:
        registration.setLevel(level)


def _batch_is_fixed(value: "onnx.ValueInfoProto") -> bool:
    axes = value.type.tensor_type.shape.dim
    return not axes or axes[0].HasField("dim_value")


def _strip_origin(exported: "onnx.ModelProto") -> None:
    """Remove stack traces and paths of the exporting machine: they'd be published, and make
    equal models differ."""
    graph = exported.graph
    holders: list[Any] = [exported, graph, *graph.node, *graph.value_info, *graph.input]
    holders += [*graph.output, *graph.initializer, *exported.functions]
    holders += [node for function in exported.functions for node in function.node]
    for holder in holders:
        holder.doc_string = ""
        del holder.metadata_props[:]


def _first_line(error: BaseException) -> str:
    if error.__cause__ is not None:  # the exporter wraps what happened in general advice
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
