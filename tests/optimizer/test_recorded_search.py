"""The search, replayed on a space of which everything was measured (benchmarks/search.py)."""

from pathlib import Path

import pytest

from benchmarks import search
from benchmarks.search_recorded import Table

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "search-resnet20.json"


@pytest.mark.parametrize("max_drop", [0.15, 0.25])
def test_search_comes_near_the_optimum_in_a_tenth_of_all_evaluations(max_drop: float) -> None:
    table = Table.read(TABLE)
    n = len(table.rows) // 10
    costs = search.study("gp")(table, max_drop, n, seed=0)
    best = table.best(max_drop)
    assert table.best_baseline(max_drop) > 1.2 * best
    assert costs[-1] <= 1.05 * best
