"""Features: what two networks compute at places that correspond, inside of them.

For networks of any kind, places correspond where maps have the same size: the last of each size in
either network. A network that was made of the other has modules of the same names besides: blocks
whose outputs still have the same shape say more. It knows no losses.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_LISTS = (nn.Sequential, nn.ModuleList)
_SHOWN_NAMES = 5


@dataclass(frozen=True)
class Places:
    """Names of modules, the student's and the teacher's of the same place each, and how many
    channels their features have."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    channels: tuple[tuple[int, int], ...]
    """(student's, teacher's) of each place."""


def places_of(student: nn.Module, teacher: nn.Module, example: Sequence[torch.Tensor]) -> Places:
    """Where the two correspond, by a run of each on `example` in the mode that it is in. Raises
    ValueError if nowhere."""
    mine, theirs = _last_of_each_size(student, example), _last_of_each_size(teacher, example)
    sizes = [size for size in theirs if size in mine]
    if not sizes:
        raise ValueError(
            f"got features of the sizes {_shown(mine)} in the student and {_shown(theirs)} in the "
            "teacher, want one in both: choose another loss"
        )
    return Places(
        tuple(mine[size][0] for size in sizes),
        tuple(theirs[size][0] for size in sizes),
        tuple((mine[size][1], theirs[size][1]) for size in sizes),
    )


def hidden_places(
    student: nn.Module, teacher: nn.Module, example: Sequence[torch.Tensor]
) -> Places:
    """Where blocks end that both have, by a run of each on `example` in the mode that it is in.

    Blocks are the outermost members of the teacher's lists and sequences of modules. Of each it is
    what finishes last among the block and the modules within that the student has by the same name
    with outputs of the same shape: a network that was traced may not have the block itself. Raises
    ValueError if there is none.
    """
    mine, theirs = (
        _shapes(one, [name for name, _ in one.named_modules() if name], example)
        for one in (student, teacher)
    )
    common = [name for name, shape in theirs.items() if mine.get(name) == shape]
    blocks = _blocks(teacher)
    ends = {
        block: name
        for block in blocks
        for name in common
        if name == block or name.startswith(f"{block}.")
    }
    if not ends:
        given = ", ".join(blocks[:_SHOWN_NAMES]) or "none"
        raise ValueError(
            f"got no module in the student with the name of one in the teacher's blocks ({given}) "
            "and outputs of its shape, want one: choose another loss"
        )
    names = tuple(ends.values())
    return Places(names, names, tuple((theirs[name][1], theirs[name][1]) for name in names))


@contextmanager
def captured(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What the modules of these names give in the runs within, as maps [n, channel, y, x]."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_part: nn.Module, _inputs: Any, output: Any) -> None:
            features = _as_map(output)
            if features is not None:
                found[name] = features

        return keep

    hooks = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


def _last_of_each_size(
    module: nn.Module, example: Sequence[torch.Tensor]
) -> dict[tuple[int, int], tuple[str, int]]:
    """Size [y, x] → the module that finishes last with it, and its channels."""
    names = [name for name, _ in module.named_modules() if name]
    shapes = _shapes(module, names, example)
    return {(shape[2], shape[3]): (name, shape[1]) for name, shape in shapes.items()}


def _blocks(module: nn.Module) -> list[str]:
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, _LISTS) and not any(name.startswith(f"{one}.") for one in found):
            prefix = f"{name}." if name else ""
            found += [f"{prefix}{child}" for child, _ in part.named_children()]
    return found


def _shapes(
    module: nn.Module, names: Sequence[str], example: Sequence[torch.Tensor]
) -> dict[str, torch.Size]:
    """Of the maps that modules give, in the order of their first runs; those of one position or
    none are left out."""
    with torch.no_grad(), captured(module, names) as found:
        module(*example)
    return {name: one.shape for name, one in found.items() if one.shape[2] * one.shape[3] > 1}


def _as_map(output: Any) -> torch.Tensor | None:
    """[n, channel, y, x] as it is; tokens [n, length, channel] as a map of one column. Of several
    outputs the first."""
    if isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        return output
    return output.transpose(1, 2).unsqueeze(-1) if output.ndim == 3 else None


def _shown(sizes: Mapping[tuple[int, int], Any]) -> str:
    return ", ".join(f"{y}x{x}" for y, x in sizes) or "none"
