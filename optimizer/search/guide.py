"""The guide: which recipe to try next, by what all trials so far let expect of the others.

One surrogate predicts the logarithm of the objective, one more each constraint; of a pool of
recipes that weren't tried, random ones and neighbours of the best, it takes the one with the
highest expected improvement times the chance to keep all constraints (Gardner et al. 2014,
"Bayesian Optimization with Inequality Constraints"). It holds no randomness of its own: equal
seed and answers give equal proposals.
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
    _scales: dict[str, Distribution] = field(default_factory=dict)
    """Decision → its distribution, as walks come by it."""

    def tell(
        self, values: Mapping[str, Value], objective: float | None, constraints: Mapping[str, float]
    ) -> None:
        """`values` are the trial's decisions by name, `constraints` those of which something is
        known."""
        known = objective if objective is not None and 0 < objective < math.inf else None
        limited = {name: float(np.clip(v, -1.0, WORST)) for name, v in constraints.items()}
        self._seen.append(Seen(values, known, limited))

    def proposal(self, is_known: Callable[[Decisions], bool]) -> Decisions | None:
        """The best of the pool; None where all of it was tried, or failed to be built so far."""
        rng = np.random.default_rng([self.seed, len(self._seen)])
        pool = self._pool(rng, is_known)
        if not pool:
            return None
        scores = self._scores([self._point(decisions.values) for decisions in pool])
        return pool[int(np.argmax(scores))]

    # --- the pool

    def _pool(
        self, rng: np.random.Generator, is_known: Callable[[Decisions], bool]
    ) -> list[Decisions]:
        found: dict[tuple[tuple[str, Value], ...], Decisions] = {}
        best = sorted(self._complete(), key=lambda seen: (seen.excess, seen.objective or 0.0))
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

    def _complete(self) -> list[Seen]:
        return [seen for seen in self._seen if seen.objective is not None]

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

    def _scores(self, points: Sequence[Point]) -> Floats:
        """Logarithm of the expected improvement, plus that of the chance to keep everything."""
        complete = self._complete()[-MAX_FITTED:]
        feasible = [seen.objective for seen in complete if seen.excess <= 0 and seen.objective]
        scores = np.zeros(len(points))
        if complete:
            logs = [math.log(seen.objective or 1.0) for seen in complete]
            surrogate = fitted([self._point(seen.values) for seen in complete], logs)
            best = math.log(min(feasible)) if feasible else max(logs)
            scores += _log_improvement(surrogate, points, best)
        for name in sorted({name for seen in self._seen for name in seen.constraints}):
            told = [seen for seen in self._seen if name in seen.constraints][-MAX_FITTED:]
            excesses = [seen.constraints[name] for seen in told]
            if max(excesses) <= 0:
                continue  # nothing says that it can be broken
            surrogate = fitted([self._point(seen.values) for seen in told], excesses)
            mean, spread = surrogate.predict(points)
            scores += log_ndtr(-mean / spread)
        return scores

    def _point(self, values: Mapping[str, Value]) -> Point:
        return {
            name: _scaled(self._scales[name], value) if name in self._scales else str(value)
            for name, value in values.items()
        }


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
