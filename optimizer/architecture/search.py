"""Search: networks are proposed, looked at and rewarded, until the evaluations are spent.

The controller and its controls all run by this loop, on one table of what was looked at. It knows
neither how a network is judged nor who proposes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from optimizer.architecture.proposers import Proposer
from optimizer.architecture.reward import Reward
from optimizer.architecture.space import Choices

_MAX_REPEATS = 100
"""Proposals in a row of networks that were looked at: then the proposer has come to its end."""


@dataclass(frozen=True)
class Worth:
    """What a network is: accuracy (or another quality, more is better) and seconds of a batch."""

    accuracy: float
    latency_s: float


@dataclass(frozen=True)
class Looked:
    """The `number`th evaluation, from 0, and what came of it."""

    number: int
    choices: Choices
    worth: Worth
    reward: float


class NothingFastEnough(Exception):
    """No network of the space is within the target; the message has the fastest."""


def explored(
    proposer: Proposer,
    evaluate: Callable[[Choices], Worth],
    reward: Reward,
    max_evaluations: int,
) -> Iterator[Looked]:
    """Each evaluation as it is made. A network that comes again costs none, and its proposer is
    told the same once more; after 100 such in a row the search ends."""
    seen: dict[Choices, Looked] = {}
    n_repeats = 0
    while len(seen) < max_evaluations and n_repeats < _MAX_REPEATS:
        choices = proposer.ask()
        known = seen.get(choices)
        if known is not None:
            n_repeats += 1
            proposer.tell(choices, known.reward)
            continue
        n_repeats = 0
        worth = evaluate(choices)
        looked = Looked(len(seen), choices, worth, reward(worth.accuracy, worth.latency_s))
        seen[choices] = looked
        proposer.tell(choices, looked.reward)
        yield looked


def front(looked: Sequence[Looked]) -> list[Looked]:
    """Those than which none is both as fast and more accurate, or faster and as accurate; by
    rising latency. Of equal ones the first."""
    found: list[Looked] = []
    for one in sorted(looked, key=lambda one: (one.worth.latency_s, -one.worth.accuracy)):
        if not found or one.worth.accuracy > found[-1].worth.accuracy:
            found.append(one)
    return found


def check_target(
    fastest_s: float, target_s: float, shown: Callable[[], str], n_looked: int
) -> None:
    """Raises NothingFastEnough before anything is trained."""
    if fastest_s > target_s:
        raise NothingFastEnough(
            f"the fastest of {n_looked} networks takes {1e3 * fastest_s:.3g} ms, the target is "
            f"{1e3 * target_s:.3g} ms: allow smaller ones, or a higher target. It is {shown()}"
        )
