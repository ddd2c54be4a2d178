"""Sensitivity: how far a network's outputs move when units of one group alone are set to zero.

It measures and decides nothing.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from optimizer.pruning.allocation import Candidates
from optimizer.pruning.groups import Network
from optimizer.pruning.surgery import masked_outputs


class Sensitivity:
    """The squared distance of the first output from the whole network's, by its variance."""

    def __init__(
        self,
        module: nn.Module,
        network: Network,
        candidates: Candidates,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        self._module = module
        self._network = network
        self._candidates = candidates
        self._inputs = inputs

    def __call__(self, group: int, n_gone: int) -> float:
        counts = np.zeros(len(self._candidates.groups), dtype=np.int64)
        counts[group] = n_gone
        moved = self._outputs(self._candidates.gone(counts))
        far = float((moved - self._whole).square().mean())
        return far / max(1e-12, float(self._whole.var(correction=0)))

    @cached_property
    def _whole(self) -> torch.Tensor:
        return self._outputs([])

    def _outputs(self, gone: Sequence[int]) -> torch.Tensor:
        return masked_outputs(self._module, self._network, gone, self._inputs)[0]
