"""The finals: the best variants on the real server, one look at the locked test split, and
publication of the first that keeps its promise.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from optimizer.choice import (
    contradictions,
    finalists,
    is_candidate,
    is_undecided,
    selection_reason,
    verification_reasons,
)
from optimizer.data.splits import Split
from optimizer.measuring.cores import measuring_cores
from optimizer.observer import Observer
from optimizer.publish import make_candidate, publish
from optimizer.result import Outcome, RungRecord, Status, Variant
from optimizer.search.ladder import Rung
from optimizer.spec import Spec
from optimizer.store import StoredVariant
from optimizer.tracing import span
from optimizer.trials import Trials
from optimizer.verify import Candidate, Verifier
from serve.machine import allowed_cpus
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
    command: tuple[str, ...] = ()
    """That led the study: manifests name it."""
    clock: Callable[[], float] = time.monotonic
    rows: list[Variant] = field(init=False)
    rungs: tuple[RungRecord, ...] = ()
    """What the last rung, the real server, did."""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = list(self.trials.rows)

    def run(self) -> Outcome:
        self._correct_for_choice()
        contenders = finalists(self.rows, self.spec.objective, MAX_VERIFIED)
        if not contenders:
            undecided = any(is_undecided(self.spec.slo, row) for row in self.rows)
            return "inconclusive" if undecided else "infeasible"
        if self.verifier is None:
            return self._finish(contenders[0], "unverified")
        return self._verify(contenders, self.verifier)

    def _correct_for_choice(self) -> None:
        """Hold candidates to bounds of the drop that hold for all variants at once: the best of
        many looks better than it is."""
        accuracy, baseline = self.spec.slo.accuracy, self.trials.baseline
        if accuracy is None or baseline is None:
            return
        compared = [row for row in self.rows if row.quality is not None]
        bounds = self.trials.judgement.bounds_among_all(
            [self._stored(row) for row in compared], baseline, self.trials.validation
        )
        for row in compared:
            row = replace(row, drop_bound_among_all=bounds[row.id])
            reason = selection_reason(accuracy, bounds[row.id], len(compared))
            if reason is not None and is_candidate(row):
                row = replace(row, status="infeasible", reasons=(reason,))
            self._put(row)

    def _verify(self, contenders: Sequence[Variant], verifier: Verifier) -> Outcome:
        start = self.clock()
        try:
            return self._verify_each(contenders, verifier)
        finally:
            n_met = sum(row.status in ("chosen", "verified") for row in self.rows)
            loaded = sum(row.verification is not None for row in self.rows)
            number, title = Rung.SERVER.value
            seconds = self.clock() - start
            self.rungs = (RungRecord(number, title, loaded, loaded - n_met, seconds, 0.0),)

    def _verify_each(self, contenders: Sequence[Variant], verifier: Verifier) -> Outcome:
        self.observer.phase("verifying on the real server")
        refuted = 0
        for variant in contenders:
            self.observer.verification_began(variant, self.spec.slo.window_s)
            about = {"trimserve.variant.id": variant.id}
            with span("verify on the real server", about), measuring_cores(len(allowed_cpus())):
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
        stored, store = self._stored(variant), self.trials.builder.store
        store.log_look(self.trials.study_id, variant.id, self.test.digest)
        quality = self.trials.quality_of(stored, self.test)
        variant = replace(variant, test_quality=quality)
        n_looks = len(store.looks(self.test.digest))
        if n_looks > 1:
            self._note(f"the test split was looked at {n_looks} times by studies of this store")
        accuracy = self.spec.slo.accuracy
        reasons = contradictions(accuracy, quality) if accuracy else []
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
            self.command,
        )

    def _stored(self, variant: Variant) -> StoredVariant:
        stored = self.trials.builder.find(variant.id)
        assert stored is not None, "a ranked variant was measured, so it is in the store"
        return stored

    def _put(self, variant: Variant) -> None:
        self.rows = [variant if row.id == variant.id else row for row in self.rows]

    def _note(self, message: str) -> None:
        self.notes.append(message)
        self.observer.note(message)
