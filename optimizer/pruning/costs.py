"""Costs: the multiply-adds of a network by how many units each group has lost.

Counted, not measured: timings belong to a machine, and a technique's result mustn't.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optimizer.pruning.groups import Group, Network
from optimizer.pruning.units import Ids

Counts = NDArray[np.int64]
"""[group]: how many of its units go."""
MOVED = 16.0
"""Multiply-adds in the time in which a kernel writes one element: what an operator costs beside
its arithmetic, which is most of it for depthwise convolutions. An order of magnitude."""


class Costs:
    """For one sample. The multiply-adds of a trace's convolutions, products and attention."""

    def __init__(self, network: Network, groups: Sequence[Group]) -> None:
        works = network.flow.work
        self.n_groups = len(groups)
        self.layers = tuple(work.layer for work in works)
        """Of each operator."""
        self._operations = np.array([work.operations for work in works])
        self._moved = np.array([work.moved for work in works])
        self._outputs = _Axis(network, groups, [work.outputs for work in works])
        self._inputs = _Axis(network, groups, [work.inputs for work in works])

    def operations(self, gone: Counts) -> float:
        """Multiply-adds that are left."""
        shares = self._outputs.shares(gone, 1) * self._inputs.shares(gone, 1)
        return float(self._operations @ shares)

    def effort(self, gone: Counts, multiple: int) -> float:
        """What is left as kernels have to do it: widths rounded up to `multiple`, and elements
        written, at `MOVED` multiply-adds each."""
        return float(self.efforts(gone, multiple).sum())

    def efforts(self, gone: Counts, multiple: int) -> NDArray[np.float64]:
        """[operator]: the effort of each."""
        outputs = self._outputs.shares(gone, multiple)
        arithmetic = outputs * self._inputs.shares(gone, multiple)
        return np.asarray(self._operations * arithmetic + MOVED * self._moved * outputs)

    def shares(self, gone: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[operator]: how much of its outputs is left, and of its inputs, of 1."""
        return self._outputs.shares(gone, 1), self._inputs.shares(gone, 1)


class _Axis:
    """One axis of each operator: how wide it is, and how much of that a unit of each group is."""

    def __init__(
        self, network: Network, groups: Sequence[Group], axes: Sequence[Ids | None]
    ) -> None:
        self._widths = np.array([1 if ids is None else len(ids) for ids in axes])
        self._per_unit = np.zeros((len(axes), len(groups)))
        for row, ids in enumerate(axes):
            if ids is not None:
                roots = network.flow.units.roots(ids)
                for column, group in enumerate(groups):
                    n_indices = int(np.isin(roots, group.units).sum())
                    self._per_unit[row, column] = n_indices / len(group.units)

    def shares(self, gone: Counts, multiple: int) -> NDArray[np.float64]:
        """[operator]: how much of the axis is left, of 1."""
        kept = self._widths - self._per_unit @ gone
        rounded = np.ceil(np.round(kept, 6) / multiple) * multiple
        return np.asarray(np.minimum(1.0, rounded / self._widths))
