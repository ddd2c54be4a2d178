"""The fusion report: what the engines made of small graphs, by their own profiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimizer.fusion import fusions_of
from optimizer.fusion_rows import fusion_rows, fusion_summary, unfused
from optimizer.report import render_html
from optimizer.result import Fusion, from_json, to_json
from serve.engines import EngineSpec, KernelTime, engine_module
from tests.optimizer.study_result import met
from tests.optimizer.test_macs import node, quantized, save, weights

PLAIN = EngineSpec("onnxruntime", "model.onnx", options={"optimization": "none"})
ENGINES = (EngineSpec("onnxruntime", "model.onnx"), EngineSpec("openvino", "model.onnx"))
X = {"x": np.random.default_rng(1).normal(size=(2, 4, 16, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, normalization and activation; a cosine that nothing takes in; a product."""
    stored = {
        "w": weights(8, 4, 3, 3), "scale": weights(8), "shift": weights(8), "mean": weights(8),
        "variance": np.ones(8, np.float32), "m": weights(14, 5),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], "n"),
        node("Relu", ["n"], "r"),
        node("Cos", ["r"], "e"),
        node("MatMul", ["e", "m"], "y"),
    ]
    return save(tmp_path_factory.mktemp("graph") / "model.onnx", nodes, [4, 16, 16], stored)


def profiled(path: Path, spec: EngineSpec) -> tuple[KernelTime, ...]:
    return engine_module(spec.name).profile(path.parent, spec, X, 2)


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_operators_are_found_in_the_kernel_that_took_them_in(
    spec: EngineSpec, network: Path
) -> None:
    fusions = fusions_of(network, profiled(network, PLAIN), profiled(network, spec))
    by_operators = {one.operators: one for one in fusions if one.kernel and one.operators}
    assert set(by_operators) == {("Conv", "BatchNormalization", "Relu"), ("Cos",), ("MatMul",)}
    assert all(one.base_s > 0 and one.seconds > 0 for one in by_operators.values())
    assert ("Cos",) in {one.operators for one in unfused(fusions)}
    assert not any("Conv" in one.operators for one in unfused(fusions))


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_conversions_of_a_quantized_graph_are_part_of_its_kernels(
    spec: EngineSpec, tmp_path: Path
) -> None:
    path = quantized(tmp_path / "model.onnx", falls_back=False)
    fusions = fusions_of(path, profiled(path, PLAIN), profiled(path, spec))
    convolutions = [one for one in fusions if "Conv" in one.operators]
    assert {one.precision for one in convolutions} == {"int8"}
    assert sum(one.n for one in convolutions) == 2


def test_no_time_is_lost_when_operators_are_grouped(network: Path) -> None:
    before, after = profiled(network, PLAIN), profiled(network, ENGINES[0])
    fusions = fusions_of(network, before, after)
    for wanted, got in (
        (sum(one.duration_s for one in before), sum(one.base_s for one in fusions)),
        (sum(one.duration_s for one in after), sum(one.seconds for one in fusions)),
    ):
        assert got == pytest.approx(wanted)


ROWS = (
    Fusion(("Conv", "Relu"), "Conv", "fp32", 3, 0.003, 0.002),
    Fusion((), "Reorder", "fp32", 2, 0.0, 0.001),
    Fusion(("Cos",), "Cos", "fp32", 1, 0.001, 0.001),
    Fusion(("Flatten",), "", "", 1, 0.001, 0.0),
)


def test_rows_have_bars_of_the_longest_and_name_what_is_unfused() -> None:
    rows = fusion_rows(ROWS)
    assert [row.what for row in rows] == ["Conv + Relu", "added by the engine", "Cos", "Flatten"]
    assert [row.is_unfused for row in rows] == [False, True, True, False]
    assert [round(row.base_size, 2) for row in rows] == [1.0, 0.0, 0.33, 0.33]
    assert fusion_rows(()) == []


def test_summary_says_what_fusing_brought_and_what_stayed_unfused() -> None:
    said = fusion_summary(ROWS)
    assert said.startswith("5 ms in kernels of single operators, 4 ms in the 6 kernels")
    assert "2 ms of them (50%) in operators that stayed unfused" in said
    assert fusion_summary(()) == ""


def test_page_and_json_have_the_report_when_the_answer_came_from_a_graph() -> None:
    result = replace(met(), fusions=ROWS)
    assert from_json(to_json(result)).fusions == ROWS
    page = render_html(result)
    assert "Which operators ended in which kernel" in page
    assert "Conv + Relu" in page
    assert page.count(">unfused</span>") == 2
    assert "Which operators ended in which kernel" not in render_html(met())
