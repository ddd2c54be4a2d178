import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from loadtest.capacity import Capacity, Ending
from loadtest.capacity_html import latency_curve, render_capacity
from loadtest.capacity_report import CapacityReport, make_capacity_report
from loadtest.capacity_run import OPERATE_AT, CapacityResult, Measured, at_rate, point_of
from loadtest.document import parse_document
from loadtest.session import Settings
from loadtest.slo import Slo
from loadtest.target import Target
from loadtest.verdict import Outcome

SLO = parse_document(
    "{apiVersion: trimserve/v1, kind: SLO, name: s, latency: {threshold_ms: 50},"
    " workload: {rate_per_s: 100}, success_ratio: 0.999}",
    Slo,
    "here",
)
SETTINGS = Settings(slo=SLO, model="m", targets=(Target("rest", "127.0.0.1", 8000),), seed=7)
GOOD = Measured(
    rate_per_s=100.0,
    p50_s=0.01,
    p95_s=0.02,
    p99_s=0.03,
    mean_s=0.012,
    in_flight=1.1,
    request_bytes=256.0,
    goodput_per_s=100.0,
    good_share=1.0,
    success_ratio=1.0,
    batch_rows=2.0,
    outcome="met",
    reasons=(),
    usable=True,
    effective_n=1000.0,
)
OVERLOADED = replace(
    GOOD, rate_per_s=200.0, p99_s=math.inf, good_share=0.5, outcome="violated", batch_rows=None
)


def report_of(
    ending: Ending, found: float | None, confirmed: Outcome | None = None
) -> CapacityReport:
    measured = (GOOD, OVERLOADED)
    points = tuple(point_of(SLO, one) for one in measured)
    confirmation = None if confirmed is None else replace(GOOD, outcome=confirmed)
    operation = None if found is None else replace(GOOD, rate_per_s=OPERATE_AT * found)
    capacity = Capacity(ending, found, points)
    result = CapacityResult(SETTINGS, capacity, measured, confirmation, operation)
    return make_capacity_report(result, datetime(2026, 1, 2, tzinfo=UTC))


@pytest.mark.parametrize(
    ("ending", "found", "confirmed", "verdict", "code"),
    [
        pytest.param("found", 150.0, "met", "met", 0, id="more than wanted"),
        pytest.param("found", 150.0, "inconclusive", "met", 0, id="the confirmation was short"),
        pytest.param("found", 90.0, "met", "violated", 1, id="less than wanted"),
        pytest.param("found", 150.0, "violated", "inconclusive", 3, id="not confirmed"),
        pytest.param("unusable", None, None, "inconclusive", 3, id="the generator's limit"),
        pytest.param("not_bracketed", None, None, "inconclusive", 3, id="no crossing"),
    ],
)
def test_capacity_verdict_compares_with_the_slos_rate_when_found(
    ending: Ending, found: float | None, confirmed: Outcome | None, verdict: str, code: int
) -> None:
    report = report_of(ending, found, confirmed)
    assert (report.verdict, report.exit_code) == (verdict, code)
    text = report.model_dump_json(by_alias=True)
    assert CapacityReport.model_validate_json(text) == report
    if found is not None:
        assert report.operation is not None
        assert report.operation.rate_per_s == pytest.approx(0.8 * found)


def test_capacity_page_draws_every_rate_when_some_had_no_answer() -> None:
    report = report_of("found", 150.0, "met")
    p99 = latency_curve(report)["data"][2]
    assert (p99["x"], p99["y"]) == ([100, 200], [30, None])
    page = render_capacity(report)
    assert "150 requests/s" in page
    assert "Batch size by rate" in page
    assert "<script src" not in page


def test_point_counts_failures_by_their_own_budget_when_they_use_more_of_it() -> None:
    # 0.5 % failed, of 0.1 % allowed: five times the budget, as 5 % too slow of 1 % would be.
    failing = replace(GOOD, good_share=0.995, success_ratio=0.995)
    assert point_of(SLO, failing).bad_share == pytest.approx(0.05)
    assert point_of(SLO, GOOD).bad_share == 0
    slow = replace(GOOD, good_share=0.98)
    assert point_of(SLO, slow).bad_share == pytest.approx(0.02)


def test_search_tests_another_rate_with_arrivals_of_its_own() -> None:
    other = at_rate(SETTINGS, 250.0, 3)
    assert (other.slo.workload.rate_per_s, other.seed) == (250, 10)
    assert SETTINGS.slo.workload.rate_per_s == 100
