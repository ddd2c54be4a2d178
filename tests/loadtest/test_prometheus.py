"""A Prometheus of canned answers: what a run asks of it, and what it makes of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from loadtest.cli import main
from loadtest.prometheus import (
    Prometheus,
    PrometheusUnusable,
    ScrapeTarget,
    duration_s,
    find_target,
    same_place,
)
from loadtest.prometheus_observer import PrometheusObserver
from loadtest.reasons import CountsDisagree, ScrapesMissing, ServerRestarted
from loadtest.samples import Samples
from loadtest.server_metrics import Count, Sample, counted
from loadtest.verdict import ServerEvidence, judge
from tests.loadtest.test_verdict import GOOD, make_samples

URL = "http://10.0.0.1:8002/metrics"
ANSWER: dict[str, Any] = {
    "scrapeUrl": URL,
    "labels": {"job": "serve", "instance": "10.0.0.1:8002"},
    "scrapeInterval": "1m30s",
    "health": "up",
    "lastError": "",
}


# --- the API


@contextmanager
def canned(answer: Callable[[str, str], tuple[int, Any]]) -> Iterator[str]:
    """An HTTP server that answers (path, query) with (status, JSON)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query).get("query", [""])[0]
            status, content = answer(parts.path, query)
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def good(data: Any) -> tuple[int, Any]:
    return 200, {"status": "success", "data": data}


def test_targets_are_read_when_prometheus_is_served_under_a_path() -> None:
    def answer(path: str, query: str) -> tuple[int, Any]:
        assert path == "/prom/api/v1/targets"
        return good({"activeTargets": [ANSWER]})

    with canned(answer) as url:
        (target,) = Prometheus(f"{url}/prom/").targets()
    assert (target.url, target.interval_s, target.health) == (URL, 90.0, "up")
    assert target.selector == 'job="serve",instance="10.0.0.1:8002"'


def test_counters_are_those_of_one_scrape_when_the_target_has_a_label_of_the_same_name() -> None:
    asked = []

    def answer(path: str, query: str) -> tuple[int, Any]:
        asked.append(query)
        metric = {
            "__name__": "trimserve_batch_rows_count",
            "version": "v7-of-the-pod",
            "exported_version": "3",
        }
        return good({"resultType": "vector", "result": [{"metric": metric, "value": [12.5, "4"]}]})

    with canned(answer) as url:
        (sample,) = Prometheus(url).counters_at(target_of(), 12.5)
    assert (sample.name, sample.labels["version"], sample.value) == (
        "trimserve_batch_rows_count",
        "3",
        4.0,
    )
    assert asked[0].endswith('job="serve",instance="10.0.0.1:8002"} @ 12.500')


def test_values_leave_out_what_lies_before_when_the_range_is_longer() -> None:
    def answer(path: str, query: str) -> tuple[int, Any]:
        assert query.startswith("up{")
        assert "[11000ms] @ 20.000" in query
        return good({"result": [{"metric": {}, "values": [[9.5, "1"], [10, "1"], [20, "0"]]}]})

    with canned(answer) as url:
        assert Prometheus(url).scrapes(target_of(), 10, 20) == ((10.0, True), (20.0, False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param((200, "<html>"), "HTTP 200 without Prometheus's JSON", id="a web page"),
        pytest.param((404, "not found"), "HTTP 404 without Prometheus's JSON", id="another server"),
        pytest.param(
            (422, {"status": "error", "error": "too many samples"}),
            "too many samples",
            id="refused",
        ),
        pytest.param((200, []), "without Prometheus's JSON", id="a list"),
    ],
)
def test_prometheus_is_unusable_when_it_answers_otherwise(
    content: tuple[int, Any], message: str
) -> None:
    with (
        canned(lambda path, query: content) as url,
        pytest.raises(PrometheusUnusable, match=message),
    ):
        Prometheus(url).targets()


@pytest.mark.parametrize("url", ["prom:9090", "ftp://prom", "http://u@prom", "http://prom:x", ""])
def test_prometheus_is_unusable_when_its_url_is_none(url: str) -> None:
    with pytest.raises(PrometheusUnusable, match="want http://HOST:PORT"):
        Prometheus(url).targets()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://10.0.0.1:8002/metrics", "http://10.0.0.1:8002/metrics", True),
        ("http://10.0.0.1:8002/metrics", "http://10.0.0.1:8002", True),
        ("http://127.0.0.1:8002/metrics", "http://localhost:8002/metrics", True),
        ("http://10.0.0.1:8002/metrics", "http://10.0.0.2:8002/metrics", False),
        ("http://10.0.0.1:8002/metrics", "http://10.0.0.1:8003/metrics", False),
        ("http://10.0.0.1/metrics", "http://10.0.0.1:80/metrics", True),
        ("http://10.0.0.1:80/a", "http://10.0.0.1:80/b", False),
    ],
)
def test_same_place_compares_addresses_ports_and_paths(one: str, other: str, same: bool) -> None:
    assert same_place(one, other) is same


def test_durations_are_prometheuses() -> None:
    assert [duration_s(text) for text in ("15s", "1m30s", "500ms", "1h")] == [15, 90, 0.5, 3600]


def target_of(url: str = URL, health: str = "up") -> ScrapeTarget:
    return ScrapeTarget(url, ANSWER["labels"], 1.0, health, "")


# --- the observer


class Scraped(Prometheus):
    """A Prometheus that scrapes once each time it is asked for the last scrape.

    `series` is what the server has at a moment, None while it doesn't answer.
    """

    def __init__(
        self,
        series: Callable[[float], list[Sample] | None] = lambda time_s: [],
        left_out: frozenset[float] = frozenset(),
        health: tuple[str, ...] = ("up",),
    ) -> None:
        super().__init__("http://prom")
        self.series, self.left_out, self.health = series, left_out, health
        self.now_s = 100.0
        self.seen: dict[float, list[Sample] | None] = {}

    def targets(self) -> tuple[ScrapeTarget, ...]:
        return tuple(target_of(health=one) for one in self.health)

    def last_scrape_s(self, target: ScrapeTarget) -> float | None:
        self.now_s += 1
        if self.now_s not in self.left_out:
            self.seen[self.now_s] = self.series(self.now_s)
        return max(self.seen, default=None)

    def counters_at(self, target: ScrapeTarget, at_s: float) -> list[Sample]:
        return self.seen[at_s] or []

    def scrapes(
        self, target: ScrapeTarget, from_s: float, to_s: float
    ) -> tuple[tuple[float, bool], ...]:
        return tuple((at, one is not None) for at, one in self.seen.items() if from_s <= at <= to_s)

    def values(
        self, target: ScrapeTarget, metric: str, from_s: float, to_s: float
    ) -> list[tuple[float, float]]:
        return []

    def n_resets(self, target: ScrapeTarget, from_s: float, to_s: float) -> int:
        numbers = [counted_in(one) for at, one in self.seen.items() if one and from_s <= at <= to_s]
        return sum(later < one for one, later in pairwise(numbers))


def histogram(n: int, n_over: int = 0, started_s: float = 1.0) -> list[Sample]:
    labels = {"model": "m", "version": "1", "transport": "rest", "code": "ok"}
    name = "trimserve_request_duration_seconds_bucket"
    return [
        Sample(name, {**labels, "le": "0.05"}, n - n_over),
        Sample(name, {**labels, "le": "+Inf"}, n),
        Sample("process_start_time_seconds", {}, started_s),
    ]


def counted_in(samples: list[Sample]) -> float:
    return max((one.value for one in samples if one.labels.get("le") == "+Inf"), default=0.0)


def observe(prometheus: Scraped, samples: Samples, while_s: int = 10) -> ServerEvidence:
    """A window of so many scrapes."""
    clock = iter(range(10_000))
    observer = PrometheusObserver(
        prometheus, [URL], "m", "", 0.05, clock=lambda: next(clock), sleep=lambda _: None
    )
    observer.before()
    for _ in range(while_s):
        prometheus.last_scrape_s(target_of())
    return observer.evidence(samples)


def growing(time_s: float) -> list[Sample]:
    """10 requests before, and 3,000 from 104 s to 110 s."""
    return histogram(10 + int(np.clip((time_s - 104) / 6, 0, 1) * 3000))


def test_counts_are_exact_differences_when_all_of_the_window_was_scraped() -> None:
    server = observe(Scraped(series=growing), make_samples())
    assert counted(server.scrapes) == {"rest": Count(3000, 3000, 0)}
    (coverage,) = server.coverage
    assert coverage.complete
    assert coverage.from_s < 105
    assert coverage.to_s > 110
    assert judge(replace(GOOD, server=server)).outcome == "met"


def test_counts_start_from_zero_when_a_scrape_saw_no_series() -> None:
    def late(time_s: float) -> list[Sample]:
        started = [Sample("process_start_time_seconds", {}, 1.0)]
        return started if time_s < 106 else histogram(3000)

    server = observe(Scraped(series=late), make_samples())
    assert counted(server.scrapes) == {"rest": Count(3000, 3000, 0)}


def test_window_begins_after_the_counters_have_settled() -> None:
    """The first scrape to come in saw half of the warm-up."""

    def warming(time_s: float) -> list[Sample]:
        return histogram(5 if time_s <= 102 else 10 if time_s <= 105 else 3010)

    server = observe(Scraped(series=warming), make_samples())
    assert counted(server.scrapes) == {"rest": Count(3000, 3000, 0)}


def test_verdict_is_inconclusive_with_the_difference_when_the_counts_differ() -> None:
    server = observe(Scraped(series=lambda at: histogram(10 if at < 106 else 2910)), make_samples())
    judgement = judge(replace(GOOD, server=server))
    assert judgement.outcome == "inconclusive"
    reason = judgement.reasons[0]
    assert isinstance(reason, CountsDisagree)
    assert (reason.client_least, reason.server) == (3000, 2900)


@pytest.mark.parametrize(
    ("prometheus", "n_failed"),
    [
        pytest.param(Scraped(series=growing, left_out=frozenset({108.0})), 0, id="one is missing"),
        pytest.param(
            Scraped(series=lambda at: None if at == 108 else growing(at)), 1, id="one failed"
        ),
    ],
)
def test_verdict_is_inconclusive_when_a_scrape_is_missing(
    prometheus: Scraped, n_failed: int
) -> None:
    judgement = judge(replace(GOOD, server=observe(prometheus, make_samples())))
    assert judgement.outcome == "inconclusive"
    (reason,) = judgement.reasons
    assert isinstance(reason, ScrapesMissing)
    assert reason.n_failed == n_failed
    assert reason.longest_gap_s == (1 if n_failed else 2)


@pytest.mark.parametrize(
    "series",
    [
        pytest.param(lambda at: histogram(10 if at < 106 else 3010, 0, at // 108), id="start time"),
        pytest.param(
            lambda at: histogram(10 if at < 106 else 0 if at < 108 else 3010), id="a counter fell"
        ),
    ],
)
def test_verdict_is_inconclusive_when_the_server_restarted(
    series: Callable[[float], list[Sample]],
) -> None:
    judgement = judge(replace(GOOD, server=observe(Scraped(series=series), make_samples())))
    assert judgement.outcome == "inconclusive"
    assert [type(one) for one in judgement.reasons] == [ServerRestarted]


def test_evidence_is_an_error_when_no_scrape_comes_in() -> None:
    server = observe(Scraped(series=lambda at: None), make_samples())
    assert "had no successful scrape of" in server.error


# --- refused before the first request


SLO = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.9, threshold_ms: 100}
workload: {rate_per_s: 150, rows: 2}
window_s: 3
"""


def test_loadtest_is_a_usage_error_when_prometheus_cannot_confirm(
    start_stub: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = start_stub()
    slo = tmp_path / "slo.yaml"
    slo.write_text(SLO, "utf-8")
    common = [str(slo), "--target", stub.rest_url, "--model", "stub"]
    common += ["--metrics-url", stub.metrics_url]

    def error_of(*arguments: str) -> str:
        assert main([*common, *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "can't be reached" in error_of("--prometheus", "http://127.0.0.1:1")
    assert "--no-server-metrics" in error_of("--prometheus", "http://x", "--no-server-metrics")
    with canned(lambda path, query: good({"activeTargets": [ANSWER]})) as url:
        error = error_of("--prometheus", url)
        assert f"doesn't scrape {stub.metrics_url} (it scrapes {URL})" in error
        assert "scrape_configs" in error
    down = {**ANSWER, "scrapeUrl": stub.metrics_url, "health": "down", "lastError": "refused"}
    with canned(lambda path, query: good({"activeTargets": [down]})) as url:
        assert "no successful last scrape" in error_of("--prometheus", url)


def test_target_is_the_one_that_is_up_when_two_jobs_scrape_it() -> None:
    assert find_target(Scraped(health=("down", "up")), URL).health == "up"
