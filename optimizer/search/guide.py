"""The guide: which recipe to try next, by what all trials so far let expect of the others.

One surrogate predicts the logarithm of the objective, one more each constraint; of a pool of
recipes that weren't tried, random ones and neighbours of the best, it takes the one with the
highest expected improvement times the chance to keep all constraints (Gardner et al. 2014,
"Bayesian Optimization with Inequality Constraints"). What was proposed and isn't answered yet
counts as it is predicted (Ginsbourger et al. 2010, "Kriging is well-suited to parallelize
optimization", the kriging believer), so that several can be tried at once. It holds no randomness
of its own: equal seed, answers and open proposals give equal proposals.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from optimizer.search.landscape import Chooser, Decisions, Landscape, walk
from optimizer.search.surrogate import Point, Surrogate, fitted
from optimizer.space import Categorical, Distribution, Number, Value
from optimizer.variant import Kind

N_RANDOM = 120
N_NEIGHBOURS = 60
N_PARENTS = 5
"""The best so far, whose neighbours are looked at."""
MAX_CHANGES = 2
"""Decisions in which a neighbour differs, at most."""
MAX_FITTED = 300
"""Trials that a surrogate is fitted to, the latest."""
WORST = 2.0
"""Relative excess of a constraint, beyond which it is all the same."""
BUILT = "built"
"""A constraint like the others: broken where a step couldn't be built, so that what such trials
have in common is proposed less."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What came of a trial. Figures that aren't known are missing; constraints are kept where at
    most 0, and relative to their limit."""

    values: Mapping[str, Value]
    objective: float | None
    constraints: Mapping[str, float]

    @property
    def excess(self) -> float:
        return max([0.0, *self.constraints.values()])


@dataclass(eq=False)
class Guide:
    landscape: Landscape
    starts_from: Kind
    seed: int
    _seen: list[Seen] = field(default_factory=list)
    _open: list[Mapping[str, Value]] = field(default_factory=list)
    """Decisions of trials that are under way, in their order."""
    _scales: dict[str, Distribution] = field(default_factory=dict)
    """Decision → its distribution, as walks come by it."""

    def tell(
        self,
        values: Mapping[str, Value],
        objective: float | None,
        constraints: Mapping[str, float],
        is_built: bool = True,
    ) -> None:
        """`values` are the trial's decisions by name, `constraints` those of which something is
        known; `is_built` unless one of its steps couldn't be."""
        known = objective if objective is not None and 0 < objective < math.inf else None
        limited = {name: float(np.clip(v, -1.0, WORST)) for name, v in constraints.items()}
        limited[BUILT] = -1.0 if is_built else 1.0
        self._seen.append(Seen(values, known, limited))
        if values in self._open:
            self._open.remove(values)

    def begin(self, values: Mapping[str, Value]) -> None:
        """A trial of these decisions is under way: until it is told, its prediction counts."""
        self._open.append(values)

    def proposal(self, is_known: Callable[[Decisions], bool]) -> Decisions | None:
        """The best of the pool; None where all of it was tried, or failed to be built so far."""
        rng = np.random.default_rng([self.seed, len(self._seen) + len(self._open)])
        pool = self._pool(rng, is_known)
        if not pool:
            return None
        seen = [*self._seen, *self.believed()]
        scores = self._scores([self._point(decisions.values) for decisions in pool], seen)
        return pool[int(np.argmax(scores))]

    def believed(self) -> list[Seen]:
        """What is predicted of the open trials, from what was seen."""
        if not self._open:
            return []
        points = [self._point(values) for values in self._open]
        objectives: list[float | None] = [None] * len(points)
        objective = self._objective(self._seen)
        if objective is not None:
            objectives = [math.exp(mean) for mean in objective.predict(points)[0]]
        constraints = {
            name: surrogate.predict(points)[0]
            for name, surrogate in self._constraints(self._seen).items()
        }
        return [
            Seen(values, objectives[i], {name: float(one[i]) for name, one in constraints.items()})
            for i, values in enumerate(self._open)
        ]

    # --- the pool

    def _pool(
        self, rng: np.random.Generator, is_known: Callable[[Decisions], bool]
    ) -> list[Decisions]:
        found: dict[tuple[tuple[str, Value], ...], Decisions] = {}
        measured = [seen for seen in self._seen if seen.objective is not None]
        best = sorted(measured, key=lambda seen: (seen.excess, seen.objective or 0.0))
        parents = islice(cycle(best[:N_PARENTS]), N_NEIGHBOURS)
        for choose in (
            *(self._random(rng) for _ in range(N_RANDOM)),
            *(self._beside(parent, rng) for parent in parents),
        ):
            decisions = walk(self.landscape, self.starts_from, choose)
            key = tuple(sorted(decisions.values.items()))
            if key not in found and not is_known(decisions):
                found[key] = decisions
        return list(found.values())

    def _random(self, rng: np.random.Generator) -> Chooser:
        def choose(name: str, distribution: Distribution) -> Value:
            self._scales.setdefault(name, distribution)
            return _drawn(distribution, rng)

        return choose

    def _beside(self, parent: Seen, rng: np.random.Generator) -> Chooser:
        """Decides as the parent did, but for one or two decisions."""
        names = sorted(parent.values)
        n_changed = min(len(names), int(rng.integers(1, MAX_CHANGES + 1)))
        changed = set(rng.choice(names, n_changed, replace=False)) if names else set()

        def choose(name: str, distribution: Distribution) -> Value:
            self._scales.setdefault(name, distribution)
            if name in parent.values and name not in changed:
                return parent.values[name]
            return _drawn(distribution, rng)

        return choose

    # --- the scores

    def _scores(self, points: Sequence[Point], seen: Sequence[Seen]) -> Floats:
        """Logarithm of the expected improvement, plus that of the chance to keep everything."""
        scores = np.zeros(len(points))
        objective = self._objective(seen)
        if objective is not None:
            scores += _log_improvement(objective, points, _best(_complete(seen)))
        for surrogate in self._constraints(seen).values():
            mean, spread = surrogate.predict(points)
            scores += log_ndtr(-mean / spread)
        return scores

    def _objective(self, seen: Sequence[Seen]) -> Surrogate | None:
        """Of the objective's logarithm; None while nothing is known of it."""
        complete = _complete(seen)
        if not complete:
            return None
        logs = [math.log(one.objective or 1.0) for one in complete]
        return fitted([self._point(one.values) for one in complete], logs)

    def _constraints(self, seen: Sequence[Seen]) -> dict[str, Surrogate]:
        """Of those that can be broken, for all that was seen: others say nothing."""
        found = {}
        for name in sorted({name for one in seen for name in one.constraints}):
            told = [one for one in seen if name in one.constraints][-MAX_FITTED:]
            excesses = [one.constraints[name] for one in told]
            if max(excesses) > 0:
                found[name] = fitted([self._point(one.values) for one in told], excesses)
        return found

    def _point(self, values: Mapping[str, Value]) -> Point:
        return {
            name: _scaled(self._scales[name], value) if name in self._scales else str(value)
            for name, value in values.items()
        }


def _complete(seen: Sequence[Seen]) -> list[Seen]:
    """The latest of which the objective is known."""
    return [one for one in seen if one.objective is not None][-MAX_FITTED:]


def _best(complete: Sequence[Seen]) -> float:
    """The logarithm to improve on: the lowest that keeps all constraints, else the highest."""
    kept = [math.log(one.objective) for one in complete if one.excess <= 0 and one.objective]
    return min(kept) if kept else max(math.log(one.objective or 1.0) for one in complete)


def _log_improvement(surrogate: Surrogate, points: Sequence[Point], best: float) -> Floats:
    """Of the expected improvement over `best`, downwards."""
    mean, spread = surrogate.predict(points)
    z = (best - mean) / spread
    # Far below, where both terms cancel, the tail's own expansion: φ(z) / z².
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    near = np.log(np.maximum(z * ndtr(z) + density, 1e-300))
    tail = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - 2 * np.log(np.maximum(-z, 1.0))
    found: Floats = np.log(spread) + np.where(z < -6, tail, near)
    return found


def _drawn(distribution: Distribution, rng: np.random.Generator) -> Value:
    if isinstance(distribution, Categorical):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    return _at(distribution, float(rng.random()))


def _at(number: Number, share: float) -> Value:
    """The number at that share of the way from its low to its high end."""
    low, high = float(number.low), float(number.high)
    value = low * (high / low) ** share if number.logarithmic else low + (high - low) * share
    if not number.whole:
        return value
    return int(low) + round((value - low) / number.step) * number.step


def _scaled(distribution: Distribution, value: Value) -> float | str:
    """A number as its share of the way; numbers to choose from by their order."""
    if isinstance(distribution, Categorical):
        choices = distribution.choices
        if any(isinstance(one, str | bool) for one in choices):
            return str(value)
        return sorted(choices).index(value) / max(1, len(choices) - 1)
    low, high = distribution.low, distribution.high
    number = float(value)
    if high <= low:
        return 0.0
    if distribution.logarithmic:
        return math.log(number / low) / math.log(high / low)
    return (number - low) / (high - low)
