"""Narrowing: a network without the channels, heads and neurons that it can best do without.

Chosen by a criterion and an allocation, taken out, and compared with zeros in their place. Where
the network comes from, and what is done to it afterwards, is for others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from optimizer.blocks import Block
from optimizer.latency_table import LatencyTable
from optimizer.pruning.allocation import Candidates, allocate, check_reachable, left_by
from optimizer.pruning.costs import Costs
from optimizer.pruning.graph import InputShape
from optimizer.pruning.groups import Group, Network
from optimizer.pruning.importance import Samples, Scores, score
from optimizer.pruning.latency import Latency
from optimizer.pruning.sensitivity import Sensitivity
from optimizer.pruning.surgery import (
    MODULE,
    TRACE,
    difference,
    masked_outputs,
    operate,
    operations_of,
    tolerance_of,
)
from optimizer.variant import Json

_N_CHECKED = 2
_N_FOR_SENSITIVITY = 32

Layers = Callable[[nn.Module], Mapping[str, Block]]
"""A module's convolutions and matrix products by the names of their layers."""
Fresh = Callable[[], nn.Module]
"""Makes the module once more; nobody else holds it, so that it may be edited."""


@dataclass(frozen=True, eq=False)
class Narrowing:
    """What decides which units go; of parameters as docs/techniques.md has them."""

    criterion: str
    allocation: str
    multiple: int
    residual: bool
    samples: Samples
    inputs: Sequence[InputShape]
    layers: Layers
    table: LatencyTable | None = None
    """For the allocation by latency."""

    def narrowed(self, fresh: Fresh, network: Network, ratio: float) -> tuple[nn.Module, Json]:
        """The module that `fresh` makes and `network` was traced from, without `ratio` of its
        costs; and the operations that make it. Raises ValueError where the ratio would empty a
        layer, or the module doesn't compute what zeros would."""
        module, inputs = fresh(), self._first(_N_CHECKED)
        gone = self._gone(module, network, ratio)
        wanted = masked_outputs(module, network, gone, inputs)
        problems = []
        for form in (MODULE, TRACE):
            operations = operations_of(network, gone, form, self.inputs)
            pruned = operate(fresh(), operations)
            problem = difference(pruned, wanted, inputs, tolerance_of(network))
            if not problem:
                return pruned, operations
            problems.append(problem)
        raise ValueError(
            f"the pruned network doesn't compute what zeros in its place would: {problems[1]} "
            f"(and with the model's own forward: {problems[0]})"
        )

    def cost(self, module: nn.Module, network: Network) -> float:
        """What a ratio is a share of: the module's multiply-adds, or by latency the seconds that
        the table has for it."""
        groups = network.in_scope(self.residual)
        return left_by(self.allocation, self._candidates(module, network, _alike(groups)))(
            np.zeros(len(groups), dtype=np.int64)
        )

    def check(self, module: nn.Module, network: Network, ratio: float) -> None:
        """Raises ValueError for a ratio out of (0, 1), one that would empty a layer, or where
        nothing can go."""
        groups = self._groups(network)
        scores = score(self.criterion, module, groups, self.samples)
        candidates = self._candidates(module, network, scores)
        check_reachable(self.allocation, candidates, ratio)

    def _gone(self, module: nn.Module, network: Network, ratio: float) -> list[int]:
        groups = self._groups(network)
        scores = score(self.criterion, module, groups, self.samples)
        candidates = self._candidates(module, network, scores)
        inputs = self._first(_N_FOR_SENSITIVITY)
        sensitivity = Sensitivity(module, network, candidates, inputs)
        return candidates.gone(allocate(self.allocation, candidates, ratio, sensitivity))

    def _candidates(
        self, module: nn.Module, network: Network, scores: Sequence[Scores]
    ) -> Candidates:
        groups = network.in_scope(self.residual)
        costs = Costs(network, groups)
        table = self.table
        latency = Latency(costs, self.layers(module), table) if table is not None else None
        return Candidates(groups, scores, costs, self.multiple, latency)

    def _groups(self, network: Network) -> list[Group]:
        groups = network.in_scope(self.residual)
        if not groups and network.groups:
            raise ValueError("residual: got false, want true: all that can go is the width of "
                             "residual streams")  # fmt: skip
        if not groups:
            raise ValueError("groups: got none, want a model of which something can go")
        return groups

    def _first(self, n: int) -> list[torch.Tensor]:
        return [one[:n] for one in self.samples.inputs]


def _alike(groups: Sequence[Group]) -> list[Scores]:
    """Scores where they don't matter."""
    return [np.zeros(len(group.units)) for group in groups]
