"""An ascent: one trial's way up the ladder, rung by rung, as far as it holds.

It has things built and measured and asks the ladder's rules; a trial never ends the study. What
other trials found enters only through `Surroundings`.
"""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from optimizer.builder import Builder
from optimizer.choice import (
    constraint_values,
    limit_reasons,
    reasons_against,
    value_of,
    with_margin,
)
from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.evaluator import Evaluator
from optimizer.kernels import KernelProof
from optimizer.recipe import EFFORTS, Recipe
from optimizer.result import Constraint, Reason, Status, Variant
from optimizer.search.coordinator import Answer, Trial
from optimizer.search.ladder import (
    Bound,
    Climb,
    Rung,
    epochs_reason,
    estimate_reason,
    outclassed_reason,
    recovery_reason,
)
from optimizer.search.landscape import Unbuildable
from optimizer.search.recovery import RecoveryRecord, expected_drop
from optimizer.serving import Serving
from optimizer.spec import Spec
from optimizer.store import StoredVariant
from optimizer.timing import Timing
from optimizer.tracing import MAX_TEXT_CHARS, span
from optimizer.variant import EngineModel, Model
from serve.artifact import Quality

_CONSTRAINTS: Mapping[type[Exception], Constraint] = {
    TechniqueNotApplicable: "applicable",
    TechniqueFailed: "built",
    ParityMismatch: "parity",
}
_EFFORT_OF = {Rung.BUILT: EFFORTS[0], Rung.SHORT: EFFORTS[1], Rung.FULL: EFFORTS[2]}
_HIDDEN_EXCESS = 1.0
"""Told to the sampler for a constraint that is broken by an amount that nobody knows."""


@dataclass(frozen=True)
class Surroundings:
    """What a trial meets: the study's standing when it begins.

    `best` is the best candidate's value of the objective, `best_speedup` the highest measured;
    `trained` are the variants whose training, the same on every rung, the study has counted;
    `bound` estimates a recipe from its blocks, `judge` compares a variant with the baseline on
    the validation split, `climbed` hears of each rung that the trial comes to.
    """

    baseline: StoredVariant | None
    best: float | None
    best_speedup: float
    epochs_spent: float
    recoveries: Sequence[RecoveryRecord]
    bound: Callable[[Recipe], Bound | None]
    judge: Callable[[StoredVariant, StoredVariant], Quality]
    climbed: Callable[[Rung], None] = lambda _rung: None
    trained: Collection[str] = ()


@dataclass(frozen=True)
class Ended:
    """How a trial ended. `row` is None for one that was ruled out by estimate; `recovery` is what
    one that was trained in full has to teach; `trained` are variants that later trials may share,
    whose training is counted with this one's."""

    answer: Answer
    climb: Climb
    row: Variant | None
    epochs: float = 0.0
    recovery: RecoveryRecord | None = None
    trained: tuple[str, ...] = ()


@dataclass(eq=False)
class Ascent:
    """The trial under way; what it holds is filled in as it climbs."""

    trial: Trial
    spec: Spec
    builder: Builder
    evaluator: Evaluator
    serving: Serving
    given: Surroundings
    clock: Callable[[], float] = time.monotonic
    variant: StoredVariant | None = None
    built: Recipe | None = None
    """What the variant was made by: the trial's recipe, with as much training as there was."""
    proof: KernelProof | None = None
    timings: tuple[Timing, ...] = ()
    row: Variant | None = None
    drops: dict[Rung, float] = field(default_factory=dict)
    epochs: float = 0.0
    trained: tuple[str, ...] = ()
    _seconds: list[tuple[Rung, float]] = field(default_factory=list)

    def run(self) -> Ended:
        """Climb until a rule ends it or the top is reached."""
        with span("trial", {"trimserve.trial": self.trial.number}) as under_way:
            ended = self._climbed()
            if ended.row is not None:
                under_way.set("trimserve.variant", ended.row.label[:MAX_TEXT_CHARS])
                under_way.set("trimserve.status", ended.row.status)
        return ended

    def _climbed(self) -> Ended:
        looks: Mapping[Rung, Callable[[], Reason | None]] = {
            Rung.ESTIMATED: self._estimate,
            Rung.BUILT: self._build,
            Rung.TIMED: self._time,
            Rung.UNTRAINED: self._judge_untrained,
            Rung.SHORT: self._train_short,
            Rung.FULL: self._train_full,
        }
        for rung, look in looks.items():
            if not self._applies(rung):
                continue
            self.given.climbed(rung)
            start = self.clock()
            try:
                with span(rung.title, {"trimserve.rung": rung.number}):
                    reason = look()
            except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
                self._seconds.append((rung, self.clock() - start))
                return self._failed(error)
            self._seconds.append((rung, self.clock() - start))
            if reason is not None:
                return self._dropped(rung, reason)
        assert self.row is not None
        return self._ended(self.row, dropped=False)

    @property
    def _recipe(self) -> Recipe:
        return self.trial.recipe

    @property
    def _is_cheap(self) -> bool:
        """Whether all of the ladder is climbed whatever comes: nothing is trained."""
        return self.trial.is_baseline or not self._recipe.trains

    def _applies(self, rung: Rung) -> bool:
        if rung is Rung.ESTIMATED:
            return self._recipe.is_structural and not self.trial.is_baseline
        if rung in (Rung.SHORT, Rung.FULL):
            return self._recipe.trains
        return True

    def _estimate(self) -> Reason | None:
        limit_s = with_margin(self.spec.slo).latency.threshold_s
        return estimate_reason(self.given.bound(self._recipe), limit_s, self.given.best)

    def _build(self) -> Reason | None:
        if self.trial.decisions.failure is not None:
            raise self.trial.decisions.failure
        reason = self._train_first()
        if reason is None:
            self._build_with(Rung.BUILT)
        return reason

    def _train_first(self) -> Reason | None:
        """Count what is trained before all else and shared with other trials: once in a study,
        whether the store has it or not, so that a study that goes on decides the same."""
        found = self.builder.epochs_first(self._recipe)
        wanted = {one: epochs for one, epochs in found.items() if one not in self.given.trained}
        reason = self._unaffordable(sum(wanted.values()))
        if reason is None:
            self.trained = tuple(wanted)
            self.epochs += sum(wanted.values())
        return reason

    def _build_with(self, rung: Rung) -> StoredVariant:
        recipe = self._recipe.with_effort(_EFFORT_OF[rung])
        variant = self.builder.build(recipe)
        preserves = all(choice.traits.preserves for choice in recipe.choices)
        is_base = preserves and variant.model.precision == self.builder.base.precision
        if self.given.baseline is None and not is_base:
            raise TechniqueNotApplicable(
                self._recipe.choices[-1].traits.name,
                "no variant with the base's own weights and precision could be measured, so there "
                "is nothing to compare it with",
            )
        self.proof = self.evaluator.check(variant, self._parent(variant))
        self.variant, self.built = variant, recipe
        return variant

    def _time(self) -> Reason | None:
        variant = self._built
        baseline = self.given.baseline or variant
        self.timings = self.evaluator.timings(variant, baseline, self.given.best_speedup)
        if not self.trial.is_baseline:
            times = [timing.times for timing in self.timings]
            reason = outclassed_reason(
                self.serving.least_value(times),
                self.given.best,
                "at the highest rate of its engine",
            )
            if reason is not None:
                self.row = self._row(variant)
                return reason
        self.row = self._served(self._row(variant))
        if self.trial.is_baseline:
            return None
        if self.row.reasons and not self._is_cheap:
            return self.row.reasons[0]
        value = value_of(self.row, self.spec.objective)
        return outclassed_reason(value, self.given.best) if math.isfinite(value) else None

    def _judge_untrained(self) -> Reason | None:
        return self._judge(Rung.UNTRAINED)

    def _train_short(self) -> Reason | None:
        return self._train(Rung.SHORT) or self._judge(Rung.SHORT)

    def _train_full(self) -> Reason | None:
        reason = self._train(Rung.FULL)
        if reason is None:
            # What is served are these weights, so these are timed too.
            variant = self._built
            baseline = self.given.baseline or variant
            self.timings = self.evaluator.timings(variant, baseline, self.given.best_speedup)
            self.row = self._served(self._row(variant))
            reason = self._judge(Rung.FULL)
        return reason

    def _train(self, rung: Rung) -> Reason | None:
        wanted = self.builder.epochs(self._recipe.with_effort(_EFFORT_OF[rung]))
        reason = self._unaffordable(wanted)
        if reason is None:
            self._build_with(rung)
            self.epochs += wanted
        return reason

    def _unaffordable(self, epochs: float) -> Reason | None:
        limit = self.spec.budget.training_epochs
        spent = self.given.epochs_spent + self.epochs
        return epochs_reason(spent, epochs, limit) if epochs else None

    def _judge(self, rung: Rung) -> Reason | None:
        """Measure the accuracy; where training is still to come, whether it is worth it."""
        assert self.row is not None
        variant = self._built
        quality = self.given.judge(variant, self.given.baseline or variant)
        assert self.built is not None
        row = replace(
            self.row,
            id=variant.id,
            label=self.builder.label(self.built),
            recipe=self.builder.steps(self.built),
            quality=quality,
        )
        self.row = self._judged(row)
        self.drops[rung] = quality.drop
        if not self._recipe.trains or rung is Rung.FULL:
            return None
        expected = expected_drop(
            self.given.recoveries,
            self._size,
            self.drops[Rung.UNTRAINED],
            self.drops.get(Rung.SHORT),
        )
        return recovery_reason(expected, self.spec.slo.accuracy)

    @property
    def _built(self) -> StoredVariant:
        assert self.variant is not None
        return self.variant

    @property
    def _size(self) -> float:
        """Share of the baseline's bytes."""
        baseline = self.given.baseline or self._built
        assert isinstance(baseline.model, EngineModel)
        assert self.row is not None
        return (self.row.size_bytes or 1) / max(1, baseline.model.size_bytes())

    def _row(self, variant: StoredVariant) -> Variant:
        model = variant.model
        assert isinstance(model, EngineModel)
        assert self.proof is not None
        assert self.built is not None
        return Variant(
            id=variant.id,
            label=self.builder.label(self.built),
            status="unverified",
            recipe=self.builder.steps(self.built),
            engine=model.spec.name,
            precision=model.precision,
            service_times=tuple(timing.times for timing in self.timings),
            speedup=self.timings[0].speedup,
            int8_share=self.proof.int8_share,
            kernels=self.proof.kernels,
            size_bytes=model.size_bytes(),
            build_s=variant.build_s,
        )

    def _served(self, row: Variant) -> Variant:
        """The row with how it would be served, and what that takes where it is asked for."""
        variant = self._built
        serving = self.serving.choose(row.service_times)
        memory = joules = None
        if self.spec.constraints.memory_bytes is not None:
            memory = self.evaluator.memory_bytes(variant, serving.instances, serving.threads)
        if self.spec.objective == "energy":
            joules = self.evaluator.joules(variant, serving.instances, serving.threads)
        return self._judged(replace(row, serving=serving, memory_bytes=memory, joules=joules))

    def _judged(self, row: Variant) -> Variant:
        """The row with the constraints that it breaks by all that is known."""
        assert row.serving is not None
        assert row.size_bytes is not None
        reasons = reasons_against(self.spec.slo, row.quality, row.serving)
        reasons += limit_reasons(self.spec.constraints, row.size_bytes, row.memory_bytes)
        status: Status = "infeasible" if reasons else "unverified"
        return replace(row, status=status, reasons=tuple(reasons))

    def _parent(self, variant: StoredVariant) -> Model:
        parent = self.builder.find(variant.parent_id)
        return parent.model if parent is not None else self.builder.base

    def _failed(self, error: Unbuildable) -> Ended:
        recipe = self._failed_recipe()
        reason = Reason(_CONSTRAINTS[type(error)], detail=str(error))
        return self._unbuilt(recipe, reason, Answer(failed_id=self.builder.failed_id(recipe)))

    def _unbuilt(self, recipe: Recipe, reason: Reason, answer: Answer) -> Ended:
        """Ended with nothing to measure."""
        # The recipe may have got no further than another's; the reason tells them apart.
        variant_id = self.builder.variant_id(recipe)
        digest = hashlib.sha256(f"{variant_id} {reason.detail}".encode()).hexdigest()
        row = Variant(
            id=digest,
            label=self.builder.label(recipe),
            status="dropped",
            recipe=self.builder.steps(recipe),
            reasons=(reason,),
        )
        climb = self._climb(dropped=True)
        return Ended(answer, climb, row, self.epochs, trained=self.trained)

    def _failed_recipe(self) -> Recipe:
        """The recipe as far as the step that can't be built, with the training that it was to be
        built with; all of it where another thing failed."""
        for effort in EFFORTS:
            recipe = self._recipe.with_effort(effort)
            failed = self.builder.failed_id(recipe)
            if failed:
                n_steps = self.builder.ids(recipe).index(failed) + 1
                return Recipe(recipe.starts_from, recipe.choices[:n_steps])
        return self._recipe

    def _dropped(self, rung: Rung, reason: Reason) -> Ended:
        """Ended by a rule: what is known stays in the row, with the rule's reason first."""
        if rung is Rung.ESTIMATED:
            value = reason.value if reason.constraint == "outclassed" else None
            broken = {} if reason.constraint == "outclassed" else {"latency": _HIDDEN_EXCESS}
            return Ended(Answer(value, broken), self._climb(dropped=True), None)
        if self.row is None:
            return self._unbuilt(self._recipe, reason, Answer())
        reasons = (reason, *(one for one in self.row.reasons if one != reason))
        status: Status = (
            "infeasible" if reason.constraint in ("latency", "success_ratio") else "dropped"
        )
        return self._ended(replace(self.row, status=status, reasons=reasons), dropped=True)

    def _ended(self, row: Variant, dropped: bool) -> Ended:
        value = value_of(row, self.spec.objective)
        if not math.isfinite(value) and row.reasons and row.reasons[0].constraint == "outclassed":
            value = row.reasons[0].value or math.inf  # at best
        constraints = constraint_values(
            self.spec.slo,
            self.spec.constraints,
            row,
            is_final=not self._recipe.trains or Rung.FULL in self.drops,
        )
        answer = Answer(value if math.isfinite(value) else None, constraints)
        climb = self._climb(dropped)
        return Ended(answer, climb, row, self.epochs, self._recovery(), self.trained)

    def _recovery(self) -> RecoveryRecord | None:
        if Rung.FULL not in self.drops:
            return None
        return RecoveryRecord(
            size=self._size,
            untrained=self.drops[Rung.UNTRAINED],
            final=self.drops[Rung.FULL],
            short=self.drops.get(Rung.SHORT),
        )

    def _climb(self, dropped: bool) -> Climb:
        return Climb(tuple(self._seconds), dropped, self._recipe.trains)
