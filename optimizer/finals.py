"""The finals: the best variants on the real server, one look at the locked test split, and
publication of the first that keeps its promise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from optimizer.choice import (
    contradictions,
    finalists,
    is_candidate,
    is_undecided,
    verification_reasons,
)
from optimizer.data.splits import Split
from optimizer.observer import Observer
from optimizer.publish import make_candidate, publish
from optimizer.result import Outcome, Status, Variant
from optimizer.spec import Spec
from optimizer.store import StoredVariant
from optimizer.trials import Trials
from optimizer.verify import Candidate, Verifier
from serve.tensor import Array

MAX_VERIFIED = 3
"""How many variants are put to the real server at most."""


@dataclass(eq=False)
class Finals:
    """Decides a study whose trials are over. `rows` are the trials' rows with what became of
    them; `verifier` None leaves the answer unverified."""

    spec: Spec
    trials: Trials
    test: Split
    golden_inputs: Mapping[str, Array]
    repository: Path
    scratch: Path
    verifier: Verifier | None
    observer: Observer
    rows: list[Variant] = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = list(self.trials.rows)

    def run(self) -> Outcome:
        contenders = finalists(self.rows, self.spec.objective, MAX_VERIFIED)
        if not contenders:
            undecided = any(is_undecided(self.spec.slo, row) for row in self.rows)
            return "inconclusive" if undecided else "infeasible"
        if self.verifier is None:
            return self._finish(contenders[0], "unverified")
        return self._verify(contenders, self.verifier)

    def _verify(self, contenders: Sequence[Variant], verifier: Verifier) -> Outcome:
        self.observer.phase("verifying on the real server")
        refuted = 0
        for variant in contenders:
            self.observer.verification_began(variant, self.spec.slo.window_s)
            verification = verifier.verify(self._candidate(variant), self.spec.slo)
            variant = replace(variant, verification=verification)
            if verification.verdict == "met":
                return self._finish(replace(variant, status="verified"), "met")
            refuted += verification.verdict == "violated"
            reasons = tuple(verification_reasons(self.spec.slo, verification))
            status: Status = "infeasible" if verification.verdict == "violated" else "unverified"
            self._put(replace(variant, status=status, reasons=reasons))
            said = "; ".join(verification.reasons) or "no reason given"
            self._note(f"{variant.label}: {verification.verdict} on the real server: {said}")
        if refuted == len(contenders) and not any(is_candidate(row) for row in self.rows):
            return "infeasible"
        if refuted == len(contenders):
            self._note("the variants that weren't put to the server may still keep the SLO")
        return "inconclusive"

    def _finish(self, variant: Variant, outcome: Outcome) -> Outcome:
        """Look at the test split, once, and publish. Where it contradicts the promise the study
        ends: choosing another by it would make it a validation split."""
        stored = self._stored(variant)
        quality = self.trials.quality_of(stored, self.test)
        variant = replace(variant, test_quality=quality)
        accuracy = self.spec.slo.accuracy
        reasons = contradictions(accuracy, quality) if accuracy and quality else []
        if reasons:
            self._put(replace(variant, status="infeasible", reasons=tuple(reasons)))
            self._note(f"{variant.label}: the locked test split contradicts its accuracy")
            return "infeasible"
        self.observer.phase("publishing")
        version = publish(self._candidate(variant), self.repository)
        self._put(replace(variant, status="chosen", version=version))
        return outcome

    def _candidate(self, variant: Variant) -> Candidate:
        return make_candidate(
            variant,
            self._stored(variant),
            self.spec,
            self.trials.evaluator.machine,
            self.golden_inputs,
            self.scratch,
        )

    def _stored(self, variant: Variant) -> StoredVariant:
        stored = self.trials.builder.store.find(variant.id)
        assert stored is not None, "a ranked variant was measured, so it is in the store"
        return stored

    def _put(self, variant: Variant) -> None:
        self.rows = [variant if row.id == variant.id else row for row in self.rows]

    def _note(self, message: str) -> None:
        self.notes.append(message)
        self.observer.note(message)
