from pathlib import Path

import numpy as np
import pytest

from loadtest.cli import main
from loadtest.comparison import share_difference_bounds
from loadtest.report import Report, to_json
from tests.loadtest.test_junit import report_with


def write(folder: Path, name: str, report: Report) -> str:
    path = folder / name
    path.write_text(to_json(report), "utf-8")
    return str(path)


def test_difference_bounds_are_those_of_newcombe_when_independent() -> None:
    """Newcombe (1998), table II, row (a): 56/70 and 48/80 give 0.0524 to 0.3339 by method 10."""
    low, high = share_difference_bounds((48, 80, 1.0), (56, 70, 1.0))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_difference_bounds_hold_in_most_runs_when_simulated() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for before, after in zip(
        rng.binomial(3000, 0.99, 400), rng.binomial(3000, 0.98, 400), strict=True
    ):
        low, high = share_difference_bounds((int(before), 3000, 1.0), (int(after), 3000, 1.0))
        held += low <= -0.01 <= high
    assert 0.92 < held / 400 < 0.98


def test_difference_bounds_are_wider_when_requests_hang_together() -> None:
    alone = share_difference_bounds((2980, 3000, 1.0), (2900, 3000, 1.0))
    together = share_difference_bounds((2980, 3000, 30.0), (2900, 3000, 30.0))
    assert together[0] < alone[0] < alone[1] < together[1]


def test_compare_says_which_run_is_worse_when_their_shares_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path, "good.json", report_with({}))
    bad = write(tmp_path, "bad.json", report_with(dict.fromkeys(range(0, 2000, 20), 503)))
    for arguments, code, said in (
        ([good, bad], 1, "worse: -5 points"),
        ([bad, good], 0, "better: +5 points"),
        ([good, good], 0, "no difference shown"),
    ):
        assert main(["compare", *arguments]) == code
        assert said in capsys.readouterr().out


def test_compare_is_a_usage_error_when_reports_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_with({})
    good = write(tmp_path, "good.json", report)
    workload = report.slo.workload.model_copy(update={"rate_per_s": 50.0})
    slo = report.slo.model_copy(update={"workload": workload})
    other = write(tmp_path, "other.json", report.model_copy(update={"slo": slo}))
    empty = tmp_path / "empty.json"
    empty.write_text("{}", "utf-8")
    for arguments, said in (
        ([good, other], "workload: got"),
        ([good, str(empty)], "no load test's report"),
        ([good, str(tmp_path / "absent.json")], "can't be read"),
    ):
        assert main(["compare", *arguments]) == 2
        assert said in capsys.readouterr().err
