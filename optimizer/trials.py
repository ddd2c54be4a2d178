"""Trials: one recipe after the other, built, measured and judged.

A trial never ends the study: what goes wrong becomes a dropped variant with its reason.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from optimizer.accuracy import quality
from optimizer.builder import Builder
from optimizer.capacity import choose_serving
from optimizer.choice import constraint_values, reasons_against, value_of, with_margin
from optimizer.data.splits import Split
from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.evaluator import Evaluator, Evidence
from optimizer.recipe import Recipe
from optimizer.result import Constraint, Reason, Variant
from optimizer.search.coordinator import Answer, Trial
from optimizer.search.landscape import Unbuildable
from optimizer.spec import Spec
from optimizer.store import StoredVariant
from optimizer.variant import EngineModel, Model
from serve.artifact import Quality

DEFAULT_CONFIDENCE = 0.95
"""Of the drop's interval, where the SLO has no accuracy objective."""
_CONSTRAINTS: Mapping[type[Exception], Constraint] = {
    TechniqueNotApplicable: "applicable",
    TechniqueFailed: "built",
    ParityMismatch: "parity",
}


@dataclass(eq=False)
class Trials:
    """Runs trials and keeps what came of them. `rows` are in the order of the trials."""

    spec: Spec
    builder: Builder
    evaluator: Evaluator
    rows: list[Variant] = field(default_factory=list)
    baseline: StoredVariant | None = None
    """The first variant in the base's own precision that could be measured: what others are
    timed and compared with."""
    _best_speedup: float = 0.0

    def run(self, trial: Trial) -> Answer:
        """Build, measure and judge; returns what the search should learn from it."""
        try:
            if trial.decisions.failure is not None:
                raise trial.decisions.failure
            row = self._measured(trial.recipe)
        except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
            self.rows.append(self._dropped(trial.recipe, error))
            return Answer()
        self.rows.append(row)
        value = value_of(row, self.spec.objective)
        constraints = constraint_values(self.spec.slo, row.reasons)
        return Answer(value if math.isfinite(value) else None, constraints)

    def quality_of(self, variant: StoredVariant, split: Split) -> Quality | None:
        """Accuracy on the split against the baseline's; None without labels."""
        if split.labels is None:
            return None
        assert self.baseline is not None
        accuracy = self.spec.slo.accuracy
        return quality(
            self.evaluator.correctness(variant, split),
            self.evaluator.correctness(self.baseline, split),
            accuracy.confidence if accuracy else DEFAULT_CONFIDENCE,
            split.name,
            split.digest,
        )

    def _measured(self, recipe: Recipe) -> Variant:
        variant = self.builder.build(recipe)
        if self.baseline is None and variant.model.precision != self.builder.base.precision:
            raise TechniqueNotApplicable(
                recipe.choices[-1].traits.name,
                "no variant in the base's own precision could be measured, so there is nothing "
                "to compare it with",
            )
        baseline = self.baseline or variant
        evidence = self.evaluator.evidence(
            variant, self._parent(variant), baseline, self._best_speedup
        )
        self.baseline = baseline
        speedup = evidence.timings[0].speedup
        if speedup is not None:
            self._best_speedup = max(self._best_speedup, speedup.estimate)
        return self._judged(recipe, variant, evidence)

    def _judged(self, recipe: Recipe, variant: StoredVariant, evidence: Evidence) -> Variant:
        spec, model = self.spec, variant.model
        assert isinstance(model, EngineModel)
        service_times = tuple(timing.times for timing in evidence.timings)
        serving = choose_serving(
            service_times,
            with_margin(spec.slo),
            self.evaluator.cores,
            spec.target.price_per_core_hour,
            objective=spec.objective,
            seed=spec.seed,
        )
        measured = self.quality_of(variant, self.evaluator.validation)
        reasons = tuple(reasons_against(spec.slo, measured, serving))
        return Variant(
            id=variant.id,
            label=self.builder.label(recipe),
            status="infeasible" if reasons else "unverified",
            recipe=self.builder.steps(recipe),
            reasons=reasons,
            engine=model.spec.name,
            precision=model.precision,
            quality=measured,
            service_times=service_times,
            speedup=evidence.timings[0].speedup,
            int8_share=evidence.proof.int8_time_share,
            kernels=evidence.proof.kernels,
            size_bytes=model.size_bytes(),
            build_s=variant.build_s,
            serving=serving,
        )

    def _dropped(self, recipe: Recipe, error: Unbuildable) -> Variant:
        # The recipe may have got no further than another's; the reason tells them apart.
        variant_id = self.builder.variant_id(recipe)
        digest = hashlib.sha256(f"{variant_id} {error}".encode()).hexdigest()
        reason = Reason(_CONSTRAINTS[type(error)], detail=str(error))
        return Variant(
            id=digest,
            label=self.builder.label(recipe),
            status="dropped",
            recipe=self.builder.steps(recipe),
            reasons=(reason,),
        )

    def _parent(self, variant: StoredVariant) -> Model:
        parent = self.builder.store.find(variant.parent_id)
        return parent.model if parent is not None else self.builder.base
