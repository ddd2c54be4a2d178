"""Clients that wait for their answers: marked as such, and never a verdict of met."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.cli import main
from loadtest.html import render_html
from loadtest.reasons import LatencyMissed, LoopClosed, ServerRestarted, SuccessRatioMissed
from loadtest.report import from_json
from loadtest.samples import HTTP_OK, Samples
from loadtest.server_metrics import Count, Scrapes, Snapshot
from loadtest.slo import Slo
from loadtest.verdict import Evidence, ServerEvidence, judge

SLO_TEXT = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.9, threshold_ms: 100}
workload: {rate_per_s: 150, rows: 2}
success_ratio: 0.99
"""


def evidence(n: int, latency_s: float, status: int = HTTP_OK) -> Evidence:
    """A closed loop of 4 clients for 10 s; the promise is 100 requests/s, 99 % within 50 ms."""
    sent_s = np.arange(n) * (10.0 / n)
    samples = Samples(
        intended_s=sent_s,
        sent_s=sent_s,
        done_s=sent_s + latency_s,
        target=np.zeros(n, np.int32),
        status=np.full(n, status, np.int32),
    )
    slo = Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "s",
            "latency": {"threshold_ms": 50},
            "workload": {"rate_per_s": 100},
        }
    )
    return Evidence(slo, samples, 10.0, ("rest",), 4, 0.1, None, closed_loop=4)


def test_closed_loop_is_inconclusive_when_every_request_is_good() -> None:
    judged = judge(evidence(5000, 0.008))
    assert judged.outcome == "inconclusive"
    assert [type(one) for one in judged.reasons] == [LoopClosed]
    assert judge(replace(evidence(5000, 0.008), closed_loop=None)).outcome == "met"


def test_closed_loop_is_violated_when_it_is_too_slow_at_less_than_the_rate() -> None:
    judged = judge(evidence(400, 0.1))
    assert judged.outcome == "violated"
    assert [type(one) for one in judged.reasons] == [LoopClosed, LatencyMissed]


def test_closed_loop_is_violated_when_requests_fail_at_less_than_the_rate() -> None:
    judged = judge(evidence(400, 0.01, status=503))
    assert judged.outcome == "violated"
    assert SuccessRatioMissed in [type(one) for one in judged.reasons]


def test_closed_loop_is_inconclusive_when_it_misses_at_more_than_the_promised_rate() -> None:
    assert judge(evidence(2000, 0.1)).outcome == "inconclusive"


def test_closed_loop_is_inconclusive_when_there_is_another_doubt() -> None:
    restarted = Scrapes(
        "http://m", Snapshot(1, {"rest": Count()}, (), True), Snapshot(2, {}, (), True)
    )
    judged = judge(replace(evidence(400, 0.1), server=ServerEvidence((restarted,))))
    assert judged.outcome == "inconclusive"
    assert ServerRestarted in [type(one) for one in judged.reasons]


@pytest.mark.alone
def test_loadtest_sends_one_after_the_other_when_the_loop_has_one_client(
    start_stub: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slo, file = tmp_path / "slo.yaml", tmp_path / "report.json"
    slo.write_text(SLO_TEXT, "utf-8")
    stub = start_stub("--edge-s", "0.1", "--latency-s", "0.02")
    code = main(
        [
            *(str(slo), "--model", "stub", "--target", stub.grpc_url, "--json", str(file)),
            *("--metrics-url", stub.metrics_url, "--warmup-s", "0.3", "--duration-s", "2"),
            *("--closed-loop", "1"),
        ]
    )
    report = from_json(file.read_text("utf-8"))
    assert code == 3
    assert report.run.closed_loop == 1
    assert "loop_closed" in [one.reason.kind for one in report.reasons]
    assert "counts_disagree" not in [one.reason.kind for one in report.reasons]
    assert 0 < report.requests.n <= 101
    assert report.requests.n_ok == report.requests.n
    assert report.server is not None
    assert report.server.transports[0].server_n == report.requests.n
    assert "closed loop of 1 clients" in capsys.readouterr().out
    assert "A closed loop" in render_html(report)


def test_closed_loop_is_a_usage_error_when_it_comes_with_arrivals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slo, profile = tmp_path / "slo.yaml", tmp_path / "profile.yaml"
    slo.write_text(SLO_TEXT, "utf-8")
    profile.write_text(
        "{apiVersion: trimserve/v1, kind: LoadProfile, arrivals: {process: gamma, cv: 2}}", "utf-8"
    )
    good = [str(slo), "--model", "m", "--target", "http://127.0.0.1:1", "--closed-loop", "4"]
    for extra in (["--profile", str(profile)], ["--max-in-flight", "5"], ["--find-capacity"]):
        assert main([*good, *extra]) == 2
        assert f"--closed-loop: got it with {extra[0]}" in capsys.readouterr().err
