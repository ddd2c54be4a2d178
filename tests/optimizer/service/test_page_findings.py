"""What the page makes of a study's variants: who wins, where marks lie, where recipes part."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from optimizer import choice
from optimizer.pareto import pareto_front
from optimizer.result import StudyResult
from optimizer.service.page.comparison import comparison, recipe_lines
from optimizer.service.page.findings import Finding, finding, findings, ranked, winner
from optimizer.service.page.lineage import Branch, lineage
from optimizer.service.page.plot import Axis, Plot, plot
from optimizer.service.reporting import summary
from tests.optimizer.study_result import SLO, large, met


def found(result: StudyResult) -> list[Finding]:
    return findings([summary(one) for one in result.variants], result.objective)


def drawn(result: StudyResult) -> Plot:
    made = plot(found(result), result.slo, result.objective, pareto_front(result.variants),
                result.baseline_id)  # fmt: skip
    assert made is not None
    return made


def a_finding(label: str, cost: float, predicted_s: float, **values: Any) -> Finding:
    figures = {"cost_per_million": cost, "predicted_latency_s": predicted_s}
    return Finding(id=label, label=label, status="verified", **figures | values)


# --- who wins


@pytest.mark.parametrize("result", [met(), large(90)], ids=["few", "many"])
def test_the_winner_at_the_slo_s_own_limit_costs_no_more_than_the_answer(
    result: StudyResult,
) -> None:
    best = winner(ranked(found(result), "cost"), result.slo.latency.threshold_s)
    assert best is not None
    assert result.chosen is not None
    assert result.chosen.serving is not None
    assert best.cost_per_million is not None
    assert best.cost_per_million <= result.chosen.serving.cost_per_million


def test_the_winner_is_as_good_as_the_cheapest_of_those_that_keep_each_limit() -> None:
    of_ranked = ranked(found(large(90)), "cost")
    for limit_ms in range(1, 80):
        keeping = [
            one.cost_per_million
            for one in found(large(90))
            if one.status != "dropped"
            and set(one.constraints) <= {"latency", "rate", "outclassed"}
            and one.cost_per_million is not None
            and (one.decisive_latency_s or 1e9) <= limit_ms / 1e3
        ]
        best = winner(of_ranked, limit_ms / 1e3)
        assert (best is None) == (not keeping)
        if best is not None:
            assert best.cost_per_million is not None
            # As `ranked` groups all, not only those that keep this limit.
            assert best.cost_per_million <= min(keeping) * 1.01**2


@pytest.mark.parametrize("objective", ["cost", "latency", "size"])
def test_the_order_is_the_study_s_own(objective: Any) -> None:
    rows = [
        replace(one, status="unverified", verification=None)
        for one in large(90).variants
        if not one.reasons
    ]
    theirs = choice.ranked(rows, objective)
    ours = ranked([finding(summary(one)) for one in rows], objective)
    assert [one.id for one in ours] == [one.id for one in theirs]


def test_the_less_busy_of_two_equals_wins() -> None:
    both = [
        a_finding("busy", 1.0, 0.01, busy_cores=1.0),
        a_finding("idle", 1.009, 0.01, busy_cores=0.5),
    ]
    assert [one.label for one in ranked(both, "cost")] == ["idle", "busy"]
    apart = [both[0], replace(both[1], cost_per_million=1.02)]
    assert [one.label for one in ranked(apart, "cost")] == ["busy", "idle"]


@pytest.mark.parametrize(
    ("cheap", "limit_s", "wins"),
    [
        pytest.param({}, 0.02, "cheap", id="it is predicted to keep the limit"),
        pytest.param({}, 0.005, None, id="nobody keeps the limit"),
        pytest.param({"measured_latency_s": 0.03}, 0.02, "dear", id="it was measured to break it"),
        pytest.param(
            {"measured_latency_s": 0.019, "measured_latency_bound_s": 0.021}, 0.02, "dear",
            id="its bound breaks it",
        ),
        pytest.param({"constraints": ("accuracy_drop",)}, 1.0, "dear", id="it isn't accurate"),
        pytest.param({"constraints": ("latency",)}, 1.0, "cheap", id="only its latency was wrong"),
        pytest.param({"constraints": ("outclassed",)}, 1.0, "cheap", id="it was outclassed"),
        pytest.param({"status": "dropped"}, 1.0, "dear", id="it was dropped"),
        pytest.param({"cost_per_million": None}, 1.0, "dear", id="it has no cost"),
    ],
)  # fmt: skip
def test_the_cheap_variant_wins_only_when_it_keeps_all(
    cheap: dict[str, Any], limit_s: float, wins: str | None
) -> None:
    both = [replace(a_finding("cheap", 1.0, 0.01), **cheap), a_finding("dear", 2.0, 0.01)]
    best = winner(ranked(both, "cost"), limit_s)
    assert (best.label if best else None) == wins


@pytest.mark.parametrize(
    ("objective", "wins"), [("cost", "a"), ("latency", "b"), ("size", "b"), ("energy", "a")]
)
def test_the_winner_is_by_what_the_study_minimizes(objective: str, wins: str) -> None:
    both = [
        a_finding("a", 1.0, 0.02, latency_s=0.02, size_bytes=9.0, joules=1.0),
        a_finding("b", 2.0, 0.01, latency_s=0.01, size_bytes=5.0, joules=2.0),
    ]
    best = winner(ranked(both, objective), 1.0)
    assert best is not None
    assert best.label == wins


def test_a_variant_is_shown_once_when_it_was_told_twice() -> None:
    first = summary(met().variants[0])
    again = {**first, "status": "infeasible", "of_a_later_release": 1}
    assert [one.status for one in findings([first, again], "cost")] == ["infeasible"]


def test_an_event_of_an_older_release_is_still_read() -> None:
    old = summary(met().variants[0])
    for name in ("constraints", "predicted_latency_s", "drop_lower", "metric"):
        del old[name]
    read = finding(old)
    assert (read.constraints, read.predicted_latency_s) == ((), None)


# --- where marks lie


@pytest.mark.parametrize("result", [met(), large(90)], ids=["few", "many"])
def test_marks_and_limits_lie_in_the_plane(result: StudyResult) -> None:
    made = drawn(result)
    for mark in made.marks:
        assert 0 <= mark.x <= 1
        assert 0 <= mark.y <= 1
        assert 0 <= mark.tone <= 4
    assert 0 < made.limit_x < 1
    assert made.floor_y is not None
    assert 0 < made.floor_y < 1
    assert [mark.x for mark in made.marks] == sorted(mark.x for mark in made.marks)
    assert len(made.marks) + made.n_undrawn == len(result.variants)
    assert all(0 <= share <= 1 for share, _ in made.x.ticks + made.y.ticks)


def test_marks_are_told_apart_by_what_became_of_them() -> None:
    by_label = {mark.finding.label: mark for mark in drawn(met()).marks}
    assert by_label["openvino int8 (percentile)"].shape == "chosen"
    assert by_label["onnxruntime int8 (minmax)"].shape == "broken"
    assert by_label["onnxruntime int8 (minmax)"].rank is None
    assert by_label["openvino int8 (percentile)"].rank == 0
    assert by_label["onnxruntime fp32"].is_baseline
    assert by_label["onnxruntime fp32"].tone > by_label["openvino int8 (percentile)"].tone
    assert "p99 12.2 ms predicted, 13.4 ms measured" in by_label["openvino int8 (percentile)"].said


def test_the_front_is_a_stair_that_never_falls() -> None:
    steps = drawn(large(90)).steps
    assert steps
    for x1, y1, x2, y2 in steps:
        assert x1 <= x2
        assert y1 >= y2
        assert x1 == x2 or y1 == y2
    assert all(a[2:] == b[:2] for a, b in pairwise(steps))


def test_a_logarithmic_axis_puts_the_mean_in_the_middle() -> None:
    axis = Axis(1.0, 100.0, True, ())
    assert [axis.share(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0, 0.5, 1])


def test_the_plane_is_of_cost_when_nothing_was_judged() -> None:
    rows = tuple(replace(one, quality=None) for one in met().variants)
    made = drawn(replace(met(), variants=rows))
    assert (made.y_title, made.floor_y) == ("cost per million", None)


def test_there_is_no_plot_when_nothing_was_timed() -> None:
    only = [finding(summary(met().variants[-1]))]
    assert plot(only, SLO, "cost", frozenset(), None) is None


# --- where recipes part


def leaves(branch: Branch) -> Iterator[Finding]:
    yield from branch.variants
    for inner in branch.branches:
        yield from leaves(inner)


def test_steps_that_variants_share_stand_once() -> None:
    rows = found(large(90))
    tree = lineage(rows, "resnet")
    assert sorted(one.id for one in leaves(tree)) == sorted(one.id for one in rows)
    assert tree.technique == "resnet"
    assert [one.technique for one in tree.branches].count("export") == 1


def test_the_best_of_each_figure_is_marked_when_they_differ() -> None:
    by_label = {one.label: one for one in found(met())}
    pair = [by_label["openvino int8 (percentile)"], by_label["onnxruntime int8 (percentile)"]]
    lines = {line.name: line for line in comparison(pair, 0.99)}
    assert lines["cost per million"].best == {0}
    assert lines["accuracy"].best == {1}
    assert lines["size"].best == frozenset()
    assert lines["p99 measured, ms"].texts == ("13.4", "–")
    assert lines["memory"].texts == ("–", "–")
    differing = {step.technique: step.differs for step in recipe_lines(pair)}
    assert differing == {"export": False, "quantization": False, "compilation": True}
