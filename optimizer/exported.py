"""A model given as an archive of `torch.export`, a .pt2 file: opened, checked, and its signature.

Loading one is not safe in general: torch unpickles some of its parts, may load compiled code,
and evaluates the expressions of its symbolic shapes. What can be refused is refused here before
torch sees it; the last can't, so the file is trusted as the user's own code is.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import SpecInvalid
from optimizer.spec import Datatype, ExportedSource, InputSpec, OutputSpec
from serve.engines.torch_archive import refuse_pickles

if TYPE_CHECKING:
    import torch

_BATCHES = (1, 32)
"""Sizes that a program has to take: a study measures and serves up to the second."""
_HOW = (
    "export it again: torch.export.export(model.eval(), (inputs of batch 2,), "
    'dynamic_shapes=({0: torch.export.Dim("batch")}, …one for each input))'
)


def load_program(path: Path) -> "torch.export.ExportedProgram":
    """Open the archive. Raises SpecInvalid where it can't be opened, holds what would have to be
    unpickled, or was exported in training mode."""
    import torch

    try:
        refuse_pickles(path)
        program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds, none of them documented
        raise _invalid(path, f"can't be opened: {error}") from error
    training = sorted({str(node.target) for node in program.graph.nodes if _trains(node)})
    if training:
        raise _invalid(path, f"was exported in training mode ({', '.join(training)}): {_HOW}")
    return program


def program_inputs(path: Path, program: "torch.export.ExportedProgram") -> tuple[InputSpec, ...]:
    """Names, datatypes and shapes of the inputs. Raises SpecInvalid for keyword arguments, nested
    inputs and a fixed batch."""
    arguments, keywords = program.call_spec.in_spec.children()
    if keywords.num_children:
        raise _invalid(
            path, f"takes {', '.join(keywords.context)} by keyword, want all by position: {_HOW}"
        )
    names = program.graph_signature.user_inputs
    if arguments.num_leaves != arguments.num_children:
        raise _invalid(path, "takes nested inputs, want one tensor for each argument")
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return tuple(_input(path, program, str(name), values.get(str(name))) for name in names)


def program_outputs(program: "torch.export.ExportedProgram") -> tuple[OutputSpec, ...]:
    """Names of the outputs: the keys, where the model returns a dict, else those of the graph."""
    spec = program.call_spec.out_spec
    names = spec.context if spec.type is dict else program.graph_signature.user_outputs
    return tuple(OutputSpec(name=str(name)) for name in names)


def signature_of(source: ExportedSource) -> tuple[tuple[InputSpec, ...], tuple[OutputSpec, ...]]:
    """Inputs and outputs of the program, under the spec's names where it gives any."""
    program = load_program(source.path)
    inputs = program_inputs(source.path, program)
    outputs = program_outputs(program)
    _check_number(source.path, "inputs", len(source.inputs), len(inputs))
    _check_number(source.path, "outputs", len(source.outputs), len(outputs))
    for given, found in zip(source.inputs, inputs, strict=False):
        if (given.datatype, given.shape) != (found.datatype, found.shape):
            raise _invalid(
                source.path,
                f"input {given.name} is {found.datatype} {list(found.shape)}, model.inputs says "
                f"{given.datatype} {list(given.shape)}",
            )
    return source.inputs or inputs, source.outputs or outputs


def _check_number(path: Path, what: str, n_named: int, n_found: int) -> None:
    if n_named not in (0, n_found):
        raise _invalid(path, f"has {n_found} {what}, model.{what} names {n_named}")


def _input(path: Path, program: "torch.export.ExportedProgram", name: str, value: Any) -> InputSpec:
    import torch

    if not isinstance(value, torch.Tensor):
        raise _invalid(path, f"input {name} is no tensor, want tensors only")
    datatype = _datatypes().get(value.dtype)
    if datatype is None:
        raise _invalid(path, f"input {name} is {value.dtype}, which isn't served")
    batch: Any = value.shape[0] if value.dim() else 1
    if isinstance(batch, int):
        raise _invalid(path, f"input {name} has a fixed batch of {batch}: {_HOW}")
    limits = program.range_constraints.get(batch.node.expr)
    if limits is not None and (limits.lower > _BATCHES[0] or limits.upper < _BATCHES[1]):
        raise _invalid(
            path,
            f"input {name} takes batches of {limits.lower} to {limits.upper}, want "
            f"{_BATCHES[0]} to {_BATCHES[1]}: {_HOW}",
        )
    axes: tuple[Any, ...] = tuple(value.shape[1:])
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in axes)
    return InputSpec(name=name, datatype=datatype, shape=shape)


def _datatypes() -> "dict[torch.dtype, Datatype]":
    import torch

    return {
        torch.bool: "BOOL", torch.uint8: "UINT8", torch.int8: "INT8", torch.int16: "INT16",
        torch.int32: "INT32", torch.int64: "INT64", torch.float16: "FP16",
        torch.float32: "FP32", torch.float64: "FP64",
    }  # fmt: skip


def _trains(node: "torch.fx.Node") -> bool:
    """Whether the node is a layer that was exported as it behaves in training."""
    import torch

    modes = {
        torch.ops.aten.batch_norm.default: 5,
        torch.ops.aten.dropout.default: 2,
        torch.ops.aten.feature_dropout.default: 2,
    }
    place = modes.get(node.target)  # type: ignore[call-overload]
    return place is not None and len(node.args) > place and node.args[place] is True


def _invalid(path: Path, problem: str) -> SpecInvalid:
    return SpecInvalid(str(path), [f"model.exported: {path} {problem}"])
