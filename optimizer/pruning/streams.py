"""Streams: which argument of a call comes out of it again, beside what was made of it.

A run is followed operator by operator, within each call that is asked for. What such calls are
good for is others' matter.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Argument = int | str
"""Of a call: its position, or its keyword."""
_CARRYING = frozenset({
    "cat", "stack", "_unsafe_view", "_to_copy", "constant_pad_nd", "native_dropout",
    "gelu", "hardswish", "_prelu_kernel", "rsub",
    "native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
})  # fmt: skip
"""Operators whose outputs still carry what went in, beside views and all with torch's tag for
pointwise ones: parts side by side, activations without the tag, normalizations."""
_ADDING = frozenset({"add", "sub", "rsub", "addcmul", "addcdiv", "lerp"})


@dataclass(frozen=True)
class Origin:
    """What a tensor within a call has of the call's arguments."""

    carried: frozenset[Argument] = frozenset()
    """Those that came to it without passing weights."""
    added: frozenset[Argument] = frozenset()
    """Those of them to which something was added that was made of them."""
    made: frozenset[Argument] = frozenset()
    """Those that went into it through weights, or an operator that isn't known to carry."""


_NOWHERE = Origin()


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, with what it was given and gave."""

    arguments: Mapping[Argument, Any]
    result: Any
    origins: Mapping[int, Origin]
    """By id of the result's tensors."""

    def stream(self, value: Any) -> Argument | None:
        """The one argument that the tensor is, but for what was made of it and added; None where
        there is none, or more than one."""
        added = self.origins.get(id(value), _NOWHERE).added
        found = [name for name in added if _are_alike(self.arguments[name], value)]
        return found[0] if len(found) == 1 else None

    def same(self, value: Any) -> Argument | None:
        """The argument that the value itself is."""
        found = [name for name, one in self.arguments.items() if one is value is not None]
        return found[0] if found else None


def calls_of(
    module: nn.Module, parts: Iterable[nn.Module], inputs: Sequence[torch.Tensor]
) -> dict[nn.Module, list[Call]]:
    """The calls of each of these parts in a run of the module, which is left as it was."""
    found: dict[nn.Module, list[Call]] = {part: [] for part in parts}
    watch = _Watch()
    hooks: list[Any] = []

    def begin(_part: nn.Module, given: tuple[Any, ...], named: dict[Any, Any]) -> None:
        watch.open.append(_Open({**dict(enumerate(given)), **named}))

    def end(part: nn.Module, _given: Any, _named: Any, result: Any) -> None:
        found[part].append(watch.open.pop().closed(result))

    for part in found:
        hooks.append(part.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(part.register_forward_hook(end, with_kwargs=True))
    try:
        run(module, inputs, watch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def run(
    module: nn.Module, inputs: Sequence[torch.Tensor], watch: TorchDispatchMode | None = None
) -> Any:
    """What the module gives, without gradients, layer by layer: with such a mode on, torch's
    encoder layers aren't single operators."""
    with torch.no_grad(), BaseTorchFunctionMode():
        if watch is None:
            return module(*inputs)
        with watch:
            return module(*inputs)


@dataclass(eq=False)
class _Open:
    """A call that goes on."""

    arguments: Mapping[Argument, Any]
    known: dict[int, tuple[torch.Tensor, Origin]] = field(default_factory=dict)
    """By id of each tensor, which is kept so that no other gets its id."""

    def __post_init__(self) -> None:
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                origin = Origin(carried=frozenset({name}))
                self.known.setdefault(id(value), (value, origin))

    def follow(self, operator: Any, given: Any, result: Any) -> None:
        origins = [self.known[id(one)][1] for one in _tensors(given) if id(one) in self.known]
        if origins:
            origin = _result(operator, origins)
            self.known.update({id(one): (one, origin) for one in _tensors(result)})

    def closed(self, result: Any) -> Call:
        tensors = [one for one in _tensors(result) if id(one) in self.known]
        return Call(self.arguments, result, {id(one): self.known[id(one)][1] for one in tensors})


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells the calls that are open of every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open: list[_Open] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for call in self.open:
            call.follow(func, (args, kwargs), result)
        return result


def _result(operator: Any, given: Sequence[Origin]) -> Origin:
    carried = frozenset[Argument]().union(*(one.carried for one in given))
    made = frozenset[Argument]().union(*(one.made for one in given))
    name = operator.overloadpacket.__name__
    name = name if name.startswith("_") else name.rstrip("_")
    if not (operator.is_view or torch.Tag.pointwise in operator.tags or name in _CARRYING):
        return Origin(made=carried | made)
    added = frozenset[Argument]().union(*(one.added for one in given))
    if name in _ADDING:
        added |= _met(given)
    return Origin(carried, added, made)


def _met(given: Sequence[Origin]) -> frozenset[Argument]:
    """The arguments that one carries, and another is made of."""
    return frozenset(
        argument
        for index, one in enumerate(given)
        for argument in one.carried
        if any(argument in other.made for at, other in enumerate(given) if at != index)
    )


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    floats = one.is_floating_point()
    return floats and one.dtype == other.dtype and one.shape == other.shape
