"""Groups: the units of a network that are alike, such as the channels of one layer, with all
tensors that they have a part in.

A unit can go as a whole: its indices in all tensors at once. It doesn't say which should.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optimizer.pruning.flow import Flow, Pattern
from optimizer.pruning.graph import Trace
from optimizer.pruning.rules import walk
from optimizer.pruning.units import FROZEN, Ids

_MAX_WALKS = 24

Place = tuple[str, int]
"""A tensor's name and one of its axes."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units that have a part in the same places, with as many indices each."""

    name: str
    """Of the first layer that makes them."""
    units: tuple[int, ...]
    """Their roots, in the order of that layer's outputs."""
    places: Mapping[Place, tuple[Ids, ...]]
    """Place → for each unit its indices there."""
    makers: tuple[Place, ...]
    """Those of the places that are outputs of weights; at least one."""
    is_residual: bool
    """Whether some of them are added to another layer's: the width of a residual stream."""


@dataclass(frozen=True, eq=False)
class Network:
    """All that can go from a traced network, and what its operators cost."""

    flow: Flow
    groups: tuple[Group, ...]

    def in_scope(self, residual: bool) -> list[Group]:
        """All groups, or without `residual` those alone that lie inside of residual branches."""
        return [group for group in self.groups if residual or not group.is_residual]

    def kept(self, gone: Sequence[int]) -> dict[Place, list[int]]:
        """By place, the indices that stay when these units go; only places that lose some."""
        leaving = set(gone)
        found = {}
        for name, value in self.flow.tensors.items():
            for axis, ids in value.axes.items():
                roots = self.flow.units.roots(ids).tolist()
                stay = [index for index, root in enumerate(roots) if root not in leaving]
                if len(stay) < len(roots):
                    found[name, axis] = stay
        return found

    def gone(self, kept: Mapping[Place, Sequence[int]]) -> set[int]:
        """The units that go where these indices stay: the other way round."""
        found: set[int] = set()
        for (name, axis), stay in kept.items():
            roots = self.flow.units.roots(self.flow.tensors[name].axes[axis])
            found |= set(np.delete(roots, list(stay)).tolist())
        return found


def network_of(seen: Trace) -> Network:
    """The groups of a traced network.

    Where an axis is split over several (into heads and their width, say) one of them stays live:
    the one with which most of the parameters can go, of equal ones that with more units.
    """
    choices: dict[Pattern, int] = {}
    best = walk(seen, choices)
    n_walks = 1
    for pattern in tuple(best.patterns):
        for choice in range(1, best.patterns.get(pattern, 1)):
            if n_walks == _MAX_WALKS:
                break
            tried = walk(seen, {**choices, pattern: choice})
            n_walks += 1
            if _freedom(tried) > _freedom(best):
                best, choices = tried, {**choices, pattern: choice}
    return Network(best, _groups(best))


def _freedom(flow: Flow) -> tuple[int, int]:
    """(elements of parameters that can go, units that can go)."""
    elements, units = 0, set()
    for value in flow.tensors.values():
        for axis, ids in value.axes.items():
            roots = flow.units.roots(ids)
            live = roots[roots != FROZEN]
            elements += len(live) * int(np.prod(value.shape)) // value.shape[axis]
            units |= set(live.tolist())
    return elements, len(units)


def _groups(flow: Flow) -> tuple[Group, ...]:
    members = _members(flow)
    by_places: dict[frozenset[tuple[Place, int]], list[int]] = {}
    for unit, places in members.items():
        if _makers(flow, places):
            key = frozenset((place, len(indices)) for place, indices in places.items())
            by_places.setdefault(key, []).append(unit)
    added = {root for ids in flow.added for root in flow.units.roots(ids).tolist()}
    return tuple(_group(flow, members, units, added) for units in by_places.values())


def _group(
    flow: Flow, members: Mapping[int, Mapping[Place, Ids]], units: Sequence[int], added: set[int]
) -> Group:
    places = members[units[0]]
    makers = _makers(flow, places)
    return Group(
        makers[0][0].removesuffix(".weight"),
        tuple(units),
        {place: tuple(members[unit][place] for unit in units) for place in places},
        makers,
        is_residual=not added.isdisjoint(units),
    )


def _makers(flow: Flow, places: Iterable[Place]) -> tuple[Place, ...]:
    """A weight that only parts of are used has its outputs first, as torch's layers have."""
    return tuple(
        (name, axis)
        for name, axis in places
        if len(flow.tensors[name].shape) > 1 and axis == flow.makers.get(name, 0)
    )


def _members(flow: Flow) -> dict[int, dict[Place, Ids]]:
    """Unit → place → its indices there, in the order of the trace."""
    found: dict[int, dict[Place, Ids]] = {}
    for name, value in flow.tensors.items():
        for axis, ids in sorted(value.axes.items()):
            roots = flow.units.roots(ids)
            for root in dict.fromkeys(roots.tolist()):
                if root != FROZEN:
                    found.setdefault(root, {})[name, axis] = np.flatnonzero(roots == root)
    return found
