"""Proposers: who says which network is looked at next, and learns from what it was worth.

Random search and regularized evolution, the controls of every search; the controller has a module
of its own. None of them knows what a reward is made of.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from optimizer.architecture.space import ArchitectureSpace, Choices


class Proposer(Protocol):
    """Asked and told in turns."""

    def ask(self) -> Choices:
        """A network to look at; it may have been asked before."""
        ...

    def tell(self, choices: Choices, reward: float) -> None:
        """What the network that was asked last was worth, more is better; finite."""
        ...


@dataclass
class RandomSearch:
    """Each decision drawn evenly."""

    space: ArchitectureSpace
    seed: int
    _rng: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def ask(self) -> Choices:
        return self.space.sample(self._rng)

    def tell(self, choices: Choices, reward: float) -> None:
        pass


@dataclass
class Evolution:
    """Regularized evolution (Real et al. 2019, "Regularized Evolution for Image Classifier
    Architecture Search", algorithm 1): the best of `tournament` members drawn from the last
    `population` networks is changed in one decision; the oldest member dies, however good. The
    population begins at random. Smaller than the paper's (100 and 25), whose budgets are of
    thousands."""

    space: ArchitectureSpace
    seed: int
    population: int = 20
    tournament: int = 5
    _rng: np.random.Generator = field(init=False, repr=False)
    _members: deque[tuple[Choices, float]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.tournament <= self.population:
            raise ValueError(f"tournament: got {self.tournament}, want 1 to {self.population}")
        self._rng = np.random.default_rng(self.seed)
        self._members = deque(maxlen=self.population)

    def ask(self) -> Choices:
        if len(self._members) < self.population:
            return self.space.sample(self._rng)
        drawn = self._rng.choice(len(self._members), self.tournament, replace=False)
        parent, _ = max((self._members[index] for index in drawn), key=lambda member: member[1])
        return mutated(self.space, parent, self._rng)

    def tell(self, choices: Choices, reward: float) -> None:
        self._members.append((choices, reward))


def mutated(space: ArchitectureSpace, choices: Choices, rng: np.random.Generator) -> Choices:
    """Another network: one decision that exists and has a choice takes another option. What comes
    to exist by that is drawn evenly. The same network where there is no other."""
    open_ones = [
        index
        for index, decision in enumerate(space.decisions)
        if len(decision.options) > 1 and space.exists(index, choices[:index])
    ]
    if not open_ones:
        return choices
    changed = open_ones[int(rng.integers(len(open_ones)))]
    n_options = len(space.decisions[changed].options)
    option = (choices[changed] + 1 + int(rng.integers(n_options - 1))) % n_options

    def choose(index: int, _earlier: object) -> int:
        if index == changed:
            return option
        existed = space.exists(index, choices[:index])
        return choices[index] if existed else int(rng.integers(len(space.decisions[index].options)))

    return space.completed(choose)
