"""Latency: how long a network takes on the target, from the measured times of its blocks.

The sum over blocks is corrected by networks that were timed whole, for each precision apart. It
measures nothing.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from optimizer.architecture.networks import BlockFactory, build
from optimizer.architecture.plan import EncoderPlan, Plan
from optimizer.blocks import Block, blocks_of
from optimizer.search.block_table import Correction, Times, block_sum

_LENGTH = 16
"""Tokens of the text that an encoder's blocks are traced with, or its longest if that is less."""


class Unmeasured(Exception):
    """The table lacks a block of the network."""


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of batches of `batch_size`: the sum of the blocks, corrected where there is a
    correction for the precision that they are in."""

    times: Times
    batch_size: int
    corrections: Mapping[str, Correction] = field(default_factory=dict)

    def __call__(self, blocks: Counter[Block]) -> float:
        """Raises Unmeasured."""
        counts = {block.key: count for block, count in blocks.items()}
        total = block_sum(counts, self.times, self.batch_size)
        if total is None:
            missing = next(
                block for block in blocks if (block.key, self.batch_size) not in self.times
            )
            raise Unmeasured(f"{missing}: not measured at batch {self.batch_size}")
        found = next((self.corrections.get(block.precision) for block in blocks), None)
        return total if found is None else found.estimate(total)


def blocks_in(plan: Plan, blocks: Mapping[str, BlockFactory] | None = None) -> Counter[Block]:
    """The plan's blocks, each with how often it occurs. No arithmetic is done for it. Raises
    ValueError as `build` does."""
    if blocks:
        return _traced(plan, blocks)
    return Counter(_known(plan))


@lru_cache(maxsize=4096)
def _known(plan: Plan) -> Counter[Block]:
    return _traced(plan, None)


def _traced(plan: Plan, blocks: Mapping[str, BlockFactory] | None) -> Counter[Block]:
    with torch.device("meta"):
        network = build(plan, blocks)
        if isinstance(plan, EncoderPlan):
            tokens = torch.zeros((1, min(_LENGTH, plan.max_length)), dtype=torch.int64)
            return blocks_of(network, (tokens, torch.ones_like(tokens)))
        return blocks_of(network, (torch.zeros((1, *plan.image)),))
