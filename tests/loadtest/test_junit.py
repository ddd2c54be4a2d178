from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from loadtest.junit import to_junit
from loadtest.report import Report
from loadtest.samples import Samples
from loadtest.verdict import Evidence, judge
from tests.loadtest.test_loadtest_report import SLO, make_result, report_of


def report_with(status: dict[int, int], latency_s: float = 0.01) -> Report:
    """A report on 2,000 requests, all of them sent; `status` is of those that aren't 200."""
    result = make_result()
    before = result.played.samples
    statuses = np.full(len(before), 200, np.int32)
    statuses[list(status)] = list(status.values())
    samples = Samples(
        before.intended_s,
        before.intended_s,
        before.intended_s + latency_s,
        before.target,
        statuses,
    )
    judgement = judge(Evidence(SLO, samples, 20, ("rest",), 64, 0.1, None))
    played = replace(result.played, samples=samples)
    return report_of(replace(result, played=played, judgement=judgement))


@pytest.mark.parametrize(
    ("status", "latency_s", "verdict", "outcomes"),
    [
        pytest.param({}, 0.01, "met", {}, id="met"),
        pytest.param({}, 0.2, "violated", {"latency": "failure"}, id="too slow"),
        pytest.param(
            dict.fromkeys(range(10), 503), 0.01, "violated", {"success_ratio": "failure"},
            id="some failed",
        ),
        pytest.param(
            {5: 400}, 0.01, "inconclusive", {"latency": "error", "success_ratio": "error"},
            id="a refused request",
        ),
    ],
)  # fmt: skip
def test_junit_has_a_failure_or_an_error_when_an_objective_is_not_met(
    status: dict[int, int], latency_s: float, verdict: str, outcomes: dict[str, str]
) -> None:
    report = report_with(status, latency_s)
    assert report.verdict == verdict
    suite = ElementTree.fromstring(to_junit(report))
    found = {
        case.get("name"): child.tag
        for case in suite
        for child in case
        if child.tag in ("failure", "error")
    }
    assert found == outcomes
    n_failures = sum(tag == "failure" for tag in outcomes.values())
    assert suite.get("failures") == str(n_failures)
    assert suite.get("errors") == str(len(outcomes) - n_failures)
    assert [case.get("name") for case in suite] == ["latency", "success_ratio"]
