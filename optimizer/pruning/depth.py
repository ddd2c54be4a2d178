"""Depth: whole residual blocks or encoder layers that a network can go without.

A block can be bypassed where it gives what it was given and something that it made of that, added
to it: a tensor of the same shape, which the block's argument reaches without passing weights, and
without which the network still runs. It doesn't know widths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from optimizer.pruning.graph import InputShape, example
from optimizer.pruning.streams import Argument, Call, calls_of, run
from optimizer.variant import Json

_LISTS = (nn.Sequential, nn.ModuleList)
_BATCH_SIZE = 32

Place = int | str | None
"""Of a tensor in what a block gives: its index or key there; None for the tensor alone."""


@dataclass(frozen=True)
class Form:
    """What a block gives that only hands on: an argument of its call, or a list (of a tuple or
    list) or dict of them. None stands for what nobody needs, or has to do without."""

    gives: Argument | list[Argument | None] | dict[str, Argument | None]
    place: Place = None
    """Of the argument in it that the block adds to."""

    @property
    def stream(self) -> Argument:
        """The argument that the block adds to."""
        found = _at(self.gives, self.place)
        assert isinstance(found, int | str)
        return found

    def to_json(self) -> Json:
        return {"gives": self.gives, "place": self.place}

    @classmethod
    def from_json(cls, stored: Json) -> "Form":
        return cls(**stored)


class Bypass(nn.Module):
    """In a block's place: hands on its arguments in the block's form."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, *given: Any, **named: Any) -> Any:
        def handed(argument: Argument | None) -> Any:
            return None if argument is None else _argument(argument, given, named)

        gives = self.form.gives
        if isinstance(gives, list):
            return tuple(map(handed, gives))
        if isinstance(gives, dict):
            return {key: handed(argument) for key, argument in gives.items()}
        return handed(gives)

    def extra_repr(self) -> str:
        return str(self.form.gives)


def blocks_of(module: nn.Module, inputs: Sequence[InputShape]) -> dict[str, Form]:
    """The blocks that can be bypassed each, in the order of the module's parts, with their forms;
    of nested ones the outermost. The module is in eval mode, and left as it was."""
    given = example(inputs)
    forms = _forms(module, given)
    wanted = _outputs(module, given) if forms else None
    found: dict[str, Form] = {}
    for name, form in forms.items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and not _failure(module, {name: form}, given, wanted):
            found[name] = form
    return found


def why_not_without(
    module: nn.Module, forms: Mapping[str, Form], inputs: Sequence[torch.Tensor]
) -> str | None:
    """Why the module can't go without all of these blocks: it doesn't run, or its outputs have
    another form; None where it can. It is left as it was."""
    return _failure(module, forms, inputs, _outputs(module, inputs))


def importance(
    module: nn.Module, blocks: Mapping[str, Form], inputs: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Block → 1 less the cosine of what it adds to and what comes out, averaged over samples (Men
    et al. 2024, "ShortGPT", equation 1): 0 for one that changes nothing. The module is left as it
    was.

    Departure: the paper's cosines are of single tokens. Here all of a sample are one vector,
    padding too, since which axis has features, and which tokens count, isn't known.
    """
    sums, counts = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
    hooks = []

    def listen(name: str, form: Form) -> None:
        def note(_part: nn.Module, given: Any, named: Any, made: Any) -> None:
            one = _argument(form.stream, given, named).flatten(1).double()
            other = _at(made, form.place).flatten(1).double()
            sums[name] += float((1 - nn.functional.cosine_similarity(one, other)).sum())
            counts[name] += len(one)

        hooks.append(module.get_submodule(name).register_forward_hook(note, with_kwargs=True))

    for name, form in blocks.items():
        listen(name, form)
    try:
        for start in range(0, len(inputs[0]), _BATCH_SIZE):
            run(module, [one[start : start + _BATCH_SIZE] for one in inputs])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def least_important(scores: Mapping[str, float], n: int) -> list[str]:
    """The `n` blocks to bypass, in the order of the network. Raises ValueError where there are
    fewer."""
    if not 0 <= n <= len(scores):
        raise ValueError(f"blocks: got {n} to bypass, want 0 to {len(scores)}")
    chosen = sorted(scores, key=scores.__getitem__)[:n]
    return [name for name in scores if name in chosen]


def bypass(module: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """Bypass these blocks; the module is edited. Raises ValueError for one that isn't there."""
    for name, form in forms.items():
        try:
            module.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the module has no block {name}") from None
        module.set_submodule(name, Bypass(form))
    return module


# --- which parts are blocks, and of what form


def _forms(module: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, Form]:
    """Of all that could be bypassed by what one run of them shows."""
    blocks = {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if _is_block(module, name, part)
    }
    if not blocks:
        return {}
    calls = calls_of(module, blocks.values(), inputs)
    found = {}
    for name, part in blocks.items():
        forms = [_form(call) for call in calls[part]]
        if forms and forms[0] is not None and all(form == forms[0] for form in forms):
            found[name] = forms[0]
    return found


def _is_block(module: nn.Module, name: str, part: nn.Module) -> bool:
    """One of several in a list, with layers and weights inside."""
    parent, _, _ = name.rpartition(".")
    around = module.get_submodule(parent)
    return (
        isinstance(around, _LISTS)
        and len(list(around.children())) > 1
        and not isinstance(part, _LISTS)
        and bool(list(part.children()))
        and any(True for _ in part.parameters())
    )


def _form(call: Call) -> Form | None:
    """None where it doesn't hand on one of its arguments, or in a container of its own kind."""
    if isinstance(call.result, torch.Tensor):
        stream = call.stream(call.result)
        return None if stream is None else Form(stream)
    parts = _parts(call.result)
    streams = {place: call.stream(value) for place, value in parts.items()}
    place = next((one for one, stream in streams.items() if stream is not None), None)
    if place is None:
        return None
    handed = {
        one: call.same(value) if streams[one] is None else streams[one]
        for one, value in parts.items()
    }
    if isinstance(call.result, Mapping):
        return Form({str(one): argument for one, argument in handed.items()}, place)
    return Form(list(handed.values()), place)


def _parts(result: Any) -> Mapping[int | str, Any]:
    """What a block gave, by place; empty where that is no container of values by place."""
    if isinstance(result, tuple | list):
        return dict(enumerate(result))
    if isinstance(result, Mapping) and all(isinstance(key, str) for key in result):
        return result
    return {}


def _at(given: Any, place: Place) -> Any:
    return given if place is None else given[place]


def _argument(argument: Argument, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    return given[argument] if isinstance(argument, int) else named[argument]


# --- whether the network runs without them


def _failure(
    module: nn.Module, forms: Mapping[str, Form], inputs: Sequence[torch.Tensor], wanted: Any
) -> str | None:
    """Why it doesn't give outputs of the `wanted` form."""
    parts = {name: module.get_submodule(name) for name in forms}
    try:
        given = _outputs(bypass(module, forms), inputs)
    except Exception as error:  # noqa: BLE001 - the model's own forward raises anything
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    finally:
        for name, part in parts.items():
            module.set_submodule(name, part)
    return None if given == wanted else f"its outputs are {given[1]}, want {wanted[1]}"


def _outputs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[Any, list[str]]:
    """The form of what it gives: how that is nested, and what tensors it has."""
    with torch.no_grad():
        leaves, nested = tree_flatten(module(*inputs))
    return nested, [
        f"{one.dtype} {list(one.shape)}" if isinstance(one, torch.Tensor) else type(one).__name__
        for one in leaves
    ]
