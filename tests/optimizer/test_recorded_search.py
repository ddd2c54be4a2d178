"""The search, replayed on a space of which everything was measured (benchmarks/search.py)."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = BENCHMARKS / "results" / "search-resnet20.json"


@pytest.mark.parametrize("max_drop", [0.15, 0.25])
def test_search_comes_near_the_optimum_in_a_tenth_of_all_evaluations(
    max_drop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import search
    import search_recorded

    try:
        table = search_recorded.Table.read(TABLE)
        n = len(table.rows) // 10
        costs = search.study("gp")(table, max_drop, n, seed=0)
        best = table.best(max_drop)
        assert table.best_baseline(max_drop) > 1.2 * best
        assert costs[-1] <= 1.05 * best
    finally:
        for name in ("search", "search_recorded"):
            sys.modules.pop(name, None)
