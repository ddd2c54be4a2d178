"""Predictor: accuracy guessed from choices, learned from the networks that were looked at.

Ridge regression on the space's vectors, precision included, so that it sees both (Wang et al. 2020,
"APQ", section 3.3, with a linear model in the place of their network: they had thousands of
samples). The penalty is the one whose leave-one-out error is least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from optimizer.architecture.proposers import mutated
from optimizer.architecture.space import ArchitectureSpace, Choices, Vector

_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
_BEST = 5
"""One in so many of those known is a parent."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """`weights` [axis] and `mean`; `error` is the leave-one-out root mean square."""

    weights: Vector
    centre: Vector
    mean: float
    error: float

    def __call__(self, vector: Vector) -> float:
        return float(self.mean + (vector - self.centre) @ self.weights)


def fitted(vectors: Sequence[Vector], accuracies: Sequence[float]) -> Predictor:
    """To at least two samples. Raises ValueError for fewer."""
    if len(vectors) < 2:
        raise ValueError(f"got {len(vectors)} samples, want at least 2")
    x, y = np.stack(vectors), np.asarray(accuracies, dtype=np.float64)
    centre, mean = x.mean(axis=0), float(y.mean())
    x, y = x - centre, y - mean
    u, s, v = np.linalg.svd(x, full_matrices=False)
    best: Predictor | None = None
    for penalty in _PENALTIES:
        shrunk = s**2 / (s**2 + penalty)
        residuals = y - u @ (shrunk * (u.T @ y))
        # Of the hat matrix; the mean takes a share of each sample too.
        leverage = (u**2 * shrunk).sum(axis=1) + 1 / len(y)
        error = float(np.sqrt(np.mean((residuals / np.maximum(1 - leverage, 1e-6)) ** 2)))
        if best is None or error < best.error:
            best = Predictor(v.T @ (s / (s**2 + penalty) * (u.T @ y)), centre, mean, error)
    assert best is not None
    return best


@dataclass
class PredictorGuided:
    """A proposer: of `pool` candidates, half of them changed from the best fifth so far and half
    drawn, the one whose predicted reward is most. Networks that were looked at don't come again
    while there are others. The first `n_random` are drawn."""

    space: ArchitectureSpace
    seed: int
    discount: Callable[[Choices], float]
    """What a network's accuracy is multiplied by in its reward, above 0: its latency is known
    beforehand, so only the accuracy is predicted."""
    n_random: int = 20
    pool: int = 100
    _rng: np.random.Generator = field(init=False, repr=False)
    _rewards: dict[Choices, float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def ask(self) -> Choices:
        if len(self._rewards) < max(2, self.n_random):
            return self.space.sample(self._rng)
        known = list(self._rewards)
        predictor = fitted(
            [self.space.vector(one) for one in known],
            [self._rewards[one] / self.discount(one) for one in known],
        )
        candidates = self._candidates(known)
        new = [one for one in candidates if one not in self._rewards] or candidates
        return max(new, key=lambda one: predictor(self.space.vector(one)) * self.discount(one))

    def tell(self, choices: Choices, reward: float) -> None:
        self._rewards[choices] = reward

    def _candidates(self, known: Sequence[Choices]) -> list[Choices]:
        n_best = max(1, len(known) // _BEST)
        best = sorted(known, key=lambda one: -self._rewards[one])[:n_best]
        changed = [
            mutated(self.space, best[int(self._rng.integers(n_best))], self._rng)
            for _ in range(self.pool // 2)
        ]
        drawn = [self.space.sample(self._rng) for _ in range(self.pool - len(changed))]
        return changed + drawn
