"""The charts of a study's times."""

from dataclasses import replace

import pytest

from optimizer.chart import Figure, round_ticks
from optimizer.figures import latency_by_batch_size, predicted_against_measured
from optimizer.parallel import parallel_coordinates
from optimizer.result import StudyResult
from tests.optimizer.study_result import large, met


def test_predictions_are_drawn_where_there_is_a_measurement() -> None:
    unloaded = tuple(replace(row, verification=None) for row in met().variants)

    figure = predicted_against_measured(met())

    assert figure is not None
    assert figure["data"][0]["y"] == [pytest.approx(31.5), pytest.approx(13.4)]
    assert predicted_against_measured(replace(met(), variants=unloaded)) is None


def drawn(result: StudyResult) -> Figure:
    figure = latency_by_batch_size(result)
    assert figure is not None
    return figure


def test_latency_by_batch_size_begins_with_the_chosen_and_the_baseline() -> None:
    names = [trace["name"] for trace in drawn(met())["data"] if "name" in trace]

    assert names[:2] == ["openvino int8 (percentile) · 1×2", "onnxruntime fp32 · 1×2"]


def axes_of(result: StudyResult) -> dict[str, Figure]:
    figure = parallel_coordinates(result)
    assert figure is not None
    return {dimension["label"]: dimension for dimension in figure["data"][0]["dimensions"]}


def test_parallel_axes_are_what_the_variants_differ_in() -> None:
    axes = axes_of(met())

    assert list(axes) == [
        "engine", "precision", "calibration", "per channel", "drop, points", "p99 ms", "size, MB",
        "cost per million",
    ]  # fmt: skip
    assert axes["calibration"]["ticktext"] == ["–", "percentile"]


def test_parallel_lines_end_with_the_chosen_drawn_beside_itself() -> None:
    figure = parallel_coordinates(met())
    assert figure is not None
    colours = figure["data"][0]["line"]["color"]

    assert colours == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    drops = axes_of(met())["drop, points"]["values"]
    assert drops[5:] == pytest.approx([0.41] * 5, abs=0.02)


def test_parallel_axis_of_numbers_has_a_place_for_recipes_without_the_parameter() -> None:
    ratio = axes_of(large(60))["ratio"]

    assert ratio["ticktext"][0] == "–"
    lines = ratio["values"][:-4]  # without the copies of the chosen
    assert min(lines) == ratio["tickvals"][0] < ratio["tickvals"][1]


def test_parallel_coordinates_need_two_variants_with_figures() -> None:
    assert parallel_coordinates(replace(met(), variants=met().variants[6:])) is None


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.03, 0.92, [0.2, 0.4, 0.6, 0.8]), (1, 6, [1, 2, 3, 4, 5, 6]), (2, 2, [2])],
)
def test_ticks_are_round_numbers_between_the_ends(
    low: float, high: float, ticks: list[float]
) -> None:
    assert round_ticks(low, high) == ticks
