"""What giving way on one constraint would buy."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from loadtest.slo import Slo
from optimizer.relaxation import MAX_TIMES, Serve, relative_step, relaxations
from optimizer.result import Reason, ServingChoice, Variant, Verification
from tests.optimizer.study_result import SLO, variant

TOO_LATE = Reason("latency", 0.3, 0.045, "s", "predicted")
DROPS = Reason("accuracy_drop", 0.02134, 0.01, "1")


def missed(name: str, *reasons: Reason, milliseconds: float = 10.0) -> Variant:
    return variant(name, "infeasible", milliseconds, reasons=reasons)


def keeping(needed_s: dict[str, float]) -> Serve:
    """A replica of a variant sustains 10 requests/s at the threshold that it needs, by label, and
    up to twice that as the threshold rises."""

    def serve(one: Variant, slo: Slo) -> ServingChoice:
        needed, threshold_s = needed_s[one.label], slo.latency.threshold_s
        rate = 0.0 if threshold_s < needed else min(20.0, 10 * (threshold_s / needed))
        assert one.serving is not None
        cost = 5 / rate if rate else float("inf")
        return replace(one.serving, max_rate_per_s=rate, cost_per_million=cost)

    return serve


def found(
    rows: Sequence[Variant], needed_s: dict[str, float] | None = None
) -> list[tuple[object, ...]]:
    return [
        (one.constraint, one.from_limit, one.to_limit)
        for one in relaxations(rows, SLO, "cost", keeping(needed_s or {}))
    ]


def test_limit_moves_to_the_figure_on_record_rounded_away_from_it() -> None:
    rows = [
        missed("dropping", DROPS),
        missed("dropping more", replace(DROPS, value=0.04)),
        missed("large", Reason("size", 4_231_700.0, 1_000_000.0, "bytes")),
        missed("refusing", Reason("success_ratio", 0.998, 0.999, "1")),
    ]

    assert found(rows) == [
        ("success_ratio", 0.999, 0.998),
        ("accuracy_drop", 0.01, pytest.approx(0.0214)),
        ("size", 1_000_000.0, 4_240_000.0),
    ]


def swamped(name: str, milliseconds: float = 10.0) -> Variant:
    """What can't carry the SLO's rate on one replica, so its prediction is infinite."""
    row = missed(name, TOO_LATE, milliseconds=milliseconds)
    assert row.serving is not None
    prediction = replace(row.serving.prediction, slo_latency_s=math.inf)
    return replace(row, serving=replace(row.serving, prediction=prediction))


def test_threshold_is_that_of_the_prediction_when_a_simulation_confirms_it() -> None:
    # Predicted are 2 + 3.2 x milliseconds; a tenth of the threshold stays free.
    rows = [
        missed(name, TOO_LATE, milliseconds=ms) for name, ms in (("a", 20), ("b", 18), ("c", 19))
    ]

    steps = relaxations(rows, SLO, "cost", keeping({"a": 0.06, "b": 0.5, "c": 0.06}))

    assert [(one.variant_id, one.to_limit) for one in steps] == [
        (rows[2].id, pytest.approx(0.0698))
    ]
    assert steps[0].value == pytest.approx(5 / (10 * 0.0698 / 0.06))


def test_threshold_is_looked_for_when_no_prediction_is_finite() -> None:
    rows = [swamped("slower", 11.0), swamped("slow")]

    [step] = relaxations(rows, SLO, "cost", keeping({"slow": 0.0631, "slower": 0.07}))

    assert (step.constraint, step.from_limit, step.variant_id) == ("latency", 0.05, rows[1].id)
    assert 0.0631 <= step.to_limit <= 0.0631 * 1.12
    assert step.value == pytest.approx(0.5, rel=0.12)


def test_threshold_is_the_measured_latency_when_the_server_was_loaded() -> None:
    measured = Verification("violated", ("p99 was 61.23 ms.",), slo_latency_s=0.06123)
    row = replace(missed("refuted", replace(TOO_LATE, value=0.06123, limit=0.05)),
                  verification=measured)  # fmt: skip

    assert found([row]) == [("latency", 0.05, pytest.approx(0.0613))]


def test_nothing_is_offered_when_two_constraints_are_broken_or_none_has_a_limit() -> None:
    rows = [
        missed("both", DROPS, TOO_LATE),
        replace(missed("unbuilt", Reason("built", detail="no")), status="dropped"),
        missed("doubtful", Reason("evidence", detail="no verdict")),
        swamped("hopeless"),
    ]

    assert found(rows, {"hopeless": 0.05 * MAX_TIMES * 2}) == []


def test_better_variant_counts_when_the_steps_are_equal() -> None:
    rows = [missed("dear", DROPS, milliseconds=20.0), missed("cheap", DROPS, milliseconds=10.0)]

    [step] = relaxations(rows, SLO, "cost", keeping({}))

    assert step.variant_id == rows[1].id
    assert step.value == pytest.approx(22.2 / 130)


def test_step_is_absolute_when_the_limit_is_zero() -> None:
    [step] = relaxations([missed("dropping", replace(DROPS, limit=0.0))], SLO, "cost", keeping({}))

    assert relative_step(step) == pytest.approx(0.0214)
