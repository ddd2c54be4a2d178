"""A study's result survives JSON, and what isn't one is refused with a reason."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.slo import Slo
from optimizer.result import (
    BudgetUsed,
    InstanceTimes,
    KernelShare,
    NearestMiss,
    Prediction,
    Reason,
    ResultInvalid,
    ServingChoice,
    Speedup,
    StudyResult,
    Target,
    Variant,
    Verification,
    from_json,
    to_json,
)
from serve.artifact import Quality, ServiceTime, Step
from serve.machine import Machine

SLO = Slo.model_validate(
    {
        "apiVersion": "trimserve/v1",
        "kind": "SLO",
        "name": "digits",
        "latency": {"quantile": 0.99, "threshold_ms": 20},
        "workload": {"rate_per_s": 200},
        "accuracy": {"max_drop_points": 2},
    }
)
PREDICTION = Prediction(200.0, 0.002, 0.005, 0.008, 0.008, 199.9, 1.0, 0.41, 1.3, 20_000)
CHOSEN = Variant(
    id="a1b2",
    label="onnxruntime int8 (percentile)",
    status="chosen",
    recipe=(
        Step("quantization", "1", {"method": "percentile", "per_channel": True}, 0, {"onnx": "1"}),
        Step("compilation", "1", {"engine": "onnxruntime", "share": 0.999, "level": 2}, 0),
    ),
    engine="onnxruntime",
    precision="int8",
    quality=Quality("accuracy", 0.98, 0.002, -0.004, 0.008, 0.007, 0.95, 600, "validation", "d1"),
    test_quality=Quality("accuracy", 0.97, 0.003, -0.01, 0.02, 0.01, 0.95, 300, "test", "d2"),
    service_times=(InstanceTimes(1, 2, (ServiceTime(1, 0.001, 0.002, 200),)),),
    speedup=Speedup(1.4, 1.5, 1.7, 0.95, 1, 60),
    int8_share=1.0,
    kernels=(KernelShare("qgemm", "QLinearConv", "int8", 3, 0.8),),
    size_bytes=123_456,
    build_s=1.25,
    serving=ServingChoice(1, 2, 8, 0.0, 1, 900.0, 0.0247, PREDICTION),
    verification=Verification("met", (), 0.002, 0.009, 0.009, 200.1, 200.1, 1.0, 6000),
    version="3",
)
INFEASIBLE = Variant(
    id="c3d4",
    label="onnxruntime int8 (minmax)",
    status="infeasible",
    reasons=(Reason("accuracy_drop", 0.031, 0.02, "1"), Reason("built", detail="NaN")),
    serving=ServingChoice(
        1, 2, 1, 0.0, 1, 0.0, math.inf, replace(PREDICTION, p99_s=math.inf, slo_latency_s=math.inf)
    ),
)
RESULT = StudyResult(
    model="digits",
    slo=SLO,
    objective="cost",
    outcome="met",
    variants=(Variant("base", "eager", "verified"), CHOSEN, INFEASIBLE),
    baseline_id="base",
    target=Target("cpu", 2, 0.04),
    machine=Machine("EPYC", ("avx2",), 2, "Linux", {"onnxruntime": "1.32"}),
    spec_digest="s1",
    data_digests={"validation": "d1", "test": "d2"},
    seeds={"search": 0},
    budget=BudgetUsed(12.5, 300.0, 6, 20),
    versions={"trimserve": "0.1"},
    command=("trimserve", "optimize", "spec.yaml"),
    finished_at="2026-11-24T10:00:00Z",
    nearest_miss=NearestMiss("c3d4", Reason("accuracy_drop", 0.031, 0.02, "1")),
    notes=("noisy machine",),
)


def test_result_is_equal_after_a_round_trip_through_json() -> None:
    assert from_json(to_json(RESULT)) == RESULT


def test_result_keeps_infinity_in_standard_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(to_json(RESULT), parse_constant=refuse)

    assert document["variants"][2]["serving"]["cost_per_million"] == "Infinity"


def test_result_keeps_a_quality_that_is_not_finite() -> None:
    assert CHOSEN.quality is not None
    quality = replace(CHOSEN.quality, drop_bound=math.inf, figures={"kl": math.inf})
    result = replace(RESULT, variants=(replace(CHOSEN, quality=quality),))
    assert from_json(to_json(result)) == result


def test_result_finds_the_chosen_and_the_baseline() -> None:
    assert RESULT.chosen is CHOSEN
    assert RESULT.baseline is RESULT.variants[0]
    assert replace(RESULT, variants=()).chosen is None
    assert RESULT.variant("unknown") is None


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        pytest.param({"schema_version": 2}, "schema_version: got 2, want 1", id="newer schema"),
        pytest.param({"winner": "a1b2"}, "winner: Unexpected", id="unknown key"),
        pytest.param({"outcome": "fine"}, "outcome: Input should be 'met'", id="unknown outcome"),
        pytest.param({"budget": None}, "budget: ", id="wrong type"),
    ],
)
def test_from_json_names_the_key_when_a_document_does_not_fit(
    edit: dict[str, object], problem: str
) -> None:
    document = json.loads(to_json(RESULT)) | edit

    with pytest.raises(ResultInvalid) as caught:
        from_json(json.dumps(document), source="report.json")

    assert str(caught.value).startswith(f"report.json: {problem}")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000], ids=len)
def test_from_json_refuses_when_the_text_is_no_result(text: str) -> None:
    with pytest.raises(ResultInvalid):
        from_json(text)


def test_result_round_trips_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(to_json(RESULT), "utf-8")

    assert from_json(path.read_bytes()) == RESULT
