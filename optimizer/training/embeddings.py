"""Tables of embeddings, which stand still while what reads them is trained.

Each of a table's rows learns by the few samples alone that have its token, so that a short training
of it is learned by heart: what a change of other layers has cost isn't in there. A table that isn't
the whole network's any more, as of a student that begins with random weights, has to learn.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def tables_of(module: nn.Module, whole: nn.Module) -> list[nn.Parameter]:
    """Those of the module's parameters that have the name and values of a table in the whole
    network, where no layer of another kind uses it. The module may be a trace, which knows
    embeddings by name alone."""
    tables, others = _parameters_of(whole)
    theirs = {name: one for name, one in tables.items() if id(one) not in others}
    return [
        parameter
        for name, parameter in module.named_parameters()
        if name in theirs and _equal(parameter, theirs[name])
    ]


@contextmanager
def standing_still(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While in it they need no gradients; after it those that did need them do so again."""
    held = [one for one in parameters if one.requires_grad]
    for one in held:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in held:
            one.requires_grad_(True)


def _parameters_of(whole: nn.Module) -> tuple[dict[str, nn.Parameter], set[int]]:
    """Those of embeddings by name, and the ids of all others'."""
    tables: dict[str, nn.Parameter] = {}
    others: set[int] = set()
    for name, part in whole.named_modules():
        for own, parameter in part.named_parameters(recurse=False):
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                tables[f"{name}.{own}" if name else own] = parameter
            else:
                others.add(id(parameter))
    return tables, others


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one.shape == other.shape and torch.equal(one.detach(), other.detach())
