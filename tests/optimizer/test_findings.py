"""Findings: what there is to learn beside the answer, from trials of a tiny study."""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.findings import Findings
from optimizer.result import Reason, Variant
from optimizer.spec import Spec, read_spec
from optimizer.store import Store
from optimizer.trials import Trials
from tests.optimizer.tiny_study import write_study
from tests.optimizer.trials_bench import INT8, PLAIN, in_a_hurry, make_trials, recipe_of, trial_of


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    path = write_study(tmp_path_factory.mktemp("study"), max_drop_points=90)
    return read_spec(in_a_hurry(path))


@pytest.fixture(scope="module")
def trials(spec: Spec) -> Iterator[Trials]:
    """A baseline, and int8 in an engine that nothing else was tried in."""
    with Store(spec.source.with_name("store.sqlite")) as store:
        found = make_trials(spec, store)
        for number, steps in enumerate((PLAIN, INT8), 1):
            recipe = recipe_of(found.builder, steps)
            found.run(trial_of(number, recipe), lambda _rung: None, lambda: 1.0)
        yield found


def findings(trials: Trials, rows: list[Variant]) -> Findings:
    return Findings(trials.spec, trials, rows, trials.evaluator.measurer)


def with_answer(trials: Trials) -> list[Variant]:
    baseline, int8 = trials.rows
    return [baseline, replace(int8, status="chosen")]


def n_measurements(path: Path) -> int:
    connection = sqlite3.connect(path.with_name("store.sqlite"))
    [count] = connection.execute("SELECT count(*) FROM measurements").fetchone()
    connection.close()
    return int(count)


def test_ablation_that_lacks_a_variant_has_it_measured_after_the_choice(
    trials: Trials, spec: Spec
) -> None:
    rows = with_answer(trials)
    found = findings(trials, rows).found("unverified", has_time=True)

    *same, measured = found.rows
    assert same == rows
    assert (measured.engine, measured.precision) == ("openvino", "fp32")
    assert measured.quality is not None
    assert measured.serving is not None
    [ablation] = found.ablations
    assert (ablation.technique, ablation.without_id) == ("quantization", measured.id)
    assert rows[1].size_bytes is not None
    assert measured.size_bytes is not None
    assert ablation.size_bytes == rows[1].size_bytes - measured.size_bytes
    assert found.relaxations == ()
    # It is no trial, and isn't measured twice.
    assert trials.rows == [rows[0], replace(rows[1], status=trials.rows[1].status)]
    before = n_measurements(spec.source)
    again = findings(trials, rows).found("unverified", has_time=True)
    assert n_measurements(spec.source) == before
    assert again.rows == found.rows


def test_nothing_is_measured_when_the_budget_is_spent(trials: Trials, spec: Spec) -> None:
    rows = with_answer(trials)
    before = n_measurements(spec.source)
    found = findings(trials, rows).found("unverified", has_time=False)
    assert n_measurements(spec.source) == before
    assert (found.rows, found.ablations) == (rows, ())
    assert found.layers


def test_layers_are_those_of_the_base_and_the_answer(trials: Trials) -> None:
    found = findings(trials, with_answer(trials)).found("unverified", has_time=False)
    assert [(layer.operator, layer.base_shape) for layer in found.layers] == [
        ("Conv", (16, 1, 3, 3)), ("Conv", (16, 16, 3, 3)), ("Gemm", (4, 16)),
    ]  # fmt: skip
    assert all(layer.shape == layer.base_shape for layer in found.layers)
    assert {layer.base_precision for layer in found.layers} == {"fp32"}
    assert "int8" in {layer.precision for layer in found.layers}
    assert any(layer.base_s for layer in found.layers)


def test_relaxations_say_what_giving_way_buys_when_nothing_is_feasible(
    trials: Trials, spec: Spec
) -> None:
    assert spec.slo.accuracy is not None
    strict = replace(spec, constraints=spec.constraints.model_copy(update={"size_bytes": 1}))
    rows = [too_large(row, 1.0) for row in trials.rows]
    given = replace(findings(trials, rows), spec=strict)

    found = given.found("infeasible", has_time=True)

    [step] = found.relaxations
    smallest = min(rows, key=lambda row: row.size_bytes or 0)
    assert (step.constraint, step.variant_id, step.from_limit) == ("size", smallest.id, 1.0)
    assert step.to_limit >= (smallest.size_bytes or 0)
    assert (found.rows, found.ablations, found.layers) == (rows, (), ())
    # Where the study came to no conclusion nothing is promised.
    assert given.found("inconclusive", has_time=True).relaxations == ()


def too_large(row: Variant, limit: float) -> Variant:
    assert row.size_bytes is not None
    reason = Reason("size", float(row.size_bytes), limit, "bytes", "measured")
    return replace(row, status="infeasible", reasons=(reason,))
