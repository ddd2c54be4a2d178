"""Trials at once: batches, what their trials meet, and the log of one that was cut short."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from optimizer.observer import Silent, Standing
from optimizer.recipe import Recipe
from optimizer.result import Variant
from optimizer.search.coordinator import Trial
from optimizer.search.landscape import Decisions
from optimizer.spec import Spec, read_spec
from optimizer.store import Store
from optimizer.study import Options, optimize
from optimizer.techniques import Technique, load_technique
from optimizer.trials import Trials
from tests.optimizer.synthetic import N_STEPS, Narrow, Tune
from tests.optimizer.tiny_study import QUICK, write_study
from tests.optimizer.trials_bench import PLAIN, in_a_hurry, make_trials, recipe_of, trial_of


@dataclass
class Diary(Silent):
    """An observer that remembers which trials began, and which ended."""

    began: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def trial_began(self, max_trials: int, label: str) -> None:
        self.began.append(label)

    def trial_ended(self, variant: Variant, standing: Standing) -> None:
        self.ended.append(variant.label)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_a_hurry(write_study(tmp_path_factory.mktemp("study"), max_drop_points=90))


OPENVINO = (("export", {}), ("compilation", {"engine": "openvino"}))
TECHNIQUES: Mapping[str, Technique] = {
    "narrow": Narrow(), "tune": Tune(),
    **{name: load_technique(name) for name in ("export", "compilation")},
}  # fmt: skip


def study(path: Path, n_trials: int, at_once: int, **more: Any) -> Spec:
    spec = read_spec(path)
    changed = {"trials": n_trials, "trials_at_once": at_once, **more}
    return replace(spec, budget=spec.budget.model_copy(update=changed))


def options(store: Path, diary: Diary) -> Options:
    plain = ("export", "quantization", "compilation")
    techniques = {name: load_technique(name) for name in plain}
    return Options(store=store, verify=False, effort=QUICK, observer=diary, techniques=techniques)


def logged(store: Path) -> Mapping[int, Any]:
    """Of the one study in the store."""
    with closing(sqlite3.connect(store)) as connection:
        [[name]] = connection.execute("SELECT DISTINCT study_id FROM trials").fetchall()
    with Store(store) as opened:
        return opened.numbered_trials(str(name))


def forget(store: Path, *numbers: int) -> None:
    """As if these had been running when the study was killed."""
    with closing(sqlite3.connect(store)) as connection, connection:
        for number in numbers:
            connection.execute("DELETE FROM trials WHERE number = ?", [number])


@pytest.mark.full  # takes a while
def test_study_goes_on_in_the_middle_of_a_batch_and_with_what_its_budget_cut_off(
    path: Path, tmp_path: Path
) -> None:
    store, first, second, third = tmp_path / "store.sqlite", Diary(), Diary(), Diary()
    models = tmp_path / "models"
    optimize(study(path, 7, 3), models, options(store, first))
    before = logged(store)
    assert len(first.began) == len(before) == 7

    whole = optimize(study(path, 9, 3), models, options(store, second))
    after = logged(store)
    assert {number: after[number] for number in before} == before
    assert second.ended == [*first.ended, *second.began]

    # Of the last batch the first and the last were under way.
    forget(store, 7, 9)
    again = optimize(study(path, 9, 3), models, options(store, third))
    assert third.began == [first.began[-1], second.began[-1]]
    assert third.ended == second.ended
    recipes = [entry["recipe"] for entry in after.values()]
    assert [entry["recipe"] for entry in logged(store).values()] == recipes
    assert [row.id for row in again.variants] == [row.id for row in whole.variants]


@pytest.mark.full  # takes a while
def test_study_proposes_the_same_when_its_trials_run_in_processes_as_one_by_one(
    path: Path, tmp_path: Path
) -> None:
    store, isolated, inline = tmp_path / "store.sqlite", Diary(), Diary()
    given = Options(store=store, verify=False, effort=QUICK, observer=isolated, trials_at_once=2)
    text = path.read_text().replace("trials: 3", "trials: 7")
    spec = path.with_name("seven.yaml")
    spec.write_text(text)
    ours = optimize(spec, tmp_path / "models", given)
    assert len(isolated.began) == len(logged(store)) == 7

    # The log is of one study only as long as each proposal is what the log has.
    given = replace(given, observer=inline, isolate=False)
    theirs = optimize(read_spec(spec), tmp_path / "models", given)
    assert inline.began == []
    assert inline.ended == isolated.ended
    assert len(logged(store)) == 7
    assert [row.id for row in theirs.variants] == [row.id for row in ours.variants]


class Impatient(Diary):
    """Ends the study while the second and the third trial are under way."""

    def trial_climbed(self, rung: int, name: str) -> None:
        if len(self.began) == 3:
            raise KeyboardInterrupt


@pytest.mark.full  # takes a while
def test_interrupted_study_logs_no_trial_that_failed_of_the_interruption(
    path: Path, tmp_path: Path
) -> None:
    store, diary = tmp_path / "store.sqlite", Diary()
    given = Options(store=store, verify=False, effort=QUICK, observer=Impatient(), trials_at_once=2)
    with pytest.raises(KeyboardInterrupt):
        optimize(path, tmp_path / "models", given)
    before = logged(store)
    assert 1 in before
    assert len(before) < 3
    assert all(entry["row"]["service_times"] for entry in before.values())

    result = optimize(path, tmp_path / "models", replace(given, observer=diary))
    assert len(diary.ended) == len(result.variants) == 3
    assert len(diary.began) == 3 - len(before)


# --- what a trial of a batch meets


@pytest.fixture
def trials(path: Path, tmp_path: Path) -> Any:
    spec = study(path, 9, 3, training_epochs=10.0)
    with Store(tmp_path / "store.sqlite") as store:
        made = make_trials(spec, store)
        yield replace(made, builder=replace(made.builder, techniques=TECHNIQUES))


def structural(trials: Trials, number: int, width: float) -> Trial:
    steps = (("narrow", {"width": width}), ("tune", {"effort": "full"}), *PLAIN)
    recipe = Recipe(trials.builder.base.kind)
    for name, parameters in steps:
        recipe = recipe.then(TECHNIQUES[name].traits, parameters)
    return Trial(number, Decisions(recipe, {"width": width}), is_baseline=False, handle=None)


def test_each_trial_of_a_batch_has_the_epochs_that_those_before_it_cant_spend(
    trials: Trials,
) -> None:
    cheap = trial_of(2, recipe_of(trials.builder, PLAIN))
    batch = [structural(trials, 1, 0.5), cheap, structural(trials, 3, 0.75)]
    given = trials.surroundings_of(batch)
    most = (N_STEPS["short"] + N_STEPS["full"]) * 16 / 1000  # of 16 calibration samples
    assert [met.epochs_spent for met in given] == pytest.approx([0.0, most, most])

    unlimited = replace(
        trials, spec=replace(trials.spec, budget=study(trials.spec.source, 9, 3).budget)
    )
    assert [met.epochs_spent for met in unlimited.surroundings_of(batch)] == [0.0] * 3


def test_trials_of_a_batch_meet_what_there_was_before_it_whichever_ends_first(
    trials: Trials,
) -> None:
    first = trial_of(1, recipe_of(trials.builder, PLAIN))
    trials.run(first, lambda _rung: None, lambda: 1.0)
    recipes = [recipe_of(trials.builder, steps) for steps in (OPENVINO, PLAIN)]
    batch = [trial_of(number, recipe) for number, recipe in enumerate(recipes, 2)]
    given = trials.surroundings_of(batch)
    standing = trials.surroundings()
    for trial, met in reversed(list(zip(batch, given, strict=True))):
        ascent = trials.ascent(trial, met)
        trials.log_end(trial, ascent, ascent.run(), 2.0)
        now = trials.surroundings()
        assert (now.best, now.best_speedup, now.baseline) == (
            standing.best, standing.best_speedup, standing.baseline
        )  # fmt: skip
    store = trials.builder.store
    assert list(store.numbered_trials("study")) == [1, 2, 3]


def ended_as(trials: Trials, **more: Any) -> dict[str, Any]:
    """An entry of a trial that failed, as the log has it."""
    row = {
        "id": "f" * 64, "label": "narrow", "status": "dropped", "recipe": [],
        "reasons": [
            {"constraint": "built", "value": None, "limit": None, "unit": "", "detail": "no"}
        ],
    }  # fmt: skip
    answer = {"value": None, "constraints": None, "failed_id": "a" * 64}
    climb = {"seconds": [["BUILT", 1.0]], "dropped": True, "trains": True}
    given = {
        "answer": answer, "climb": climb, "row": row, "epochs": 0.0, "trained": [],
        "baseline": "", "spent_s": 1.0,
    }  # fmt: skip
    return {**given, **more}


def test_trial_that_failed_at_the_same_step_as_another_of_its_batch_leaves_no_row(
    trials: Trials,
) -> None:
    batch = [structural(trials, n, width) for n, width in ((1, 0.5), (2, 0.75))]
    answers = [trials.conclude(one, ended_as(trials, epochs=1.0), 2) for one in batch]
    assert [answer.failed_id for answer in answers] == ["a" * 64] * 2
    assert len(trials.rows) == len(trials.climbs) == 1
    assert trials.n_screened == 0
    assert trials.epochs == 2.0


def test_training_that_trials_of_a_batch_share_is_counted_once(
    trials: Trials,
) -> None:
    batch = [structural(trials, n, width) for n, width in ((1, 0.5), (2, 0.75))]
    shared = trials.builder.ids(batch[0].recipe)[0]

    @dataclass(frozen=True, eq=False)
    class Sharing(type(trials.builder)):  # type: ignore[misc]
        def epochs_first(self, recipe: Recipe) -> dict[str, float]:
            return {shared: 3.0}

    builder = Sharing(**{name: getattr(trials.builder, name) for name in vars(trials.builder)})
    ours = replace(trials, builder=builder)
    for n, (one, epochs) in enumerate(zip(batch, (5.0, 4.0), strict=True)):
        row = {**ended_as(trials)["row"], "id": f"{n}" * 64}
        entry = ended_as(trials, epochs=epochs, trained=[shared], row=row)
        ours.conclude(one, entry, 2)
    assert ours.epochs == 5.0 + 4.0 - 3.0
    assert ours.trained == {shared}
