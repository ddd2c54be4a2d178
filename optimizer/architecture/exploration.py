"""Exploration: a controller and its controls look at a space, each as many networks, on one record
of what was looked at.

The controls are regularized evolution and random search, which run always: without them nobody
knows what a controller is worth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from optimizer.architecture.controller import Controller
from optimizer.architecture.predictor import PredictorGuided
from optimizer.architecture.proposers import Evolution, Proposer, RandomSearch
from optimizer.architecture.reward import Reward
from optimizer.architecture.search import Looked, Worth, explored, front
from optimizer.architecture.space import ArchitectureSpace, Choices
from optimizer.variant import Json

EVOLUTION, RANDOM = "evolution", "random"
N_PROPOSERS = 3
"""A controller and its controls."""
Evaluate = Callable[[Choices], Worth]
Rate = Callable[[Choices], float]
_MAX_TOLD = 4
"""Networks of the front that a line about a running search has."""
_MAX_SCREENED = 10
"""Proposals in a row that are screened out, after which the next is looked at anyway."""


@dataclass(frozen=True)
class Trail:
    """What one proposer looked at, in its order."""

    proposer: str
    looked: tuple[Looked, ...]

    @property
    def best(self) -> Looked:
        """The first of those with the highest reward."""
        return max(self.looked, key=lambda one: one.reward)


@dataclass
class Screened:
    """A proposer whose proposals pass only if an untrained network's rating is at least the median
    of those rated so far. What doesn't is told as the least reward so far."""

    inner: Proposer
    rate: Rate
    _ratings: dict[Choices, float] = field(default_factory=dict)
    _least: float = 0.0

    def ask(self) -> Choices:
        for _ in range(_MAX_SCREENED):
            choices = self.inner.ask()
            if choices in self._ratings:
                return choices
            self._ratings[choices] = self.rate(choices)
            if self._ratings[choices] >= median(self._ratings.values()):
                return choices
            self.inner.tell(choices, self._least)
        return choices

    def tell(self, choices: Choices, reward: float) -> None:
        self._least = min(self._least or reward, reward)
        self.inner.tell(choices, reward)


def proposers_of(
    space: ArchitectureSpace, controller: str, seed: int, discount: Callable[[Choices], float]
) -> dict[str, Proposer]:
    """The controller of that name, first, and its controls. `discount` is what a network's
    accuracy is multiplied by in its reward."""
    first: Proposer
    if controller == "predictor":
        first = PredictorGuided(space, seed, discount)
    elif controller in ("reinforce", "ppo"):
        first = Controller(space, seed, "ppo" if controller == "ppo" else "reinforce")
    else:
        raise ValueError(f"controller: got {controller}, want reinforce, ppo or predictor")
    return {
        controller: first,
        EVOLUTION: Evolution(space, seed),
        RANDOM: RandomSearch(space, seed),
    }


def explore(
    proposers: Mapping[str, Proposer],
    evaluate: Evaluate,
    reward: Reward,
    n_evaluations: int,
) -> tuple[Trail, ...]:
    """Each proposer's trail. No network is evaluated twice: who comes later finds what others
    have looked at, and it counts for it like its own."""
    known: dict[Choices, Worth] = {}

    def looked_up(choices: Choices) -> Worth:
        if choices not in known:
            known[choices] = evaluate(choices)
        return known[choices]

    return tuple(
        Trail(name, tuple(explored(one, looked_up, reward, n_evaluations)))
        for name, one in proposers.items()
    )


def everything(trails: Sequence[Trail]) -> list[Looked]:
    """All that was looked at, each network once."""
    return list({one.choices: one for trail in trails for one in trail.looked}.values())


def ranking(trails: Sequence[Trail], target_s: float) -> list[Looked]:
    """The best first: those within the target by accuracy, then the others by reward."""
    return sorted(
        everything(trails),
        key=lambda one: (
            one.worth.latency_s > target_s,
            -one.worth.accuracy if one.worth.latency_s <= target_s else -one.reward,
            one.worth.latency_s,
        ),
    )


def regrets(trails: Sequence[Trail]) -> dict[str, tuple[float, ...]]:
    """By proposer, after each of its evaluations: what its best reward so far falls short of the
    best that any of them found. The true best of the space may be higher."""
    best = max(trail.best.reward for trail in trails)
    return {
        trail.proposer: tuple(
            best - reached for reached in accumulate((one.reward for one in trail.looked), max)
        )
        for trail in trails
    }


def document(space: ArchitectureSpace, trails: Sequence[Trail], target_s: float) -> Json:
    """All of it as JSON: what was looked at, by whom, with which regret, and the front of accuracy
    over latency."""

    def shown(one: Looked) -> Json:
        return {
            "choices": list(one.choices),
            "accuracy": one.worth.accuracy,
            "latency_s": one.worth.latency_s,
            "reward": one.reward,
        }

    return {
        "target_s": target_s,
        "decisions": [{"name": one.name, "options": list(one.options)} for one in space.decisions],
        "trails": {trail.proposer: [shown(one) for one in trail.looked] for trail in trails},
        "regret": {name: list(values) for name, values in regrets(trails).items()},
        "front": [shown(one) for one in front(everything(trails))],
    }


def told(looked: Sequence[Looked], n_most: int, target_s: float) -> str:
    """How far it is, and the front as it stands: the most accurate first."""
    ahead = front(looked)[::-1]
    within = [one for one in ahead if one.worth.latency_s <= target_s]
    best = f"the best in time {within[0].worth.accuracy:.1%}" if within else "none in time yet"
    points = ", ".join(
        f"{one.worth.accuracy:.1%} in {1e3 * one.worth.latency_s:.3g} ms"
        for one in ahead[:_MAX_TOLD]
    )
    return f"{len(looked)} of at most {n_most} networks, {best}; front {points}"


def notes_of(trails: Sequence[Trail], target_s: float) -> tuple[str, ...]:
    """What came of each proposer, in a line each."""
    whole = len(everything(trails))
    left = regrets(trails)
    lines = [f"{whole} networks looked at, {1e3 * target_s:.3g} ms a batch is the target"]
    for trail in trails:
        best, regret = trail.best, left[trail.proposer][-1]
        lines.append(
            f"{trail.proposer}: regret {regret:.4f}, reward {best.reward:.4f} after "
            f"{best.number + 1} of {len(trail.looked)} networks (accuracy "
            f"{best.worth.accuracy:.2%}, {1e3 * best.worth.latency_s:.3g} ms)"
        )
    return tuple(lines)
