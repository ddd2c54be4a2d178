"""Estimates from blocks' times, and the correction by networks that were timed whole."""

import numpy as np
import pytest

from optimizer.search.block_table import Pair, block_sum, correction

TIMES = {("a", 1): 0.001, ("a", 8): 0.006, ("b", 1): 0.002}


def pairs(n: int, error: float = 0.0, seed: int = 0) -> list[Pair]:
    """Networks that take 1 ms and 0.8 times their blocks' sum, give or take `error`."""
    rng = np.random.default_rng(seed)
    sums = rng.uniform(0.002, 0.05, n)
    return [
        Pair(float(x), float((0.001 + 0.8 * x) * (1 + rng.uniform(-error, error)))) for x in sums
    ]


def test_sum_counts_each_block_as_often_as_it_occurs() -> None:
    assert block_sum({"a": 3, "b": 1}, TIMES, 1) == pytest.approx(0.005)


def test_sum_is_unknown_when_a_block_was_not_measured() -> None:
    assert block_sum({"a": 1, "b": 1}, TIMES, 8) is None


def test_correction_finds_what_lies_between_the_blocks() -> None:
    found = correction(pairs(8))
    assert found is not None
    assert found.fixed_s == pytest.approx(0.001, rel=1e-6)
    assert found.factor == pytest.approx(0.8, rel=1e-6)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_correction_waits_when_pairs_are_few_or_alike() -> None:
    assert correction(pairs(3)) is None
    assert correction(pairs(1) * 10) is None


def test_fastest_stays_below_every_pair_that_it_was_fitted_to() -> None:
    known = pairs(12, error=0.2)
    found = correction(known)
    assert found is not None
    assert all(found.fastest(pair.sum_s) < pair.whole_s for pair in known)


@pytest.mark.parametrize("seed", range(5))
def test_correction_is_never_negative_when_the_pairs_are_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = correction([Pair(*rng.uniform(0.001, 0.01, 2)) for _ in range(6)])
    assert found is not None
    assert found.fixed_s >= 0
    assert found.factor >= 0
