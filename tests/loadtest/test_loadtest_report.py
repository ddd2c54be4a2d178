from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from loadtest.arrivals import draw_arrivals
from loadtest.document import parse_document
from loadtest.driver import Played, Warmed
from loadtest.html import render_html, script_json
from loadtest.plan import Payload, Plan
from loadtest.report import Report, from_json, make_report, to_json, write_atomically
from loadtest.samples import DROPPED, Samples, load_samples, save_samples
from loadtest.session import Result, Settings
from loadtest.slo import Slo
from loadtest.target import Target
from loadtest.verdict import Evidence, judge

SLO = parse_document(
    "{apiVersion: trimserve/v1, kind: SLO, name: s, latency: {threshold_ms: 50},"
    " workload: {rate_per_s: 100}, window_s: 20}",
    Slo,
    "here",
)


def make_result(model: str = "m", error: str = "") -> Result:
    rng = np.random.default_rng(1)
    window = draw_arrivals("poisson", 100, 20, 1, 1, rng)
    n = len(window)
    status = np.full(n, 200, np.int32)
    status[7], status[9] = 503, DROPPED
    sent_s = np.where(status == DROPPED, np.nan, window.intended_s + 1e-4)
    samples = Samples(
        intended_s=window.intended_s,
        sent_s=sent_s,
        done_s=sent_s + rng.exponential(0.005, n),
        target=window.target,
        status=status,
    )
    settings = Settings(slo=SLO, model=model, targets=(Target("rest", "127.0.0.1", 8000),))
    plan = Plan(
        model=model,
        version="",
        targets=settings.targets,
        payloads={"rest": (Payload(b"{}"),)},
        warmup=window,
        window=window,
        timeout_s=5,
        max_in_flight=64,
    )
    evidence = Evidence(SLO, samples, 20, ("rest",), 64, 0.1, None)
    played = Played(samples, {503: error}, cpu_share=0.1, process_cores=0.1)
    return Result(settings, plan, played, Warmed(10, 0), None, judge(evidence))


def report_of(result: Result) -> Report:
    return make_report(result, datetime(2026, 1, 2, tzinfo=UTC))


def test_report_is_the_same_when_read_from_its_json() -> None:
    report = report_of(make_result())
    assert from_json(to_json(report)) == report


def test_report_counts_every_planned_request_when_some_are_bad() -> None:
    report = report_of(make_result())
    assert report.requests.n == 2000
    assert report.requests.n_sent == 1999
    assert report.requests.n_ok == 1998
    assert sum(one.n for one in report.requests.statuses) == 2000
    per_bin = sum(one.good_per_s + one.bad_per_s for one in report.timeline) * report.bin_s
    assert per_bin == pytest.approx(2000)
    assert report.curve[-1].quantile == 1
    assert report.curve[-1].latency_s is None
    assert (report.verdict, report.exit_code) == ("inconclusive", 3)


def test_report_curve_never_falls_when_followed() -> None:
    values = [one.latency_s for one in report_of(make_result()).curve if one.latency_s is not None]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"LoadTestReport"', '"SLO"'), ("trimserve/v1", "trimserve/v2"), ('"bin_s"', '"bins"')],
)
def test_report_is_refused_when_it_is_of_another_version(old: str, new: str) -> None:
    text = to_json(report_of(make_result()))
    with pytest.raises(ValidationError):
        from_json(text.replace(old, new))


def test_html_escapes_what_servers_and_users_say() -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    page = render_html(report_of(make_result(model=hostile, error=hostile)))
    assert hostile not in page
    assert "&lt;img src=x" in page


def test_script_json_cannot_close_its_element_when_it_holds_markup() -> None:
    assert script_json({"a": "</script>&"}) == '{"a": "\\u003c/script\\u003e\\u0026"}'


def test_html_is_drawn_when_no_request_was_answered() -> None:
    result = make_result()
    samples = result.played.samples
    silent = replace(samples, status=np.full(len(samples), 503, np.int32))
    evidence = Evidence(SLO, silent, 20, ("rest",), 64, 0.1, None)
    result = replace(
        result, played=replace(result.played, samples=silent), judgement=judge(evidence)
    )
    report = report_of(result)
    assert report.verdict == "violated"
    assert "no answer" in render_html(report)


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udc80")
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_samples_are_the_same_when_read_from_their_file(tmp_path: Path) -> None:
    samples = make_result().played.samples
    save_samples(samples, tmp_path / "samples.npz")
    again = load_samples(tmp_path / "samples.npz")
    np.testing.assert_array_equal(again.done_s, samples.done_s)
    np.testing.assert_array_equal(again.status, samples.status)
