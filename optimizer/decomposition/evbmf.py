"""EVBMF: how many components of a matrix are signal, by empirical variational Bayes.

Nakajima, Sugiyama, Babacan and Tomioka 2013, "Global Analytic Solution of Fully-observed
Variational Bayesian Matrix Factorization", JMLR 14, with the noise's variance estimated; as Kim
et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", section 3.2, choose ranks by it. It knows singular values, not layers.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_Z = 2.5129
"""The threshold's constant: tau is its root times the square root of alpha (theorem 1 there)."""
_N_GRID = 128
"""Variances at which the free energy is looked at before the best is refined: it can have more
than one valley."""
_N_REFINED = 60
_GOLDEN = (5**0.5 - 1) / 2
_FLOOR = 1e-12
"""Of squared singular values, relative to the largest, so that a matrix without noise has a
logarithm."""


def evbmf_rank(matrix: NDArray[np.float64]) -> int:
    """Components of `matrix` [m, n] that stand out from its noise, 0 to min(m, n); 0 for a matrix
    of zeros. Raises ValueError for values that aren't finite."""
    if not np.isfinite(matrix).all():
        raise ValueError("got a matrix with NaN or infinity, want finite values")
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2  # [min(m, n)], falling
    if not squares[0]:
        return 0
    squares = np.maximum(squares, squares[0] * _FLOOR)
    n_long = max(matrix.shape)
    threshold = n_long * noise_variance(squares, n_long) * _limit(len(squares) / n_long)
    return int(np.count_nonzero(squares > threshold))


def noise_variance(squares: NDArray[np.float64], n_long: int) -> float:
    """The variance of the noise that minimizes the free energy (there, theorem 3 and equation 27).

    `squares` are all squared singular values, falling and above 0; `n_long` is the longer side.
    """
    n_short = len(squares)
    alpha = n_short / n_long
    n_most = min(max(int(np.ceil(n_short / (1 + alpha))) - 1, 0), n_short - 1)
    low = max(squares[n_most] / (n_long * _limit(alpha)), squares[n_most:].mean() / n_long)
    high = squares.sum() / (n_short * n_long)
    if low >= high:
        return float(high)

    def energy(logarithm: float) -> float:
        return free_energy(squares, n_long, float(np.exp(logarithm)))

    grid = np.linspace(np.log(low), np.log(high), _N_GRID)
    best = int(np.argmin([energy(point) for point in grid]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, _N_GRID - 1)]
    return float(np.exp(_minimum(energy, float(left), float(right))))


def free_energy(squares: NDArray[np.float64], n_long: int, variance: float) -> float:
    """The part of it that depends on the noise's variance, by the longer side (equation 27)."""
    alpha = len(squares) / n_long
    x = squares / (n_long * variance)
    signal, noise = x[x > _limit(alpha)], x[x <= _limit(alpha)]
    centred = signal - (1 + alpha)
    tau = (centred + np.sqrt(centred**2 - 4 * alpha)) / 2
    return float(
        np.sum(noise - np.log(noise))
        + np.sum(signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1))
    )


def _limit(alpha: float) -> float:
    """Where a component begins to be signal, of squares over (longer side x variance)."""
    tau = _Z * alpha**0.5
    return float((1 + tau) * (1 + alpha / tau))


def _minimum(function: Callable[[float], float], left: float, right: float) -> float:
    """By golden sections, between the two."""
    for _ in range(_N_REFINED):
        span = _GOLDEN * (right - left)
        if function(right - span) <= function(left + span):
            right = left + span
        else:
            left = right - span
    return (left + right) / 2
