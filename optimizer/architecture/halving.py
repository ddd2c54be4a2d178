"""Successive halving: networks trained from scratch, all of them shortly, the better ones longer.

Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization", with a factor of 3: the first round trains a ninth of the epochs, the last all of
them. Each round begins from new weights, so that what is compared has had the same schedule.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

FACTOR = 3
N_ROUNDS = 3
One = TypeVar("One")


def first_epochs(epochs: float) -> float:
    """Of the round that all networks have."""
    return epochs / float(FACTOR ** (N_ROUNDS - 1))


def survivors(n: int) -> list[int]:
    """How many are left for each round after the first, of `n` that had it."""
    return [max(1, n // FACTOR**number) for number in range(1, N_ROUNDS)]


def total_epochs(n: int, epochs: float) -> float:
    """Of all rounds."""
    rounds = [n, *survivors(n)]
    shares = [count * float(FACTOR**number) for number, count in enumerate(rounds)]
    return first_epochs(epochs) * sum(shares)


def halved(ranked: Sequence[One], epochs: float, score: Callable[[One, float], float]) -> One:
    """The best, of those ranked by the first round, best first. `score(one, epochs)` trains for so
    many and says what it is worth then. Raises ValueError for none."""
    if not ranked:
        raise ValueError("got no networks, want at least one")
    left = list(ranked)
    n = len(left)
    for number, count in enumerate(survivors(n), start=1):
        spent = first_epochs(epochs) * FACTOR**number
        scored = [(score(one, spent), -place) for place, one in enumerate(left[:count])]
        order = sorted(range(len(scored)), key=lambda index: scored[index], reverse=True)
        left = [left[index] for index in order]
    return left[0]
