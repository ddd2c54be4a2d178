"""Trials: what came of them so far, what the next one meets, and the log by which a study that
was killed goes on.

The climbing is `optimizer.ascent`'s matter. A trial is written to the log when it has ended, with
its answer, so that a study that is started again tells the search the same and decides the same,
whatever else the store has learned in between. Trials of a batch all meet what there was before it,
whichever of them ends first.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optimizer.ascent import Ascent, Ended, Surroundings
from optimizer.builder import Builder
from optimizer.choice import ranked, value_of
from optimizer.data.splits import Split
from optimizer.errors import TechniqueFailed
from optimizer.estimates import Estimates
from optimizer.evaluator import Evaluator
from optimizer.judgement import Judgement
from optimizer.recipe import EFFORTS, Recipe
from optimizer.result import Variant, variant_from_dict, variant_to_dict
from optimizer.search import recovery
from optimizer.search.coordinator import Answer, Trial
from optimizer.search.ladder import Climb, Rung
from optimizer.search.recovery import RecoveryRecord
from optimizer.serving import Serving
from optimizer.spec import Spec
from optimizer.store import Key, StoredVariant
from serve.artifact import Quality

_RECOVERY = "recovery"


@dataclass(eq=False)
class Trials:
    """Runs trials and keeps what came of them. `rows` are in the order of the trials."""

    spec: Spec
    builder: Builder
    evaluator: Evaluator
    judgement: Judgement
    serving: Serving
    validation: Split
    study_id: str
    estimates: Estimates | None = None
    clock: Callable[[], float] = time.monotonic
    rows: list[Variant] = field(default_factory=list)
    climbs: list[Climb] = field(default_factory=list)
    recoveries: list[RecoveryRecord] = field(default_factory=list)
    epochs: float = 0.0
    trained: set[str] = field(default_factory=set)
    """Variants that trials share, whose epochs are counted."""
    log: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Number of a trial → its entry."""
    baseline: StoredVariant | None = None
    """The first variant in the base's own precision that could be measured: what others are
    timed and compared with."""

    @property
    def n_screened(self) -> int:
        """Recipes that were ruled out by estimate: trials without a row."""
        return len(self.climbs) - len(self.rows)

    def recall(self) -> None:
        """Take this study's log from the store, and what others of the same base learned."""
        self.log = self.builder.store.numbered_trials(self.study_id)
        version = recovery.PROTOCOL_VERSION
        for _, serving, stored in self.builder.store.values(_RECOVERY, version):
            value: Any = stored
            if serving["base"] == self.builder.base.digest:
                self.recoveries.append(RecoveryRecord.from_dict(value))
        if self.estimates is not None:
            self.estimates.recall()

    def run(
        self, trial: Trial, climbed: Callable[[Rung], None], spent_s: Callable[[], float]
    ) -> Answer:
        """Build, measure and judge; returns what the search should learn from it. `spent_s` gives
        the seconds of the study so far."""
        ascent = self.ascent(trial, self.surroundings(climbed))
        ended = ascent.run()
        self._learn(trial.recipe, ended)
        self.log_end(trial, ascent, ended, spent_s())
        self._take(ended, ascent.variant)
        return ended.answer

    def log_end(
        self, trial: Trial, ascent: Ascent, ended: Ended, spent_s: float
    ) -> Mapping[str, Any]:
        """Write how a trial ended to the log; returns its entry."""
        entry = _entry(trial, ended, _baseline_after(ascent, ended), spent_s)
        self.builder.store.log_trial(self.study_id, trial.number, entry)
        return entry

    def conclude(self, trial: Trial, entry: Mapping[str, Any], last: int) -> Answer:
        """Learn from a trial of a batch that ended so, now or before; in the order of the trials.
        `last` is the number of the batch's last one.

        What several of them trained is counted once. One that failed at the same step as another
        leaves no row: alone it wouldn't have been proposed.
        """
        ended = _ended_from(entry)
        counted = self.trained & set(ended.trained)
        if counted:
            first = self.builder.epochs_first(trial.recipe)
            twice = sum(first[variant_id] for variant_id in counted)
            ended = replace(ended, epochs=ended.epochs - twice)
        if ended.row is not None and ended.row.id in {row.id for row in self.rows}:
            self.epochs += ended.epochs
            return ended.answer
        is_logged = entry is self.log.get(trial.number)
        # Of the log's last batch the study may have been killed before it learned from it.
        if not is_logged or max(self.log) <= last:
            self._learn(trial.recipe, ended, again=is_logged)
        self._take(ended, self._baseline_of(entry))
        return ended.answer

    def ascent(self, trial: Trial, given: Surroundings) -> Ascent:
        """The trial at the foot of the ladder."""
        return Ascent(
            trial, self.spec, self.builder, self.evaluator, self.serving, given, self.clock
        )

    def logged(self, trial: Trial) -> Mapping[str, Any] | None:
        """The trial's end as the log has it; None where it is still to be run.

        Where the log is of other trials from here on (the code has changed, or a file is gone),
        the study goes on under an id of its own, with the log so far.
        """
        while (entry := self.log.get(trial.number)) is not None:
            if entry["recipe"] == recipe_key(trial.recipe) and self._has_baseline(entry):
                return entry
            self._fork(trial.number - 1)
        return None

    def replay(self, entry: Mapping[str, Any]) -> Answer:
        """Take a logged end instead of running the trial."""
        ended = _ended_from(entry)
        self._take(ended, self._baseline_of(entry))
        return ended.answer

    def _baseline_of(self, entry: Mapping[str, Any]) -> StoredVariant | None:
        return self.builder.store.find(entry["baseline"]) if entry["baseline"] else None

    def _has_baseline(self, entry: Mapping[str, Any]) -> bool:
        """Nothing can be compared with a baseline whose files are gone."""
        return not entry["baseline"] or self.builder.store.find(entry["baseline"]) is not None

    def _fork(self, n_kept: int) -> None:
        kept = {number: entry for number, entry in self.log.items() if number <= n_kept}
        content = f"{self.study_id} after {n_kept}"
        self.study_id = hashlib.sha256(content.encode()).hexdigest()
        store = self.builder.store
        # Whole even where a fork was killed while it copied: what is there already stays.
        for number, entry in kept.items():
            store.log_trial(self.study_id, number, entry)
        self.log = store.numbered_trials(self.study_id)

    def quality_of(self, variant: StoredVariant, split: Split) -> Quality:
        """How well it does on the split against the baseline."""
        assert self.baseline is not None
        return self.judgement.quality(variant, self.baseline, split)

    def surroundings(self, climbed: Callable[[Rung], None] = lambda _rung: None) -> Surroundings:
        """What the next trial meets."""
        best = ranked(self.rows, self.spec.objective)
        speedups = [row.speedup.estimate for row in self.rows if row.speedup is not None]
        return Surroundings(
            baseline=self.baseline,
            best=value_of(best[0], self.spec.objective) if best else None,
            best_speedup=max(speedups, default=0.0),
            epochs_spent=self.epochs,
            recoveries=self.recoveries,
            bound=self.estimates.bound if self.estimates is not None else lambda _recipe: None,
            judge=lambda variant, base: self.judgement.quality(variant, base, self.validation),
            climbed=climbed,
            trained=frozenset(self.trained),
        )

    def surroundings_of(
        self, batch: Sequence[Trial], climbed: Callable[[Rung], None] = lambda _rung: None
    ) -> list[Surroundings]:
        """What each trial of a batch meets. Of a budget of epochs each has what those before it in
        the batch can't spend."""
        given = self.surroundings(climbed)
        found = []
        for trial in batch:
            found.append(given)
            spent = given.epochs_spent + self._most_epochs(trial.recipe)
            given = replace(given, epochs_spent=spent)
        return found

    def _most_epochs(self, recipe: Recipe) -> float:
        """That a trial of the recipe can spend; of no interest where there is no limit."""
        if self.spec.budget.training_epochs is None:
            return 0.0
        try:
            first = self.builder.epochs_first(recipe)
            wanted = sum(epochs for one, epochs in first.items() if one not in self.trained)
            if recipe.trains:
                wanted += sum(self.builder.epochs(recipe.with_effort(one)) for one in EFFORTS[1:])
        except TechniqueFailed:
            return 0.0
        return wanted

    def _take(self, ended: Ended, variant: StoredVariant | None) -> None:
        self.climbs.append(ended.climb)
        self.epochs += ended.epochs
        self.trained |= set(ended.trained)
        if ended.row is not None:
            self.rows.append(ended.row)
            if self.baseline is None and ended.row.service_times:
                self.baseline = variant

    def _learn(self, recipe: Recipe, ended: Ended, again: bool = False) -> None:
        """Keep what later trials and studies can learn from this one; `again` where it may have
        been kept before."""
        if ended.row is None:
            return
        if ended.row.service_times and self.estimates is not None:
            self.estimates.learn(recipe, ended.row)
        if ended.recovery is None:
            return
        serving = {"base": self.builder.base.digest}
        machine, version = self.evaluator.machine, recovery.PROTOCOL_VERSION
        key = Key(ended.row.id, machine, _RECOVERY, version, serving)
        is_new = self.builder.store.recorded(key) is None
        if is_new or not again:
            self.recoveries.append(ended.recovery)
        if is_new:
            self.builder.store.record(key, ended.recovery.to_dict())


def _baseline_after(ascent: Ascent, ended: Ended) -> StoredVariant | None:
    """The first that could be measured is the baseline."""
    if ascent.given.baseline is None and ended.row is not None and ended.row.service_times:
        return ascent.variant
    return ascent.given.baseline


def _entry(
    trial: Trial, ended: Ended, baseline: StoredVariant | None, spent_s: float
) -> dict[str, Any]:
    answer = asdict(ended.answer)
    if answer["constraints"] is not None:
        answer["constraints"] = dict(answer["constraints"])
    recovered = {} if ended.recovery is None else {"recovery": ended.recovery.to_dict()}
    return {
        "recipe": recipe_key(trial.recipe),
        "decisions": dict(trial.decisions.values),
        "answer": answer,
        "climb": _climb_to(ended.climb),
        "row": None if ended.row is None else variant_to_dict(ended.row),
        "epochs": ended.epochs,
        "trained": list(ended.trained),
        "baseline": baseline.id if baseline is not None else "",
        "spent_s": spent_s,
        **recovered,
    }


def _ended_from(entry: Mapping[str, Any]) -> Ended:
    row, recovered = entry["row"], entry.get("recovery")
    return Ended(
        Answer(**entry["answer"]),
        _climb_from(entry["climb"]),
        None if row is None else variant_from_dict(row),
        entry["epochs"],
        None if recovered is None else RecoveryRecord.from_dict(recovered),
        tuple(entry.get("trained", ())),
    )


def recipe_key(recipe: Recipe) -> list[Any]:
    """The recipe as JSON holds it."""
    steps = [[choice.traits.name, dict(choice.parameters)] for choice in recipe.choices]
    plain: list[Any] = json.loads(json.dumps(steps))
    return plain


def _climb_to(climb: Climb) -> dict[str, Any]:
    seconds = [[rung.name, seconds] for rung, seconds in climb.seconds]
    return {"seconds": seconds, "dropped": climb.dropped, "trains": climb.trains}


def _climb_from(stored: Mapping[str, Any]) -> Climb:
    seconds = tuple((Rung[name], float(seconds)) for name, seconds in stored["seconds"])
    return Climb(seconds, bool(stored["dropped"]), bool(stored["trains"]))
