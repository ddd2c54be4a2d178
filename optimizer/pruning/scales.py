"""Scales: batch normalization's γ, by the units that they belong to.

A unit has a scale in each normalization that it passes through, and in one as many as it has
channels there. What is asked of them is others' matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from optimizer.pruning.graph import named_tensors
from optimizer.pruning.groups import Group
from optimizer.pruning.units import Ids


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of some groups' units. The tensors are the module's own, so they change as it
    is trained."""

    tensors: tuple[torch.Tensor, ...]
    """The γ [channel] of each normalization that has a part in a unit."""
    places: torch.Tensor
    """int64 [scale]: where each scale is in the `tensors` end to end."""
    units: torch.Tensor
    """int64 [scale]: whose it is, from 0."""
    n_units: int

    def values(self) -> torch.Tensor:
        """[scale], with gradients."""
        return torch.cat(self.tensors)[self.places]


def norm_scales(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → γ of the module's batch normalizations that have one."""
    return {
        f"{name}.weight": part.weight
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.weight is not None
    }


def scales_of(module: nn.Module, groups: Sequence[Group]) -> Scales:
    """Those of the groups' units; a unit without batch normalization isn't counted."""
    names = norm_scales(module)
    tensors = named_tensors(module)
    starts = _starts(tensors, sorted({n for group in groups for n, _ in group.places} & set(names)))
    places: list[int] = []
    units: list[int] = []
    n_units = 0
    for group in groups:
        parts = [(starts[name], ids) for (name, _), ids in group.places.items() if name in starts]
        if parts:
            _add(parts, n_units, places, units)
            n_units += len(group.units)
    return Scales(
        tuple(tensors[name] for name in starts),
        torch.tensor(places, dtype=torch.int64),
        torch.tensor(units, dtype=torch.int64),
        n_units,
    )


def _starts(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, int]:
    """Where each tensor begins in all of them end to end."""
    starts, start = {}, 0
    for name in names:
        starts[name] = start
        start += len(tensors[name])
    return starts


def _add(
    parts: Sequence[tuple[int, tuple[Ids, ...]]], first: int, places: list[int], units: list[int]
) -> None:
    """Of a group's units, counted from `first`."""
    for start, by_unit in parts:
        for unit, ids in enumerate(by_unit, first):
            places.extend(start + index for index in ids.tolist())
            units.extend([unit] * len(ids))
