"""The surrogate: a Gaussian process that predicts a number for decisions that weren't tried.

Decisions are a point of a conditional space: each is made or not, and takes one of some names, or
a number. The covariance is the sum of one part for each decision, by which what one choice does is
learned from all trials that made it, whatever else they chose, and a product of all of them for
what choices do together (Duvenaud et al. 2011, "Additive Gaussian Processes", with the orders 1
and all). How much each part weighs, and the noise, maximize the posterior (Rasmussen and Williams
2006, section 5.4). It knows no search and no Optuna.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize

Point = Mapping[str, float | str]
"""Decision → a name, or a number scaled to 0 to 1; a decision that wasn't to be made is missing."""

_LENGTH = 0.7
"""Distance of numbers, of which all lie in 0 to 1, at which they tell little of each other."""
_SHARED = 0.5
"""Correlation in the product of points that differ in a decision entirely."""
_JITTER = 1e-6
_LOG_NOISE, _LOG_WEIGHT, _LOG_TOGETHER = -2.3, -0.7, -1.2
"""Means of the logarithms' normal priors: noise of 0.1, parts of 0.5, the product of 0.3, all as
standard deviations where those of the values is 1."""
_SPREADS = (0.7, 1.0, 1.0)
"""Their standard deviations, in that order."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Fitted. Predictions are in the unit of the values it was fitted to."""

    names: tuple[str, ...]
    points: Sequence[Point]
    weights: Floats
    """Standard deviation of each decision's part, and last that of the product."""
    centre: float
    scale: float
    _factor: Floats
    _solved: Floats

    def predict(self, points: Sequence[Point]) -> tuple[Floats, Floats]:
        """(means, standard deviations) for the points, [n] each, without the noise."""
        parts = _parts(self.names, points, self.points)
        covariance = np.tensordot(self.weights**2, parts, axes=1)  # [n, n fitted]
        solved = cho_solve((self._factor, True), covariance.T)
        made = np.array([[name in point for name in self.names] for point in points], dtype=float)
        own = made @ self.weights[:-1] ** 2 + self.weights[-1] ** 2
        variance = np.maximum(own - np.einsum("ij,ji->i", covariance, solved), 1e-12)
        return self.centre + self.scale * (covariance @ self._solved), self.scale * np.sqrt(
            variance
        )


def fitted(points: Sequence[Point], values: Sequence[float]) -> Surrogate:
    """The surrogate of these points and values, at least one of each, all finite."""
    names = tuple(sorted({name for point in points for name in point}))
    observed = np.asarray(values, dtype=np.float64)
    centre, scale = float(observed.mean()), float(observed.std()) or 1.0
    standard = (observed - centre) / scale
    parts = _parts(names, points, points)
    start = np.array([_LOG_NOISE, *[_LOG_WEIGHT] * len(names), _LOG_TOGETHER])
    found = minimize(_Posterior(parts, standard, start), start, jac=True, method="L-BFGS-B",
                     bounds=[(-6.0, 2.0)] * len(start), options={"maxiter": 60})  # fmt: skip
    noise, weights = np.exp(found.x[0]), np.exp(found.x[1:])
    factor = cholesky(_covariance(parts, weights, noise), lower=True)
    return Surrogate(
        names, points, weights, centre, scale, factor, cho_solve((factor, True), standard)
    )


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Minus the logarithm of the posterior of (log noise, log weights), and its gradient."""

    parts: Floats
    values: Floats
    means: Floats

    def __call__(self, logs: Floats) -> tuple[float, Floats]:
        noise, weights = np.exp(logs[0]), np.exp(logs[1:])
        factor = cholesky(_covariance(self.parts, weights, noise), lower=True)
        solved = cho_solve((factor, True), self.values)
        inverse = cho_solve((factor, True), np.eye(len(self.values)))
        spreads = np.array([_SPREADS[0], *[_SPREADS[1]] * (len(weights) - 1), _SPREADS[2]])
        off = (logs - self.means) / spreads
        value = (
            0.5 * float(self.values @ solved) + float(np.log(np.diag(factor)).sum())
            + 0.5 * float(off @ off)
        )  # fmt: skip
        # d/dθ = ½ tr((K⁻¹ - αα') dK/dθ), and dK/dlog w = 2 w² part.
        middle = inverse - np.outer(solved, solved)
        by_weight = weights**2 * np.einsum("ij,kij->k", middle, self.parts)
        gradient = np.array([noise**2 * np.trace(middle), *by_weight]) + off / spreads
        return value, gradient


def _covariance(parts: Floats, weights: Floats, noise: float) -> Floats:
    found: Floats = np.tensordot(weights**2, parts, axes=1)
    return found + (noise**2 + _JITTER) * np.eye(len(found))


def _parts(names: Sequence[str], left: Sequence[Point], right: Sequence[Point]) -> Floats:
    """Correlations of the points, 0 to 1, by decision and last in all: [names + 1, left, right]."""
    together = np.ones((len(left), len(right)))
    parts = []
    for name in names:
        part = _part([point.get(name) for point in left], [point.get(name) for point in right])
        # That neither made the decision is no difference.
        neither = np.logical_and.outer(
            *([name not in one for one in side] for side in (left, right))
        )
        together *= np.where(neither, 1.0, _SHARED + (1 - _SHARED) * part)
        parts.append(part)
    return np.array([*parts, together])


def _part(left: Sequence[float | str | None], right: Sequence[float | str | None]) -> Floats:
    """1 where both took the same choice, less the further apart, 0 where one had none to take."""
    found = [*left, *right]
    if any(isinstance(one, str) for one in found):
        codes = {name: float(code) for code, name in enumerate(dict.fromkeys(map(str, found)))}
        ours, theirs = (
            np.array([np.nan if one is None else codes[str(one)] for one in side])
            for side in (left, right)
        )
        same: Floats = np.equal.outer(ours, theirs).astype(np.float64)
        return same
    ours, theirs = np.array(left, dtype=np.float64), np.array(right, dtype=np.float64)
    distances = np.subtract.outer(ours, theirs) / _LENGTH
    alike: Floats = np.nan_to_num(np.exp(-0.5 * distances**2), nan=0.0)
    return alike
