"""Latency: what a network takes on the target, by how many units each group has lost.

The seconds come from a table of single layers. So what a channel is worth is what the machine
gains by it, which isn't what is counted: kernels work in tiles.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from optimizer.blocks import Block
from optimizer.latency_table import LatencyTable
from optimizer.pruning.costs import Costs, Counts


class Latency:
    """For one batch of the table. What isn't in it (attention's products, layers that an earlier
    step made) is taken at the seconds that a counted multiply-add costs on average in what is."""

    def __init__(self, costs: Costs, layers: Mapping[str, Block], table: LatencyTable) -> None:
        """`layers` are the network's by name. Raises ValueError where the table has none of
        them."""
        self._costs = costs
        self._rows = {
            at: row
            for at, name in enumerate(costs.layers)
            if name in layers and (row := table.row(layers[name])) is not None
        }
        if not self._rows:
            raise ValueError("allocation: got latency, and the table has none of these layers")

    def seconds(self, gone: Counts) -> float:
        """What is left of the network takes."""
        counted = self._costs.efforts(gone, multiple=1)
        others = counted.sum() - counted[list(self._rows)].sum()
        return self._known(gone) + float(others) * self._per_effort

    def _known(self, gone: Counts) -> float:
        """Of what is in the table."""
        outputs, inputs = self._costs.shares(gone)
        return sum(row(outputs[at], inputs[at]) for at, row in self._rows.items())

    @cached_property
    def _per_effort(self) -> float:
        whole = np.zeros(self._costs.n_groups, dtype=np.int64)
        counted = float(self._costs.efforts(whole, multiple=1)[list(self._rows)].sum())
        return self._known(whole) / counted
