"""Rounds: channels that go a few at a time, between which the network is trained shortly.

Molchanov et al. 2017 ("Pruning Convolutional Neural Networks for Resource Efficient Inference",
section 2) prune and fine-tune in turns. How much goes in a turn is Frankle and Carbin 2019's ("The
Lottery Ticket Hypothesis", section 1): the same share of what is left, here of its costs and not
of its weights, which aren't reset. Which channels go in a round is `optimizer.pruning.narrowing`'s
matter; how the network learns is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from optimizer.pruning.groups import Network
from optimizer.pruning.narrowing import Fresh, Narrowing
from optimizer.pruning.surgery import operate
from optimizer.variant import Json

_NOTHING = 1e-9
"""A share that isn't worth a unit: what rounding leaves."""

Find = Callable[[nn.Module], Network]
"""Traces a module; takes seconds."""
Train = Callable[[nn.Module, int, Sequence[Json]], None]
"""Trains the module in place after the round of that index, counted from 0, with the operations
that made it of the first one."""


@dataclass(frozen=True, eq=False)
class Pruned:
    module: nn.Module
    operations: tuple[Json, ...]
    """Of each round that took something."""
    left: tuple[float, ...]
    """[round]: share of the costs."""


@dataclass(frozen=True)
class Schedule:
    ratio: float
    """Of the costs that are to go, in (0, 1)."""
    n_rounds: int

    def kept(self) -> list[float]:
        """[round]: the share of the costs that is to be left after each, of those before the first:
        by equal factors (1 − ratio)^(1/n) a round."""
        n = self.n_rounds
        return [(1 - self.ratio) ** (index / n) for index in range(1, n + 1)]


def in_rounds(
    fresh: Fresh,
    network: Network,
    narrowing: Narrowing,
    schedule: Schedule,
    find: Find,
    train: Train,
) -> Pruned:
    """The module that `fresh` makes and `network` was traced from, without as much of its costs as
    the schedule says, with a training between each round and the next, and none after the last.

    A round that took more than its share, as multiples have it, leaves less to the next: the whole
    comes to the ratio as at once. One to which nothing is left takes nothing, and isn't trained
    after. Raises ValueError as `Narrowing.narrowed` does; for the ratio before all training.
    """
    module = fresh()
    narrowing.check(module, network, schedule.ratio)
    whole = narrowing.cost(module, network)
    operations: list[Json] = []
    left: list[float] = []
    for index, wanted in enumerate(schedule.kept()):
        share = 1 - wanted * whole / narrowing.cost(module, network)
        if share > _NOTHING:
            again = _replayed(fresh, operations, module)
            module, operation = narrowing.narrowed(again, network, share)
            operations.append(operation)
            if index < schedule.n_rounds - 1:
                train(module, index, operations)
            network = find(module)
        left.append(narrowing.cost(module, network) / whole)
    return Pruned(module, tuple(operations), tuple(left))


def replay(module: nn.Module, operations: Sequence[Json]) -> nn.Module:
    """The module after these rounds; it may be edited in place."""
    for one in operations:
        module = operate(module, one)
    return module


def _replayed(fresh: Fresh, operations: Sequence[Json], module: nn.Module) -> Fresh:
    """Makes what came of these rounds again, with the module's weights."""
    done, state = tuple(operations), module.state_dict()

    def make() -> nn.Module:
        made = replay(fresh(), done)
        made.load_state_dict(state)
        return made.eval()

    return make
