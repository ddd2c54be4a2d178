"""The choice from measurements: constraints, order, and the nearest miss."""

import math
from dataclasses import replace

import pytest

from loadtest.slo import Slo
from optimizer.choice import (
    MAX_EXCESS,
    constraint_values,
    contradictions,
    excess,
    finalists,
    is_undecided,
    nearest_miss,
    ranked,
    reasons_against,
    verification_reasons,
    with_margin,
)
from optimizer.result import Prediction, Reason, ServingChoice, Variant, Verification
from optimizer.spec import Constraints
from serve.artifact import Quality


def slo(judged_by: str = "bound") -> Slo:
    return Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "tests",
            "latency": {"threshold_ms": 50},
            "workload": {"rate_per_s": 100},
            "accuracy": {"max_drop_points": 1, "judged_by": judged_by},
        }
    )


def quality(drop: float = 0.0, bound: float = 0.005) -> Quality:
    return Quality(
        "top1", 0.9 - drop, drop, drop - 0.004, drop + 0.006, bound, 0.95, 1000, "validation", "d"
    )


def serving(
    cost: float = 1.0, max_rate_per_s: float = 200.0, busy: float = 0.5, latency_s: float = 0.02
) -> ServingChoice:
    prediction = Prediction(
        100.0, latency_s / 3, latency_s / 2, latency_s, latency_s, 100.0, 1.0, busy, 1.0, 1000
    )
    return ServingChoice(1, 1, 8, 0.0, 1, max_rate_per_s, cost, prediction)


def variant(name: str, cost: float = 1.0, busy: float = 0.5, drop: float = 0.0) -> Variant:
    return Variant(
        id=name,
        label=name,
        status="unverified",
        quality=quality(drop),
        serving=serving(cost, busy=busy),
        size_bytes=100,
    )


def test_margin_tightens_the_latency_only() -> None:
    tight = with_margin(slo())
    assert tight.latency.threshold_ms == pytest.approx(45)
    assert tight.workload == slo().workload


def test_variant_within_every_constraint_has_no_reason_against_it() -> None:
    assert reasons_against(slo(), quality(), serving()) == []


def test_accuracy_is_judged_by_the_bound_when_the_slo_says_so() -> None:
    worse = quality(drop=0.006, bound=0.015)
    (reason,) = reasons_against(slo(), worse, serving())
    assert (reason.constraint, reason.value, reason.limit) == ("accuracy_drop", 0.015, 0.01)
    assert reasons_against(slo("estimate"), worse, serving()) == []


def test_latency_is_the_reason_when_no_rate_keeps_it() -> None:
    hopeless = serving(max_rate_per_s=0.0, cost=math.inf, latency_s=0.08)
    (reason,) = reasons_against(slo(), quality(), hopeless)
    assert (reason.constraint, reason.value, reason.limit) == ("latency", 0.08, 0.045)


def test_every_broken_constraint_is_named() -> None:
    hopeless = serving(max_rate_per_s=0.0, latency_s=0.08)
    reasons = reasons_against(slo(), quality(0.1, 0.12), hopeless)
    assert [reason.constraint for reason in reasons] == ["accuracy_drop", "latency"]


def test_cheapest_comes_first() -> None:
    order = ranked([variant("dear", 2.0), variant("cheap", 1.0), variant("dearest", 3.0)], "cost")
    assert [one.id for one in order] == ["cheap", "dear", "dearest"]


def test_less_busy_comes_first_among_equally_cheap() -> None:
    order = ranked([variant("busy", 1.0, 0.5), variant("idle", 1.005, 0.2)], "cost")
    assert [one.id for one in order] == ["idle", "busy"]


def test_smaller_drop_comes_first_among_equally_cheap_and_busy() -> None:
    order = ranked([variant("a", drop=0.004), variant("b", busy=0.52, drop=0.001)], "cost")
    assert [one.id for one in order] == ["b", "a"]


def test_order_does_not_depend_on_the_order_of_the_trials() -> None:
    variants = [variant("a", 1.0, 0.3), variant("b", 1.004, 0.31), variant("c", 1.008, 0.2)]
    assert ranked(variants, "cost") == ranked(variants[::-1], "cost")


def test_finalists_are_of_different_engines_and_precisions() -> None:
    variants = [
        replace(variant("a", 1.0), engine="onnxruntime", precision="int8"),
        replace(variant("b", 2.0), engine="onnxruntime", precision="int8"),
        replace(variant("c", 3.0), engine="openvino", precision="int8"),
        replace(variant("d", 4.0), engine="openvino", precision="fp32"),
    ]
    assert [one.id for one in finalists(variants, "cost", 2)] == ["a", "c"]


def test_what_breaks_a_constraint_is_never_a_contender() -> None:
    broken = replace(variant("cheap", 0.1), status="infeasible", reasons=(Reason("latency"),))
    assert ranked([broken, variant("dear")], "cost") == [variant("dear")]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        pytest.param(Reason("latency", 0.06, 0.05, "s"), 0.2, id="above an upper limit"),
        pytest.param(Reason("success_ratio", 0.5, 1.0, "1"), 0.5, id="below a lower limit"),
        pytest.param(Reason("accuracy_drop", 0.1, 0.0, "1"), 0.1, id="a limit of zero"),
        pytest.param(Reason("evidence"), math.inf, id="without numbers"),
    ],
)
def test_excess_is_relative_to_the_limit(reason: Reason, expected: float) -> None:
    assert excess(reason) == pytest.approx(expected)


def test_nearest_miss_is_the_variant_whose_worst_violation_is_smallest() -> None:
    def missed(name: str, *reasons: Reason) -> Variant:
        return replace(variant(name), status="infeasible", reasons=reasons)

    near = Reason("accuracy_drop", 0.012, 0.01, "1")
    miss = nearest_miss(
        [
            missed("slow", Reason("latency", 0.1, 0.05, "s")),
            missed("near", Reason("latency", 0.051, 0.05, "s"), near),
            replace(variant("dropped"), status="dropped", reasons=(Reason("built"),)),
        ]
    )
    assert miss is not None
    assert miss.variant_id == "near"
    assert miss.binding == near


def test_nearest_miss_is_none_when_nothing_was_measured() -> None:
    assert nearest_miss([]) is None


def test_variant_is_undecided_when_only_the_bound_stands_against_it() -> None:
    reason = Reason("accuracy_drop", 0.015, 0.01, "1")
    close = replace(
        variant("close"), status="infeasible", reasons=(reason,), quality=quality(0.005, 0.015)
    )
    assert is_undecided(slo(), close)
    worse = replace(close, quality=quality(0.02, 0.03))
    assert not is_undecided(slo(), worse)
    slow = replace(close, reasons=(reason, Reason("latency", 0.1, 0.05, "s")))
    assert not is_undecided(slo(), slow)


def test_test_split_contradicts_only_when_even_the_lower_end_is_too_much() -> None:
    accuracy = slo().accuracy
    assert accuracy is not None
    assert contradictions(accuracy, quality(drop=0.012, bound=0.03)) == []
    (reason,) = contradictions(accuracy, quality(drop=0.03, bound=0.05))
    assert reason.value == pytest.approx(0.026)


@pytest.mark.parametrize(
    ("verification", "constraint"),
    [
        pytest.param(
            Verification("violated", ("slow",), slo_latency_s=0.06), "latency", id="too slow"
        ),
        pytest.param(
            Verification("violated", ("errors",), slo_latency_s=0.01), "evidence", id="errors"
        ),
        pytest.param(Verification("inconclusive", ("few",)), "evidence", id="inconclusive"),
    ],
)
def test_verification_gives_the_reason_that_it_measured(
    verification: Verification, constraint: str
) -> None:
    (reason,) = verification_reasons(slo(), verification)
    assert reason.constraint == constraint
    assert verification.reasons[0] in reason.detail


def test_search_is_told_how_far_each_constraint_is_from_its_limit() -> None:
    limits = Constraints(size_bytes=400, memory_bytes=100)
    told = constraint_values(slo(), limits, replace(variant("a"), memory_bytes=150), is_final=True)
    assert told == pytest.approx(
        {"latency": -1.0, "accuracy_drop": -0.5, "size": -0.75, "memory": 0.5}
    )


def test_search_is_told_nothing_of_an_accuracy_that_training_will_change() -> None:
    worse = replace(variant("a"), quality=quality(drop=0.5, bound=0.6))
    assert constraint_values(slo(), Constraints(), worse, is_final=False) == {"latency": -1.0}


def test_search_is_told_what_training_was_expected_to_end_with_when_that_ruled_it_out() -> None:
    expected = Reason("accuracy_drop", 0.03, 0.01, "1", "as others let expect")
    seen = Reason("accuracy_drop", 0.6, 0.01, "1")
    ruled_out = replace(variant("a"), reasons=(expected, seen))
    told = constraint_values(slo(), Constraints(), ruled_out, is_final=False)
    assert told["accuracy_drop"] == pytest.approx(2.0)


def test_search_is_told_a_finite_excess_when_nobody_knows_by_how_much() -> None:
    lost = replace(variant("a"), reasons=(Reason("latency"),))
    assert constraint_values(slo(), Constraints(), lost, is_final=True)["latency"] == MAX_EXCESS
