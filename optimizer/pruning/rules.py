"""Rules: what each operator does to the units of what goes into it.

Operators that only move elements (views, concatenations, slices) are run on tensors of ids, which
then say where each unit went. Pointwise ones are known by torch's own tag. It decides nothing
about which units should go.
"""

import math
import operator as python_operators
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from optimizer.pruning.flow import Flow, Pattern, Value, concrete, nodes_in
from optimizer.pruning.graph import Trace, operator, shape_of
from optimizer.pruning.units import Ids

Rule = Callable[[Flow, fx.Node], Value | tuple[Value, ...]]


def walk(seen: Trace, choices: Mapping[Pattern, int]) -> Flow:
    """Follow the units through the whole trace. Inputs and outputs of the model stay whole."""
    flow = Flow(seen, choices)
    for node in seen.graph.nodes:
        if node.op == "placeholder":
            flow.values[node] = _placeholder(flow, node)
        elif node.op == "output":
            for value in map(flow.value, nodes_in(node.args, flow)):
                flow.freeze(value)
        elif _gives_tensors(node):
            flow.values[node] = _rule(node)(flow, node)
    return flow


def _placeholder(flow: Flow, node: fx.Node) -> Value:
    """A parameter that nothing uses stays: who knows what for."""
    shape = shape_of(node.meta["val"])
    name = flow.seen.tensors.get(node.name) if node.users else None
    return Value(shape) if name is None else flow.tensor(name, shape)


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor | tuple | list)


def _rule(node: fx.Node) -> Rule:
    if node.target is python_operators.getitem:
        return _getitem
    rule = RULES.get(operator(node))
    if rule is not None:
        return rule
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return _pointwise if is_pointwise else _unknown


def _unknown(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    given = [flow.values[one] for one in nodes_in((node.args, node.kwargs), flow)]
    for value in given:
        assert isinstance(value, Value)
        if value.axes and flow.units.roots(np.concatenate(list(value.axes.values()))).any():
            flow.unknown.add(operator(node))
        flow.freeze(value)
    return _result(node)


def _result(
    node: fx.Node, axes: Mapping[int, Ids | None] | None = None
) -> Value | tuple[Value, ...]:
    """The node's value, or values, with these live axes."""
    value = node.meta["val"]
    live = {axis: ids for axis, ids in (axes or {}).items() if ids is not None}
    if isinstance(value, tuple | list):
        return tuple(Value(shape_of(one), live) for one in value)
    return Value(shape_of(value), live)


def _getitem(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    source, index = node.args
    assert isinstance(source, fx.Node)
    values = flow.values.get(source)
    assert isinstance(values, tuple)
    assert isinstance(index, int)
    return values[index]


def _pointwise(flow: Flow, node: fx.Node) -> Value:
    given = [flow.value(one) for one in nodes_in((node.args, node.kwargs), flow)]
    values = [value for value in given if value is not None]
    shape = shape_of(node.meta["val"])
    axes: dict[int, Ids] = {}
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        ids = _tied(flow, values, axis - len(shape))
        if ids is not None:
            axes[axis] = ids
    if operator(node) in ("add", "sub") and _joins_layers(flow, node):
        flow.added.extend(axes.values())
    return Value(shape, axes, all(value.is_weight for value in values))


def _joins_layers(flow: Flow, node: fx.Node) -> bool:
    """Whether activations come together that other layers made: what a residual connection does,
    and a rotation of queries (q · cos + q' · sin) doesn't."""
    values = [(one, flow.value(one)) for one in nodes_in((node.args, node.kwargs), flow)]
    made = [_layers_behind(one) for one, value in values
            if value is not None and value.axes and not value.is_weight]  # fmt: skip
    return any(layers != made[0] for layers in made)


def _layers_behind(node: fx.Node) -> set[fx.Node]:
    """The operators that contract with something, of all that a value depends on."""
    found, left = {node}, [node]
    while left:
        new = [one for one in left.pop().all_input_nodes if one not in found]
        found.update(new)
        left.extend(new)
    return {one for one in found if operator(one) in _LAYERS}


def _tied(flow: Flow, values: list[Value], from_end: int) -> Ids | None:
    """Ids along an axis, counted from the last, that the values are broadcast over."""
    wide = [v for v in values if len(v.shape) >= -from_end and v.shape[from_end] > 1]
    found = [value.axes.get(len(value.shape) + from_end) for value in wide]
    ids = found[0] if found else None
    for other in found[1:]:
        ids = flow.tie(ids, other)
    if ids is None:  # what was live is frozen by a partner that isn't
        for other in found:
            flow.tie(None, other)
    return ids


def _moved(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Run the operator on ids, one live axis of the arguments at a time."""
    arguments = nodes_in(node.args, flow)
    values = [value for one in arguments if (value := flow.value(one)) is not None]
    is_weight = all(value.is_weight for value in values)
    results: list[list[Value]] = []
    for axis in sorted({axis for value in values for axis in value.axes}):
        moved = _run_on_ids(flow, node, axis)
        results.append([flow.of_result(one, is_weight) for one in moved])
    merged = [_joined(flow, one) for one in zip(*results, strict=True)]
    if not merged:
        return _result(node)
    return tuple(merged) if isinstance(node.meta["val"], tuple | list) else merged[0]


def _run_on_ids(flow: Flow, node: fx.Node, axis: int) -> list[torch.Tensor]:
    def ids(one: fx.Node) -> Any:
        value = flow.value(one)
        if value is None:
            return one
        if axis not in value.axes:
            return torch.zeros((), dtype=torch.int64).expand(value.shape)
        line = torch.from_numpy(flow.units.roots(value.axes[axis]))
        return line.view([-1 if a == axis else 1 for a in range(len(value.shape))]).expand(
            value.shape
        )

    arguments = fx.node.map_arg(concrete(node.args), ids)
    keywords = concrete(node.kwargs)
    # Tensors of ids are laid out in memory as it comes, which a view would refuse.
    target = torch.reshape if operator(node) in ("view", "_unsafe_view") else node.target
    assert callable(target)
    moved = target(*arguments, **keywords)
    return list(moved) if isinstance(moved, tuple | list) else [moved]


def _joined(flow: Flow, parts: tuple[Value, ...]) -> Value:
    """One value of the live axes of all parts; two that came to lie on one axis are frozen."""
    axes: dict[int, Ids] = {}
    for part in parts:
        for axis, ids in part.axes.items():
            if axis in axes:
                flow.units.freeze(ids)
                flow.units.freeze(axes[axis])
            axes[axis] = ids
    return Value(parts[0].shape, axes, parts[0].is_weight)


def _sliced(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """(x, axis, start, end, step): by steps, or between bounds that depend on the inputs' sizes,
    the axis has to stay whole."""
    value, axis = flow.value(node.args[0]), node.args[1] if len(node.args) > 1 else 0
    assert value is not None
    assert isinstance(axis, int)
    step = node.args[4] if len(node.args) > 4 else 1
    if step != 1 or any(isinstance(bound, fx.Node) for bound in node.args[2:4]):
        flow.freeze(value, [axis % len(value.shape)])
    return _moved(flow, node)


def _shuffled(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """(x, groups): channels as rows [groups, channels of a group], by columns from now on. From
    each group the same ones go, or whole groups."""
    value, groups = flow.value(node.args[0]), node.args[1]
    assert value is not None
    assert isinstance(groups, int)
    axes: dict[int, Ids | None] = dict(value.axes)
    if 1 in value.axes:
        rows = torch.from_numpy(flow.units.roots(value.axes[1]).reshape(groups, -1))
        flow.of_result(rows, value.is_weight)  # which ties them
        axes[1] = np.ascontiguousarray(value.axes[1].reshape(groups, -1).T).reshape(-1)
    return _result(node, axes)


def _rolled(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """(x, shifts, axes): by how much depends on how wide the axes are."""
    value, rolled = flow.value(node.args[0]), node.args[2] if len(node.args) > 2 else ()
    assert value is not None
    assert isinstance(rolled, list | tuple)
    gone = {int(axis) % len(value.shape) for axis in rolled}
    if not gone:
        return _unknown(flow, node)
    flow.freeze(value, sorted(gone))
    return _result(node, {axis: ids for axis, ids in value.axes.items() if axis not in gone})


def _selected(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """One index of an axis, which then has to stay whole."""
    value, axis = flow.value(node.args[0]), node.args[1] if len(node.args) > 1 else 0
    assert value is not None
    assert isinstance(axis, int)
    flow.freeze(value, [axis % len(value.shape)])
    return _moved(flow, node)


def _padded(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Constants around an axis are units of their own: nobody's parameters."""
    value, pads = flow.value(node.args[0]), node.args[1]
    assert value is not None
    is_constant = len(node.args) < 3 or node.args[2] == "constant" or operator(node) != "pad"
    axes: dict[int, Ids | None] = dict(value.axes)
    for axis, ids in value.axes.items():
        before, after = _pads(pads, len(value.shape) - 1 - axis)
        if before < 0 or after < 0 or ((before or after) and not is_constant):
            flow.units.freeze(ids)
            axes[axis] = None
        elif before or after:
            fresh = flow.units.fresh
            axes[axis] = np.concatenate([fresh(before), ids, fresh(after)])
    return _result(node, axes)


def _pads(pads: Any, from_end: int) -> tuple[int, int]:
    pairs = [one if isinstance(one, int) else -1 for one in pads]
    return (*pairs[2 * from_end : 2 * from_end + 2], 0, 0)[:2]  # type: ignore[return-value]


def _reduced(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """A mean, sum or maximum over axes, which have to stay whole."""
    value = flow.value(node.args[0])
    assert value is not None
    rank = len(value.shape)
    given = node.args[1] if len(node.args) > 1 else None
    given = [given] if isinstance(given, int) else given
    if not isinstance(given, list | tuple) or not given:
        return _unknown(flow, node)
    gone = {int(axis) % rank for axis in given}
    flow.freeze(value, sorted(gone))
    keeps = (len(node.args) > 2 and bool(node.args[2])) or bool(node.kwargs.get("keepdim"))
    axes: dict[int, Ids | None] = {
        axis if keeps else axis - sum(one < axis for one in gone): ids
        for axis, ids in value.axes.items()
        if axis not in gone
    }
    return _result(node, axes)


def _along(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """What mixes the indices of one axis and keeps the shape: softmax, cumulative sums."""
    value = flow.value(node.args[0])
    axis = node.args[1] if len(node.args) > 1 else None
    if value is None or not isinstance(axis, int):
        return _unknown(flow, node)
    flow.freeze(value, [axis % len(value.shape)])
    return _result(node, {a: i for a, i in value.axes.items() if a != axis % len(value.shape)})


def _spatial(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Pooling and resizing: axes of space, the last ones, are mixed; channels pass."""
    value = flow.value(node.args[0])
    assert value is not None
    spatial = int(next((c for c in operator(node) if c in "123"), "0"))
    if not spatial:
        return _unknown(flow, node)
    first = len(value.shape) - spatial
    flow.freeze(value, range(first, len(value.shape)))
    return _result(node, {axis: ids for axis, ids in value.axes.items() if axis < first})


def _convolved(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    x, weight = flow.value(node.args[0]), flow.value(node.args[1])
    transposed = "transpose" in operator(node)
    groups = node.args[6] if len(node.args) > 6 else 1
    assert isinstance(groups, int)
    if x is None or weight is None or len(x.shape) != len(weight.shape):
        return _unknown(flow, node)
    flow.freeze(x, [0, *range(2, len(x.shape))])
    flow.freeze(weight, range(2, len(weight.shape)))
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    flow.make(node.args[1], out_axis)
    inputs: Ids | None
    if groups == 1:
        inputs = flow.consume(node, 0, 1, weight.axes.get(in_axis))
        outputs = weight.axes.get(out_axis)
    elif transposed:
        return _unknown(flow, node)
    else:
        inputs, outputs = _grouped(flow, x, weight, groups), weight.axes.get(0)
    bias = flow.value(node.args[2]) if len(node.args) > 2 else None
    if bias is not None:
        outputs = flow.tie(outputs, bias.axes.get(0))
    wide = x.shape if transposed else shape_of(node.meta["val"])
    operations = math.prod(wide) / wide[1] * math.prod(weight.shape)
    flow.note_work(node, operations, outputs, None if groups > 1 else inputs)
    return _result(node, {1: outputs})


def _grouped(flow: Flow, x: Value, weight: Value, groups: int) -> Ids | None:
    """Whole groups go: the inputs of one with all its outputs. Depthwise is one input each."""
    flow.freeze(weight, [1])
    inputs, outputs = x.axes.get(1), weight.axes.get(0)
    if inputs is None or outputs is None:
        return flow.tie(inputs, outputs)
    rows = inputs.reshape(groups, -1)
    for ids in (rows, outputs.reshape(groups, -1)):
        for column in range(ids.shape[1]):
            flow.units.merge(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(ids[:, column]))
    return inputs


def _linear(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    x, weight = flow.value(node.args[0]), flow.value(node.args[1])
    if x is None or weight is None or len(weight.shape) != 2:
        return _unknown(flow, node)
    last = len(x.shape) - 1
    inputs = flow.consume(node, 0, last, weight.axes.get(1))
    outputs = weight.axes.get(0)
    bias = flow.value(node.args[2]) if len(node.args) > 2 else None
    if bias is not None:
        outputs = flow.tie(outputs, bias.axes.get(0))
    flow.note_work(node, math.prod(x.shape) * weight.shape[0], outputs, inputs)
    axes = {axis: ids for axis, ids in x.axes.items() if axis != last}
    return _result(node, {**axes, last: outputs})


def _matmul(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """A contraction with a weight sums over units; one of two activations stays whole."""
    one, other = flow.value(node.args[0]), flow.value(node.args[1])
    if one is None or other is None or min(len(one.shape), len(other.shape)) < 2:
        return _unknown(flow, node)
    last, row = len(one.shape) - 1, len(other.shape) - 2
    inputs = None
    if other.is_weight and not one.is_weight and len(other.shape) == 2:
        inputs = flow.consume(node, 0, last, other.axes.get(row))
        flow.make(node.args[1], 1)
    else:
        flow.freeze(one, [last])
        flow.freeze(other, [row])
    rank = len(shape_of(node.meta["val"]))
    axes: dict[int, Ids | None] = {}
    batch = [_leading(one), _leading(other)]
    for axis in range(rank - 2):
        axes[axis] = _tied(flow, batch, axis - rank)
    axes[rank - 2] = one.axes.get(last - 1)
    axes[rank - 1] = other.axes.get(row + 1)
    operations = math.prod(shape_of(node.meta["val"])) * one.shape[last]
    live = next((ids for axis, ids in axes.items() if axis < rank - 2 and ids is not None), None)
    flow.note_work(node, operations, axes[rank - 1] if inputs is not None else live, inputs)
    return _result(node, axes)


def _leading(value: Value) -> Value:
    """The value with its last two axes out of the way of broadcasting."""
    axes = {axis: ids for axis, ids in value.axes.items() if axis < len(value.shape) - 2}
    return Value(value.shape, axes, value.is_weight)


def _attention(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Heads pass; what is contracted, scaled by its size, and normalized over stays whole."""
    values = [flow.value(one) for one in node.args[:4]]
    given = [value for value in values if value is not None]
    rank = len(given[0].shape)
    if node.kwargs.get("enable_gqa") or any(len(value.shape) > rank for value in given):
        return _unknown(flow, node)
    for value in given:
        flow.freeze(value, [len(value.shape) - 1, len(value.shape) - 2])
    axes = {axis: _tied(flow, given, axis - rank) for axis in range(rank - 2)}
    query, key = given[0].shape, given[1].shape
    operations = 2.0 * math.prod(query) * key[-2]
    live = next((ids for ids in axes.values() if ids is not None), None)
    flow.note_work(node, operations, live)
    return _result(node, axes)


def _batch_norm(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Also of instances: every channel by itself."""
    x = flow.value(node.args[0])
    assert x is not None
    flow.freeze(x, [0, *range(2, len(x.shape))])
    ids = x.axes.get(1)
    for one in node.args[1:5]:
        value = flow.value(one)
        if value is not None:
            ids = flow.tie(ids, value.axes.get(0))
    return _result(node, {1: ids})


def _group_norm(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Whole groups go, since each has statistics of its own."""
    x, groups = flow.value(node.args[0]), node.args[1]
    assert x is not None
    assert isinstance(groups, int)
    flow.freeze(x, [0, *range(2, len(x.shape))])
    ids = x.axes.get(1)
    for one in node.args[2:4]:
        value = flow.value(one)
        if value is not None:
            ids = flow.tie(ids, value.axes.get(0))
    if ids is not None:
        rows = ids.reshape(groups, -1)
        for column in range(1, rows.shape[1]):
            flow.units.merge(
                np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, column])
            )
    return _result(node, {1: ids})


def _layer_norm(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    """Its statistics are over all it normalizes, which stays whole."""
    x, normalized = flow.value(node.args[0]), node.args[1]
    assert x is not None
    assert isinstance(normalized, list | tuple)
    first = len(x.shape) - len(normalized)
    flow.freeze(x, range(first, len(x.shape)))
    for one in node.args[2:4]:
        flow.freeze(flow.value(one))
    return _result(node, {axis: ids for axis, ids in x.axes.items() if axis < first})


def _embedding(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    table, indices = flow.value(node.args[0]), flow.value(node.args[1])
    assert table is not None
    flow.make(node.args[0], 1)
    flow.freeze(table, [0])
    flow.freeze(indices)
    return _result(node, {len(shape_of(node.meta["val"])) - 1: table.axes.get(1)})


def _prelu(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    x, slope = flow.value(node.args[0]), flow.value(node.args[1])
    assert x is not None
    assert slope is not None
    if slope.shape == (1,):
        return _result(node, dict(x.axes))
    axes: dict[int, Ids | None] = dict(x.axes)
    axes[1] = flow.tie(x.axes.get(1), slope.axes.get(0))
    return _result(node, axes)


def _as_given(flow: Flow, node: fx.Node) -> Value | tuple[Value, ...]:
    value = flow.value(node.args[0])
    assert value is not None
    return Value(value.shape, value.axes, value.is_weight)


_MOVES = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t",
    "squeeze", "unsqueeze", "expand", "chunk", "split", "split_with_sizes", "unbind",
    "cat", "concat", "concatenate", "stack", "repeat", "flip", "movedim", "moveaxis", "swapaxes",
    "swapdims", "pixel_shuffle", "pixel_unshuffle", "numpy_T", "mT", "tile", "broadcast_to",
)  # fmt: skip
_SPATIAL = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "max_pool2d_with_indices", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip
_SAME = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "dropout", "feature_dropout",
         "alpha_dropout", "to", "_to_copy")  # fmt: skip
_REDUCTIONS = ("mean", "sum", "amax", "amin")
_MIXERS = ("softmax", "log_softmax", "_softmax", "cumsum")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
                 "conv_transpose3d")  # fmt: skip

_LAYERS = (*_CONVOLUTIONS, "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum",
           "embedding", "scaled_dot_product_attention")  # fmt: skip

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(_SPATIAL, _spatial),
    **dict.fromkeys(_SAME, _as_given),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(_MIXERS, _along),
    **dict.fromkeys(_CONVOLUTIONS, _convolved),
    "slice": _sliced,
    "narrow": _sliced,
    "channel_shuffle": _shuffled,
    "native_channel_shuffle": _shuffled,
    "roll": _rolled,
    "select": _selected,
    "pad": _padded,
    "constant_pad_nd": _padded,
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "prelu": _prelu,
}
