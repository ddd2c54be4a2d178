"""Surgery: taking indices out of a module's tensors, so that it still computes.

Layers of torch know how wide they are, and are told. Where a module's own `forward` has widths
written in, its trace is used in its place, with the widths changed there: the layers stay, under
their names, but the modules around them are no longer called. What should go is decided elsewhere.
"""

import operator as python_operators
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree

from optimizer.pruning.flow import Value
from optimizer.pruning.graph import (
    InputShape,
    Masking,
    Trace,
    first_names,
    layer_of,
    named_tensors,
    operator,
    region_of,
    trace,
    under_autocast,
)
from optimizer.pruning.groups import Network, Place, network_of
from optimizer.pruning.units import Ids
from optimizer.variant import Json

MODULE, TRACE = "module", "trace"
"""What computes the pruned network: the module's own `forward`, or its trace."""
_TOLERANCE = 1e-4
"""Relative to an output, and to how far outputs are spread: sums come in another order."""
_TOLERANCE_EPS = 8
"""The same in units of the last place, where half precision rounds more than that."""
_MIN_SPREAD = 1e-3
_QUARTER_OF_NORMAL = 0.3186
"""A quarter of a normal distribution is within so many standard deviations of its mean."""
_FEW = 0.01
"""The share of outputs, constants counted once, that may be farther off: by cancellation, or where
numbers are nearly tied."""
_CALLED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear,
           nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.Embedding, nn.LayerNorm,
           nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # fmt: skip
"""Layers that a trace calls as such, so that they can be trained and replaced."""


def operations_of(
    network: Network, gone: Sequence[int], form: str, inputs: Sequence[InputShape]
) -> Json:
    """What `operate` needs to take these units out of the module again."""
    return {
        "form": form,
        "inputs": [one.to_json() for one in inputs],
        "kept": [[name, axis, stay] for (name, axis), stay in sorted(network.kept(gone).items())],
    }


def operate(module: nn.Module, operations: Json) -> nn.Module:
    """Take out of the module what `operations` don't keep; it may be edited in place.

    Raises ValueError where they don't fit the module.
    """
    kept: dict[Place, list[int]] = {(name, axis): stay for name, axis, stay in operations["kept"]}
    if operations["form"] == MODULE:
        return _narrowed(module, kept)
    inputs = [InputShape.from_json(one) for one in operations["inputs"]]
    network = network_of(trace(module, inputs))
    return _from_trace(_narrowed(module, kept), network, network.gone(kept))


def masked_outputs(
    module: nn.Module, network: Network, gone: Sequence[int], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """What the whole module gives with these units set to zero wherever weights sum over them:
    the reference for what it has to give without them."""
    leaving = torch.tensor(sorted(gone))
    consumed: dict[fx.Node, list[tuple[int, int, torch.Tensor]]] = {}
    for one in network.flow.consumptions:
        roots = torch.from_numpy(network.flow.units.roots(one.ids))
        keep = ~torch.isin(roots, leaving)
        consumed.setdefault(one.node, []).append((one.argument, one.axis, keep))

    def mask(node: fx.Node, arguments: list[Any]) -> list[Any]:
        for argument, axis, keep in consumed.get(node, ()):
            tensor = arguments[argument]
            sizes = [-1 if one == axis else 1 for one in range(tensor.ndim)]
            arguments[argument] = tensor * keep.to(tensor).view(sizes)
        return arguments

    return Masking(network.flow.seen, module, mask).compute(inputs)


def tolerance_of(network: Network) -> float:
    """For `difference`: by the coarsest numbers that the network computes with."""
    values = [node.meta.get("val") for node in network.flow.seen.graph.nodes]
    floats = [
        one.dtype for one in values if isinstance(one, torch.Tensor) and one.is_floating_point()
    ]
    coarsest = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    return max(_TOLERANCE, _TOLERANCE_EPS * coarsest)


def difference(
    pruned: nn.Module,
    wanted: Sequence[Any],
    inputs: Sequence[torch.Tensor],
    tolerance: float = _TOLERANCE,
) -> str:
    """How the pruned module's outputs differ from the masked one's; empty for not at all."""
    try:
        with torch.no_grad():
            given, _ = _pytree.tree_flatten(_plain(pruned(*inputs)))
    except Exception as error:  # noqa: BLE001  what a module raises on widths it doesn't expect
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if len(given) != len(wanted):
        return f"{len(given)} outputs in place of {len(wanted)}"
    for got, want in zip(given, wanted, strict=True):
        problem = _output_difference(got, want, tolerance)
        if problem:
            return problem
    return ""


def _output_difference(got: Any, want: Any, tolerance: float) -> str:
    """Also of outputs that aren't tensors: numbers, or None."""
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        return "" if type(got) is type(want) and got == want else f"an output is {got}, not {want}"
    if got.shape != want.shape:
        return f"an output is {list(got.shape)}, want {list(want.shape)}"
    if not want.is_floating_point():
        n_others = int((got != want).sum())
        few = n_others <= _FEW * want.numel()
        return "" if few else f"{n_others} of {want.numel()} values of an output are others"
    return _float_difference(got, want, tolerance)


def _float_difference(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str:
    """Each number may differ by the tolerance relative to itself and to how far most are spread,
    so that a large constant among them (a mask's -1e4) excuses nothing; a few relative to the
    largest. NaN always differs."""
    got, want = got.double(), want.double()
    far = torch.where(got == want, 0.0, (got - want).abs())
    values = torch.unique(want[want.isfinite()])
    largest = float(values.abs().max()) if len(values) else 0.0
    n_far = int((~(far <= tolerance * (want.abs() + _spread(values)))).sum())
    excused = bool((far <= tolerance * max(_MIN_SPREAD, largest)).all())
    if n_far <= (_FEW * len(values) if excused else 0):
        return ""
    return f"an output differs by {float(far.max()):.3g} from what zeros in its place give"


def _spread(values: torch.Tensor) -> float:
    """The standard deviation of [n] distinct values by the quarter of them nearest to the median,
    so that those far off don't count; not less than what float32 makes of numbers around 1."""
    if not len(values):
        return _MIN_SPREAD
    distances = (values - values.median()).abs().sort().values
    quarter = distances[min(len(values) - 1, max(1, len(values) // 4))]
    return max(_MIN_SPREAD, float(quarter) / _QUARTER_OF_NORMAL)


def _plain(outputs: Any) -> Any:
    """Objects that are mappings in disguise as dicts, which pytree can flatten."""
    return dict(outputs) if isinstance(outputs, Mapping) else outputs


# --- tensors and the layers that hold them


def _narrowed(module: nn.Module, kept: Mapping[Place, Sequence[int]]) -> nn.Module:
    tensors = named_tensors(module)
    firsts = first_names(module)
    by_tensor: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for (name, axis), stay in kept.items():
        _check_fits(tensors, name, axis, stay)
        by_tensor.setdefault(name, []).append((axis, torch.tensor(stay, dtype=torch.int64)))
    for name, cuts in by_tensor.items():
        narrow = tensors[name].detach()
        for axis, index in cuts:
            narrow = narrow.index_select(axis, index)
        narrow = narrow.contiguous().clone()
        is_parameter = isinstance(tensors[name], nn.Parameter)
        new = nn.Parameter(narrow, tensors[name].requires_grad) if is_parameter else narrow
        for other in [one for one, first in firsts.items() if first == firsts[name]]:
            path, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(path), attribute, new)
    for part in module.modules():
        _tell_widths(part)
    return module


def _check_fits(
    tensors: Mapping[str, torch.Tensor], name: str, axis: int, stay: Sequence[int]
) -> None:
    if name not in tensors or axis >= tensors[name].ndim:
        raise ValueError(f"the module has no tensor {name} with an axis {axis}")
    size = tensors[name].shape[axis]
    if not stay or max(stay) >= size or min(stay) < 0:
        raise ValueError(f"{name}: got {len(stay)} indices to keep of axis {axis}, "
                         f"want 1 to {size} of them, each below {size}")  # fmt: skip


def _tell_widths(part: nn.Module) -> None:
    """Set the attributes in which torch's layers repeat the shapes of their tensors."""
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not part.transposed:
        per_group = part.weight.shape[1]
        before = part.out_channels // part.groups
        part.out_channels = part.weight.shape[0]
        if part.groups > 1:
            part.groups = part.out_channels // before
        part.in_channels = per_group * part.groups
    elif isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        part.in_channels, part.out_channels = part.weight.shape[0], part.weight.shape[1]
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, nn.modules.batchnorm._NormBase):
        first = next((t for t in (part.weight, part.running_mean) if t is not None), None)
        part.num_features = part.num_features if first is None else len(first)
    elif isinstance(part, nn.GroupNorm) and part.weight is not None:
        per_group = part.num_channels // part.num_groups
        part.num_channels = len(part.weight)
        part.num_groups = part.num_channels // per_group
    elif isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = part.weight.shape
    elif isinstance(part, nn.PReLU):
        part.num_parameters = len(part.weight)


# --- the trace in the module's place


def _from_trace(module: nn.Module, network: Network, gone: set[int]) -> nn.Module:
    """The trace as a module, with the narrowed module's layers and tensors under their names."""
    seen = network.flow.seen
    graph = fx.Graph()
    widths = _Widths(network, gone, graph)
    root = _Holder(module, seen)
    copies: dict[fx.Node, Any] = {}
    for node in seen.graph.nodes:
        if node.op == "placeholder":
            copies[node] = _held(graph, seen, node)
        elif node.op == "output":
            flat = fx.node.map_arg(node.args[0], copies.__getitem__)
            graph.output(_pytree.tree_unflatten(list(flat), seen.outputs))
        else:
            copies[node] = _copied(module, node, copies, widths)
    made = fx.GraphModule(root, graph, type(module).__name__)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made.train(module.training)


class _Holder(nn.Module):
    """The module's tree of layers and tensors, and the constants of its trace."""

    def __init__(self, module: nn.Module, seen: Trace) -> None:
        super().__init__()
        for name, part in module.named_children():
            self.add_module(name, part)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            kept = name not in module._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=kept)
        for name, tensor in seen.constants.items():
            self.register_buffer(name, tensor, persistent=False)


class _Widths:
    """What sizes in an operator's arguments become."""

    def __init__(self, network: Network, gone: set[int], graph: fx.Graph) -> None:
        """`graph` is the new one, for what has to be computed."""
        self._network = network
        self._gone = gone
        self.graph = graph

    def n_kept(self, ids: Ids) -> int:
        roots = self._network.flow.units.roots(ids).tolist()
        return sum(root not in self._gone for root in roots)

    def of_axis(self, node: Any, axis: int) -> tuple[int, int] | None:
        """(kept, before) along an axis of a tensor; None where nothing goes."""
        value = self._network.flow.value(node)
        if value is None:
            return None
        ids = value.axes.get(axis % len(value.shape))
        if ids is None or self.n_kept(ids) == len(ids):
            return None
        return self.n_kept(ids), len(ids)

    def value(self, node: Any) -> Value | None:
        return self._network.flow.value(node)

    def parts(self, node: fx.Node) -> tuple[Value, ...]:
        values = self._network.flow.values[node]
        assert isinstance(values, tuple)
        return values

    def ids(self, node: Any, axis: int) -> Ids | None:
        value = self.value(node)
        return None if value is None else value.axes.get(axis % len(value.shape))


def _held(graph: fx.Graph, seen: Trace, node: fx.Node) -> fx.Node | None:
    if node.name in seen.inputs:
        return graph.placeholder(node.name)
    if node.name in seen.constants:
        return graph.get_attr(node.name)
    return graph.get_attr(seen.tensors[node.name])


def _copied(
    module: nn.Module,
    node: fx.Node,
    copies: Mapping[fx.Node, Any],
    widths: _Widths,
) -> fx.Node:
    graph = widths.graph
    region, called = region_of(node), _called_layer(module, node)
    if called:
        x = copies[cast(fx.Node, node.args[0])]
        if region:  # not by the name of what is there now: layers are replaced
            return graph.call_function(under_autocast, (*region, graph.get_attr(called), x))
        return graph.call_module(called, (x,))
    arguments = fx.node.map_arg(node.args, copies.__getitem__)
    keywords = fx.node.map_arg(node.kwargs, copies.__getitem__)
    target = node.target
    rewrite = _REWRITES.get(operator(node))
    if rewrite is not None:
        rewritten = rewrite(node, list(arguments), widths)
        if rewrite is _split and rewritten != list(arguments):
            target, keywords = torch.ops.aten.split_with_sizes.default, {}
        arguments = tuple(rewritten)
    if region and isinstance(target, torch._ops.OpOverload):
        return graph.call_function(under_autocast, (*region, target, *arguments), dict(keywords))
    assert callable(target)
    return graph.call_function(target, arguments, dict(keywords))


def _called_layer(module: nn.Module, node: fx.Node) -> str:
    """The layer of torch's whose one operator this is; empty for none."""
    name = layer_of(node)
    if not name or operator(node) in ("getitem", "detach"):
        return ""
    try:
        part = module.get_submodule(name)
    except AttributeError:
        return ""
    if type(part) not in _CALLED or getattr(part, "padding_mode", "zeros") != "zeros":
        return ""
    if isinstance(part, nn.GroupNorm) and not part.affine:
        return ""  # nothing tells it how many groups are left
    return "" if isinstance(part, nn.Embedding) else name


def _resized(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """Sizes of a view: (x, sizes)."""
    sizes = [
        _scaled(widths, size, widths.of_axis(node, axis)) for axis, size in enumerate(arguments[1])
    ]
    return [arguments[0], sizes, *arguments[2:]]


def _scaled(widths: _Widths, size: Any, change: tuple[int, int] | None) -> Any:
    if change is None or (isinstance(size, int) and size < 0):
        return size
    kept, before = change
    if isinstance(size, int):
        return kept
    times = widths.graph.call_function(python_operators.mul, (size, kept))
    return widths.graph.call_function(python_operators.floordiv, (times, before))


def _unflattened(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """(x, axis, sizes)."""
    x = widths.value(node.args[0])
    assert x is not None
    first = arguments[1] % len(x.shape)
    sizes = [
        _scaled(widths, size, widths.of_axis(node, first + offset))
        for offset, size in enumerate(arguments[2])
    ]
    return [arguments[0], arguments[1], sizes]


def _sliced(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """(x, axis, start, end, step): by other steps than 1 nothing goes."""
    defaults: list[Any] = [None, 0, None, None, 1]
    x, axis, start, end, _ = [*arguments, *defaults[len(arguments) :]]
    ids = widths.ids(node.args[0], axis)
    if ids is None or widths.of_axis(node.args[0], axis) is None:
        return arguments
    first, last, _ = slice(start, end).indices(len(ids))
    return [x, axis, widths.n_kept(ids[:first]), widths.n_kept(ids[:last]), 1]


def _narrowed_to(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """(x, axis, start, length)."""
    x, axis, start, length = arguments
    ids = widths.ids(node.args[0], axis)
    if ids is None or widths.of_axis(node.args[0], axis) is None:
        return arguments
    first = start % len(ids) if start < 0 else start
    inside = ids[first : first + length]
    return [x, axis, widths.n_kept(ids[:first]), widths.n_kept(inside)]


def _padded(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """(x, pads from the last axis on, …)."""
    value = widths.value(node)
    assert value is not None
    pads = list(arguments[1])
    for pair in range(len(pads) // 2):
        ids = value.axes.get(len(value.shape) - 1 - pair)
        before, after = pads[2 * pair : 2 * pair + 2]
        if ids is not None and (before or after):
            pads[2 * pair] = widths.n_kept(ids[:before])
            pads[2 * pair + 1] = widths.n_kept(ids[len(ids) - after :]) if after else 0
    return [arguments[0], pads, *arguments[2:]]


def _split(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """(x, size or sizes, axis)."""
    axis = arguments[2] if len(arguments) > 2 else 0
    if widths.of_axis(node.args[0], axis) is None:
        return arguments
    kept = [_size(widths, part, axis % len(part.shape)) for part in widths.parts(node)]
    return [arguments[0], kept, axis]


def _size(widths: _Widths, value: Value, axis: int) -> int:
    ids = value.axes.get(axis)
    return value.shape[axis] if ids is None else widths.n_kept(ids)


def _regrouped(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """Groups of a convolution (the seventh argument) or a normalization (the second)."""
    index = 1 if operator(node) == "group_norm" else 6
    change = widths.of_axis(node.args[0], 1)
    if change is not None and len(arguments) > index and arguments[index] > 1:
        kept, before = change
        arguments[index] = arguments[index] * kept // before
    return arguments


def _reshuffled(node: fx.Node, arguments: list[Any], widths: _Widths) -> list[Any]:
    """(x, groups): those of which something is left."""
    ids = widths.ids(node.args[0], 1)
    if ids is not None:
        arguments[1] = sum(widths.n_kept(row) > 0 for row in ids.reshape(arguments[1], -1))
    return arguments


_REWRITES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "group_norm"), _regrouped),
    "view": _resized,
    "reshape": _resized,
    "_unsafe_view": _resized,
    "expand": _resized,
    "broadcast_to": _resized,
    "unflatten": _unflattened,
    "slice": _sliced,
    "narrow": _narrowed_to,
    "channel_shuffle": _reshuffled,
    "native_channel_shuffle": _reshuffled,
    "pad": _padded,
    "constant_pad_nd": _padded,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
}
