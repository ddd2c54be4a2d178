"""Trials: the log by which a study that was killed goes on where it was."""

import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from optimizer.recipe import Recipe
from optimizer.result import Reason, Variant, variant_from_dict, variant_to_dict
from optimizer.search.coordinator import Answer
from optimizer.spec import Spec, read_spec
from optimizer.store import Store
from optimizer.study import Options, optimize
from optimizer.trials import Trials
from tests.optimizer.study_result import variant
from tests.optimizer.tiny_study import QUICK, spec_with, write_study
from tests.optimizer.trials_bench import INT8, PLAIN, in_a_hurry, make_trials, recipe_of, trial_of


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_a_hurry(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def spec(path: Path) -> Spec:
    return read_spec(path)


@dataclass(frozen=True)
class Lived:
    """Trials that were run, and what they answered."""

    trials: Trials
    recipes: list[Recipe]
    answers: list[Answer]


@pytest.fixture(scope="module")
def lived(path: Path, spec: Spec) -> Iterator[Lived]:
    with Store(path.with_name("lived.sqlite")) as store:
        trials = make_trials(spec, store)
        recipes = [recipe_of(trials.builder, steps) for steps in (PLAIN, INT8)]
        seconds = iter((1.5, 3.0))
        answers = [
            trials.run(trial_of(number, recipe), lambda _rung: None, lambda: next(seconds))
            for number, recipe in enumerate(recipes, 1)
        ]
        third = {**store.trials("study")[1], "spent_s": 4.5}  # as if it had been run once more
        store.log_trial("study", 3, third)
        answers.append(trials.replay(third))
        recipes.append(recipes[1])
        yield Lived(trials, recipes, answers)


def recalled(lived: Lived, spec: Spec, store: Store | None = None) -> Trials:
    """As the same study has them that is started again."""
    trials = make_trials(spec, store or lived.trials.builder.store)
    trials.recall()
    return trials


def test_replay_gives_the_same_rows_climbs_epochs_and_answers(lived: Lived, spec: Spec) -> None:
    again = recalled(lived, spec)
    answers, spent_s = [], []
    for number, recipe in enumerate(lived.recipes, 1):
        entry = again.logged(trial_of(number, recipe))
        assert entry is not None
        spent_s.append(entry["spent_s"])
        answers.append(again.replay(entry))

    assert answers == lived.answers
    assert again.rows == lived.trials.rows
    assert again.climbs == lived.trials.climbs
    assert again.epochs == lived.trials.epochs
    assert again.baseline is not None
    assert lived.trials.baseline is not None
    assert again.baseline.id == lived.trials.baseline.id == again.rows[0].id
    assert spent_s == [1.5, 3.0, 4.5]
    assert again.logged(trial_of(4, lived.recipes[0])) is None
    assert again.study_id == lived.trials.study_id


def test_replayed_trial_leaves_the_next_one_the_same_surroundings(lived: Lived, spec: Spec) -> None:
    again = recalled(lived, spec)
    for number, recipe in enumerate(lived.recipes, 1):
        entry = again.logged(trial_of(number, recipe))
        assert entry is not None
        again.replay(entry)
    ours, theirs = again.surroundings(), lived.trials.surroundings()
    assert (ours.best, ours.best_speedup) == (theirs.best, theirs.best_speedup)
    assert ours.best is not None


def test_training_that_trials_share_stays_counted_when_it_is_replayed(
    lived: Lived, spec: Spec
) -> None:
    entry = lived.trials.builder.store.trials("study")[0]
    assert entry["trained"] == []
    again = recalled(lived, spec)
    again.replay({**entry, "epochs": 5.0, "trained": ["sparse"]})
    again.replay({name: value for name, value in entry.items() if name != "trained"})
    assert (again.epochs, again.surroundings().trained) == (5.0, {"sparse"})


def test_study_is_forked_with_its_earlier_part_when_the_log_is_of_another_trial(
    lived: Lived, spec: Spec
) -> None:
    store = lived.trials.builder.store
    log = store.trials("study")
    again = recalled(lived, spec)
    assert again.logged(trial_of(1, lived.recipes[0])) == log[0]
    assert again.logged(trial_of(2, lived.recipes[0])) is None  # int8 in the log

    assert again.study_id != "study"
    assert store.trials(again.study_id) == log[:1]
    assert store.trials("study") == log
    # A study that goes the same way finds the fork.
    third = recalled(lived, spec)
    assert third.logged(trial_of(2, lived.recipes[0])) is None
    assert third.study_id == again.study_id


def test_fork_is_whole_when_it_was_killed_while_it_was_made(
    lived: Lived, spec: Spec, tmp_path: Path
) -> None:
    log = lived.trials.builder.store.trials("study")
    whole = recalled(lived, spec)
    assert whole.logged(trial_of(3, lived.recipes[0])) is None
    with Store(tmp_path / "store.sqlite") as store:
        for number, entry in enumerate(log, 1):
            store.log_trial("study", number, {**entry, "baseline": ""})
        kept = store.trials("study")[:2]
        store.log_trial(whole.study_id, 1, kept[0])  # and then it was killed

        again = recalled(lived, spec, store)
        assert again.logged(trial_of(3, lived.recipes[0])) is None

        assert again.study_id == whole.study_id
        assert store.trials(again.study_id) == kept
        assert again.log == dict(enumerate(kept, 1))


def test_study_is_forked_when_the_baseline_of_the_log_is_gone(
    lived: Lived, spec: Spec, tmp_path: Path
) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.log_trial("study", 1, lived.trials.builder.store.trials("study")[0])
        again = recalled(lived, spec, store)
        assert again.logged(trial_of(1, lived.recipes[0])) is None
        assert again.study_id != "study"
        assert again.log == {}


def test_row_with_infinite_values_survives_the_log(lived: Lived, tmp_path: Path) -> None:
    row = endless(variant("onnxruntime fp32", "infeasible", 8.0))
    entry = {**lived.trials.builder.store.trials("study")[0], "row": variant_to_dict(row)}
    with Store(tmp_path / "store.sqlite") as store:
        store.log_trial("study", 1, entry)
        [stored] = store.trials("study")
    assert variant_from_dict(stored["row"]) == row
    # What the log holds is JSON to everybody.
    json.dumps(stored, allow_nan=False)


def endless(row: Variant) -> Variant:
    """What keeps no rate, and whose drop can't be bounded."""
    assert row.serving is not None
    assert row.quality is not None
    prediction = replace(row.serving.prediction, p99_s=math.inf, slo_latency_s=math.inf)
    serving = replace(
        row.serving, max_rate_per_s=0.0, cost_per_million=math.inf, prediction=prediction
    )
    quality = replace(row.quality, drop_bound=math.inf, drop_lower=-math.inf)
    quality = replace(quality, figures={"kl": math.inf})
    reasons = (Reason("latency", math.inf, 0.9, "s", "predicted"),)
    return replace(row, serving=serving, quality=quality, reasons=reasons)


class Ticking:
    """A clock that goes on by a second each time it is asked."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.mark.full  # takes a while
def test_study_goes_on_with_the_seconds_it_has_spent_when_its_budget_is_larger(
    path: Path, tmp_path: Path
) -> None:
    given = Options(store=tmp_path / "store.sqlite", verify=False, effort=QUICK, clock=Ticking())
    optimize(spec_with(path, trials=1), tmp_path / "models", given)
    [before] = logs(given.store)
    result = optimize(
        spec_with(path, trials=2), tmp_path / "models", replace(given, clock=Ticking())
    )
    [after] = logs(given.store)

    assert (len(before), len(after)) == (1, 2)
    assert after[0] == before[0]
    assert after[1]["spent_s"] > before[0]["spent_s"] > 0
    assert result.budget.wall_clock_s > after[1]["spent_s"]
    assert result.budget.trials == 2

    spec = spec_with(path, trials=9)
    spent = spec.budget.model_copy(update={"wall_clock_s": after[1]["spent_s"]})
    optimize(replace(spec, budget=spent), tmp_path / "models", replace(given, clock=Ticking()))
    assert logs(given.store) == [after]


def logs(path: Path | str) -> list[Any]:
    """Of each study in the store."""
    connection = sqlite3.connect(path)
    names = [row[0] for row in connection.execute("SELECT DISTINCT study_id FROM trials")]
    connection.close()
    with Store(path) as store:
        return [store.trials(name) for name in names]
