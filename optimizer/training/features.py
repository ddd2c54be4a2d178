"""Features: what two networks compute at places that correspond, inside of them.

Places correspond where maps have the same size: the last of each size in either network. It knows
no losses.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


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
    with torch.no_grad(), captured(module, names) as found:
        module(*example)
    # The dict keeps the order of the first runs; what runs twice is taken where it was first.
    maps = {name: features.shape for name, features in found.items()}
    return {
        (shape[2], shape[3]): (name, shape[1])
        for name, shape in maps.items()
        if shape[2] * shape[3] > 1
    }


def _as_map(output: Any) -> torch.Tensor | None:
    """[n, channel, y, x] as it is; tokens [n, length, channel] as a map of one column."""
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        return output
    return output.transpose(1, 2).unsqueeze(-1) if output.ndim == 3 else None


def _shown(sizes: Mapping[tuple[int, int], Any]) -> str:
    return ", ".join(f"{y}x{x}" for y, x in sizes) or "none"
