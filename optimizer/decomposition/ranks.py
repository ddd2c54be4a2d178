"""Ranks: how many components of a matrix are kept, by a rule.

It knows matrices; which matrices a layer's rank is read from is the forms' matter.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.decomposition.evbmf import evbmf_rank

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class RankRule:
    """`evbmf` needs no amount; `energy` keeps that share of the sum of squared singular values,
    `share` that share of the largest rank. Results are multiples of `round_to`, the nearest, at
    least one of them and at most the largest rank."""

    by: Literal["evbmf", "energy", "share"]
    amount: float = 1.0
    round_to: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.amount <= 1:
            raise ValueError(f"got {self.amount} as {self.by}, want above 0 and at most 1")
        if self.round_to < 1:
            raise ValueError(f"got round_to {self.round_to}, want at least 1")

    def rank(self, matrix: Matrix) -> int:
        """Of a matrix [m, n]: 1 to min(m, n)."""
        largest = min(matrix.shape)
        if self.by == "share":
            return rounded(self.amount * largest, self.round_to, largest)
        if self.by == "evbmf":
            return rounded(evbmf_rank(matrix), self.round_to, largest)
        return rounded(energy_rank(matrix, self.amount), self.round_to, largest)


def energy_rank(matrix: Matrix, energy: float) -> int:
    """The fewest components that hold that share of the squared Frobenius norm; 1 for zeros."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    held = np.cumsum(squares)
    # What rounding takes from the sum mustn't ask for one more at a share of 1.
    return int(np.count_nonzero(held < energy * held[-1] * (1 - 1e-12))) + 1


def rounded(rank: float, multiple: int, largest: int) -> int:
    """The nearest multiple (of two the higher), at least one and at most `largest`."""
    nearest = multiple * int(rank / multiple + 0.5)
    return min(max(nearest, multiple), largest)
