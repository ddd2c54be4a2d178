"""The flow of units through a trace: which indices of which axes can only go together.

Each value has ids along the axes from which indices can be taken ("live" axes); all others stay
as they are. What an operator does to ids is in `optimizer.pruning.rules`; one that has no rule
freezes all that goes into it, so that a group is right or isn't there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from optimizer.pruning.graph import Trace, layer_of, shape_of, size_of
from optimizer.pruning.units import Ids, Units

Pattern = tuple[int, ...]
"""Sizes of the axes over which one axis was split."""


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor: its shape, and the ids of its live axes."""

    shape: tuple[int, ...]
    axes: Mapping[int, Ids] = field(default_factory=dict)
    is_weight: bool = False
    """Whether it is made of parameters alone."""


@dataclass(frozen=True, eq=False)
class Work:
    """The multiply-adds of one operator for one sample: a constant times what is kept of each
    live axis."""

    layer: str
    operations: float
    """With nothing pruned."""
    outputs: Ids | None
    inputs: Ids | None
    moved: float
    """Elements that it writes, with nothing pruned."""


@dataclass(frozen=True, eq=False)
class Consumption:
    """An operator that contracts a live axis of an argument with weights: unit by unit its
    result is a sum, so that taking a unit out and setting it to zero here come to the same."""

    node: fx.Node
    argument: int
    axis: int
    ids: Ids


class Flow:
    """State of one walk through a trace; `optimizer.pruning.rules.walk` fills it."""

    def __init__(self, seen: Trace, choices: Mapping[Pattern, int]) -> None:
        """`choices` say which of the axes stays live where one is split over several."""
        self.seen = seen
        self.units = Units()
        self.values: dict[fx.Node, Value | tuple[Value, ...]] = {}
        self.tensors: dict[str, Value] = {}
        """Parameters and buffers by name."""
        self.consumptions: list[Consumption] = []
        self.work: list[Work] = []
        self.added: list[Ids] = []
        """Of activations that are added to each other: residual connections."""
        self.patterns: dict[Pattern, int] = {}
        """Those met, with the number of axes that there are to choose from."""
        self.makers: dict[str, int] = {}
        """Weights that were used as they are → their axis of outputs."""
        self.unknown: set[str] = set()
        """Operators without a rule that froze something."""
        self._choices = choices

    def value(self, node: Any) -> Value | None:
        """What is known of an argument; None for one that is no tensor."""
        found = self.values.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Value) else None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Value:
        """The parameter or buffer: every index of every axis is a unit of its own at first."""
        if name not in self.tensors:
            axes = {axis: self.units.fresh(size) for axis, size in enumerate(shape) if size > 1}
            self.tensors[name] = Value(shape, axes, is_weight=True)
        return self.tensors[name]

    def freeze(self, value: Value | None, axes: Sequence[int] | None = None) -> None:
        """Nothing may go from these axes (all without)."""
        for axis in tuple(value.axes) if value is not None and axes is None else axes or ():
            if value is not None and axis in value.axes:
                self.units.freeze(value.axes[axis])

    def tie(self, one: Ids | None, other: Ids | None) -> Ids | None:
        """Index by index the two go together; what is tied to an axis that isn't live is frozen."""
        if one is None or other is None:
            for ids in (one, other):
                if ids is not None:
                    self.units.freeze(ids)
            return None
        self.units.merge(one, other)
        return one

    def consume(self, node: fx.Node, argument: int, axis: int, weight: Ids | None) -> Ids | None:
        """The argument's axis is contracted with a weight's, whose ids are `weight`."""
        value = self.value(node.args[argument])
        assert value is not None
        ids = self.tie(value.axes.get(axis), weight)
        if ids is not None:
            self.consumptions.append(Consumption(node, argument, axis, ids))
        return ids

    def make(self, weight: Any, axis: int) -> None:
        """The argument is a weight whose `axis` is that of what it makes."""
        if isinstance(weight, fx.Node) and weight.name in self.seen.tensors:
            self.makers[self.seen.tensors[weight.name]] = axis

    def note_work(
        self,
        node: fx.Node,
        operations: float,
        outputs: Ids | None = None,
        inputs: Ids | None = None,
    ) -> None:
        """`operations` for the whole batch of the example."""
        shape = shape_of(node.meta["val"])
        batch = max(1, shape[0]) if shape else 1
        moved = float(np.prod(shape)) / batch
        self.work.append(Work(layer_of(node), operations / batch, outputs, inputs, moved))

    def of_result(self, result: torch.Tensor, is_weight: bool) -> Value:
        """The value that a tensor of ids, [*shape], stands for: it has at most one live axis.

        Where ids differ along several axes, one of them stays live, and all ids at one of its
        indices go together.
        """
        shape = tuple(result.shape)
        varying = [axis for axis in range(result.ndim) if _varies(result, axis)]
        if not varying:
            self.units.freeze(np.unique(result.numpy()))
            return Value(shape, {}, is_weight)
        axis = varying[0]
        if len(varying) > 1:
            pattern = tuple(shape[one] for one in varying)
            self.patterns[pattern] = len(varying)
            axis = varying[self._choices.get(pattern, 0)]
        for one in set(range(result.ndim)) - set(varying):
            result = result.narrow(one, 0, 1)
        columns = result.movedim(axis, 0).reshape(shape[axis], -1).numpy()
        first = columns[:, 0].copy()
        for column in range(1, columns.shape[1]):
            self.units.merge(first, columns[:, column])
        return Value(shape, {axis: first}, is_weight)


def concrete(argument: Any) -> Any:
    """An operator's arguments with sizes as they were in the example, tensors left as nodes."""

    def of(node: fx.Node) -> Any:
        value = node.meta.get("val")
        return size_of(value) if isinstance(value, int | torch.SymInt) else node

    return fx.node.map_arg(argument, of)


def nodes_in(argument: Any, flow: Flow) -> list[fx.Node]:
    """The tensors among an operator's arguments, in order."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return [node for node in found if isinstance(flow.values.get(node), Value)]


def _varies(tensor: torch.Tensor, axis: int) -> bool:
    return bool((tensor != tensor.narrow(axis, 0, 1)).any()) if tensor.shape[axis] else False
