"""What a running job tells: an observer that writes each event of a study as a line of JSON.

The kinds of events are `phase`, `trial_began`, `trial_climbed`, `step` (how far a long one is),
`trial_ended`, `verification` and `note` here, `state` by the ledger, `result` and `error` by the
child, `load_test` by a load test. A `span` is none, it goes to the traces.
"""

import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from optimizer.choice import busy_cores
from optimizer.observer import Standing
from optimizer.result import Variant, variant_to_dict
from optimizer.telling import Seldom
from optimizer.wording import explain, slo_latency_s

STEP_EVERY_S = 10.0
"""Events are kept, so a long step has few of them."""
SPAN = "span"
"""The kind of line that holds an `optimizer.tracing.SpanRecord`; its worker keeps it to itself."""
MAX_FRONT = 64
"""Variants of the front that go with an event."""


class Lines:
    """Writes events to a file descriptor: {"kind": …, "payload": {…}} a line."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()  # spans end in the threads of trials

    def tell(self, kind: str, payload: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, "payload": payload}, allow_nan=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()


class Reporter:
    """An `optimizer.observer.Observer` of which workers and pages are told."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._seldom = Seldom(lambda one: lines.tell("step", {"message": one}), STEP_EVERY_S)

    def phase(self, name: str) -> None:
        self._lines.tell("phase", {"name": name})

    def trial_began(self, max_trials: int, label: str) -> None:
        self._lines.tell("trial_began", {"label": label, "max_trials": max_trials})

    def trial_climbed(self, rung: int, name: str) -> None:
        self._lines.tell("trial_climbed", {"rung": rung, "name": name})

    def step_told(self, message: str) -> None:
        self._seldom(message)

    def trial_ended(self, variant: Variant, standing: Standing) -> None:
        budget = standing.budget
        self._lines.tell(
            "trial_ended",
            {
                "variant": summary(variant),
                "best": standing.best.id if standing.best is not None else None,
                "front": [one.id for one in list(standing.front)[:MAX_FRONT]],
                "dropped": dict(standing.dropped),
                "budget": {
                    "wall_clock_s": round(budget.wall_clock_s, 1),
                    "max_wall_clock_s": budget.max_wall_clock_s,
                    "trials": budget.trials,
                    "max_trials": budget.max_trials,
                    "training_epochs": round(budget.training_epochs, 2),
                    "screened": budget.screened,
                },
            },
        )

    def verification_began(self, variant: Variant, window_s: float) -> None:
        self._lines.tell(
            "verification", {"id": variant.id, "label": variant.label, "window_s": window_s}
        )

    def note(self, message: str) -> None:
        self._lines.tell("note", {"message": message})


def summary(variant: Variant) -> dict[str, Any]:
    """A row as lists, charts and events have it: what isn't known, or not finite, is None."""
    serving, quality = variant.serving, variant.quality
    told: dict[str, Any] = variant_to_dict(variant)
    loaded = variant.verification
    figures = {
        "cost_per_million": serving.cost_per_million if serving else None,
        "max_rate_per_s": serving.max_rate_per_s if serving else None,
        "latency_s": slo_latency_s(variant),
        "predicted_latency_s": serving.prediction.slo_latency_s if serving else None,
        "measured_latency_s": loaded.slo_latency_s if loaded else None,
        "measured_latency_bound_s": loaded.slo_latency_bound_s if loaded else None,
        "quality": quality.value if quality else None,
        "drop": quality.drop if quality else None,
        "drop_lower": quality.drop_lower if quality else None,
        "drop_upper": quality.drop_upper if quality else None,
        "size_bytes": variant.size_bytes,
        "memory_bytes": variant.memory_bytes,
        "joules": variant.joules,
        "busy_cores": busy_cores(variant),
        "build_s": variant.build_s,
        "speedup": variant.speedup.estimate if variant.speedup else None,
    }
    return {
        "id": variant.id,
        "label": variant.label,
        "status": variant.status,
        "engine": variant.engine,
        "precision": variant.precision,
        "recipe": told["recipe"],
        "reasons": [explain(reason) for reason in variant.reasons],
        "constraints": [reason.constraint for reason in variant.reasons],
        "metric": quality.metric if quality else None,
        **{name: _finite(value) for name, value in figures.items()},
    }


def _finite(value: float | None) -> float | None:
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return value
