"""A torch model as a program of `torch.export` with a dynamic batch, for the targets on torch."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optimizer.model_source import read_signature
from optimizer.torch_example import dynamic_shapes, example_inputs
from optimizer.torch_source import named_outputs
from optimizer.torch_variant import load_torch
from optimizer.variant import TorchModel
from serve.engines import Signature
from serve.engines.torch_archive import write_signature
from serve.tensor import DATATYPES, TensorSpec

if TYPE_CHECKING:
    import torch


def export_program(
    model: TorchModel, directory: Path, device: str = "cpu"
) -> "torch.export.ExportedProgram":
    """The program, whose outputs are a tuple in the signature's order; its signature goes to
    `directory`. Raises what torch.export raises, and ValueError for a batch that came out fixed."""
    import torch

    source = read_signature(model.source)
    names = source.output_names
    example = tuple(tensor.to(device) for tensor in example_inputs(source))

    class InOrder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = load_torch(model).to(device)

        def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(named_outputs(self.module(*arguments), names).values())

    with quiet(), torch.no_grad():
        program = torch.export.export(
            InOrder().eval(), example, dynamic_shapes=(dynamic_shapes(source),)
        )
    fixed = [n for n, one in zip(source.input_names, _placeholders(program), strict=True)
             if isinstance(one.shape[0], int)]  # fmt: skip
    if fixed:
        raise ValueError(f"the batch axis of {', '.join(fixed)} came out fixed")
    write_signature(directory, _signature(program, source.input_names, names))
    _strip_origin(program)
    return program


def _signature(
    program: "torch.export.ExportedProgram", inputs: Sequence[str], outputs: Sequence[str]
) -> Signature:
    given = zip(inputs, _placeholders(program), strict=True)
    made = zip(outputs, _results(program), strict=True)
    return Signature(
        tuple(_tensor_spec(name, value) for name, value in given),
        tuple(_tensor_spec(name, value) for name, value in made),
    )


def _placeholders(program: "torch.export.ExportedProgram") -> "list[torch.Tensor]":
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [values[str(name)] for name in program.graph_signature.user_inputs]


def _results(program: "torch.export.ExportedProgram") -> "list[torch.Tensor]":
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [values[str(name)] for name in program.graph_signature.user_outputs]


def _tensor_spec(name: str, value: "torch.Tensor") -> TensorSpec:
    datatype = DATATYPES[np.dtype(str(value.dtype).removeprefix("torch."))]
    axes: tuple[object, ...] = tuple(value.shape)
    return TensorSpec(name, datatype, tuple(a if isinstance(a, int) else -1 for a in axes))


def _strip_origin(program: "torch.export.ExportedProgram") -> None:
    """Remove stack traces with the paths of this machine: they'd be published, and make equal
    models differ."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says on every call and no user can act on."""
    with warnings.catch_warnings():
        # torch.export copies a type that torch itself deprecates.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        yield
