"""Traces: a module's operators as `torch.export` sees them, with names of tensors and shapes.

What can be exported to ONNX can be traced, since that exporter begins in the same way. It doesn't
know what an operator means for pruning.
"""

import operator as python_operators
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from optimizer.variant import Json

_EXAMPLE_BATCH = 2
"""Not 1: torch.export takes sizes 0 and 1 for constants."""
_EXAMPLE_LENGTH = 16
"""Of every other variable axis."""
_TYPES = {"BOOL": torch.bool, "FP16": torch.float16, "FP32": torch.float32,
          "FP64": torch.float64, "UINT8": torch.uint8, "INT8": torch.int8,
          "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64}  # fmt: skip
_GRAD, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_N_SETTINGS = {_GRAD: 1, _AUTOCAST: 4}
"""What export makes of `with torch.no_grad():` and of `with torch.autocast(…):` → how many
arguments it has before the body, which is a graph of its own."""
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range",
           "sym_constrain_range_for_size")  # fmt: skip
_REGION = "autocast"
"""The key of an operator's `meta` for the arguments of the `torch.autocast` that it is in."""


class Untraceable(ValueError):
    """The module's operators can't be seen."""


@dataclass(frozen=True)
class InputShape:
    """An input by its OIP datatype, and shape without the batch; -1 is a variable length."""

    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> Json:
        return [self.datatype, list(self.shape)]

    @classmethod
    def from_json(cls, stored: Json) -> "InputShape":
        return cls(stored[0], tuple(stored[1]))


@dataclass(frozen=True, eq=False)
class Trace:
    """Operators in order, all of them needed for the outputs. Parameters and buffers are
    placeholders, as inputs are."""

    graph: fx.Graph
    tensors: Mapping[str, str]
    """Placeholder → the parameter's or buffer's name in the module, one name for tied ones."""
    constants: Mapping[str, torch.Tensor]
    """Placeholder → a tensor that `forward` makes itself."""
    inputs: tuple[str, ...]
    """Placeholders of the module's inputs."""
    outputs: Any
    """How the module's outputs are nested: a spec of `torch.utils._pytree`."""


def trace(module: nn.Module, inputs: Sequence[InputShape]) -> Trace:
    """The module's trace with a dynamic batch. It is left as it was; it should be in eval mode.

    Raises Untraceable with the first line of the reason, or the operator that has operators of its
    own (`cond` and the like).
    """
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate((-1, *one.shape)) if size == -1}
        for one in inputs
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, example(inputs), dynamic_shapes=shapes)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise Untraceable(
            f"{type(module).__name__} can't be traced: {type(error).__name__}: {lines[0]}"
        ) from error
    seen = _read(module, program)
    _check_lengths(seen, inputs)
    return seen


def example(inputs: Sequence[InputShape]) -> tuple[torch.Tensor, ...]:
    """Zeros in the shape of the inputs, batch first."""
    return tuple(
        torch.zeros(
            (_EXAMPLE_BATCH, *(_EXAMPLE_LENGTH if axis == -1 else axis for axis in one.shape)),
            dtype=_TYPES[one.datatype],
        )
        for one in inputs
    )


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of what a node gave in the trace, variable axes as they were in the example."""
    return tuple(map(size_of, value.shape))


def size_of(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def operator(node: fx.Node) -> str:
    """The operator's plain name: `add` for `aten.add_.Tensor` too."""
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", "")
    return name if name.startswith("_") else str(name).rstrip("_")


def region_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of the innermost `torch.autocast` within `forward` that the operator is in;
    empty for none."""
    return tuple(node.meta.get(_REGION, ()))


def under_autocast(
    device: str,
    dtype: torch.dtype | None,
    enabled: bool,
    cache_enabled: bool | None,
    called: Callable[..., Any],
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """Call an operator or a layer in its region."""
    with torch.autocast(device, dtype, enabled, cache_enabled):
        return called(*arguments, **keywords)


def layer_of(node: fx.Node) -> str:
    """The name of the innermost module that the operator belongs to; empty for the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1] if paths and not paths[-1].startswith("_empty") else ""


def layers_of(node: fx.Node) -> tuple[str, ...]:
    """The names of all modules that the operator is in, from the outside."""
    return tuple(str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values())


class Masking(fx.Interpreter):
    """Computes a trace, changing inputs of operators on the way: slow, for comparison."""

    def __init__(
        self, seen: Trace, module: nn.Module, change: Callable[[fx.Node, list[Any]], list[Any]]
    ) -> None:
        """`change` gets each operator with its arguments and gives the arguments to take."""
        super().__init__(nn.Module(), graph=seen.graph)
        self._seen = seen
        self._named = named_tensors(module)
        self._change = change

    def compute(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self._seen.inputs, inputs, strict=True))
        arguments = [
            given.get(node.name, self._tensor(node.name))
            for node in self._seen.graph.nodes
            if node.op == "placeholder"
        ]
        with torch.no_grad():
            return cast(tuple[torch.Tensor, ...], self.run(*arguments))

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        changed = self._change(n, list(arguments))
        assert callable(n.target)
        region = region_of(n)
        if region:
            return under_autocast(*region, n.target, *changed, **keywords)
        return n.target(*changed, **keywords)

    def _tensor(self, placeholder: str) -> torch.Tensor | None:
        if placeholder in self._seen.constants:
            return self._seen.constants[placeholder]
        return self._named.get(self._seen.tensors.get(placeholder, ""))


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def first_names(module: nn.Module) -> dict[str, str]:
    """Name → the first of the names of the same tensor."""
    firsts: dict[int, str] = {}
    return {
        name: firsts.setdefault(id(tensor), name) for name, tensor in named_tensors(module).items()
    }


def _check_lengths(seen: Trace, inputs: Sequence[InputShape]) -> None:
    nodes = {node.name: node for node in seen.graph.nodes if node.op == "placeholder"}
    for name, one in zip(seen.inputs, inputs, strict=True):
        sizes = nodes[name].meta["val"].shape
        for axis, (size, wanted) in enumerate(zip(sizes, (-1, *one.shape), strict=True)):
            if wanted == -1 and _is_fixed(size):
                raise Untraceable(f"axis {axis} of the input {name} only works at {size}")


def _is_fixed(size: Any) -> bool:
    """A variable that `forward` took for a number (by `len(x)`, say) is one that has its value."""
    return not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None


def _read(module: nn.Module, program: torch.export.ExportedProgram) -> Trace:
    firsts = first_names(module)
    tensors, constants, inputs = {}, {}, []
    for one in program.graph_signature.input_specs:
        name = one.arg.name
        if one.kind is InputKind.USER_INPUT:
            inputs.append(name)
        elif one.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert one.target is not None
            tensors[name] = firsts[one.target]
        elif one.kind is InputKind.CONSTANT_TENSOR and one.target is not None:
            constants[name] = program.constants[one.target]
        else:
            raise Untraceable(f"{type(module).__name__} has a {one.kind.name.lower()} as input")
    graph = _plain(type(module).__name__, program.graph_module)
    return Trace(graph, tensors, constants, tuple(inputs), program.call_spec.out_spec)


# --- regions: operators that have operators of their own


def _plain(name: str, program: fx.GraphModule) -> fx.Graph:
    """The program's graph without regions, checks, and what nothing depends on."""
    graph = _inlined(program)
    for node in [one for one in graph.nodes if operator(one) in _CHECKS]:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "get_attr":  # a body: parameters, buffers and constants are placeholders
            found = operator(next(iter(node.users)))
            raise Untraceable(f"{name} has {found} in its forward, which pruning can't follow")
    return graph


def _inlined(program: fx.GraphModule) -> fx.Graph:
    """The program's graph with the bodies of its regions in their places, from the inside."""
    for node in list(program.graph.nodes):
        if operator(node) in _N_SETTINGS:
            _inline(program, node)
    return program.graph


def _inline(program: fx.GraphModule, region: fx.Node) -> None:
    """What is under autocast is marked as such, so that it stays there where training is under
    another; what leaves a `no_grad` is detached, which is all that a gradient sees of it. (Export
    puts an `enable_grad` within a `no_grad` behind it.)"""
    n_settings = _N_SETTINGS[operator(region)]
    settings, (body, *given) = region.args[:n_settings], region.args[n_settings:]
    assert isinstance(body, fx.Node)
    inner = _inlined(cast(fx.GraphModule, program.get_submodule(str(body.target))))
    copies = dict(zip(inner.find_nodes(op="placeholder"), given, strict=True))
    with program.graph.inserting_before(region):
        made = program.graph.graph_copy(inner, cast(dict[fx.Node, fx.Node], copies))
        if operator(region) == _GRAD and not settings[0]:
            made = tuple(_detached(program.graph, one) for one in cast(tuple[fx.Node, ...], made))
    if operator(region) == _AUTOCAST:
        for node in inner.nodes:
            if node.op == "call_function":
                cast(fx.Node, copies[node]).meta.setdefault(_REGION, settings)
    for user in list(region.users):
        assert user.target is python_operators.getitem
        user.replace_all_uses_with(cast(tuple[fx.Node, ...], made)[cast(int, user.args[1])])
        program.graph.erase_node(user)
    program.graph.erase_node(region)


def _detached(graph: fx.Graph, made: fx.Node) -> fx.Node:
    if not isinstance(made.meta.get("val"), torch.Tensor):
        return made
    node = graph.call_function(torch.ops.aten.detach.default, (made,))
    node.meta = dict(made.meta)
    return node
