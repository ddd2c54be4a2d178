"""Jobs that have something to show, told to the ledger in the words of a worker and its child."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimizer.observer import Standing
from optimizer.pareto import pareto_front
from optimizer.result import StudyResult, Variant, to_json
from optimizer.service.app import Parts
from optimizer.service.child import REPORT, REPOSITORY, RESULT
from optimizer.service.records import Claim
from optimizer.service.reporting import Reporter
from serve.artifact import write_version
from tests.serve.test_artifact import MANIFEST_OF_A

LOAD_TEST: Mapping[str, Any] = {
    "verdict": "met", "reasons": [], "p50_s": 0.004, "p99_s": 0.0134, "slo_latency_s": 0.0134,
    "slo_latency_bound_s": 0.0149, "bound_confidence": 0.95, "rate_per_s": 100.1,
    "goodput_per_s": 99.9, "success_ratio": 1.0, "n_requests": 6000,
}  # fmt: skip


class Collected:
    """Takes the place of a child's pipe."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Mapping[str, Any]]] = []

    def tell(self, kind: str, payload: Mapping[str, Any]) -> None:
        self.events.append((kind, payload))


def taken(parts: Parts, job_id: str) -> Claim:
    """By a worker, from the queue in which it is the first."""
    claim = parts.ledger.claim("worker-1", 600.0)
    assert claim is not None
    assert claim.job.id == job_id
    return claim


def trials(result: StudyResult, variants: tuple[Variant, ...]) -> list[tuple[str, Any]]:
    """The events of a study whose trials made `variants` of the result's."""
    collected = Collected()
    reporter = Reporter(collected)  # type: ignore[arg-type]
    reporter.phase("search")
    for n, one in enumerate(variants, 1):
        seen = variants[:n]
        front = pareto_front(seen)
        kept = [v for v in seen if not v.reasons and v.serving is not None]
        best = min(kept, key=lambda v: v.serving.cost_per_million, default=None)  # type: ignore[union-attr]
        budget = replace(result.budget, trials=n, wall_clock_s=12.5 * n)
        reporter.trial_began(result.budget.max_trials, one.label)
        reporter.trial_climbed(1, "timing")
        standing = Standing(budget, best, [v for v in seen if v.id in front], {})
        reporter.trial_ended(one, standing)
    return collected.events


def tell(parts: Parts, claim: Claim, events: list[tuple[str, Any]], text: str = "") -> None:
    parts.ledger.tell(claim.job.id, claim.lease.token, events, text)


def succeed(parts: Parts, claim: Claim, result: StudyResult) -> None:
    """With a result, a page that stands for its report, and a version that can be published."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        (out / RESULT).write_text(to_json(result), "utf-8")
        (out / REPORT).write_text("<!doctype html><title>a report</title>", "utf-8")
        model = out / "model.onnx"
        model.write_bytes(b"model")
        files = {"model.onnx": model, "golden.npz": model}
        write_version(out / REPOSITORY, MANIFEST_OF_A, files)
        model.unlink()
        parts.operations._blobs.store(claim.job.id, "claim", out)
    made = {"claim": "claim", "outcome": result.outcome, "has_version": True}
    tell(parts, claim, [("made", made)])
    parts.ledger.succeed(claim.job.id, claim.lease.token, result.outcome)
