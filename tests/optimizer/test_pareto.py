"""The front of a study and its chart."""

import math
from dataclasses import replace

import pytest

from optimizer.pareto import VIEWS, drawn_points, pareto_chart, pareto_front, pareto_views
from optimizer.result import Variant
from tests.optimizer.study_result import large, met, variant


def test_front_leaves_out_what_another_variant_beats() -> None:
    cheap = variant("cheap int8", "chosen", 3.0, drop=0.01)
    good = variant("good fp32", "verified", 9.0)
    beaten = variant("beaten fp32", "verified", 9.5, drop=0.001)
    unmeasured = Variant("0" * 64, "nothing known", "dropped")

    front = pareto_front([cheap, good, beaten, unmeasured])

    assert front == {cheap.id, good.id}


def test_front_keeps_both_when_they_are_equal() -> None:
    one = variant("one int8", "verified", 3.0)

    assert len(pareto_front([one, replace(one, id="other")])) == 2


def test_chart_of_the_front_draws_the_limits_of_the_slo() -> None:
    layout = pareto_chart(met())["layout"]

    limits = [shape for shape in layout["shapes"] if shape["type"] == "line"]
    assert [shape["x0"] for shape in limits if shape["x0"] == shape["x1"]] == [50]
    assert [shape["y0"] for shape in limits if shape["y0"] == shape["y1"]] == [pytest.approx(93.27)]


def test_chart_shows_every_variant_that_has_figures() -> None:
    result = met()
    shown = [
        name
        for trace in pareto_chart(result)["data"]
        if "customdata" in trace
        for name, *_ in trace["customdata"]
    ]

    assert sorted(shown) == sorted(point.variant.label for point in drawn_points(result))
    assert len(shown) == 6


def test_chart_leaves_out_what_is_far_less_accurate() -> None:
    rows = (
        variant("near", "infeasible", 3.0, drop=0.09),
        variant("wreck", "infeasible", 3.0, drop=0.5),
    )

    drawn = drawn_points(replace(met(), variants=rows))

    assert [point.variant.label for point in drawn] == ["near"]


def test_chart_is_logarithmic_when_latencies_are_far_apart() -> None:
    rows = (variant("fast", "chosen", 0.1), variant("slow", "verified", 30.0))

    axis = pareto_chart(replace(met(), variants=rows))["layout"]["xaxis"]

    assert axis["type"] == "log"
    assert axis["range"][0] < math.log10(2.32) < math.log10(98) < axis["range"][1]


def test_chart_draws_what_was_measured_beside_the_prediction() -> None:
    [trace] = [t for t in pareto_chart(met())["data"] if t["name"] == "measured under load"]

    assert trace["x"] == [pytest.approx(27.92), 31.5, None, pytest.approx(12.24), 13.4, None]


def test_views_show_the_same_variants_in_other_planes() -> None:
    views = pareto_views(met())

    assert list(views) == [view.name for view in VIEWS]
    [chosen] = [t for t in views["accuracy and size"]["data"] if t["name"] == "chosen"]
    assert (chosen["x"], chosen["y"]) == ([0.93], [pytest.approx(93.86)])
    [chosen] = [t for t in views["cost and latency"]["data"] if t["name"] == "chosen"]
    assert (chosen["x"], chosen["y"]) == (
        [pytest.approx(12.24)],
        [pytest.approx(22.2 / (1300 / 3.2))],
    )


def test_views_are_without_accuracy_when_none_was_measured() -> None:
    rows = tuple(replace(row, quality=None) for row in met().variants)
    unjudged = replace(met(), variants=rows)

    assert list(pareto_views(unjudged)) == ["cost and latency"]
    assert pareto_front(rows) == {rows[4].id}


def test_chart_draws_few_intervals_when_it_is_crowded() -> None:
    few = pareto_chart(met())["data"][2]["error_y"]["array"]
    many = pareto_chart(large(200))["data"][2]["error_y"]["array"]

    assert all(few)
    assert [bool(length) for length in many].count(True) == 1
