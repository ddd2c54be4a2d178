"""Depth: whole residual blocks or encoder layers that a network can go without.

A block can be bypassed where it hands on what it was given beside what it adds: its output has
its input's shape, and the input reaches it without passing a layer with weights. It doesn't know
widths.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from optimizer.pruning.graph import Trace, layers_of, operator, shape_of
from optimizer.pruning.outputs import first_output

_LISTS = (nn.Sequential, nn.ModuleList)
_MIXING = ("conv", "linear", "matmul", "bmm", "mm", "scaled_dot", "embedding")
"""Operators that the bypassed input doesn't pass, by how their names begin."""
_BATCH_SIZE = 32


class Bypass(nn.Module):
    """In a block's place: hands on its first input, in the form that the block gave it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, features: Any, *_others: Any, **_named: Any) -> Any:
        return (features,) if self.form == "tuple" else features

    def extra_repr(self) -> str:
        return self.form


def blocks_of(module: nn.Module, seen: Trace) -> tuple[str, ...]:
    """Names of the blocks that can be bypassed, in the order of the trace; of nested ones the
    outermost."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in seen.graph.nodes:
        if node.op == "call_function":
            for layer in layers_of(node):
                nodes.setdefault(layer, []).append(node)
    found: list[str] = []
    for name in nodes:
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and _is_block(module, name) and _passes(nodes[name]):
            found.append(name)
    return tuple(found)


def importance(
    module: nn.Module, blocks: Sequence[str], inputs: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Block → 1 less the cosine of what goes into it and comes out, averaged over samples (Men et
    al. 2024, "ShortGPT", equation 1): 0 for one that changes nothing. The module is left as it
    was."""
    sums = dict.fromkeys(blocks, 0.0)
    hooks = []

    def listen(name: str) -> None:
        def note(_part: nn.Module, given: Any, made: Any) -> None:
            one, other = given[0].flatten(1).double(), first_output(made).flatten(1).double()
            sums[name] += float((1 - nn.functional.cosine_similarity(one, other)).sum())

        hooks.append(module.get_submodule(name).register_forward_hook(note))

    for name in blocks:
        listen(name)
    try:
        with torch.no_grad():
            for start in range(0, len(inputs[0]), _BATCH_SIZE):
                module(*(one[start : start + _BATCH_SIZE] for one in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / len(inputs[0]) for name, total in sums.items()}


def least_important(scores: Mapping[str, float], n: int) -> list[str]:
    """The `n` blocks to bypass, in the order of the network. Raises ValueError where there are
    fewer."""
    if not 0 <= n <= len(scores):
        raise ValueError(f"blocks: got {n} to bypass, want 0 to {len(scores)}")
    chosen = sorted(scores, key=scores.__getitem__)[:n]
    return [name for name in scores if name in chosen]


def forms_of(
    module: nn.Module, blocks: Sequence[str], inputs: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Block → `tensor` or `tuple`, by what it returns."""
    forms: dict[str, str] = {}
    hooks = []

    def listen(name: str) -> None:
        def note(_part: nn.Module, _given: Any, made: Any) -> None:
            forms[name] = "tensor" if isinstance(made, torch.Tensor) else "tuple"

        hooks.append(module.get_submodule(name).register_forward_hook(note))

    for name in blocks:
        listen(name)
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return forms


def bypass(module: nn.Module, forms: Mapping[str, str]) -> nn.Module:
    """Bypass these blocks; the module is edited. Raises ValueError for one that isn't there."""
    for name, form in forms.items():
        try:
            module.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the module has no block {name}") from None
        module.set_submodule(name, Bypass(form))
    return module


def _is_block(module: nn.Module, name: str) -> bool:
    """One of several in a list, with layers and weights inside."""
    parent, _, _ = name.rpartition(".")
    try:
        part, around = module.get_submodule(name), module.get_submodule(parent)
    except AttributeError:
        return False
    return (
        isinstance(around, _LISTS)
        and len(list(around.children())) > 1
        and not isinstance(part, _LISTS)
        and bool(list(part.children()))
        and any(True for _ in part.parameters())
    )


def _passes(nodes: Sequence[fx.Node]) -> bool:
    """Whether the block's one input reaches its one output without weights in between."""
    inside = set(nodes)
    given = [one for node in nodes for one in node.all_input_nodes if one not in inside]
    made = [node for node in nodes if any(user not in inside for user in node.users)]
    made = [node for node in made if isinstance(node.meta.get("val"), torch.Tensor)]
    if len(made) != 1:
        return False
    tensors = [one for one in given if _is_activation(one) and _shape(one) == _shape(made[0])]
    if not tensors:
        return False
    reached = {tensors[0]}
    for node in nodes:
        mixes = operator(node).startswith(_MIXING)
        if not mixes and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return made[0] in reached


def _is_activation(node: fx.Node) -> bool:
    value = node.meta.get("val")
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floats and node.op == "call_function"


def _shape(node: fx.Node) -> tuple[int, ...]:
    return shape_of(node.meta["val"])
