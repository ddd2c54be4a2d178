"""The warm start: what did well for one SLO is tried first for the next."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optimizer.result import Variant, variant_to_dict
from optimizer.search.coordinator import Answer, Coordinator
from optimizer.search.landscape import baselines
from optimizer.spec import Spec, read_spec
from optimizer.store import Store
from optimizer.variant import Kind
from optimizer.warm_start import N_FIRST, first_decisions
from tests.optimizer.study_result import variant
from tests.optimizer.test_search import identify, landscape, run
from tests.optimizer.tiny_study import write_study

BASE, OTHER = "ba5e" * 16, "07e4" * 16


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """It allows a drop of 20 points."""
    return read_spec(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def row(label: str, milliseconds: float, drop: float = 0.0) -> Variant:
    """It costs as much as it takes."""
    return variant(label, "unverified", milliseconds, drop)


def entry(made: Variant | None, **decisions: Any) -> dict[str, Any]:
    logged = None if made is None else variant_to_dict(made)
    named = decisions or {"of": made.label if made is not None else ""}
    return {"row": logged, "decisions": named}


def study(
    store: Store, spec: Spec, study_id: str, *entries: dict[str, Any], base: str = BASE
) -> list[Any]:
    """What it tries first; then it ran, and logged its trials."""
    first = list(first_decisions(store, study_id, base, spec))
    for number, one in enumerate(entries, 1):
        store.log_trial(study_id, number, one)
    return first


def test_first_study_of_a_model_starts_cold(store: Store, spec: Spec) -> None:
    assert study(store, spec, "first") == []


def test_second_study_tries_first_what_was_best_and_accurate_enough(
    store: Store, spec: Spec
) -> None:
    fast_but_wrong = row("fast int8", 1.0, drop=0.3)
    dropped = replace(row("broken", 0.5), status="dropped", serving=None)
    entries = [row("slow", 9.0), fast_but_wrong, row("fast", 2.0), dropped, row("middle", 5.0)]
    study(store, spec, "first", *map(entry, entries), entry(None))

    assert study(store, spec, "second") == [{"of": "fast"}, {"of": "middle"}, {"of": "slow"}]

    # For another objective, another order.
    by_size = replace(spec, objective="size")
    small = [replace(one, size_bytes=n) for n, one in enumerate(entries, 1)]
    study(store, by_size, "third", *map(entry, small), base=OTHER)
    assert study(store, by_size, "fourth", base=OTHER) == [
        {"of": "slow"}, {"of": "fast"}, {"of": "middle"},
    ]  # fmt: skip


def test_second_study_takes_only_the_best_each_once(store: Store, spec: Spec) -> None:
    rows = [row(f"engine{n} fp32", 1.0 + n) for n in range(N_FIRST + 3)]
    study(store, spec, "first", *map(entry, rows))
    study(store, spec, "again", *map(entry, rows))
    assert study(store, spec, "next") == [{"of": one.label} for one in rows[:N_FIRST]]


def test_resumed_study_begins_the_same_way_whatever_others_have_found(
    store: Store, spec: Spec
) -> None:
    study(store, spec, "first", entry(row("slow", 9.0)))
    begun = study(store, spec, "second", entry(row("its own", 3.0)))
    study(store, spec, "third", entry(row("fast", 1.0)))

    assert begun == [{"of": "slow"}]
    assert study(store, spec, "second") == begun
    assert study(store, spec, "first") == []
    assert study(store, spec, "fourth") == [{"of": "fast"}, {"of": "its own"}, {"of": "slow"}]


def test_studies_of_other_models_are_ignored(store: Store, spec: Spec) -> None:
    study(store, spec, "first", entry(row("theirs", 1.0)), base=OTHER)
    assert study(store, spec, "second") == []


def test_search_tries_what_did_well_before_right_after_the_baselines(
    store: Store, spec: Spec
) -> None:
    before = run(12)
    done = [
        entry(row(f"engine{n} fp32", 9.0 - n / 2), **trial.decisions.values)
        for n, trial in enumerate(before)
    ]
    study(store, spec, "first", *done)
    first = first_decisions(store, "second", BASE, spec)
    n_baselines = len(list(baselines(landscape, Kind.TORCH)))
    best = [str(trial.recipe) for trial in reversed(before[-N_FIRST:])]

    coordinator = Coordinator(landscape, Kind.TORCH, identify, seed=7, first=first)
    found = []
    for trial in coordinator.trials():
        found.append(trial)
        if len(found) == n_baselines + N_FIRST:
            break
        coordinator.tell(trial, Answer(1.0))
    assert [str(trial.recipe) for trial in found[n_baselines:]] == best
