"""What each step contributed, by the row without it."""

import math
from dataclasses import replace

import pytest

from optimizer.ablation import ablations, missing
from optimizer.result import Variant
from serve.artifact import Step
from tests.optimizer.study_result import variant

EXPORT = Step("export", "1", {"opset": 20}, 0)
PRUNE = Step("pruning", "1", {"ratio": 0.4}, 0)
QUANTIZE = Step("quantization", "1", {"calibration": "minmax"}, 0)


def compiled(precision: str, engine: str = "openvino") -> Step:
    return Step("compilation", "1", {"engine": engine, "precision": precision}, 0)


def row(name: str, *recipe: Step, milliseconds: float = 8.0) -> Variant:
    return replace(variant(name, "verified", milliseconds), id=name, recipe=recipe)


ANSWER = row("answer", PRUNE, EXPORT, QUANTIZE, compiled("int8"), milliseconds=4.0)
IN_FP32 = row("in fp32", PRUNE, EXPORT, compiled("fp32"))
IN_BF16 = row("a bf16 one", PRUNE, EXPORT, compiled("bf16"))
UNPRUNED = row("unpruned", EXPORT, QUANTIZE, compiled("int8"), milliseconds=6.0)
OTHERS = (
    row("other engine", PRUNE, EXPORT, compiled("fp32", "onnxruntime")),
    row("other ratio", replace(PRUNE, parameters={"ratio": 0.5}), EXPORT, compiled("fp32")),
    row("other seed", replace(PRUNE, seed=1), EXPORT, compiled("fp32")),
)


def test_step_contributes_the_difference_to_the_row_without_it() -> None:
    pruning, quantization = ablations([*OTHERS, UNPRUNED, IN_BF16, IN_FP32, ANSWER], ANSWER)

    assert (pruning.technique, pruning.without_id) == ("pruning", "unpruned")
    assert (quantization.technique, quantization.without_id) == ("quantization", "in fp32")
    assert quantization.cost_per_million == pytest.approx(22.2 / 1300 * (4 - 8))
    assert quantization.latency_s == pytest.approx(-3.2e-3 * 4)
    assert quantization.size_bytes == 0


def test_missing_names_the_recipes_that_nobody_measured() -> None:
    assert missing([*OTHERS, ANSWER], ANSWER) == (
        (EXPORT, QUANTIZE, compiled("int8")),
        (PRUNE, EXPORT, compiled("fp32")),
    )
    assert missing([UNPRUNED, IN_FP32], ANSWER) == ()


def test_what_only_a_quantized_model_has_goes_with_quantization() -> None:
    with_rest = replace(
        compiled("int8"), parameters={**compiled("int8").parameters, "rest": "bf16"}
    )
    answer = row("answer", EXPORT, QUANTIZE, with_rest)
    assert missing([answer], answer) == ((EXPORT, compiled("fp32")),)
    (found,) = ablations([row("in fp32", EXPORT, compiled("fp32")), answer], answer)
    assert found.without_id == "in fp32"


def test_step_that_cannot_go_is_not_asked_for() -> None:
    plain = row("plain", EXPORT, compiled("fp32"))

    assert missing([plain], plain) == ()
    assert ablations([plain], plain) == ()


def test_difference_is_unknown_when_the_other_keeps_no_rate() -> None:
    assert UNPRUNED.serving is not None
    idle = replace(UNPRUNED.serving, max_rate_per_s=0.0, cost_per_million=math.inf)
    rows = [replace(UNPRUNED, serving=idle, quality=None), IN_FP32]

    [pruning, _] = ablations(rows, ANSWER)

    assert (pruning.cost_per_million, pruning.drop) == (None, None)
    assert pruning.latency_s == pytest.approx(-3.2e-3 * 2)


def test_dropped_row_is_no_comparison_and_is_not_asked_for_again() -> None:
    rows = [replace(UNPRUNED, status="dropped", serving=None), IN_FP32]

    assert [one.technique for one in ablations(rows, ANSWER)] == ["quantization"]
    assert missing(rows, ANSWER) == ()
